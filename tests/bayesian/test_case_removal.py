"""Removal of cases and groups, against exact refits."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from bayesinf.bayesian import ParetoWarning, case_removal
from bayesinf.bayesian._case_removal import pareto_threshold, smoothed_weights
from tests.bayesian.closed_forms import LinearRegression, regression


def refits(model: LinearRegression, sets: list[list[int]]) -> np.ndarray:
    mean = model.posterior()[0]
    changes = []
    for members in sets:
        b = np.ones(len(model.y))
        b[members] = 0
        changes.append(model.posterior(b)[0] - mean)
    return np.array(changes).T


def test_single_cases_by_importance_weights() -> None:
    """Leverage is at most 0.36, so weights are good; 5 standard errors for 60 pairs of 8,000 draws
    raise a false alarm below 1 in 1000 (t with 12 degrees of freedom or more).
    """
    model = regression(n=20)
    exact = refits(model, [[i] for i in range(20)])
    found = case_removal(model.tree(3, draws=2000))
    assert (found["uses"] == "psis").all()
    np.testing.assert_array_equal(found["change"], found["psis"])
    assert (abs(found["psis"].values - exact) < 5 * found["psis_mcse"].values).all()
    orders = ("first_order", "second_order", "psis")
    error = {k: np.sqrt(np.mean((found[k].values - exact) ** 2)) for k in orders}
    assert max(error["psis"], error["second_order"]) < 0.5 * error["first_order"]
    # first and second order are what the Taylor series says, not the refit
    first = -model.influence()
    off = abs(found["first_order"].values - first)
    assert (off < 5 * found["first_order_mcse"].values).all()
    second = first + model.second_order() / 2
    off = abs(found["second_order"].values - second)
    assert (off < 6 * found["second_order_mcse"].values).all()


@pytest.mark.filterwarnings("ignore::bayesinf.bayesian.ParetoWarning")
def test_standard_errors_of_changes_are_their_scatter_over_runs() -> None:
    """100 runs: the ratio of variances over 90 pairs, correlated, stays within 15 % of 1 (standard
    error about 4 %; false alarm below 1 in 1000).
    """
    model = regression(n=30)
    runs = [case_removal(model.tree(seed, draws=300)) for seed in range(100)]
    for name in ("first_order", "second_order", "psis"):
        scatter = np.array([run[name].values for run in runs]).var(axis=0, ddof=1)
        told = np.mean([run[f"{name}_mcse"].values ** 2 for run in runs], axis=0)
        assert np.median(told / scatter) == pytest.approx(1, abs=0.15), name


def test_weights_of_arviz_give_the_same_means() -> None:
    from arviz_stats import loo_expectations

    model = regression(n=10)
    tree = model.tree(0)
    w = tree["posterior"]["w"].isel(feature=0)
    like = tree["log_likelihood"]["y"]
    tree["posterior_predictive"] = xr.DataTree(xr.Dataset({"y": w + 0 * like}))
    tree["observed_data"] = xr.DataTree(xr.Dataset({"y": ("obs", model.y)}))
    expected, _ = loo_expectations(tree, var_name="y", kind="mean")
    found = case_removal(tree, quantities={"w0": w})
    means = found["psis"].sel(query="w0").values + float(w.mean())
    # tails differ by a draw or two, as ArviZ counts effective draws of the parameters
    np.testing.assert_allclose(means, expected, atol=2e-3)


def test_an_outlier_of_high_leverage_is_told_by_its_pareto_k() -> None:
    plain = regression(n=20)
    x, y = plain.x.copy(), plain.y.copy()
    x[4] *= 12
    y[4] = 0.0
    model = LinearRegression(x, y)
    assert model.leverage()[4] > 0.9
    with pytest.warns(ParetoWarning, match=r"of 20 removals, by falling effect: .*4 \(1\."):
        found = case_removal(model.tree(0))
    bad = found["pareto_k"].values >= found.attrs["pareto_threshold"]
    assert bad[4]
    assert bad.sum() <= 4
    exact = refits(model, [[i] for i in range(20)])  # and what is flagged is what fails
    error = abs(found["psis"].values - exact).max(axis=0)
    assert error.argmax() == 4
    assert error[bad].min() > error[~bad].max()
    np.testing.assert_array_equal(found["uses"] == "first_order", bad)
    np.testing.assert_array_equal(found["change"][:, bad], found["first_order"][:, bad])
    np.testing.assert_array_equal(found["change"][:, ~bad], found["psis"][:, ~bad])


def test_groups_are_removed_together() -> None:
    """5 standard errors for 6 pairs: false alarm below 1 in 1000."""
    model = regression(n=60)
    sets = {"first two": [0, 1], "others": np.array([7, 30, 41])}
    found = case_removal(model.tree(0, draws=2000), sets)
    exact = refits(model, [list(v) for v in sets.values()])
    assert found["removed"].values.tolist() == list(sets)
    assert (abs(found["change"].values - exact) < 5 * found["change_mcse"].values).all()
    alone = case_removal(model.tree(0, draws=2000))
    total = alone["first_order"].sel(removed=[0, 1]).sum("removed")
    np.testing.assert_allclose(found["first_order"][:, 0], total, rtol=1e-9)


def test_errors_teach() -> None:
    tree = regression().tree(0)
    with pytest.raises(KeyError, match="not in log_likelihood: \\[99\\]"):
        case_removal(tree, {"a": [0, 99]})
    for members in ([], [1, 1]):
        with pytest.raises(ValueError, match="empty or names"):
            case_removal(tree, {"a": members})


def test_cases_that_hardly_matter_have_plain_weights() -> None:
    """Probabilities of almost 1, and a likelihood of two values: no NaN, no refusal."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((4, 250, 1))
    log_p = np.concatenate([-1e-13 * np.exp(w), -1e-8 * w**2, 0.1 * (w > 0), 0 * w, 0.3 * w], 2)
    weights, k = smoothed_weights(log_p)
    assert np.isfinite(weights).all()
    np.testing.assert_array_equal(k[:4], 0)
    np.testing.assert_allclose(weights.sum(axis=(0, 1)), 1)
    plain = np.exp(-log_p) / np.exp(-log_p).sum(axis=(0, 1))
    np.testing.assert_allclose(weights[..., :4], plain[..., :4], rtol=1e-12)
    np.testing.assert_allclose(weights[..., 4], plain[..., 4], rtol=0.1)
    with pytest.raises(ValueError, match="25 draws"):
        smoothed_weights(log_p[:2, :10])


def test_threshold() -> None:
    assert pareto_threshold(100) == pytest.approx(0.5)
    assert pareto_threshold(10**6) == 0.7


@pytest.mark.parametrize(("scale", "expected"), [(1e-3, 0.0), (1.0, np.inf)])
def test_a_tail_of_ties_has_no_fit(scale: float, expected: float) -> None:
    """The largest weights are those of one in a hundred draws, the next ones all the same."""
    log_p = np.zeros((4, 500, 1))
    log_p[:, ::100, 0] = -scale * np.linspace(0.5, 1.0, 20).reshape(4, 5)
    weights, k = smoothed_weights(log_p)
    assert k[0] == expected
    raw = np.exp(-log_p)
    np.testing.assert_allclose(weights, raw / raw.sum(), rtol=1e-12)
