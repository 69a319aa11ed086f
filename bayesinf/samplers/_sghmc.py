"""Stochastic gradient Hamiltonian Monte Carlo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from bayesinf._posterior import Potential
from bayesinf._rng import ChainGenerators
from bayesinf.samplers._preconditioner import Preconditioner, pull, push
from bayesinf.samplers._protocol import State

__all__ = ["SGHMC"]


@dataclass(frozen=True)
class SGHMC:
    r"""Gradient descent with momentum, and the noise that its friction calls for.

    With ``h = √ε``, ``α = Γh``, ``β̂ = B̂h`` and ``P = S Sᵀ``

        w ← w + h S u
        u ← (1 − α) u − h Sᵀ∇U_B(w) + √(2(α − β̂)) ξ,      ξ ~ N(0, I)

    On a quadratic potential with Hessian ``A``, exact gradients and ``Ã = Sᵀ A S`` the stationary
    covariance of the positions is ``(1 − β̂/α) S Ã⁻¹ (I − εÃ/(4 − 2α))⁻¹ Sᵀ``; it exists iff
    ``ε ã_max < 4 − 2α``. Gradient noise of covariance ``V`` in the coordinates ``z`` heats like
    ``B = hV/2`` more friction's worth of noise, which ``B̂`` takes back.

    Parameters
    ----------
    step_size
        ``ε = h² > 0``, comparable with that of :class:`SGLD`.
    friction
        ``Γ > 0``, in units of an inverse time, at most ``1/h``.
    noise_correction
        ``B̂``, an estimate of ``hV/2``, in units of the friction: ``0 ≤ B̂ < Γ``.
    preconditioner
        ``P``, the inverse of the mass matrix; None is the identity.

    Raises
    ------
    ValueError
        If a setting is out of range.

    References
    ----------
    Chen, Fox and Guestrin 2014 (arXiv 1402.4102), algorithm 2 and eq. 15, whose ``η`` is ``ε``.
    """

    step_size: float
    friction: float
    noise_correction: float = 0.0
    preconditioner: Preconditioner | None = None

    full_batch: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (self.step_size > 0 and 0 <= self.noise_correction < self.friction):
            raise ValueError(
                f"need step_size > 0 and 0 ≤ noise_correction < friction; got step_size="
                f"{self.step_size}, friction={self.friction}, noise_correction="
                f"{self.noise_correction}. Where gradient noise alone heats more than the friction "
                f"cools, raise the friction or lower the step."
            )
        if self.friction * self.step_size**0.5 > 1:
            raise ValueError(
                f"friction·√step_size is the share of the momentum that a step takes away, at most "
                f"1; got {self.friction * self.step_size**0.5:.4g}. Lower one of the two: at 1 no "
                f"momentum is left, and SGLD with twice the step is the same."
            )

    def init(self, position: Tensor, rng: ChainGenerators) -> State:
        """Start at ``position`` with standard normal momenta."""
        return {"position": position, "momentum": rng.normal_like(position)}

    def step(
        self, state: State, potential: Potential, batch: Tensor | None, rng: ChainGenerators
    ) -> tuple[State, dict[str, Any]]:
        """One step: the position, then the momentum at the new position."""
        h, momentum = self.step_size**0.5, state["momentum"]
        moved = push(self.preconditioner, h * momentum).add_(state["position"])
        force = pull(self.preconditioner, potential.grad(moved, batch))
        kick = rng.normal_like(moved).mul_((2 * (self.friction - self.noise_correction) * h) ** 0.5)
        kick.add_(momentum, alpha=1 - self.friction * h).add_(force, alpha=-h)
        return {"position": moved, "momentum": kick}, {}

    def freeze(self, state: State) -> State:
        """Nothing adapts."""
        return state

    def excess(self, variance: Tensor) -> Tensor:
        """``(h v/2 − B̂)/Γ``: what the correction leaves of the heat."""
        return (0.5 * self.step_size**0.5 * variance - self.noise_correction) / self.friction
