r"""How hot a posterior may be before the loss stops looking like the one at its checkpoint.

For displacements ``δ`` around ``w0`` and the tilted loss ``T(δ) = L(w0 + δ) − L(w0) − ⟨∇L(w0), δ⟩``
the **virial ratio** is

    v = 2 E[T(δ)] / E[⟨δ, ∇T(δ)⟩]

It is 1 for a quadratic loss, whatever the curvature and the law of ``δ``; above 1 where the loss
grows more slowly (kinks of ReLU units: 2 for a piecewise linear one), below 1 where it grows
faster, as it does once the displacements rearrange the network. It has no units: a rescaled loss,
doubled data or other coordinates leave it as it is.

On a chain that has arrived, ``E⟨δ, ∇U⟩ = d`` (equipartition), so that

    v = 2 nβ E[T] / (d − p E‖δ‖²),       p = γ + nβ·wd,

needs only what a trace store holds; the denominator is the effective dimension at that temperature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from bayesinf._posterior import Potential
from bayesinf._task import Task

__all__ = ["LocalRange", "find_temperature", "first_temperature", "look_at", "virial"]

_BRACKET = 8
"""Factors of 10 that the search goes colder than where it begins."""

_HOTTER = 10.0
"""Factor that it may go hotter: noise is then three times as long as the weights."""

_COLDER, _DEPARTURE = 1e3, 3.0
"""``nβ E[T]``, which a quadratic loss holds constant, may rise so far above what it is colder."""


@dataclass(frozen=True)
class LocalRange:
    """What a search for a temperature saw.

    Attributes
    ----------
    n_beta
        The hottest ``nβ`` whose virial ratio is as wanted; where the search began if the loss is
        local ten times as hot, too.
    tried
        All ``(nβ, v, E[T])`` that were looked at, by ``nβ``.
    """

    n_beta: float
    tried: tuple[tuple[float, float, float], ...]


def virial(potential: Potential, displacements: Tensor) -> tuple[float, float]:
    """Virial ratio of the tilted mean loss and its mean rise, over displacements ``(K, d)``.

    Parameters
    ----------
    potential
        Of a tilted posterior with ``n_beta=1, gamma=0, weight_decay=0``.
    displacements
        ``δ``.

    Returns
    -------
    ratio, rise
        ``v`` and ``E[T]``; the ratio is 0 where a loss or a slope is not finite.
    """
    start = potential.value(potential.center[None])
    value, slope = potential.value_and_grad(potential.center + displacements)
    rise = float((value - start).double().mean())
    work = float((slope.double() * displacements.double()).sum(1).mean())
    if not (math.isfinite(rise) and math.isfinite(work)):
        return 0.0, float("inf")
    return (2 * rise / work if work > 0 else 0.0), rise


def first_temperature(task: Task, damping: float) -> float:
    """``nβ`` at which the noise of unconstrained directions is as long as the weights."""
    norm = float(task.flatten(task.params).double().square().sum())
    return task.dimension / (damping * norm) if norm > 0 else float(task.n)


def find_temperature(
    potential: Potential, noise: Tensor, *, start: float, ratio: float, precision: float = 1.1
) -> LocalRange:
    """Find the hottest ``nβ`` at which the virial ratio of Laplace draws is at least ``ratio``.

    The ratio is a slope, ``1/v = d log E[T] / d log(1/nβ)``, and far out, where a network with norm
    layers grows linearly again, it comes back to 1 and above. What the slopes add up to does not:
    ``nβ E[T]`` must also stay within three times what it is a thousand times colder than where the
    search begins; and where a large damping leaves the loss little to say, no temperature beyond
    ten times the first is looked at, as longer noise than that leaves nothing of the network.

    Parameters
    ----------
    potential
        As in :func:`virial`.
    noise
        Draws ``(K, d)`` from the Laplace approximation at ``nβ = 1``. The same ones, scaled by
        ``nβ^{-1/2}``, serve every temperature, so that the ratio is a smooth function of it.
    start
        Where the search begins: :func:`first_temperature`.
    ratio
        Wanted virial ratio, in (0, 1).
    precision
        Factor to which ``nβ`` is found.

    Raises
    ------
    ValueError
        If the ratio is not in (0, 1).
    RuntimeError
        If no temperature in reach has that ratio.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"virial must lie between 0 and 1, such as 0.75; got {ratio}.")
    tried: dict[float, tuple[float, float]] = {}

    def look(n_beta: float) -> float:
        tried[n_beta] = virial(potential, noise / n_beta**0.5)
        return n_beta * tried[n_beta][1]

    quadratic = look(start * _COLDER)

    def local(n_beta: float) -> bool:
        departure = look(n_beta) / quadratic if quadratic > 0 else 1.0
        return departure <= _DEPARTURE and tried[n_beta][0] >= ratio

    # The hot end of the local range: whatever lies far on its cold side does not matter.
    cold = hot = start
    if local(start):
        if local(hot := start / _HOTTER):
            return LocalRange(start, _table(tried))
    else:
        while not local(cold := cold * 10):
            hot = cold
            if cold > start * 10.0**_BRACKET:
                raise RuntimeError(
                    f"the loss is not locally quadratic at any temperature up to "
                    f"n_beta={cold:.3g}: its virial ratio is {tried[cold][0]:.3g}, wanted is "
                    f"{ratio}. Usual causes: rounding (use a float64 model), a damping that is too "
                    f"small, a loss with jumps. Raise damping, or choose n_beta yourself."
                )
    while cold / hot > precision:
        middle = math.sqrt(cold * hot)
        if local(middle):
            cold = middle
        else:
            hot = middle
    return LocalRange(cold, _table(tried))


def look_at(potential: Potential, noise: Tensor, n_beta: float) -> LocalRange:
    """Virial ratio at a temperature that is given; see :func:`find_temperature`."""
    return LocalRange(n_beta, _table({n_beta: virial(potential, noise / n_beta**0.5)}))


def _table(
    tried: dict[float, tuple[float, float]],
) -> tuple[tuple[float, float, float], ...]:
    return tuple((n, *tried[n]) for n in sorted(tried))
