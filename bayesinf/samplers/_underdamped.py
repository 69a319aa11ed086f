"""Underdamped Langevin dynamics in the BAOAB splitting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from bayesinf._posterior import Potential
from bayesinf._rng import ChainGenerators
from bayesinf.samplers._preconditioner import Preconditioner, pull, push
from bayesinf.samplers._protocol import State

__all__ = ["Underdamped"]


@dataclass(frozen=True)
class Underdamped:
    r"""Langevin dynamics with momentum, ``dz = u dt``, ``du = −∇_z U dt − Γu dt + √(2Γ) dW``.

    One step of size ``h = √ε`` splits it into kicks (B), drifts (A) and an exact refreshment of the
    momentum (O), in the order B A O A B, with one gradient:

        u ← u − (h/2) Sᵀ∇U(w)                              B
        u' = e^{−Γh} u + √(1 − e^{−2Γh}) ξ                   O
        w ← w + (h/2) S (u + u')                           A before and after O
        u ← u' − (h/2) Sᵀ∇U(w)                             B

    On a quadratic potential positions have **exactly** the covariance ``A⁻¹``, whatever the step,
    as long as ``ε ã_max < 4``, ``Ã = Sᵀ A S``; momenta do not. A direction relaxes in about
    ``max(2/Γ, Γ/ã)/h`` steps: without a preconditioner ``√κ`` of them, where overdamped dynamics
    take ``κ``, the condition number.

    Parameters
    ----------
    step_size
        ``ε = h² > 0``, comparable with that of :class:`SGLD`.
    friction
        ``Γ > 0``, in units of an inverse time: of ``√ã`` of the slowest direction is the fastest.
    preconditioner
        ``P = S Sᵀ``, the inverse of the mass matrix; None is the identity.

    Raises
    ------
    ValueError
        If a setting is not positive.

    References
    ----------
    Leimkuhler and Matthews 2013, "Rational construction of stochastic numerical methods for
    molecular sampling", section 4 (BAOAB is exact for the positions of harmonic systems).
    """

    step_size: float
    friction: float
    preconditioner: Preconditioner | None = None

    full_batch: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (self.step_size > 0 and self.friction > 0):
            raise ValueError(
                f"need step_size > 0 and friction > 0; got step_size={self.step_size}, "
                f"friction={self.friction}."
            )

    def init(self, position: Tensor, rng: ChainGenerators) -> State:
        """Start at ``position`` with momenta from their law."""
        return {"position": position, "momentum": rng.normal_like(position)}

    def step(
        self, state: State, potential: Potential, batch: Tensor | None, rng: ChainGenerators
    ) -> tuple[State, dict[str, Any]]:
        """One BAOAB step; its gradient serves the first kick of the next step, too."""
        position, h = state["position"], self.step_size**0.5
        force = state["force"] if "force" in state else self._force(position, potential, batch)
        kept = math.exp(-self.friction * h)
        before = state["momentum"].add(force, alpha=-0.5 * h)
        after = rng.normal_like(position).mul_((1 - kept**2) ** 0.5).add_(before, alpha=kept)
        moved = push(self.preconditioner, before.add_(after).mul_(0.5 * h)).add_(position)
        force = self._force(moved, potential, batch)
        momentum = after.add_(force, alpha=-0.5 * h)
        return {"position": moved, "momentum": momentum, "force": force}, {}

    def _force(self, position: Tensor, potential: Potential, batch: Tensor | None) -> Tensor:
        """``Sᵀ ∇U``, the negative of the force in ``z``."""
        return pull(self.preconditioner, potential.grad(position, batch))

    def freeze(self, state: State) -> State:
        """Nothing adapts."""
        return state

    def excess(self, variance: Tensor) -> Tensor:
        r"""``(ε v/4) coth(Γh/2)``: by how much white gradient noise raises a stationary variance.

        The two kicks that share a gradient add ``h² v`` to the momentum's variance, of which the
        friction takes ``1 − e^{−2Γh}`` away; the discrete Lyapunov equation of a direction of
        curvature ``ã`` gives this times ``1/(1 − εã/4)``, which is 1 but for the stiffest ones.
        """
        cooled = math.tanh(0.5 * self.friction * self.step_size**0.5)
        return 0.25 * self.step_size / cooled * variance
