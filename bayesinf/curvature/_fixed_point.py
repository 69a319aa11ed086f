r"""Fixed-point iterations for ``(C + λI) x = b``: their steps, minibatches and stopping rule.

    x ← x + α M (b − (C̃ + λI) x) + β (x − x_previous)

``C̃`` is ``C`` or its mean over a random minibatch, ``M`` a symmetric positive definite
preconditioner. An error along an eigenvector of ``M (C + λI)`` with eigenvalue ``μ`` is multiplied
by ``1 − αμ`` an iteration, so that α is bounded by ``2/μ_max`` and a digit takes about
``μ_max/μ_min`` iterations; with Chebyshev's α and β, which vary with the iteration and follow from
``[μ_min, μ_max]``, the square root of that.

Minibatches are drawn independently of one another, so that the mean of the iterates has the exact
solution as its fixed point. What is returned is their average with weights that grow as the third
power of the iteration: about the last quarter.

Sources: Golub & Varga 1961 (Chebyshev's semi-iteration; Saad 2003, algorithm 12.1); Shamir & Zhang
2013 (averages with polynomial weights).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from bayesinf.curvature._lanczos import Spectrum, estimate_spectrum
from bayesinf.curvature._operator import SymmetricOperator
from bayesinf.curvature._solvers import (
    DampedSystem,
    Solution,
    SolverDivergenceError,
    indefinite,
    relative,
    require_examples,
)

__all__ = ["FixedPoint", "Schedule", "chebyshev_coefficients"]

_AVERAGE = 3
"""Power of the weights of the average."""

_GROWTH = 1e4
"""How far a residual may rise above where it began."""

_STEPS = 20
"""Lanczos steps of an estimate of the spectrum."""

_MINIBATCHES = 5
"""Minibatches whose spectrum is estimated."""


@dataclass(frozen=True)
class Schedule:
    """``(α, β)`` of every iteration and where they come from."""

    coefficients: Callable[[], Iterator[tuple[float, float]]]
    step: float | None
    momentum: float
    spectrum: Spectrum | None


def chebyshev_coefficients(spectrum: Spectrum) -> Iterator[tuple[float, float]]:
    """``(α, β)`` of Chebyshev's semi-iteration on an interval, without end."""
    center, radius = (spectrum.high + spectrum.low) / 2, (spectrum.high - spectrum.low) / 2
    rho = radius / center
    yield 1 / center, 0.0
    while True:
        scale = 2 * center - radius * rho
        yield 2 / scale, rho * radius / scale
        rho = radius / scale


