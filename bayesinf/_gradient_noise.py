r"""How much hotter than wanted gradient noise makes a chain.

A gradient of a batch is the exact one plus noise of covariance ``V(w)``, in the coordinates ``z``
in which a kernel's own noise is standard normal (``w = S z``: a gradient is ``Sᵀ∇U``). Treated as
white, noise of variance ``v`` in a direction raises the stationary variance there by a share that
every kernel states, ``kernel.excess(v)``: the **excess temperature** of the direction.

The share is exact on a quadratic for the eigenvectors of ``Ã = SᵀAS``; a direction that mixes
stiff ones, where noise is, with slow ones, where variance is, gets less.

``V`` is averaged over positions, as a stationary law does. Three numbers say what it is like:

    mean       tr V / d               over all directions, most of which a batch leaves alone
    typical    tr V² / tr V           over directions, each counted by the noise it gets
    largest    top eigenvalue         the hottest direction

Batches without replacement compensate within an epoch. Of a run, directions are therefore given
the share of their white excess that :mod:`bayesinf._compensation` says, at the curvature measured
along the noise.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bayesinf._batching import Batches, Batching, normalise
from bayesinf._compensation import uncompensated_share
from bayesinf._gradients import MAX_VECTORIZED_PARAMETERS
from bayesinf._posterior import LocalPosterior, Potential
from bayesinf.samplers import Preconditioner, Sampler, State
from bayesinf.samplers._preconditioner import pull, push

__all__ = ["GradientNoise", "GradientNoiseWarning", "excess_temperature", "gradient_noise"]

_NUMBERS = 2**22
"""Numbers in all the gradients held at once; where they would be more, fewer batches are drawn,
and of the largest networks those of fewer chains."""

_FEWEST = 4

_AT_ONCE = 4
"""Examples of one product with the Hessian, which keeps four times what a gradient does; of
networks too large to vectorise, one."""

_PER_PRODUCT = 8
"""Gradients that cost about what two products with the Hessian do."""

_CURVATURES = 4
"""Positions at which curvature along the noise is measured."""


class GradientNoiseWarning(UserWarning):
    """Minibatches heat the chains above the stated bound."""


@dataclass(frozen=True)
class GradientNoise:
    """Covariance ``V`` of a stochastic gradient; see the module.

    Attributes
    ----------
    mean, typical, largest
        Variances, in units of a squared gradient of the potential.
    draws
        Gradients per chain that they were measured from.
    top
        The hottest direction, ``(d,)`` in ``z``.
    sample
        Noise of one batch of every measured chain, ``(C, d)`` in ``z``.
    """

    mean: float
    typical: float
    largest: float
    draws: int
    top: Tensor = field(repr=False, compare=False)
    sample: Tensor = field(repr=False, compare=False)

    def excess(self, sampler: Any) -> dict[str, float]:
        """Share by which each, as white noise, raises the stationary variance under a kernel."""
        found = sampler.excess(torch.tensor([self.mean, self.typical, self.largest]).double())
        return dict(zip(("mean", "typical", "largest"), found.tolist(), strict=True))


def gradient_noise(
    posterior: LocalPosterior,
    position: Tensor,
    batch_size: int | Batches,
    *,
    preconditioner: Preconditioner | None = None,
    draws: int = 32,
    seed: int = 0,
    vectorize: bool | None = None,
    chunk_size: int = 1000,
) -> GradientNoise:
    r"""Measure the covariance of a stochastic gradient at given positions.

    Parameters
    ----------
    posterior
        Whose gradient.
    position
        ``(C, d)``: typical ones, such as the last of ``C`` chains. A moving anchor is taken at
        these positions and then holds for a chain at the others of them, one further on.
    batch_size
        As of :func:`bayesinf.sample`.
    preconditioner
        Of the kernel, whose coordinates the noise is measured in.
    draws
        Independent batches per position, at least 4; fewer where all gradients together would be
        more than ``2^22`` numbers. Where 4 are still more, fewer positions are measured.
    seed
        Of the batches.
    vectorize, chunk_size
        As of :func:`bayesinf.sample`.

    Returns
    -------
    GradientNoise
        ``mean`` and the numerator of ``typical`` are without bias. ``largest`` is the variance,
        measured on one half of the batches, of the direction that has most of it on the other:
        without bias for that direction, so at most the top eigenvalue on average.

    Raises
    ------
    ValueError
        If the batch is the full one, or there are fewer than 4 draws.
    """
    batches = normalise(batch_size, posterior)
    if batches is None:
        raise ValueError(f"a batch of all {posterior.task.n} training examples has no noise.")
    potential = posterior.bind(vectorize=vectorize, chunk_size=chunk_size)
    with torch.no_grad():
        batching = Batching(batches, potential, seed, len(position))
        batching.at(0, position.roll(1, 0))
        return measure(batching, {"position": position}, preconditioner, draws)


def measure(
    batching: Batching,
    state: State,
    preconditioner: Preconditioner | None,
    draws: int = 32,
    alive: list[int] | None = None,
) -> GradientNoise:
    """:func:`gradient_noise` at a state's positions, with the anchors as they are now."""
    position = state["position"]
    rows = list(range(len(position))) if alive is None else alive
    if draws < _FEWEST:
        raise ValueError(f"draws must be at least {_FEWEST}; got {draws}.")
    rows = rows[: max(1, _NUMBERS // (_FEWEST * position.shape[1]))]
    draws = min(draws, max(_FEWEST, _NUMBERS // position[rows].numel()))
    found = position.new_empty(draws, len(rows), position.shape[1])
    order = [*range(0, draws, 2), *range(1, draws, 2)]  # the two halves one after the other
    for place, k in enumerate(order):
        gradient = pull(preconditioner, batching.potential.grad(position, batching.stream.probe(k)))
        found[place] = gradient[rows]
    return _summarise(_scaled(found, {name: value[rows] for name, value in state.items()}))


def _scaled(rows: Tensor, state: State) -> Tensor:
    """Times the root of a diagonal preconditioner that was adapted and frozen."""
    return rows * state["scale"].sqrt() if "scale" in state else rows


def _summarise(rows: Tensor) -> GradientNoise:
    """Of gradients ``(K, C, d)``: noise is what differs between the ``K``. Overwrites them.

    The first ``⌈K/2⌉`` and the others are the two halves.
    """
    draws, d = rows.shape[0], rows.shape[2]
    noise = rows[0] - rows.mean(0)
    halves = [_centre(half) for half in rows.split(-(-draws // 2))]
    inner = [half @ half.T for half in halves]
    trace = float(sum(own.double().trace() for own in inner)) / 2
    if trace == 0 or not math.isfinite(trace):
        return GradientNoise(trace, trace, trace, draws, noise[0], noise)
    cross = (halves[0] @ halves[1].T).double()  # of independent halves
    vectors = torch.linalg.eigh(inner[0].double())[1]
    top = halves[0].T @ vectors[:, -1].to(rows)
    top /= top.norm()
    square = float(cross.square().sum())
    largest = float((halves[1] @ top).double().square().sum())
    return GradientNoise(trace / d, square / trace, largest, draws, top, noise)


def _centre(rows: Tensor) -> Tensor:
    """``(K·C, d)`` with the mean over ``K`` taken off, scaled so that ``XᵀX`` estimates ``V``."""
    draws, chains, d = rows.shape
    rows -= rows.mean(0)
    rows /= ((draws - 1) * chains) ** 0.5
    return rows.view(-1, d)


def excess_temperature(
    sampler: Sampler, batching: Batching, state: State, alive: list[int]
) -> dict[str, float] | None:
    """Excess temperatures at the positions of a run's healthy chains, epochs accounted for.

    None at the full batch, and for a kernel that states none.
    """
    if not batching.stream.parts or not hasattr(sampler, "excess"):
        return None
    preconditioner = getattr(sampler, "preconditioner", None)
    noise = measure(batching, state, preconditioner, alive=alive)
    white = noise.excess(sampler)
    if not 0 < noise.mean < float("inf"):
        return white
    along = noise.sample[:_CURVATURES]
    kept = {name: value[alive[: len(along)]] for name, value in state.items()}
    examples = _examples(batching, noise.draws, len(along))
    curvature = [
        _curvature(batching.potential, kept, preconditioner, rows, examples)
        for rows in (along, noise.top.expand_as(along))
    ]
    share = uncompensated_share(sampler, batching.stream, torch.tensor(curvature)).tolist()
    kept_share = {"mean": share[0], "typical": share[0], "largest": share[1]}
    return {name: value * kept_share[name] for name, value in white.items()}


def _examples(batching: Batching, draws: int, chains: int) -> Tensor | None:
    """Examples ``(C, B)`` to measure curvature on, at no more cost than the noise; None for all."""
    batches = [batching.stream.probe(k) for k in range(draws)]
    found = torch.cat([batch[:chains] for batch in batches if batch is not None], dim=1)
    size = max(_AT_ONCE, found.shape[1] // _PER_PRODUCT)
    found = found[:, :size]
    return found if size < batching.potential.posterior.task.n else None


def _curvature(
    potential: Potential,
    state: State,
    preconditioner: Preconditioner | None,
    rows: Tensor,
    examples: Tensor | None,
) -> float:
    """Mean of ``xᵀÃx / xᵀx`` over the rows, each at its position, at least the prior's share."""
    moved = push(preconditioner, _scaled(rows, state))
    at_once = 1 if rows.shape[1] > MAX_VECTORIZED_PARAMETERS else _AT_ONCE
    parts = [None] if examples is None else examples.split(at_once, dim=1)
    size = [1 if part is None else part.shape[1] for part in parts]
    inner = sum(
        k / sum(size) * float((potential.hvp(state["position"], moved, part) * moved).sum())
        for k, part in zip(size, parts, strict=True)
    )
    least = potential.posterior.prior_precision * float(moved.square().sum())
    return max(inner, least, 1e-12) / float(rows.square().sum())


def warn_of_noise(excess: dict[str, float] | None, bound: float, stacklevel: int) -> None:
    """Warn where the typical excess temperature is above the bound."""
    if excess is None or not excess["typical"] > bound:
        return
    warnings.warn(
        f"gradient noise heats the directions that it reaches by {excess['typical']:.0%} (the "
        f"hottest by {excess['largest']:.0%}, the average one by {excess['mean']:.2%}), above the "
        f"bound max_excess={bound:g}: their variances are too large by that share. Usual cause: a "
        f"batch too small for the step size. Lower the step, take a larger batch or the full one, "
        f"or try to draw hard examples more often (batch_size=Batches(…, "
        f"probabilities='gradient')), which helps where a few of them make most of the noise.",
        GradientNoiseWarning,
        stacklevel=stacklevel + 1,
    )
