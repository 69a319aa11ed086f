"""The stochastic gradient Nosé–Hoover thermostat in the BADODAB splitting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesinf._posterior import Potential
from bayesinf._rng import ChainGenerators
from bayesinf.samplers._preconditioner import Preconditioner, pull, push
from bayesinf.samplers._protocol import State

__all__ = ["SGNHT"]


@dataclass(frozen=True)
class SGNHT:
    r"""Langevin dynamics whose friction ``ζ`` settles where the momenta have temperature 1.

    ``dz = u dt``, ``du = −∇_z U dt − ζu dt + √(2Γ) dW``, ``dζ = (Γ²/m)(‖u‖²/d − 1) dt``. Noise of
    the gradient that is the same in every direction of ``z`` and at every position heats the
    momenta, and ``ζ`` rises from ``Γ`` by as much as that takes: unlike with a fixed friction, the
    positions keep their law. Noise that differs by direction is corrected on average alone.
    One step of size ``h = √ε``, with one gradient:

        u ← u − (h/2) Sᵀ∇U_B(w)                                      B
        w ← w + (h/2) S u                                            A
        ζ ← ζ + (h/2)(Γ²/m)(‖u‖²/d − 1)                               D
        u ← e^{−ζh} u + √(Γ(1 − e^{−2ζh})/ζ) ξ                         O, then D, A, B again

    With ``ζ`` held at ``Γ`` this is :class:`Underdamped`, exact for the positions of quadratic
    potentials; with ``ζ`` moving it is exact up to terms of second order in ``h``, and with noise
    of the gradient up to the first order in ``ζh``.

    Parameters
    ----------
    step_size
        ``ε = h² > 0``, comparable with that of :class:`SGLD`.
    friction
        ``Γ > 0``: of the injected noise, and where ``ζ`` starts.
    inertia
        ``m > 0`` of the thermostat per parameter, a pure number: ``ζ`` settles in about ``m/Γ``
        and fluctuates by ``Γ/√(m d)``.
    preconditioner
        ``P = S Sᵀ``, the inverse of the mass matrix; None is the identity.

    Raises
    ------
    ValueError
        If a setting is not positive.

    References
    ----------
    Ding et al. 2014, "Bayesian sampling using stochastic gradient thermostats", algorithm 2;
    Leimkuhler and Shang 2016 (arXiv 1505.06889), section 4, for the splitting.
    """

    step_size: float
    friction: float
    inertia: float = 1.0
    preconditioner: Preconditioner | None = None

    full_batch: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (self.step_size > 0 and self.friction > 0 and self.inertia > 0):
            raise ValueError(
                f"need step_size > 0, friction > 0 and inertia > 0; got step_size={self.step_size},"
                f" friction={self.friction}, inertia={self.inertia}."
            )

    def init(self, position: Tensor, rng: ChainGenerators) -> State:
        """Start at ``position`` with momenta from their law and ``ζ = Γ``."""
        thermostat = position.new_full((len(position), 1), self.friction)
        momentum = rng.normal_like(position)
        return {"position": position, "momentum": momentum, "thermostat": thermostat}

    def step(
        self, state: State, potential: Potential, batch: Tensor | None, rng: ChainGenerators
    ) -> tuple[State, dict[str, Any]]:
        """One BADODAB step; its gradient serves the first kick of the next step, too."""
        position, h = state["position"], self.step_size**0.5
        force = state["force"] if "force" in state else self._force(position, potential, batch)
        before = state["momentum"].add(force, alpha=-0.5 * h)
        thermostat = self._heat(state["thermostat"], before)
        noise = rng.normal_like(position).mul_(self._spread(thermostat))
        after = noise.addcmul_(before, torch.exp(-h * thermostat))
        thermostat = self._heat(thermostat, after)
        moved = push(self.preconditioner, before.add_(after).mul_(0.5 * h)).add_(position)
        force = self._force(moved, potential, batch)
        momentum = after.add_(force, alpha=-0.5 * h)
        return {
            "position": moved, "momentum": momentum, "thermostat": thermostat, "force": force
        }, {}  # fmt: skip

    def _heat(self, thermostat: Tensor, momentum: Tensor) -> Tensor:
        """Half a step of ``ζ (C, 1)``."""
        excess = momentum.square().mean(1, keepdim=True) - 1
        return thermostat + (0.5 * self.step_size**0.5 * self.friction**2 / self.inertia) * excess

    def _spread(self, thermostat: Tensor) -> Tensor:
        """``√(Γ(1 − e^{−2ζh})/ζ)``, which is ``√(2Γh)`` at ``ζ = 0`` and exists below, too."""
        x = 2 * self.step_size**0.5 * thermostat
        small = x.abs() < 1e-4
        ratio = torch.where(small, 1 - 0.5 * x, -torch.expm1(-x) / torch.where(small, 1.0, x))
        return (2 * self.friction * self.step_size**0.5 * ratio).sqrt()

    def _force(self, position: Tensor, potential: Potential, batch: Tensor | None) -> Tensor:
        """``Sᵀ ∇U``, the negative of the force in ``z``."""
        return pull(self.preconditioner, potential.grad(position, batch))

    def freeze(self, state: State) -> State:
        """Nothing stops: the thermostat is a part of the dynamics, not an adaptation."""
        return state

    def excess(self, variance: Tensor) -> Tensor:
        """``h v/(2Γ)``, of noise in a few of the directions.

        ``ζ`` takes back the average over all directions, which is little where most have none.
        """
        return 0.5 * self.step_size**0.5 / self.friction * variance