class FixedPoint:
    """One solve: its system, its preconditioner, its minibatches, and when it stops.

    The arguments are those of :func:`astra`.
    """

    def __init__(
        self,
        system: DampedSystem,
        rhs: Tensor,
        preconditioner: SymmetricOperator | None,
        batch_size: int | None,
        tolerance: float,
        iterations: int,
        check_every: int | None,
        seed: int,
    ) -> None:
        self.system, self.rhs = system, rhs
        self.precondition: Callable[[Tensor], Tensor] = (
            (lambda rows: rows) if preconditioner is None else preconditioner.apply
        )
        self.preconditioned = preconditioner is not None
        self.tolerance, self.iterations = tolerance, iterations
        self.generator = torch.Generator().manual_seed(seed)
        self.batch_size, self.n = batch_size, 1
        if batch_size is not None:
            self.n = require_examples(system.operator).n
            if not 1 <= batch_size <= self.n:
                raise ValueError(
                    f"batch_size must lie between 1 and the {self.n} examples, or be None for all "
                    f"of them; got {batch_size}."
                )
        self.check_every = check_every or max(1, 5 * self.n // (batch_size or self.n))

    # ------------------------------------------------------------------ steps

    def chebyshev(self, spectrum: Spectrum | None) -> Schedule:
        """Chebyshev's steps on a spectrum, which is estimated if None."""
        found = spectrum or self._spectrum()
        return Schedule(lambda: chebyshev_coefficients(found), None, 0.0, found)

    def constant(
        self, step: float | None, momentum: float, spectrum: Spectrum | None = None
    ) -> Schedule:
        """Return one step and momentum for all iterations; half of what is stable if None."""
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1); got {momentum}.")
        if step is None:
            spectrum = spectrum or self._spectrum()
            step = self._stable(momentum, spectrum) / 2
        elif not 0 < step < float("inf"):
            raise ValueError(f"step must be positive and finite; got {step}.")
        return Schedule(lambda: repeat((step, momentum)), step, momentum, spectrum)

    def _stable(self, momentum: float, spectrum: Spectrum) -> float:
        """Step at which the iteration over all examples, or over minibatches, stops to shrink."""
        factor = 1 + momentum if self.batch_size is None else 1 - momentum
        return 2 * factor / spectrum.high

    def _spectrum(self) -> Spectrum:
        """Ends of the spectrum of ``M (C̃ + λI)``, the widest of some minibatches."""
        batches = [self._batch() for _ in range(1 if self.batch_size is None else _MINIBATCHES)]
        found = []
        for batch in batches:
            start = torch.randn(1, self.rhs.shape[1], generator=self.generator).to(self.rhs)
            found.append(
                estimate_spectrum(
                    partial(self.system, index=batch),
                    start,
                    precondition=self.precondition,
                    steps=_STEPS,
                )
            )
        low, high = min(s.low for s in found), max(s.high for s in found)
        if not low > 0:
            raise indefinite(low, self.system.damping, preconditioned=self.preconditioned)
        return Spectrum(low, high)

    def _batch(self) -> Tensor | None:
        if self.batch_size is None:
            return None
        return torch.randperm(self.n, generator=self.generator)[: self.batch_size]

    # ------------------------------------------------------------------ iterations

    def solve(self, x: Tensor, schedule: Schedule) -> Solution:
        """Iterate from ``x`` ``(k, d)``."""
        if x.shape != self.rhs.shape:
            raise ValueError(f"start must be {tuple(self.rhs.shape)}; got {tuple(x.shape)}.")
        if self.batch_size is None:
            x, residual, done = self._deterministic(x, schedule)
        else:
            x, residual, done = self._stochastic(x, schedule)
        spectrum = schedule.spectrum
        return Solution(
            x,
            residual,
            done,
            self.system.products,
            residual <= self.tolerance,
            schedule.step,
            None if spectrum is None else (spectrum.low, spectrum.high),
        )

    def _deterministic(self, x: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor, int]:
        """Iterate over all examples; rows that are done cost no more products."""
        rows = torch.arange(len(x), device=x.device)
        r = self.system.residual(x, self.rhs)
        residual = relative(r, self.rhs)
        first, velocity, done = residual.clone(), torch.zeros_like(x), 0
        for alpha, beta in schedule.coefficients():
            going = residual[rows] > self.tolerance
            rows, r, velocity = rows[going], r[going], velocity[going]
            if not len(rows) or done == self.iterations:
                break
            velocity.mul_(beta).add_(self.precondition(r), alpha=alpha)
            x[rows] += velocity
            r = self.system.residual(x[rows], self.rhs[rows])
            residual[rows] = relative(r, self.rhs[rows])
            done += 1
            self._require_bounded(residual[rows], first[rows], schedule, done)
        return x, residual, done

    def _stochastic(self, x: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor, int]:
        """Iterate over minibatches; return the average, and its residual on all examples."""
        x, average, velocity = x.clone(), x.clone(), torch.zeros_like(x)
        first = residual = relative(self.system.residual(x, self.rhs), self.rhs)
        for done, (alpha, beta) in enumerate(schedule.coefficients(), 1):
            r = self.system(x, self._batch()).neg_().add_(self.rhs)
            self._require_bounded(relative(r, self.rhs), first, schedule, done)
            velocity.mul_(beta).add_(self.precondition(r), alpha=alpha)
            x += velocity
            average.lerp_(x, (_AVERAGE + 1) / (done + _AVERAGE))
            if done % self.check_every == 0 or done == self.iterations:
                residual = relative(self.system.residual(average, self.rhs), self.rhs)
                if done == self.iterations or bool((residual <= self.tolerance).all()):
                    break
        return average, residual, done

    def _require_bounded(
        self, residual: Tensor, first: Tensor, schedule: Schedule, done: int
    ) -> None:
        """Raise :class:`SolverDivergenceError` if a residual has grown out of proportion."""
        if bool((residual <= _GROWTH * (1 + first)).all()):
            return
        worst = float(residual.max())
        grown = f"the residual grew to {worst:.3g} of the right-hand side in {done} iterations"
        if schedule.step is None:
            assert schedule.spectrum is not None
            raise SolverDivergenceError(
                f"{grown}: the spectrum of (P + λ)⁻¹(C + λI) reaches beyond the "
                f"{schedule.spectrum.high:.4g} that Chebyshev's steps assume. Pass a wider "
                f"spectrum=({schedule.spectrum.low:.3g}, {2 * schedule.spectrum.high:.3g}), or "
                f"another seed for its estimate.",
                None,
            )
        stable = self._stable(schedule.momentum, self._spectrum())
        raise SolverDivergenceError(
            f"{grown} with step={schedule.step:.4g} and momentum={schedule.momentum:g}. Steps "
            f"below {stable:.4g} are stable here; step=None chooses one.",
            stable,
        )
