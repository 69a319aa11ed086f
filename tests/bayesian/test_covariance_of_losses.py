"""What the covariance matrix of log-likelihoods gives, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from bayesinf.bayesian import (
    anomaly_scores,
    case_influence,
    case_summary,
    infinitesimal_jackknife,
    loss_map,
    w_kernel,
)
from tests.bayesian.closed_forms import LinearRegression, regression


def exact_covariance(model: LinearRegression) -> np.ndarray:
    """``r_i r_j K_ij/σ⁴ + K_ij²/(2σ⁴)`` of log p_i and log p_j, with K = XVXᵀ, r at the mean."""
    mean, v = model.posterior()
    kernel, r = model.x @ v @ model.x.T, model.y - model.x @ mean
    out: np.ndarray = (np.outer(r, r) * kernel + kernel**2 / 2) / model.sigma**4
    return out


def test_functional_variance_and_spectrum() -> None:
    """5 standard errors of 20 variances, 12 or more degrees of freedom: below 1 % of seeds."""
    model = regression()
    exact = exact_covariance(model)
    tree = model.tree(0, draws=2000)
    table = case_summary(tree)
    assert (abs(table["p_waic"].values - np.diag(exact)) < 5 * table["p_waic_mcse"].values).all()
    kernel = w_kernel(tree)
    assert kernel.attrs["functional_variance"] == pytest.approx(table.attrs["p_waic"], rel=1e-9)
    assert kernel.attrs["functional_variance"] == pytest.approx(np.trace(exact), rel=0.05)
    expected = np.linalg.eigvalsh(exact)[::-1]
    off = abs(kernel["eigenvalue"].values - expected)[:3]
    assert (off < 5 * kernel["mcse"].values[:3]).all()
    spectrum = (kernel["eigenvector"] * kernel["eigenvalue"]).values @ kernel[
        "eigenvector"
    ].values.T
    np.testing.assert_allclose(spectrum, kernel["covariance"], atol=1e-9)
    own = case_influence(tree, group="log_likelihood")
    np.testing.assert_allclose(kernel["covariance"], own["influence"], atol=1e-9)


def test_spectrum_of_a_model_that_is_right_counts_its_parameters() -> None:
    """n = 400, d = 3: eigenvalues of J^{-1/2} I J^{-1/2} are 1 ± √(2/n)·2, with d of them."""
    kernel = w_kernel(regression(n=400).tree(0))
    value = kernel["eigenvalue"].values
    assert (abs(value[:3] - 1) < 0.4).all()
    assert value[3] < 0.1
    assert 2.5 < kernel.attrs["components"] < 3.5


def test_summary_agrees_with_its_parts() -> None:
    from arviz_stats import loo

    model = regression()
    tree = model.tree(0, draws=2000)
    table = case_summary(tree)
    mean, v = model.posterior()
    predictive = np.sqrt(1 + np.einsum("ni,ij,nj->n", model.x, v, model.x))
    exact = stats.norm.logpdf(model.y, model.x @ mean, predictive)
    np.testing.assert_allclose(table["lppd"], exact, atol=0.02)  # 8,000 draws
    elpd = loo(tree, pointwise=True)
    assert table.attrs["elpd_waic"] == pytest.approx(elpd.elpd, abs=0.5 * elpd.p)
    np.testing.assert_allclose(table["pareto_k"], elpd.pareto_k, atol=0.05)
    scores = case_influence(tree)
    relative = scores["influence"] / scores["posterior_sd"]
    np.testing.assert_allclose(abs(table["largest_shift"]), abs(relative).max("query"))
    for i in (0, 7):
        row = table.isel(train=i)
        assert row["largest_shift"] == relative.sel(query=row["moves"].item()).values[i]
    frame = table.to_dataframe()
    assert len(frame) == 20
    assert {"p_waic", "pareto_k", "moves"} <= set(frame.columns)


def test_mislabelled_cases_have_the_highest_self_variance() -> None:
    plain = regression(n=40, seed=3)
    y = plain.y.copy()
    wrong = np.array([2, 11, 30])
    y[wrong] += np.where(plain.x[wrong, 2] > 0, -6, 6)
    table = case_summary(LinearRegression(plain.x, y).tree(0))
    value = table["p_waic"].values
    others = np.delete(value, wrong)
    assert (value[wrong][:, None] > others).mean() > 0.97  # area under the ROC curve
    assert table["unreliable"].values[wrong].all()


def test_jackknife_is_the_sandwich_and_sees_misfit() -> None:
    """ψ of a linear model with a wide prior sum to the sandwich ``V Σ r² x xᵀ V``; the noise here
    is three times what the model says, so that the posterior is three times too narrow.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 2))
    model = LinearRegression(x, x @ [1.0, -1.0] + 3 * rng.standard_normal(200), tau=100.0)
    mean, v = model.posterior()
    r = model.y - x @ mean
    sandwich = np.sqrt(np.diag(v @ (x.T * r**2) @ x @ v))
    found = infinitesimal_jackknife(model.tree(0, draws=4000))
    np.testing.assert_allclose(found["standard_error"], sandwich, rtol=0.1)
    np.testing.assert_allclose(found["posterior_sd"], np.sqrt(np.diag(v)), rtol=0.05)
    assert (abs(found["ratio"] - 3) < 0.6).all()
    noisy = infinitesimal_jackknife(model.tree(0, draws=100))
    assert (noisy["monte_carlo_share"] > 10 * found["monte_carlo_share"]).all()
    excess = noisy["standard_error"].values ** 2 * (1 - noisy["monte_carlo_share"].values)
    np.testing.assert_allclose(np.sqrt(excess), sandwich, rtol=0.15)


