"""Stochastic gradient Langevin dynamics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bayesinf._posterior import Potential
from bayesinf._rng import ChainGenerators
from bayesinf.samplers._protocol import State

__all__ = ["SGLD"]


@dataclass(frozen=True)
class SGLD:
    r"""``w ← w − (ε/2) ∇U_B(w) + √ε ξ``, ``ξ ~ N(0, I)``.

    On a quadratic potential with Hessian ``A`` and exact gradients the stationary covariance is
    ``A⁻¹(I − εA/4)⁻¹``; it exists iff ``ε a_max < 4``, and the slowest direction relaxes in about
    ``2/(ε a_min)`` steps.

    Parameters
    ----------
    step_size
        ``ε > 0``, in units of the inverse potential Hessian: stiff directions have
        ``a = nβ h + γ``, so ``ε`` scales with ``1/nβ``.

    Raises
    ------
    ValueError
        If the step size is not positive.

    References
    ----------
    Welling and Teh 2011, eq. 4.
    """

    step_size: float

    def __post_init__(self) -> None:
        if not self.step_size > 0:
            raise ValueError(f"step_size must be > 0; got {self.step_size}.")

    def init(self, position: Tensor, rng: ChainGenerators) -> State:
        """Start at ``position``."""
        return {"position": position}

    def step(
        self, state: State, potential: Potential, batch: Tensor | None, rng: ChainGenerators
    ) -> tuple[State, dict[str, Any]]:
        """One Euler–Maruyama step."""
        position = state["position"]
        drift = potential.grad(position, batch)
        noise = rng.normal_like(position)
        moved = noise.mul_(self.step_size**0.5).add_(drift, alpha=-0.5 * self.step_size)
        return {"position": moved.add_(position)}, {}

    def freeze(self, state: State) -> State:
        """Nothing adapts."""
        return state
