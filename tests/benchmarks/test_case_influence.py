"""The program that judges influence of cases: its sampler, its refits, its table."""

from __future__ import annotations

import numpy as np
import pytest

from bayesinf.bayesian import case_influence
from benchmarks import case_influence as program


def one_weight(seed: int = 0) -> program.Logistic:
    rng = np.random.default_rng(seed)
    return program.Logistic(rng.standard_normal((12, 1)), np.sign(rng.standard_normal(12)))


def test_sampler_has_the_law_of_the_posterior() -> None:
    """Moments by quadrature; 5 standard errors over 64 chains: false alarm below 1e-4."""
    model = one_weight()
    grid = np.linspace(-8, 8, 4001)[:, None]
    density = np.exp(-model.potential(grid) + model.potential(grid).min())
    mean = (grid[:, 0] * density).sum() / density.sum()
    square = (grid[:, 0] ** 2 * density).sum() / density.sum()
    w = model.draws(0, 64, 200)[..., 0]
    for power, exact in ((1, mean), (2, square)):
        means = (w**power).mean(axis=1)
        assert abs(means.mean() - exact) < 5 * means.std() / 8
    np.testing.assert_allclose(
        model.gradient(grid[2000:2001] + 0.3)[0, 0],
        np.diff(model.potential(np.array([[0.2999], [0.3001]]))).item() / 2e-4,
        rtol=1e-5,
    )


def test_removals_and_derivatives_of_a_small_model() -> None:
    """Signs of removals that move φ by more than 3 errors, and of intervals without 0."""
    model = program.breast_cancer(1)
    model = program.Logistic(model.x[:60], model.y[:60])
    table = program.removals(model, draws=500, refit_chains=16, refit_draws=200, top=2)
    assert table["removed"].values.tolist()[2:] == ["these 1", "these 2"]
    np.testing.assert_allclose(table["refit"][0], table["refit"][2])
    assert (table["refit_mcse"] < 0.1 * table["refit"]).all()
    assert (table["change"] < 0.5 * table["refit"]).all()
    assert (table["signs"] == 1).all()
    found = program.derivatives(model, runs=4, draws=250, reference_chains=32)
    assert 0.85 < found["coverage"] <= 1
    assert found["signs"] > 0.97
    assert found["change"] > 0.99


def mean(model: program.Logistic) -> float:
    """By quadrature."""
    grid = np.linspace(-8, 8, 4001)[:, None]
    density = np.exp(-model.potential(grid) + model.potential(grid).min())
    return float((grid[:, 0] * density).sum() / density.sum())


def test_signs_of_a_small_model() -> None:
    """One φ, twelve cases; the truth by quadrature, and no sign is wrong beyond 3 errors."""
    model = one_weight()
    found = program.signs(model, draws=1000, beyond=(0, 1, 3))
    assert (found.attrs["cases"], found.attrs["known"]) == (12, 1.0)
    scores = case_influence(model.tree(model.draws(0, 4, 1000)))
    value, mcse = scores["influence"].values[0], scores["mcse"].values[0]
    exact = np.array([mean(model) - mean(model.without([i])) for i in range(12)])
    for limit, pairs, wrong in zip((0, 1, 3), found["pairs"], found["wrong"], strict=True):
        shown = abs(value) > limit * mcse
        assert pairs == shown.sum()
        assert wrong == (shown & (value * exact < 0)).sum()
    assert found["wrong"][-1] == 0
    assert (found["expected"] < 2).all()
    assert program.signs(model, draws=1000, cases=3).attrs["cases"] == 3


@pytest.mark.slow
def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    program.main(
        ["--runs", "1", "--draws", "150", "--refit-draws", "20", "--features", "1", "--cases", "4"]
    )
    printed = capsys.readouterr().out
    assert "these 10" in printed
    assert "coverage of 95 % intervals" in printed
    assert "3 errors" in printed
