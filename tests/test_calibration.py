"""Calibration: no units, one rule, settings that hold what they promise."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bayesinf as bi
from bayesinf._pilot import lengths
from bayesinf.plots import plot_calibration
from tests import quadratic


@dataclass(frozen=True)
class Scaled:
    """A Gaussian likelihood in other units: every loss times ``factor``."""

    factor: float

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        return self.factor * bi.Gaussian().loss(outputs, target)

    def fisher_factor(self, outputs: Tensor, target: Tensor) -> Tensor:
        return self.factor**0.5 * bi.Gaussian().fisher_factor(outputs, target)


def task(factor: float = 1.0, copies: int = 1) -> bi.Task:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(40, 3, generator=g, dtype=torch.float64)
    y = (x[:, :1] * x[:, 1:2]).tanh() + 0.1 * torch.randn(40, 1, generator=g, dtype=torch.float64)
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    net.load_state_dict(trained(net, x, y))
    train = (x.repeat(copies, 1), y.repeat(copies, 1))
    return bi.Task(net, Scaled(factor), train=train, query=(x[:5], y[:5]))


def trained(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Weights after some steps of gradient descent: no minimum, and away from the start."""
    weights = list(net.parameters())
    for _ in range(200):
        slopes = torch.autograd.grad(bi.Gaussian().loss(net(x), y).mean(), weights)
        with torch.no_grad():
            for weight, slope in zip(weights, slopes, strict=True):
                weight -= 0.1 * slope
    return net.state_dict()


def calibrated(factor: float = 1.0, copies: int = 1, **options: Any) -> bi.Calibration:
    return bi.calibrate(task(factor, copies), error=0.05, chains=4, vectorize=False, **options)


@cache
def reference() -> bi.Calibration:
    return calibrated()


def test_a_rescaled_loss_changes_units_and_nothing_else() -> None:
    mine, theirs = reference(), calibrated(factor=50.0)
    a, b = mine.report.attrs, theirs.report.attrs
    for name in ("lambda_max", "damping", "loss", "gradient_norm"):
        assert b[name] == pytest.approx(50 * a[name], rel=1e-6)
    assert theirs.posterior.n_beta == pytest.approx(mine.posterior.n_beta / 50, rel=1e-6)
    for name in ("gamma", "step_size", "friction", "effective_dimension"):
        assert b[name] == pytest.approx(a[name], rel=1e-4)
    assert theirs.options == mine.options


def test_doubled_data_change_nothing() -> None:
    mine, theirs = reference(), calibrated(copies=2)
    for name in ("lambda_max", "damping", "n_beta", "gamma", "step_size", "friction"):
        assert theirs.report.attrs[name] == pytest.approx(mine.report.attrs[name], rel=1e-4)
    assert theirs.options == mine.options


def test_the_condition_number_is_what_was_asked_for() -> None:
    found = calibrated(condition=7.0)
    assert found.posterior.damping == pytest.approx(found.report.attrs["lambda_max"] / 7, rel=1e-9)
    eye = torch.eye(31, dtype=torch.float64)
    exact = torch.linalg.eigvalsh(bi.curvature.GaussNewtonProduct(task()) @ eye)
    assert found.report.attrs["lambda_max"] == pytest.approx(float(exact[-1]), rel=0.01)


def test_negative_curvature_raises_the_damping() -> None:
    """At κ = 100 the damping would be 0.022, the Hessian's lowest eigenvalue is −0.054."""
    lowest = float(torch.linalg.eigvalsh(bi.curvature.dense_hessian(task()))[0])
    found = reference()
    assert found.report.attrs["lambda_min"] == pytest.approx(lowest, rel=1e-6)
    assert found.report.attrs["lambda_max"] / 100 < -lowest
    assert found.posterior.damping == pytest.approx(-2 * lowest, rel=1e-6)
    with pytest.raises(ValueError, match=r"no minimum of any local posterior.*Raise damping"):
        calibrated(damping=-0.9 * lowest)


def test_what_is_given_is_taken() -> None:
    found = calibrated(damping=0.2, n_beta=300.0, weight_decay=0.01)
    assert found.posterior.config() == {
        "n_beta": 300.0, "gamma": pytest.approx(300 * 0.19), "weight_decay": 0.01,
        "potential": "tilted",
    }  # fmt: skip
    assert found.posterior.damping == pytest.approx(0.2)


def test_the_run_has_the_error_that_was_asked_for() -> None:
    """Effective draws of the losses at least 0.6 × 1/error², in 95 of 100 losses.

    The pilot's autocorrelation time is that of its slowest 5 %, known to about 20 %.
    """
    found = reference()
    traces = bi.sample(found.posterior, found.sampler, progress=False, **found.options)
    verdict = bi.diagnose(traces)
    assert np.nanquantile(verdict.ess_bulk_train, 0.05) > 0.6 / 0.05**2
    assert verdict.attrs["ok"], verdict.attrs["verdict"]
    half = calibrated_draws(0.025)
    assert half == pytest.approx(4 * found.options["draws"], rel=0.02)


def calibrated_draws(error: float) -> int:
    draws: int = bi.calibrate(task(), error=error, chains=4, vectorize=False).options["draws"]
    return draws


