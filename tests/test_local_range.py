"""The virial ratio, where its value is known, and the temperature that follows from it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf._local_range import find_temperature, look_at, virial
from tests import quadratic


class Power(nn.Module):
    """Output whose square is ``2 Σ |w|^p``: the loss ``½ f²`` is ``Σ |w|^p``."""

    def __init__(self, power: float, scale: float = 1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.power, self.scale = power, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = (self.w.abs() ** self.power).sum() * 2 * self.scale
        return (total + 1e-300).sqrt().expand(len(x), 1)


def task(power: float, scale: float = 1.0) -> bi.Task:
    x, y = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    return bi.Task(Power(power, scale), bi.Gaussian(), train=(x, y), query=(x, y))


def unit(own: bi.Task) -> bi.LocalPosterior:
    return bi.LocalPosterior(own, n_beta=1.0, gamma=0.0)


NOISE = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("power", [2.0, 4.0, 6.0])
def test_of_a_power_it_is_two_over_the_power(power: float) -> None:
    """``⟨δ, ∇|δ|^p⟩ = p |δ|^p`` (Euler), whatever the law of δ."""
    ratio, rise = virial(unit(task(power)).bind(vectorize=False), NOISE)
    assert ratio == pytest.approx(2 / power, rel=1e-9)
    assert rise == pytest.approx(float((NOISE.abs() ** power).sum(1).mean()), rel=1e-9)


def test_of_a_linear_model_it_is_one_at_every_temperature() -> None:
    problem = quadratic.make()
    noise = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for n_beta in (1e-3, 1.0, 1e3):
        (row,) = look_at(unit(problem.task).bind(vectorize=False), noise, n_beta).tried
        assert row[1] == pytest.approx(1.0, rel=1e-9)
    found = find_temperature(
        unit(problem.task).bind(vectorize=False), noise, start=17.0, ratio=0.75
    )
    assert found.n_beta == 17.0  # as good as any


class Mixed(nn.Module):
    """Loss ``Σ w² + Σ w⁴``: quadratic when cold, quartic when hot."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((3,), 1e-9, dtype=torch.float64))
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        square = self.w**2
        return (2 * self.scale * (square + square**2).sum()).sqrt().expand(len(x), 1)


def mixed(scale: float = 1.0) -> bi.Task:
    x, y = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    return bi.Task(Mixed(scale), bi.Gaussian(), train=(x, y), query=(x, y))


@pytest.mark.parametrize("start", [1e-3, 1.0, 50.0])
def test_the_temperature_is_where_the_ratio_crosses(start: float) -> None:
    """v = (s² + s⁴ q)/(s² + 2 s⁴ q) with q = E|δ|⁴/E|δ|², so that v = r at s² q = (1−r)/(2r−1)."""
    q = float((NOISE**4).sum() / (NOISE**2).sum())
    exact = q * (2 * 0.75 - 1) / (1 - 0.75)
    found = find_temperature(unit(mixed()).bind(vectorize=False), NOISE, start=start, ratio=0.75)
    assert exact <= found.n_beta <= 1.1 * exact
    ratios = [ratio for _, ratio, _ in found.tried]
    assert ratios == sorted(ratios)  # colder is more quadratic
    assert look_at(unit(mixed()).bind(vectorize=False), NOISE, exact).tried[0][1] == pytest.approx(
        0.75, rel=1e-6
    )


class Wall(nn.Module):
    """Loss ``s + 10⁴ s²/(1 + s)^1.5`` of ``s = |w|²``: quadratic, then steep, then linear."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((3,), 1e-9, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = (self.w**2).sum()
        return (2 * (s + 1e4 * s**2 / (1 + s) ** 1.5)).sqrt().expand(len(x), 1)


@pytest.mark.parametrize("start", [1.0, 1e3, 1e5])
def test_a_range_far_out_where_the_ratio_is_good_again_is_not_local(start: float) -> None:
    x, y = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    own = bi.Task(Wall(), bi.Gaussian(), train=(x, y), query=(x, y))
    potential = unit(own).bind(vectorize=False)
    far = look_at(potential, NOISE, 1.0).tried[0]
    assert far[1] > 0.75  # the ratio alone would take it
    found = find_temperature(potential, NOISE, start=start, ratio=0.75)
    size = float((NOISE**2).sum(1).mean()) / found.n_beta
    assert 1e-5 < size < 1e-4  # before the wall, which begins at 10⁻⁴


def test_noise_far_longer_than_the_weights_is_not_looked_at() -> None:
    """The ratio crosses near nβ = 6; from 10⁴ the search looks at 10³, and stays where it was."""
    found = find_temperature(unit(mixed()).bind(vectorize=False), NOISE, start=1e4, ratio=0.75)
    assert found.n_beta == 1e4
    assert min(n_beta for n_beta, *_ in found.tried) == 1e3


def test_a_rescaled_loss_changes_nothing() -> None:
    one = find_temperature(unit(mixed()).bind(vectorize=False), NOISE, start=1.0, ratio=0.75)
    other = find_temperature(unit(mixed(7.0)).bind(vectorize=False), NOISE, start=1.0, ratio=0.75)
    assert other.n_beta == pytest.approx(one.n_beta, rel=1e-9)


def test_a_quartic_loss_has_no_local_range() -> None:
    with pytest.raises(RuntimeError, match="not locally quadratic at any temperature"):
        find_temperature(unit(task(6.0)).bind(vectorize=False), NOISE, start=1.0, ratio=0.75)


@pytest.mark.parametrize("ratio", [0.0, 1.0, math.nan])
def test_a_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(ValueError, match="virial must lie between 0 and 1"):
        find_temperature(unit(mixed()).bind(vectorize=False), NOISE, start=1.0, ratio=ratio)


def test_displacements_that_overflow_are_not_local() -> None:
    assert virial(unit(task(6.0)).bind(vectorize=False), NOISE * 1e200) == (0.0, math.inf)
