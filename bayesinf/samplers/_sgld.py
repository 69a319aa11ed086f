"""Stochastic gradient Langevin dynamics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from bayesinf._posterior import Potential
from bayesinf._rng import ChainGenerators
from bayesinf.samplers._preconditioner import Preconditioner, pull, push
from bayesinf.samplers._protocol import State

__all__ = ["SGLD"]


@dataclass(frozen=True)
class SGLD:
    r"""``w ← w − (ε/2) P ∇U_B(w) + √ε S ξ``, ``ξ ~ N(0, I)``, ``P = S Sᵀ``.

    On a quadratic potential with Hessian ``A`` and exact gradients the stationary covariance is
    ``S Ã⁻¹(I − εÃ/4)⁻¹ Sᵀ`` with ``Ã = Sᵀ A S``; it exists iff ``ε ã_max < 4``, and the slowest
    direction relaxes in about ``2/(ε ã_min)`` steps. Without a preconditioner ``Ã = A``, whose
    directions differ by orders of magnitude; with that of a curvature they are of order 1.

    Parameters
    ----------
    step_size
        ``ε > 0``. Without a preconditioner in units of the inverse Hessian of the potential: stiff
        directions have ``a = nβ h + γ``, so ``ε`` scales with ``1/nβ``. With one it is a pure
        number.
    preconditioner
        ``P``; None is the identity.

    Raises
    ------
    ValueError
        If the step size is not positive.

    References
    ----------
    Welling and Teh 2011, eq. 4; with a constant preconditioner Girolami and Calderhead 2011, eq. 6.
    """

    step_size: float
    preconditioner: Preconditioner | None = None

    full_batch: ClassVar[bool] = False

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
        drift = pull(self.preconditioner, potential.grad(position, batch))
        noise = rng.normal_like(position)
        moved = noise.mul_(self.step_size**0.5).add_(drift, alpha=-0.5 * self.step_size)
        return {"position": push(self.preconditioner, moved).add_(position)}, {}

    def freeze(self, state: State) -> State:
        """Nothing adapts."""
        return state

    def excess(self, variance: Tensor) -> Tensor:
        """``ε v/4``: by how much white gradient noise raises a direction's stationary variance.

        A step adds ``(ε/2)² v`` to its own noise ``ε``, in every direction of ``z``, whatever the
        curvature.
        """
        return 0.25 * self.step_size * variance
