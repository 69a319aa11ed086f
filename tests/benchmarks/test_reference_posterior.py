"""The program that judges kernels by NUTS: its arithmetic, and a run on a tiny model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import bayesinf as bi
from benchmarks import reference_posterior as program

UNIT = np.outer(np.geomspace(0.1, 10, 40), np.geomspace(1, 5, 100))


def estimate(influence: np.ndarray, mcse: float) -> program.Estimate:
    return program.Estimate(
        influence * UNIT, np.full_like(UNIT, mcse) * UNIT, UNIT, 1.0, 100.0, 0.8, "8 × 10", 2.0
    )


@pytest.mark.parametrize(("bias", "mcse"), [(0.0, 0.01), (0.03, 0.01), (0.07, 0.002)])
def test_bias_is_what_noise_does_not_explain(bias: float, mcse: float) -> None:
    """4,000 independent pairs; false alarms are rarer than one in 10⁵ (4.5 standard errors)."""
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 0.3, UNIT.shape)
    off = bias * rng.choice([-1.0, 1.0], UNIT.shape)
    noise = rng.normal(size=(2, *UNIT.shape))
    found = estimate(truth + off + mcse * noise[0], mcse)
    judged = program.compare(found, estimate(truth + 0.01 * noise[1], 0.01))
    error = mcse**2 + 0.01**2
    spread = (2 * error**2 + 4 * error * bias**2) ** 0.5 / UNIT.size**0.5
    assert abs(judged.bias * abs(judged.bias) - bias**2) < 4.5 * spread
    assert judged.mcse == pytest.approx(mcse)
    assert judged.reference == pytest.approx(0.01)
    if bias == 0:
        assert abs(judged.within - 0.9973) < 4.5 * (0.0027 / UNIT.size) ** 0.5
        assert judged.largest < 0.03
        assert judged.holds(exact=True)
    assert judged.holds(exact=False) is (bias < 0.05)


def test_a_bias_that_is_not_precise_is_not_judged() -> None:
    judged = program.Judged(within=0.98, bias=0.01, largest=0.0, mcse=0.02, reference=0.01)
    assert judged.holds(exact=False) is None
    assert judged.holds(exact=True) is False
    row = program._row("x", math.nan, estimate(UNIT * 0, 0.02), judged, False)
    assert row[-1] == "imprecise"
    assert len(row) == len(program._HEADER)


@pytest.mark.slow
def test_a_tiny_model_from_start_to_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("numpyro")

    def tiny() -> bi.Task:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(24, 3, generator=g, dtype=torch.float64)
        y = torch.randint(3, (24,), generator=g)
        model = nn.Linear(3, 3, dtype=torch.float64)
        return bi.Task(model, bi.Categorical(), train=(x[:20], y[:20]), query=(x[20:], y[20:]))

    monkeypatch.setitem(program.MODELS, "tiny", tiny)
    status = program.main(
        ["tiny", "--kernels", "MALA,Underdamped", "--mcse", "0.015", "--reference", "0.012"]
    )
    out = capsys.readouterr().out
    assert status == 0, out
    for name in ("NUTS", "MALA, preconditioned", "Underdamped, preconditioned"):
        assert f"tiny: {name} " in out
