"""Correlations, their jackknife, and the interval of their mean."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from bayesinf.evaluation._statistics import (
    Correlation,
    correlations,
    delete_one,
    mean_estimate,
    standardised,
)


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(("kind", "peer"), [("spearman", spearmanr), ("pearson", pearsonr)])
@pytest.mark.parametrize("levels", [None, 4])
def test_correlations_and_their_jackknife_equal_scipy(
    generator: np.random.Generator, levels: int | None, kind: Correlation, peer: Any
) -> None:
    a, b = generator.standard_normal((2, 15, 3))
    if levels:  # ties
        a, b = np.round(a), np.round(b)
    expected = [peer(a[:, q], b[:, q]).statistic for q in range(3)]
    np.testing.assert_allclose(correlations(a, b, kind), expected, atol=1e-14)
    products = standardised(a, kind).T @ standardised(b, kind)
    np.testing.assert_allclose(np.diag(products), expected, atol=1e-14)
    deleted = delete_one(a, b, kind)
    assert deleted.shape == (15, 3)
    for j in range(15):
        keep = np.arange(15) != j
        expected = [peer(a[keep, q], b[keep, q]).statistic for q in range(3)]
        np.testing.assert_allclose(deleted[j], expected, atol=1e-14)


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_a_constant_column_has_correlation_zero(
    generator: np.random.Generator, kind: Correlation
) -> None:
    a, b = generator.standard_normal((2, 9, 2))
    a[:, 1] = 3.0
    assert correlations(a, b, kind)[1] == 0
    assert (standardised(a, kind)[:, 1] == 0).all()
    assert (delete_one(a, b, kind)[:, 1] == 0).all()
    one_odd = np.eye(9)[:, :1]  # constant once its only odd subset is left out
    assert delete_one(one_odd, b[:, :1], kind)[0, 0] == 0


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
