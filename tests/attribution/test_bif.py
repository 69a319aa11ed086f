"""BIF against closed forms; every run is seeded, its error measured in its own standard errors."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

import bayesinf as bi
from tests import quadratic


def _weights(task: bi.Task, params: dict[str, Tensor], batch: object) -> Tensor:
    """φ_q = θ_q: one weight per query."""
    return params["weight"][0][: len(batch[0])]  # type: ignore[index]


def _sample(problem: quadratic.Quadratic, **options: object) -> bi.TraceStore:
    step = float(0.3 / torch.linalg.eigvalsh(problem.hessian)[-1])
    settings = {"chains": 64, "draws": 600, "warmup": 400, "thin": 8, "progress": False}
    return bi.sample(problem.posterior, bi.SGLD(step), **{**settings, **options})  # type: ignore[arg-type]


def _relative_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("potential", ["tilted", "plain"])
def test_influence_of_quadratic_losses(potential: str) -> None:
    """g_iᵀΣg_q + ½tr(H_iΣH_qΣ) with SGLD's own Σ; the Monte-Carlo error here is about 1 %."""
    problem = quadratic.make(potential=potential)
    traces = _sample(problem)
    scores = bi.bif(traces)
    step = traces.config["sampler"]["step_size"]
    exact = problem.influence(problem.covariance(step)).numpy()
    assert _relative_error(scores["influence"].values, exact) < 0.05
    z = (scores["influence"].values - exact) / scores["mcse"].values
    assert 0.3 < np.sqrt((z**2).mean()) < 2  # standard errors of the right size
    assert scores.attrs["estimand"] == "influence"


def test_damping_map_in_value() -> None:
    """At low temperature: −(1/n) g_qᵀ(H + λI)⁻¹g_i at w0, λ = γ/(nβ) + weight decay."""
    problem = quadratic.make(n_beta=6e4, gamma=1.2e4, weight_decay=0.1)
    assert problem.posterior.damping == pytest.approx(0.3)
    scores = bi.bif(_sample(problem))
    g, x = problem.gradients("train", problem.w0)
    gq, _ = problem.gradients("query", problem.w0)
    curvature = x.T @ x / len(x) + 0.3 * torch.eye(4, dtype=torch.float64)
    exact = (-gq @ torch.linalg.solve(curvature, g.T) / len(x)).numpy()
    # SGLD's step inflates variances by up to 1/(1 − 0.3/4) = 8 %, along stiff directions
    assert _relative_error(scores["influence"].values, exact) < 0.12
    slope = float((scores["influence"].values * exact).sum() / (exact**2).sum())
    assert 0.95 < slope < 1.12


