"""Halves of the seeds: scales, splits, and the ceilings that they give."""

import numpy as np
import pytest

from bayesinf.evaluation._reliability import (
    ceiling,
    halves,
    pearson_to_spearman,
    spearman_brown,
    spearman_to_pearson,
    split_half,
)
from bayesinf.evaluation._statistics import Correlation


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def test_scales() -> None:
    """The values of the exact Gaussian relation, and Spearman-Brown against its definition."""
    assert pearson_to_spearman(np.array(1.0)) == pytest.approx(1.0)
    assert pearson_to_spearman(np.array(0.5)) == pytest.approx(0.4825838, abs=1e-6)
    grid = np.linspace(-1, 1, 9)
    np.testing.assert_allclose(spearman_to_pearson(pearson_to_spearman(grid)), grid, atol=1e-14)
    signal, noise, runs = 0.7, 1.9, 5
    one, mean_of_runs = signal / (signal + noise), signal / (signal + noise / runs)
    assert spearman_brown(np.array(one), runs) == pytest.approx(mean_of_runs)
    assert ceiling(np.array(one), runs, "pearson") == pytest.approx(mean_of_runs**0.5)
    assert ceiling(np.array(-0.3), runs, "spearman") == 0


def test_splits_are_all_there_are_or_some() -> None:
    assert halves(3, 1, 200, 0) == [((0,), (1,)), ((0,), (2,)), ((1,), (2,))]
    assert len(halves(5, 2, 200, 0)) == 15
    assert len(halves(10, 5, 200, 0)) == 126
    some = halves(50, 25, 200, 0)
    assert len(some) == 200
    assert all(sorted({*a, *b}) == list(range(50)) for a, b in some)


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
@pytest.mark.parametrize(
    ("signal", "runs", "known"),
    [(0.3, 5, 0.75), (0.3, 10, 0.85), (1, 2, 0.803), (1, 5, 0.90), (1, 10, 0.95), (3, 5, 0.96)],
)
def test_ceiling_against_known_values(
    generator: np.random.Generator, signal: float, runs: int, known: float, kind: Correlation
) -> None:
    """Known: the Spearman correlation with the true effect, (6/π) asin(√(sR/(sR+1))/2).

    The mean over 300 queries has a standard error of at most 0.0035 (seen), a bias of at most 0.01
    and the table is rounded to 0.005: 0.03 is more than 4 standard errors on top.
    """
    if kind == "pearson":
        known = (signal * runs / (signal * runs + 1)) ** 0.5
    effect = np.sqrt(signal) * generator.standard_normal((100, 1, 300))
    found = split_half(effect + generator.standard_normal((100, runs, 300)), kind)
    assert found.ceilings(runs).shape == (300,)
    assert abs(found.ceilings(runs).mean() - known) < 0.03
    mean, error, lower, upper = found.ceiling_estimate(runs, random_queries=True, confidence=0.95)
    assert abs(mean - known) < 0.02
    assert 0 < error < 0.01
    assert lower < mean < upper


def test_two_points_stand_for_queries_that_differ(generator: np.random.Generator) -> None:
    """Signals from 0.05 to 3: the mean of the ceilings, not the ceiling of the mean.

    Over 2,000 queries the noise of the estimate is below 0.004, and what is left is the two-point
    rule's own error, 0.003 for such a spread; the ceiling of the mean is 0.014 off.
    """
    signal = generator.uniform(0.05, 3, 2000)
    truth = np.sqrt(signal) * generator.standard_normal((60, 1, 2000))
    found = split_half(truth + generator.standard_normal((60, 4, 2000)), "pearson")
    known = np.sqrt(4 * signal / (4 * signal + 1)).mean()
    mean, *_ = found.ceiling_estimate(4, random_queries=True, confidence=0.95)
    assert abs(mean - known) < 0.007
    assert ceiling(found.values.mean(), 2, "pearson") - known > 0.010


def test_ceiling_is_one_without_noise_and_zero_for_opposite_halves() -> None:
    outcome = np.random.default_rng(1).standard_normal((20, 1, 3))
    same = split_half(outcome.repeat(4, axis=1), "spearman")
    np.testing.assert_allclose(same.ceilings(4), 1.0)
    opposite = split_half(np.concatenate([outcome, -outcome], axis=1), "spearman")
    np.testing.assert_allclose(opposite.ceilings(2), 0.0)
    estimate = opposite.ceiling_estimate(2, random_queries=True, confidence=0.95)
    np.testing.assert_allclose(estimate, 0.0)


def test_ceiling_by_random_splits_agrees_with_all_splits(generator: np.random.Generator) -> None:
    outcomes = generator.standard_normal((60, 1, 40)) + generator.standard_normal((60, 8, 40))
    every = split_half(outcomes, "spearman", splits=35).values.mean()
    some = split_half(outcomes, "spearman", splits=30).values.mean()
    assert some != every
    assert abs(some - every) < 0.02