def test_the_control_keeps_the_localisation_and_drops_the_loss() -> None:
    """At n_beta = 0 the law is N(w0, I/γ): E‖δ‖² = d/γ, within 5 standard errors of 400 draws."""
    control = calibrated(control=True)
    assert control.posterior.n_beta == 0
    assert control.posterior.gamma == pytest.approx(reference().posterior.prior_precision)
    options = {**control.options, "draws": 50, "thin": 5}
    traces = bi.sample(control.posterior, control.sampler, progress=False, **options)
    squares = traces.tree["sample_stats"]["distance"].values.ravel() ** 2
    d, gamma = control.posterior.task.dimension, control.posterior.gamma
    error = (2 * d) ** 0.5 / gamma / len(squares) ** 0.5
    assert abs(squares.mean() - d / gamma) < 5 * error


def test_it_is_the_same_every_time() -> None:
    again = calibrated()
    assert again.posterior.config() == reference().posterior.config()
    assert again.options == reference().options
    drop = {"pilot_seconds", "seconds", "text"}
    assert {k: v for k, v in again.report.attrs.items() if k not in drop} == {
        k: v for k, v in reference().report.attrs.items() if k not in drop
    }


def test_a_linear_model_has_its_closed_forms() -> None:
    """EK-FAC is exact here, so that SᵀAS is the identity.

    The pilot's 100 draws of 8 chains, thinned to near independence, know the rise to 3 % and the
    dimension to 0.1: bounds of 5 standard errors, where a factor of 2 is 30 of them.
    """
    problem = quadratic.make()
    found = bi.calibrate(problem.task, error=0.05, chains=8, vectorize=False)
    np.testing.assert_allclose(found.report["virial"], 1.0, rtol=1e-6)
    report, x = found.report.attrs, problem.task.train.batch()[0]
    curvature = torch.linalg.eigvalsh(x.T @ x / len(x))
    dimension = float((curvature / (curvature + found.posterior.damping)).sum())
    assert report["lambda_max"] == pytest.approx(float(curvature[-1]), rel=0.01)
    assert report["lambda_min"] == pytest.approx(float(curvature[0]), rel=1e-6)
    assert report["effective_dimension"] == pytest.approx(dimension, rel=1e-9)
    assert report["step_size"] == pytest.approx(1.5, rel=1e-6)
    assert report["friction"] == pytest.approx(2**0.5, rel=1e-6)
    assert report["rise"] == pytest.approx(dimension / (2 * found.posterior.n_beta), rel=0.15)
    assert report["chain_dimension"] == pytest.approx(dimension, abs=0.5)
    gradients = problem.gradients("train", problem.w0)[0]
    mean = float(gradients.mean(0).square().sum())
    noise = float(gradients.square().sum(1).mean()) / mean - 1
    assert report["gradient_norm"] == pytest.approx(mean**0.5, rel=1e-9)
    assert report["gradient_noise_scale"] == pytest.approx(noise, rel=1e-9)
    traces = bi.sample(found.posterior, found.sampler, progress=False, **found.options)
    assert bi.diagnose(traces).attrs["ok"]


def test_lengths_of_a_run() -> None:
    """Independent steps need 1/error² draws; at ρ = 0.8 (time 9) every choice is worth the same."""
    assert lengths(1.0, 4, 0.1) == {
        "chains": 4, "draws": 25, "warmup": 5, "thin": 1, "batch_size": None,
    }  # fmt: skip
    for error, effective in ((0.1, 20 * 16), (0.05, 400), (0.01, 10000)):
        found = lengths(9.0, 16, error)
        kept = 0.8 ** found["thin"]
        assert 16 * found["draws"] * (1 - kept) / (1 + kept) == pytest.approx(effective, rel=0.05)
        assert 1 < found["thin"] < 9
        assert found["warmup"] == 45


def test_the_report_says_what_was_found() -> None:
    report = reference().report
    text = report.attrs["text"]
    for word in ("λ_max", "κ = 20", "effective dimension", "virial", "step size", "chains ×"):
        assert word in text
    assert bool((report["virial"].diff("n_beta") >= -0.2).all())
    assert float(report["virial"].sel(n_beta=report.attrs["n_beta"])) >= 0.75


def test_its_picture() -> None:
    figure = plot_calibration(reference().report)
    left, right = figure.axes
    np.testing.assert_array_equal(left.lines[0].get_ydata(), reference().report["virial"])
    assert left.lines[2].get_xdata()[0] == reference().posterior.n_beta
    assert right.lines[1].get_ydata()[0] == reference().posterior.damping
    plt.close(figure)
    with pytest.raises(ValueError, match=r"report of bi\.calibrate"):
        plot_calibration(reference().report.drop_vars("virial"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"condition": 1.0}, "κ = λ_max/λ and must exceed 1"),
        ({"error": 0.0}, "wanted standard error"),
        ({"error": 1.0}, "wanted standard error"),
        ({"chains": 0}, "chains must be at least 1"),
        ({"damping": 0.01, "weight_decay": 0.02}, "must exceed the weight decay"),
        ({"virial": 1.5}, "virial must lie between 0 and 1"),
        ({"n_beta": 0.0}, "control=True"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bi.calibrate(task(), **options)


def test_a_curvature_of_another_task_is_refused() -> None:
    other = bi.fit_curvature(quadratic.make().task, fisher="enumerated")
    with pytest.raises(ValueError, match="belongs to other parameters"):
        bi.calibrate(task(), curvature=other)
