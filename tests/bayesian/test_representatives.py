"""Pivots of the covariance of log-likelihoods, values of cases, a bootstrap without refits."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

import bayesinf as bi
from bayesinf.bayesian import (
    approximate_bootstrap,
    case_summary,
    functional_variance,
    infinitesimal_jackknife,
    representative_cases,
    w_kernel,
)
from tests.bayesian.closed_forms import LinearRegression, regression


def test_pivots_are_those_of_the_factorisation_with_exchanges() -> None:
    """Against a factorisation of W itself, matrix by matrix; all pivots together are W."""
    tree = regression(n=9).tree(0)
    w = w_kernel(tree)["covariance"].values
    left, expected, share = w.copy(), [], []
    for _ in range(9):
        pivot = int(np.diag(left).argmax())
        left = left - np.outer(left[:, pivot], left[pivot]) / left[pivot, pivot]
        expected.append(pivot)
        share.append(np.trace(left) / np.trace(w))
    found = representative_cases(tree, 9)
    assert found["representative"].values.tolist() == expected
    np.testing.assert_allclose(found["remaining"], share, atol=1e-9)
    factor = found["factor"].values
    np.testing.assert_allclose(factor @ factor.T, w, atol=1e-9)
    few = representative_cases(tree, 3)
    np.testing.assert_array_equal(few["factor"], factor[:, :3])
    assert few.attrs["functional_variance"] == pytest.approx(np.trace(w))


def test_cases_that_say_the_same_are_taken_once() -> None:
    """Two observations, each five times: the rank is 2, and both are represented."""
    plain = regression(n=2, d=1)
    model = LinearRegression(np.repeat(plain.x, 5, axis=0), np.repeat(plain.y, 5))
    found = representative_cases(model.tree(0), 6)
    assert found.sizes["component"] == 2
    assert {i // 5 for i in found["representative"].values.tolist()} == {0, 1}
    assert found["remaining"].values[-1] == pytest.approx(0, abs=1e-9)


def test_values_are_functional_variances_and_find_wrong_labels() -> None:
    plain = regression(n=40, seed=3)
    y, wrong = plain.y.copy(), np.array([2, 11, 30])
    y[wrong] += np.where(plain.x[wrong, 2] > 0, -6, 6)
    tree = LinearRegression(plain.x, y).tree(0)
    values = functional_variance(tree)
    summary = case_summary(tree)
    np.testing.assert_array_equal(values["value"], summary["p_waic"])
    np.testing.assert_array_equal(values["mcse"], summary["p_waic_mcse"])
    table = bi.mislabel_detection({"variance": values}, wrong, baseline=None, resamples=50)
    assert float(table["auroc"].item()) > 0.97
    assert float(table["seconds"].item()) > 0


def test_bootstrap_predicts_refits() -> None:
    """Refits in closed form with the very weights; 20,000 draws."""
    model = regression(n=100)
    found = approximate_bootstrap(model.tree(0, draws=5000), resamples=60, seed=3)
    counts = np.random.default_rng(3).multinomial(100, np.full(100, 0.01), size=60)
    base = model.posterior()[0]
    exact = np.array([model.posterior(b.astype(float))[0] - base for b in counts]).T
    first, second = (
        np.sqrt(((found[name].values - exact) ** 2).mean(axis=1))
        for name in ("first_order", "second_order")
    )
    assert (first < 0.3 * exact.std(axis=1)).all()
    assert (second < 0.5 * first).all()


def test_second_order_is_the_sum_of_third_cumulants() -> None:
    """``½ Σ_ij η_i η_j κ₃(φ, log p_i, log p_j)``, pair by pair."""
    model = regression(n=5, d=1)
    tree = model.tree(0)
    found = approximate_bootstrap(tree, resamples=3)
    eta = np.random.default_rng(0).multinomial(5, np.full(5, 0.2), size=3) - 1
    x = tree["posterior"]["w"].values.reshape(-1)
    y = tree["log_likelihood"]["y"].values.reshape(-1, 5)
    x, y, s = x - x.mean(), y - y.mean(axis=0), len(x)
    cumulant = np.einsum("t,ti,tj->ij", x, y, y) * s / ((s - 1) * (s - 2))
    expected = np.einsum("ri,ij,rj->r", eta, cumulant, eta) / 2
    got = (found["second_order"] - found["first_order"]).values[0]
    np.testing.assert_allclose(got, expected, rtol=1e-8)
    np.testing.assert_allclose(found["first_order"][0], eta @ (x @ y) / (s - 1), rtol=1e-8)


def test_scatter_of_the_first_order_is_the_jackknifes_error() -> None:
    """2,000 resamples: a standard deviation has an error of about 1.6 %; 5 of these."""
    tree = regression(n=50).tree(0, draws=1000)
    found = approximate_bootstrap(tree, resamples=2000)
    expected = infinitesimal_jackknife(tree)["standard_error"]
    np.testing.assert_allclose(found["first_order"].std("resample"), expected, rtol=0.08)
    np.testing.assert_allclose(found["bias"], found["second_order"].mean("resample"))
    np.testing.assert_allclose(
        found["monte_carlo_share"] * found["standard_error"] ** 2,
        (found["second_order_mcse"] ** 2).mean("resample"),
    )


def test_errors_teach() -> None:
    tree: xr.DataTree = regression(n=9).tree(0)
    for k in (0, 10):
        with pytest.raises(ValueError, match="k must be from 1"):
            representative_cases(tree, k)
    with pytest.raises(ValueError, match="2 resamples or more"):
        approximate_bootstrap(tree, resamples=1)
