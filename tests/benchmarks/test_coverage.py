"""The program that judges intervals: its arithmetic, its truths, its verdict."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import xarray as xr

import bayesinf as bi
from benchmarks import coverage as program
from benchmarks._table import verdict

FREEDOM, SHAPE = 15.0, (20, 30)


def pretend(monkeypatch: pytest.MonkeyPatch, *, size: float = 1.0, shift: float = 0.0) -> None:
    """Runs of error ``N(shift, 1)`` whose ``mcse`` is ``size`` times what it should be."""

    def fake_bif(rng: np.random.Generator) -> xr.Dataset:
        error = size * np.sqrt(rng.chisquare(FREEDOM, SHAPE) / FREEDOM)
        if rng.random() < 0.5:
            warnings.warn("in doubt", bi.ConvergenceWarning, stacklevel=1)
        return bi.make_scores(
            rng.standard_normal(SHAPE) + shift, mcse=error, query=np.arange(20),
            train=np.arange(30), method="bif", estimand="influence", attrs={"mcse_df": FREEDOM},
        )  # fmt: skip

    monkeypatch.setattr(bi, "sample", lambda *_, seed, **__: np.random.default_rng(seed))
    monkeypatch.setattr(bi, "bif", fake_bif)


def found(task: bi.Task | None = None) -> bi.Calibration:
    """A calibration of the linear regression, by hand."""
    posterior = bi.LocalPosterior(program.gaussian() if task is None else task, 40.0, 2.0)
    options = {"chains": 4, "draws": 20, "warmup": 20, "thin": 2}
    return bi.Calibration(posterior, bi.Underdamped(0.01, 4.0), options, xr.Dataset())


def test_right_intervals_are_called_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 40 runs of 600 pairs; one false alarm in 15,000 per number (four standard errors)."""
    pretend(monkeypatch)
    c = program.coverage(found(), np.zeros(SHAPE), 40)
    assert abs(c.mean - 0.95) < 4 * (0.95 * 0.05 / 24000) ** 0.5
    assert c.error == pytest.approx((0.95 * 0.05 / 24000) ** 0.5, rel=0.5)
    assert c.bias < 0.06
    assert c.spread == pytest.approx(1.0, abs=0.03)
    assert c.mcse == pytest.approx(1.0, abs=0.02)
    assert c.doubt == pytest.approx(0.5, abs=0.32)
    assert c.holds


@pytest.mark.parametrize(
    ("size", "shift", "covered", "bias", "spread"),
    [(0.5, 0.0, 0.70, 0.0, 2.0), (2.0, 0.0, 0.999, 0.0, 0.5), (1.0, 1.0, 0.84, 1.05, 1.0)],
)
def test_wrong_intervals_are_found_out(
    monkeypatch: pytest.MonkeyPatch,
    size: float,
    shift: float,
    covered: float,
    bias: float,
    spread: float,
) -> None:
    """P(|t₁₅| ≤ 2.131 · size) and P(|t₁₅ + shift| ≤ 2.131), to two digits."""
    pretend(monkeypatch, size=size, shift=shift)
    c = program.coverage(found(), np.zeros(SHAPE), 40)
    assert c.mean == pytest.approx(covered, abs=0.02)
    assert c.bias == pytest.approx(bias, abs=0.12)
    assert c.spread == pytest.approx(spread, rel=0.05)
    assert not c.holds


def z_scores(scores: xr.Dataset, truth: np.ndarray) -> np.ndarray:
    out: np.ndarray = (scores["influence"].values - truth) / scores["mcse"].values
    return out


def test_closed_form_is_what_independent_draws_give() -> None:
    """800 pairs with t₁₅ errors: their mean square is 1.15; four times its spread of about 0.15."""
    c = found()
    kernel = bi.EKFACLaplace(bi.fit_curvature(c.posterior.task, fisher="enumerated"))  # exact here
    traces = bi.sample(c.posterior, kernel, draws=200, warmup=1, chains=16, progress=False)
    truth = program.closed_form(c, 50)
    assert not truth.mcse.any()
    z = z_scores(bi.bif(traces), truth.influence)
    assert z.shape == (20, 40)
    assert abs((z**2).mean() - 1.15) < 0.6
    assert (z_scores(bi.bif(traces), 1.3 * truth.influence) ** 2).mean() > 3


def test_long_run_is_longer_and_exact() -> None:
    """As above; 16 batches or more."""
    c = found()
    truth = program.long_run(c, 10)
    exact = program.closed_form(c, 10).influence
    z = (truth.influence - exact) / truth.mcse
    assert abs((z**2).mean() - 1.15) < 0.9
    traces = bi.sample(c.posterior, c.sampler, progress=False, **c.options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bi.ConvergenceWarning)  # it is short
        one = bi.bif(traces, center="grand")
    share = np.sqrt((truth.mcse**2).mean() / (one["mcse"].values ** 2).mean())
    assert 0.15 < share < 0.6  # 10^-½ = 0.32, with errors that are themselves uncertain
    assert "accepted" in truth.words


def test_no_truth_where_proposals_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_acceptance", lambda traces: 0.5)
    monkeypatch.setattr(program, "HALVINGS", 1)
    with pytest.raises(RuntimeError, match=r"at the step 0\.005: this posterior has no truth"):
        program.long_run(found(), 10)


@pytest.mark.parametrize("name", program.CASES)
def test_cases_are_trained(name: str) -> None:
    task = program.CASES[name].make()
    assert task.dtype == program.CASES["gaussian"].make().dtype
    losses, chance = task.losses(task.params, task.train.batch()), {"logistic": 0.69, "digits": 2.3}
    assert float(losses.mean()) < 0.8 * chance.get(name, 0.5)


@pytest.mark.parametrize(("shift", "status"), [(0.0, 0), (2.0, 1)])
def test_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shift: float, status: int
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(bi, "calibrate", lambda task, **options: asked.update(options) or found())
    pretend(monkeypatch, shift=shift)
    zero = program.Truth(np.zeros(SHAPE), np.full(SHAPE, 0.1), "a truth")
    fake = program.Case(program.gaussian, 0.07, lambda *_: zero)
    monkeypatch.setattr(program, "CASES", {"fake": fake})
    assert program.main(["--runs", "10"]) == status
    out = capsys.readouterr().out
    assert asked == {"error": 0.07}
    assert "truth: a truth" in out
    assert "4 × 20, thin 2" in out
    assert "0.10" in out
    assert verdict(not status) in out


def test_unknown_case() -> None:
    with pytest.raises(SystemExit):
        program.main(["nonsense"])


def test_one_run_has_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    c = program.coverage(found(), np.zeros(SHAPE), 1)
    assert np.isnan([c.error, c.bias, c.spread]).all()
    assert c.draws == "4 × 20, thin 2"