def test_the_tilt_is_constant_in_the_weights_of_the_data() -> None:
    """d E[θ]/d b_i = −(nβ/n) A⁻¹∇ℓ_i(w0); a tilt that moved with b would make it 0."""
    problem = quadratic.make()
    traces = _sample(problem, measurements={"theta": _weights}, observe={"query": [0, 1, 2, 3]})
    scores = bi.bif(traces, measurement="theta")
    g, _ = problem.gradients("train", problem.w0)
    step = traces.config["sampler"]["step_size"]
    exact = (-60 / 30 * problem.covariance(step) @ g.T).numpy()
    assert _relative_error(scores["influence"].values, exact) < 0.05

    # the same derivative from the potential itself: minimise it with b_i = 1 ± h, tilt kept
    x, y = problem.task.train.batch()
    tilt = problem.posterior.bind().assemble(
        problem.w0[None], torch.zeros(1, 4, dtype=torch.float64), None
    )[0]
    h, i = 1e-4, 7

    def minimiser(b: Tensor) -> Tensor:
        linear = 60 / 30 * x.T @ (b * y[:, 0]) - tilt + 6 * problem.w0
        hessian = 60 / 30 * x.T @ (b[:, None] * x) + 6 * torch.eye(4, dtype=torch.float64)
        return torch.linalg.solve(hessian, linear)

    up, down = torch.ones(30, dtype=torch.float64), torch.ones(30, dtype=torch.float64)
    up[i], down[i] = 1 + h, 1 - h
    derivative = (minimiser(up) - minimiser(down)) / (2 * h)
    torch.testing.assert_close(minimiser(torch.ones(30, dtype=torch.float64)), problem.w0)
    exact_at_zero_step = -60 / 30 * torch.linalg.solve(problem.hessian, g[i])
    torch.testing.assert_close(derivative, exact_at_zero_step, rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore::bayesinf.ConvergenceWarning")
def test_normalised_bif_is_minus_the_correlation() -> None:
    traces = _sample(quadratic.make(), draws=50)
    scores = bi.bif(traces, normalize="correlation", center="grand")
    train, query = traces.values("train").values, traces.values("query").values
    exact = np.corrcoef(query.reshape(-1, 6).T, train.reshape(-1, 30).T)[:6, 6:]
    np.testing.assert_allclose(scores["influence"].values, -exact, atol=1e-6)
    assert scores.attrs["estimand"] == "similarity"


@pytest.mark.filterwarnings("ignore::bayesinf.ConvergenceWarning")
def test_influence_is_minus_n_beta_over_n_times_the_covariance() -> None:
    traces = _sample(quadratic.make(), draws=50)
    train, query = traces.values("train").values, traces.values("query").values
    exact = np.cov(query.reshape(-1, 6).T, train.reshape(-1, 30).T)[:6, 6:]
    scores = bi.bif(traces, center="grand")
    np.testing.assert_allclose(scores["influence"].values, -60 / 30 * exact, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::bayesinf.ConvergenceWarning")
@pytest.mark.parametrize("center", ["grand", "chain"])
@pytest.mark.parametrize("normalize", [None, "correlation"])
@pytest.mark.parametrize("streamed", [False, True])
def test_scores_without_errors(center, normalize, streamed, tmp_path) -> None:
    kept = bi.StreamingCovariance() if streamed else None
    traces = _sample(quadratic.make(), draws=50, store=kept)
    options = {"center": center, "normalize": normalize}
    whole = bi.bif(traces, **options)
    for more in ({}, {"store": tmp_path / "scores"}):
        alone = bi.bif(traces, errors=False, **options, **more)
        assert set(alone.data_vars) == {"influence"}
        assert not {"mcse_df", "relative_mcse"} & set(alone.attrs)
        scale = float(abs(whole["influence"]).max())
        np.testing.assert_allclose(alone["influence"], whole["influence"], atol=1e-5 * scale)


def test_errors_are_wanted_or_not() -> None:
    traces = _sample(quadratic.make(), draws=50)
    for asked in ({"replicates": True}, {"target_mcse": 0.1}):
        with pytest.raises(ValueError, match="errors=False leaves the standard errors out"):
            bi.bif(traces, errors=False, **asked)


@pytest.mark.filterwarnings("ignore::bayesinf.ConvergenceWarning")
def test_observing_a_subset_keeps_n() -> None:
    problem = quadratic.make()
    every = bi.bif(_sample(problem, draws=60), center="grand")
    part = {"train": [3, 8], "query": [5]}
    few = bi.bif(_sample(problem, draws=60, observe=part), center="grand")
    np.testing.assert_allclose(
        few["influence"].values, every["influence"].sel(query=[5], train=[3, 8]).values, rtol=1e-6
    )


def test_bad_chains_give_a_warning_and_chainwise_centring() -> None:
    problem = quadratic.make()
    step = float(1e-4 / torch.linalg.eigvalsh(problem.hessian)[-1])
    traces = bi.sample(
        problem.posterior, bi.SGLD(step), chains=4, draws=60, warmup=0, progress=False
    )
    with pytest.warns(bi.ConvergenceWarning, match="R-hat"):
        scores = bi.bif(traces)
    assert scores.attrs["center"] == "chain"
    np.testing.assert_allclose(scores["influence"], scores["influence_within"])


@pytest.mark.filterwarnings("ignore::bayesinf.ConvergenceWarning")
def test_zero_temperature_weight_is_refused() -> None:
    problem = quadratic.make(n_beta=0.0)
    traces = _sample(problem, draws=50)
    with pytest.raises(ValueError, match="n_beta = 0 samples the prior alone"):
        bi.bif(traces)


def test_unknown_measurement_is_named() -> None:
    traces = _sample(quadratic.make(), draws=50)
    with pytest.raises(KeyError, match="margin"):
        bi.bif(traces, measurement="margin")


def test_good_chains_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bi.bif(_sample(quadratic.make())).attrs["center"] == "grand"
