"""The PBRF program on a few examples of its smallest task, and its comparison."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

import bayesinf as bi
from benchmarks import pbrf as program


def make(influence: np.ndarray, estimand: str = "influence") -> xr.Dataset:
    return bi.make_scores(
        influence, query=np.arange(len(influence)), train=np.arange(influence.shape[1]),
        method="m", estimand=estimand,
    )  # fmt: skip


def test_agreement_is_by_query_and_by_id() -> None:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((6, 40))
    scale = np.arange(1, 7)[:, None]  # of each query: pooled sees it, the mean does not
    found = program.agreement(make(scale * truth), make(truth).isel(train=[5, 3, 30, 8, 9]))
    assert found.mean.mean == pytest.approx(1.0, abs=1e-12)
    assert found.mean.lower == pytest.approx(1.0, abs=1e-6)
    assert found.holds
    assert found.pooled < 0.99
    x, y = (scale * truth)[:, [5, 3, 30, 8, 9]], truth[:, [5, 3, 30, 8, 9]]
    assert found.slope == pytest.approx((x * y).sum() / (x * x).sum())
    noisy = truth + 0.5 * rng.standard_normal(truth.shape)
    other = program.agreement(make(noisy, "similarity"), make(truth))
    each = [np.corrcoef(a, b)[0, 1] for a, b in zip(noisy, truth, strict=True)]
    assert other.mean.mean == pytest.approx(np.mean(each))
    assert other.mean.lower < other.mean.mean < other.mean.upper
    assert not other.holds
    assert np.isnan(other.slope)


def test_program_judges_the_exact_method(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["diabetes-mlp", "--examples", "6", "--queries", "10", "--weight", "0.01"]
    exact, plain = (s for s in program.SOLVERS if s.exact or s.name == "GradDot")
    monkeypatch.setattr(program, "SOLVERS", (exact, plain))
    assert program.main(few) == 0
    out = capsys.readouterr().out
    assert "6 of 342 training examples × 10 queries, λ = 0.1, ε = ±0.01/n" in out
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines[-2:]] == ["Gauss–Newton, exact", "GradDot"]
    assert "met" in lines[-2]
    judged = program.Solver("GradDot", plain.scores, exact=True)
    monkeypatch.setattr(program, "SOLVERS", (judged,))
    assert program.main(few) == 1
    assert "MISSED" in capsys.readouterr().out


def test_too_few_examples() -> None:
    with pytest.raises(SystemExit):
        program.main(["diabetes-mlp", "--examples", "3"])
