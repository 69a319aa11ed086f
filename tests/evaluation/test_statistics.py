"""Rank correlations, their jackknife, the interval's coverage and the ceiling."""

import numpy as np
import pytest
from scipy.stats import binom, spearmanr

from bayesinf.evaluation._statistics import (
    delete_one_spearman,
    mean_estimate,
    pearson_to_spearman,
    spearman,
    spearman_brown,
    spearman_to_pearson,
    split_half_ceiling,
)


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("levels", [None, 4])
def test_spearman_and_its_jackknife_equal_scipy(
    generator: np.random.Generator, levels: int | None
) -> None:
    a, b = generator.standard_normal((2, 15, 3))
    if levels:  # ties
        a, b = np.round(a), np.round(b)
    expected = [spearmanr(a[:, q], b[:, q]).statistic for q in range(3)]
    np.testing.assert_allclose(spearman(a, b), expected, atol=1e-14)
    deleted = delete_one_spearman(a, b)
    assert deleted.shape == (15, 3)
    for j in range(15):
        keep = np.arange(15) != j
        expected = [spearmanr(a[keep, q], b[keep, q]).statistic for q in range(3)]
        np.testing.assert_allclose(deleted[j], expected, atol=1e-14)


def test_a_constant_column_has_correlation_zero(generator: np.random.Generator) -> None:
    a, b = generator.standard_normal((2, 9, 2))
    a[:, 1] = 3.0
    assert spearman(a, b)[1] == 0
    assert (delete_one_spearman(a, b)[:, 1] == 0).all()
    one_odd = np.eye(9)[:, :1]  # constant once its only odd subset is left out
    assert delete_one_spearman(one_odd, b[:, :1])[0, 0] == 0


def test_mean_estimate_of_plain_means_is_exact(generator: np.random.Generator) -> None:
    """The jackknife of a mean is its usual variance, and two-way ANOVA gives the query part."""
    m, q = 11, 7
    table = generator.standard_normal((m, q)) + generator.standard_normal((m, 1))
    table += 3 * generator.standard_normal(q)
    values = table.mean(axis=0)
    deleted = (m * values - table) / (m - 1)
    fixed = mean_estimate(values, deleted, random_queries=False, confidence=0.95)
    row_means = table.mean(axis=1)
    assert fixed.mean == pytest.approx(table.mean())
    assert fixed.standard_error == pytest.approx(row_means.std(ddof=1) / np.sqrt(m))
    assert fixed.query_error == 0
    random = mean_estimate(values, deleted, random_queries=True, confidence=0.95)
    residual = table - row_means[:, None] - values + table.mean()
    within = (residual**2).sum() / ((m - 1) * (q - 1))
    between = m * values.var(ddof=1)
    assert random.query_error**2 * q == pytest.approx((between - within) / m)
    total = random.subset_error**2 + random.query_error**2
    assert random.standard_error**2 == pytest.approx(total)
    wide = mean_estimate(values, deleted, random_queries=True, confidence=0.99)
    assert wide.upper - wide.mean > random.upper - random.mean > 1.96 * random.standard_error


def test_scales() -> None:
    """The values of the exact Gaussian relation, and Spearman-Brown against its definition."""
    assert pearson_to_spearman(np.array(1.0)) == pytest.approx(1.0)
    assert pearson_to_spearman(np.array(0.5)) == pytest.approx(0.4825838, abs=1e-6)
    grid = np.linspace(-1, 1, 9)
    np.testing.assert_allclose(spearman_to_pearson(pearson_to_spearman(grid)), grid, atol=1e-14)
    signal, noise, runs = 0.7, 1.9, 5
    one, mean_of_runs = signal / (signal + noise), signal / (signal + noise / runs)
    assert spearman_brown(np.array(one), runs) == pytest.approx(mean_of_runs)


@pytest.mark.parametrize(
    ("signal", "runs", "known"),
    [(0.3, 5, 0.75), (0.3, 10, 0.85), (1, 2, 0.803), (1, 5, 0.90), (1, 10, 0.95), (3, 5, 0.96)],
)
def test_ceiling_against_known_values(
    generator: np.random.Generator, signal: float, runs: int, known: float
) -> None:
    """Known: the Spearman correlation with the true effect, (6/π) asin(√(sR/(sR+1))/2).

    The mean over 300 queries has a standard error of at most 0.0035 (seen), a bias of at most 0.01
    and the table is rounded to 0.005: 0.03 is more than 4 standard errors on top.
    """
    effect = np.sqrt(signal) * generator.standard_normal((100, 1, 300))
    ceiling = split_half_ceiling(effect + generator.standard_normal((100, runs, 300)))
    assert ceiling.shape == (300,)
    assert abs(ceiling.mean() - known) < 0.03


