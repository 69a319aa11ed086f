r"""Minimising many objectives around one checkpoint: L-BFGS on stacked rows with a shared metric.

Every row has its own memory and its own step, bracketed and bisected until the weak Wolfe
conditions hold (with the condition on slopes alone where rounding hides the decrease); the first
trial is 1, or four times the last step where that is less. With these conditions BFGS also
converges where the objective has kinks (Lewis & Overton 2013, "Nonsmooth optimization via
quasi-Newton methods"), as it has for ReLU networks. A minimum may lie **on** a kink, where the
gradient does not vanish; such a row is judged by the decrease of its objective,
``√(decrease in the last ten steps / decrease since the checkpoint)``: where the objective grows
quadratically away from the minimum, that is the relative error of the response, up to a factor.
(Of a row that finds no decrease any more, three steps count.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesinf.evaluation._proximal import MOST_ROWS, Metric, Neighbourhood, Objective

__all__ = ["Minimum", "minimise"]

_MEMORY = 30  # pairs; with 10, minima on several kinks take five times the steps
_BLOCK_ELEMENTS = 2**27
_TRIALS = 25
_LONGEST = 8.0
_STEPS, _LAST_STEPS = 10, 3  # that a row's progress is judged by; that of one that is stuck
_STATE = ("damping", "scale", "first", "w", "f", "g", "residual", "iterations", "stuck", "length")


@dataclass(frozen=True)
class Minimum:
    """Where ``C`` minimisations ended.

    Attributes
    ----------
    position
        ``(C, d)``.
    residual
        ``(C,)``: norm of the gradient relative to ``scale``, or what the module says of kinks
        where that is smaller.
    iterations
        ``(C,)``.
    """

    position: Tensor
    residual: Tensor
    iterations: Tensor


def minimise(
    near: Neighbourhood,
    objective: Objective,
    metric: Metric,
    scale: Tensor,
    *,
    tolerance: float,
    max_iterations: int,
) -> Minimum:
    """Minimise from the checkpoint until the residual is at most ``tolerance``.

    A row that can make no progress any more stops where it is. A gradient below what rounding
    leaves of it counts as 0.

    Parameters
    ----------
    near, objective
        What is minimised.
    metric
        Curvature at the checkpoint; it is damped by each row's ``λ + κ``.
    scale
        ``(C,)``: norm of the gradient that drives the row away from the checkpoint.
    tolerance, max_iterations
        When a row stops.
    """
    size = _BLOCK_ELEMENTS // (len(near.center) * (2 * _MEMORY + 8))
    size = max(1, min(MOST_ROWS, size))
    rounding = 4 * torch.finfo(torch.float64).eps * metric.largest * float(near.center.norm())
    scale = scale.clamp(min=max(rounding / tolerance, 1e-300))
    found = []
    for start in range(0, len(objective), size):
        part = slice(start, start + size)
        descent = _Descent(near, objective.rows(part), metric, scale[part], tolerance)
        found.append(descent.run(max_iterations))
    return Minimum(
        torch.cat([m.position for m in found]),
        torch.cat([m.residual for m in found]),
        torch.cat([m.iterations for m in found]),
    )


class _Descent:
    """A block of rows on their way down."""

    def __init__(
        self,
        near: Neighbourhood,
        objective: Objective,
        metric: Metric,
        scale: Tensor,
        tolerance: float,
    ) -> None:
        self.near, self.objective, self.metric = near, objective, metric
        self.end: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.index = list(range(len(objective)))
        self.damping = objective.proximity + objective.decay
        self.scale, self.tolerance = scale, tolerance
        self.w = near.center.repeat(len(objective), 1)
        self.f, self.g = near.value_and_grad(objective, self.w)
        self.residual = self.g.norm(dim=1) / scale
        self.iterations = torch.zeros(len(scale), dtype=torch.int64, device=scale.device)
        self.stuck = torch.zeros(len(scale), dtype=torch.bool, device=scale.device)
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # s, y, 1/sᵀy (0: not to be used)
        self.length = torch.ones_like(scale)
        self.values = [self.f.clone()]  # of the last steps
        self.first = self.f.clone()

    def run(self, max_iterations: int) -> Minimum:
        for _ in range(max_iterations):
            active = ~(self.residual <= self.tolerance) & ~self.stuck
            count = int(active.sum())
            if not count:
                break
            if count <= len(active) // 2:
                active = self._leave_behind(active)
            self._step(active)
            self.residual[active] = (self.g.norm(dim=1) / self.scale)[active]
            self._look_back(active)
        self._leave_behind(torch.zeros_like(self.stuck))
        rows = [self.end[c] for c in sorted(self.end)]
        position, residual, iterations = (torch.stack(part) for part in zip(*rows, strict=True))
        return Minimum(position, residual, iterations)

    def _leave_behind(self, active: Tensor) -> Tensor:
        """Put rows that have ended aside; returns the flags of the others, all True."""
        for place in (~active).nonzero()[:, 0].tolist():
            self.end[self.index[place]] = (
                self.w[place].clone(), self.residual[place].clone(), self.iterations[place].clone()
            )  # fmt: skip
        k = active.nonzero()[:, 0]
        self.values = [f[k] for f in self.values]
        self.index = [self.index[place] for place in k.tolist()]
        self.objective = self.objective.rows(k)
        self.pairs = [(s[k], y[k], inverse[k]) for s, y, inverse in self.pairs]
        for name in _STATE:
            setattr(self, name, getattr(self, name)[k])
        return active[k]

    # ------------------------------------------------------------------ one step

    def _step(self, active: Tensor) -> None:
        direction = -self._inverse(self.g)
        slope = _dot(self.g, direction)
        uphill = active & ~(slope < 0)
        if bool(uphill.any()):
            self._forget(uphill)
            direction[uphill] = -self.metric.solve(self.g[uphill], self.damping[uphill])
            slope = _dot(self.g, direction)
        w, g = self.w.clone(), self.g.clone()
        moved = self._search(active, direction, slope)
        self.iterations += moved
        failed = active & ~moved
        self.stuck |= failed & ~self._remembers()
        s, y = self.w - w, self.g - g
        curved = _dot(s, y)
        useful = curved > 1e-10 * s.norm(dim=1) * y.norm(dim=1)
        inverse = torch.where(useful, 1 / torch.where(useful, curved, 1.0), 0.0)
        self.pairs = [*self.pairs, (s, y, inverse)][-_MEMORY:]
        self._forget(failed)

    def _inverse(self, gradient: Tensor) -> Tensor:
        """Two-loop recursion; every row has its own pairs."""
        q, weights = gradient.clone(), []
        for s, y, inverse in reversed(self.pairs):
            weight = inverse * _dot(s, q)
            q -= weight[:, None] * y
            weights.append(weight)
        q = self.metric.solve(q, self.damping)
        for (s, y, inverse), weight in zip(self.pairs, reversed(weights), strict=True):
            q += (weight - inverse * _dot(y, q))[:, None] * s
        return q

    def _remembers(self) -> Tensor:
        found = torch.zeros_like(self.stuck)
        for _, _, inverse in self.pairs:
            found |= inverse > 0
        return found

    def _forget(self, rows: Tensor) -> None:
        for _, _, inverse in self.pairs:
            inverse[rows] = 0.0

    def _search(self, active: Tensor, direction: Tensor, slope: Tensor) -> Tensor:
        """Move the active rows along their directions; returns which were moved."""
        start, f0 = self.w.clone(), self.f.clone()
        pending, moved = active.clone(), torch.zeros_like(active)
        t = (4 * self.length).clamp(max=1.0)
        low, high = torch.zeros_like(t), torch.full_like(t, float("inf"))
        for _ in range(_TRIALS):
            k = pending.nonzero()[:, 0]
            if not len(k):
                break
            trial = start[k] + t[k, None] * direction[k]
            f, g = self.near.value_and_grad(self.objective.rows(k), trial)
            rise, after = f - f0[k], _dot(g, direction[k])
            hidden = (rise <= 1e-14 * (1 + f0[k].abs())) & (after <= -0.8 * slope[k])
            down = torch.isfinite(f) & ((rise <= 1e-4 * t[k] * slope[k]) | hidden)
            there = k[down]
            self.w[there], self.f[there], self.g[there] = trial[down], f[down], g[down]
            moved[there] = True
            low[there] = t[there]
            high[k[~down]] = t[k[~down]]
            level = (after >= 0.9 * slope[k]) | (t[k] >= _LONGEST)
            pending[k[down & level]] = False
            t[k] = torch.where(torch.isinf(high[k]), 2 * t[k], 0.5 * (low[k] + high[k]))
        self.length = torch.where(moved, low, 1.0)
        return moved

    def _look_back(self, active: Tensor) -> None:
        """Lower the residual to that of a minimum on a kink; see the module."""
        self.values = [*self.values, self.f.clone()][-_STEPS - 1 :]
        if len(self.values) <= _STEPS:
            return
        before = torch.where(self.stuck, self.values[-_LAST_STEPS - 1], self.values[0])
        total = (self.first - self.f).clamp(min=1e-300)
        rounding = 4 * torch.finfo(torch.float64).eps * torch.maximum(before.abs(), self.f.abs())
        left = ((before - self.f + rounding).clamp(min=0.0) / total).sqrt()
        self.residual = torch.where(active, torch.minimum(self.residual, left), self.residual)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)
