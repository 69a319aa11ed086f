r"""What Metropolis-adjusted kernels share: leapfrog trajectories, energies, the decision.

Coordinates ``z`` with ``w = w0 + S z`` and momenta ``u ~ N(0, I)``. The energy is
``H = U(w) + ‖u‖²/2``. States hold the potential's value and its gradient ``Sᵀ∇U`` at the position,
so that a step computes neither again.

Energies are summed in float64, but a network in float32 gives each loss with a relative error of
about 1e-7, and ``U`` is ``nβ`` times their mean: differences of ``H`` are known to ``1e-7 · U`` or
so (0.001 at ``U = 10⁴``, measured on a network of 17,226 parameters), and a decision that is
blurred by much less than 1 is a fair one. Where ``nβ L`` exceeds about 1e6, use a task in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesinf._posterior import Potential
from bayesinf._rng import ChainGenerators
from bayesinf.samplers._preconditioner import Preconditioner, pull, push
from bayesinf.samplers._protocol import State

__all__ = ["choose", "evaluate", "leapfrog", "uniform"]


def evaluate(
    position: Tensor, potential: Potential, preconditioner: Preconditioner | None
) -> State:
    """Position, ``U (C,)`` in float64 and ``Sᵀ∇U (C, d)``, over all examples."""
    loss_grad, losses = potential.evaluate(position)
    value = potential.value_of_loss(position.double(), losses.double().mean(1))
    grad = potential.assemble(position, loss_grad, None)
    return {"position": position, "value": value, "force": pull(preconditioner, grad)}


def leapfrog(
    start: State,
    momentum: Tensor,
    h: Tensor | float,
    steps: int,
    potential: Potential,
    preconditioner: Preconditioner | None,
) -> tuple[State, Tensor]:
    """``steps`` leapfrog steps of size ``h``, a number or one per chain ``(C, 1)``.

    Returns
    -------
    end : State
        As :func:`evaluate` gives it.
    momentum : Tensor
        ``(C, d)``.
    """
    end = start
    momentum = momentum - 0.5 * h * start["force"]
    for k in range(steps):
        moved = end["position"] + push(preconditioner, h * momentum)
        if k + 1 < steps:
            force = pull(preconditioner, potential.grad(moved))
            end, momentum = {"position": moved}, momentum - h * force
    end = evaluate(moved, potential, preconditioner)
    return end, momentum - 0.5 * h * end["force"]


def choose(
    start: State, end: State, before: Tensor, after: Tensor, rng: ChainGenerators
) -> tuple[State, dict[str, Any]]:
    """Accept each chain's proposal with probability ``min(1, e^{H(start) − H(end)})``.

    A proposal whose value or gradient is not finite is rejected.

    Returns
    -------
    state : State
        The end of the accepted trajectories, the start of the others.
    info : dict
        ``"acceptance" (C,)``, the probabilities.
    """
    gain = start["value"] - end["value"] + _kinetic(before) - _kinetic(after)
    finite = end["value"].isfinite() & end["force"].isfinite().all(1)
    probability = torch.where(finite, gain, float("-inf")).clamp(max=0).exp().nan_to_num(0.0)
    accepted = uniform(rng, end["position"])[:, 0] < probability
    state = {
        name: torch.where(accepted.view(-1, *[1] * (old.ndim - 1)), end[name], old)
        for name, old in start.items()
    }
    return state, {"acceptance": probability}


def uniform(rng: ChainGenerators, position: Tensor) -> Tensor:
    """``(C, 1)`` numbers in ``[0, 1)``, float64, from each chain's own normals."""
    empty = position.new_empty((len(position), 1), dtype=torch.float64)
    return torch.special.ndtr(rng.normal_like(empty))


def _kinetic(momentum: Tensor) -> Tensor:
    return 0.5 * momentum.double().square().sum(1)