def test_ceiling_is_one_without_noise_and_zero_for_opposite_halves() -> None:
    outcome = np.random.default_rng(1).standard_normal((20, 1, 3))
    np.testing.assert_allclose(split_half_ceiling(outcome.repeat(4, axis=1)), 1.0)
    opposite = np.concatenate([outcome, -outcome], axis=1)
    np.testing.assert_allclose(split_half_ceiling(opposite), 0.0)


def test_ceiling_by_random_splits_agrees_with_all_splits(generator: np.random.Generator) -> None:
    outcomes = generator.standard_normal((60, 1, 40)) + generator.standard_normal((60, 8, 40))
    every = split_half_ceiling(outcomes, splits=35).mean()
    some = split_half_ceiling(outcomes, splits=30).mean()
    assert some != every
    assert abs(some - every) < 0.02


def covered(queries: int, shared: float, seed: int, subsets: int = 100) -> tuple[bool, float]:
    """One simulated judgement: does the 95 % interval hold its target, and its half-width.

    A query's prediction and truth are Gaussian over subsets; the share ``shared`` of their variance
    is common to all queries (correlation 0.5 there), the rest is the query's own, with a
    correlation uniform in [0.3, 0.8]. The target is the exact expectation of the sample Spearman
    correlation at ``M`` subsets, (6/π)(asin r + (M−2) asin(r/2))/(M+1), over queries.
    """
    low, high, common = 0.3, 0.8, 0.5
    r = shared * common + (1 - shared) * np.linspace(low, high, 2001)
    expected = 6 / np.pi / (subsets + 1) * (np.arcsin(r) + (subsets - 2) * np.arcsin(r / 2))
    g = np.random.default_rng([queries, seed])
    truth_all, noise_all = g.standard_normal((2, subsets, 1))
    truth_own, noise_own = g.standard_normal((2, subsets, queries))
    own = g.uniform(low, high, queries)
    guess_all = common * truth_all + np.sqrt(1 - common**2) * noise_all
    guess_own = own * truth_own + np.sqrt(1 - own**2) * noise_own
    truth = np.sqrt(shared) * truth_all + np.sqrt(1 - shared) * truth_own
    guess = np.sqrt(shared) * guess_all + np.sqrt(1 - shared) * guess_own
    estimate = mean_estimate(
        spearman(guess, truth),
        delete_one_spearman(guess, truth),
        random_queries=True,
        confidence=0.95,
    )
    half_width = estimate.upper - estimate.mean
    return bool(estimate.lower < expected.mean() < estimate.upper), half_width


@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_interval_covers_reduced(shared: float) -> None:
    """150 judgements at 50 queries: false alarm 1e-4 for any true coverage in [0.93, 0.97]."""
    repeats = 150
    hits = sum(covered(50, shared, seed)[0] for seed in range(repeats))
    low, high = binom.ppf(5e-5, repeats, 0.93), binom.isf(5e-5, repeats, 0.97)
    assert low <= hits <= high


def test_half_shared_effects_widen_the_interval() -> None:
    """At 200 queries the interval is 3 times as wide when half the variance is shared."""
    independent = np.mean([covered(200, 0.0, seed)[1] for seed in range(4)])
    half = np.mean([covered(200, 0.5, seed)[1] for seed in range(4)])
    assert 2.4 < half / independent < 4.2


@pytest.mark.slow
@pytest.mark.parametrize("queries", [50, 200])
@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_interval_covers_in_full(queries: int, shared: float) -> None:
    """1,000 judgements: false alarm 1e-4 for any true coverage in [0.93, 0.97]."""
    repeats = 1000
    hits = sum(covered(queries, shared, seed)[0] for seed in range(repeats))
    low, high = binom.ppf(5e-5, repeats, 0.93), binom.isf(5e-5, repeats, 0.97)
    assert low <= hits <= high