def two_groups(seed: int = 0) -> LinearRegression:
    """The first 8 tell of one parameter, the next 6 of the other."""
    rng = np.random.default_rng(seed)
    x = np.zeros((14, 2))
    x[:8, 0], x[8:, 1] = 1.0, 1.0
    return LinearRegression(x, x @ [1.0, 2.0] + 4 + 0.1 * rng.standard_normal(14), tau=1.0)


def test_map_shows_the_groups_of_the_data() -> None:
    found = loss_map(two_groups().tree(0), clusters=2)
    assert found["cluster"].values.tolist() == [0] * 8 + [1] * 6
    first = found["embedding"].values[:, 0]
    assert max(first[:8]) < min(first[8:]) or min(first[:8]) > max(first[8:])
    assert found["share"].values[0] > 0.8
    distance = 2 * (1 - found["correlation"].values)
    shown = found["embedding"].values
    seen = ((shown[:, None] - shown[None]) ** 2).sum(-1)
    assert np.corrcoef(seen.ravel(), distance.ravel())[0, 1] > 0.99
    np.testing.assert_allclose(np.diag(found["correlation"]), 1)


def new_points(model: LinearRegression, x: np.ndarray, y: np.ndarray) -> xr.DataTree:
    log_p = LinearRegression(x, y).log_p(model.draws(0))
    return xr.DataTree.from_dict(
        {"log_likelihood": xr.Dataset({"y": (("chain", "draw", "obs"), log_p)})}
    )


def test_points_unlike_the_trusted_ones_score_high() -> None:
    model = two_groups()
    x = np.array([[1.0, 0.0], [1.0, 0.0], [-3.0, 0.0]])
    y = np.array([model.y[0], model.y[1] + 0.05, 9.0])
    found = anomaly_scores(model.tree(0), new_points(model, x, y))
    assert found["value"].values[2] > found["value"].values[:2].max()
    assert found["max_concordance"].values[0] == pytest.approx(1)  # it is a trusted point
    a, b = LinearRegression(x, y).log_p(model.draws(0))[..., 1].ravel(), model.log_p(model.draws(0))
    flat = b.reshape(-1, 14)
    ccc = [
        2 * np.cov(a, c, ddof=0)[0, 1] / (a.var() + c.var() + (a.mean() - c.mean()) ** 2)
        for c in flat.T
    ]
    np.testing.assert_allclose(found["mean_concordance"].values[1], np.mean(ccc), rtol=1e-9)
    rho = [np.corrcoef(a, c)[0, 1] for c in flat.T]
    np.testing.assert_allclose(found["max_correlation"].values[1], max(rho), rtol=1e-9)


def test_a_new_point_is_held_against_the_class_it_is_most_like() -> None:
    model = two_groups()
    x = np.array([[1.0, 0.0], [0.0, 1.0], [-3.0, 0.0]])
    y = np.array([model.y[0], model.y[9] + 0.05, 9.0])
    kinds = np.array(["a"] * 8 + ["b"] * 6)
    new = new_points(model, x, y)
    found = anomaly_scores(model.tree(0), new, classes=kinds)
    plain = anomaly_scores(model.tree(0), new)
    assert found["class"].values.tolist() == ["a", "b"]
    assert found["nearest_class"].values.tolist()[:2] == ["a", "b"]
    for name, part in (("a", slice(0, 8)), ("b", slice(8, None))):
        trusted = model.tree(0)
        kept = trusted["log_likelihood"].to_dataset().isel(obs=part)
        alone = anomaly_scores(xr.DataTree.from_dict({"log_likelihood": kept}), new)
        for kind in ("mean", "max"):
            for what in ("correlation", "concordance"):
                own = found[f"class_{kind}_{what}"].sel({"class": name})
                np.testing.assert_allclose(own, alone[f"{kind}_{what}"], rtol=1e-9)
    expected = -found["class_mean_concordance"].max("class")
    np.testing.assert_allclose(found["value"], expected)
    np.testing.assert_allclose(plain["mean_concordance"], found["mean_concordance"])
    gap = found["value"].values[2] - found["value"].values[:2].max()
    assert gap > plain["value"].values[2] - plain["value"].values[:2].max()
    with pytest.raises(ValueError, match="one class for each of the 14"):
        anomaly_scores(model.tree(0), new, classes=[0, 1])


def test_errors_teach() -> None:
    model = two_groups()
    tree = model.tree(0)
    with pytest.raises(ValueError, match="clusters from 1"):
        loss_map(tree, clusters=0)
    with pytest.raises(ValueError, match="very draws"):
        anomaly_scores(tree, model.tree(0, draws=100))
    still = tree["log_likelihood"].to_dataset()
    still = still.where(still["obs"] != 5, 1.0)
    flat = xr.DataTree.from_dict({"log_likelihood": still})
    with pytest.raises(ValueError, match="first that of 5"):
        loss_map(flat)
    with pytest.raises(ValueError, match="no log-likelihood varies"):
        w_kernel(xr.DataTree.from_dict({"log_likelihood": still * 0}))
    constant = xr.DataArray(np.zeros((4, 500)), dims=("chain", "draw"))
    with (
        pytest.warns(UserWarning, match="cannot be judged"),
        pytest.raises(ValueError, match="nothing can move"),
    ):
        case_summary(tree, quantities={"zero": constant})
