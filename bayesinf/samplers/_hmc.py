"""Hamiltonian Monte Carlo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from bayesinf._posterior import Potential
from bayesinf._rng import ChainGenerators
from bayesinf.samplers._metropolis import choose, evaluate, leapfrog, uniform
from bayesinf.samplers._preconditioner import Preconditioner
from bayesinf.samplers._protocol import State

__all__ = ["HMC"]


@dataclass(frozen=True)
class HMC:
    r"""Leapfrog trajectories from fresh momenta, accepted or rejected as a whole.

        u ~ N(0, I);   steps × [u ← u − (h/2) Sᵀ∇U(w),  w ← w + h S u,  u ← u − (h/2) Sᵀ∇U(w)]

    and the end is accepted with probability ``min(1, e^{H − H'})``, ``H = U + ‖u‖²/2``, with exact
    gradients. Stationary law: ``p`` itself, any step. A direction of curvature ``ã = 1`` in ``z``
    is at its farthest after a path of ``π/2``: draws are nearly independent at
    ``steps · h ≈ π/2`` where the preconditioner fits, and at ``2π`` they would be back where they
    were. So each chain's step is ``h = √ε (1 + jitter · v)``, ``v`` uniform on (−1, 1), drawn
    afresh for every trajectory. About 0.65–0.8 of the proposals accepted is best, at a step that
    shrinks as ``d^{−1/4}``, and faster where the gradient jumps, as that of ReLU networks does.
    Precision of the decision in float32: :mod:`bayesinf.samplers._metropolis`.

    Parameters
    ----------
    step_size
        ``ε = h² > 0``, comparable with that of :class:`SGLD`; stable below ``ε ã_max = 4``.
    steps
        Leapfrog steps, and gradients, of a trajectory, at least 1.
    jitter
        Relative half-width of the steps' distribution, in ``[0, 1)``.
    preconditioner
        ``P = S Sᵀ``, the inverse of the mass matrix; None is the identity.

    Raises
    ------
    ValueError
        If a setting is out of range.

    References
    ----------
    Neal 2011 (arXiv 1206.1901), sections 3 and 4.2; Beskos et al. 2013 for the best acceptance.
    """

    step_size: float
    steps: int
    jitter: float = 0.2
    preconditioner: Preconditioner | None = None

    full_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.step_size > 0 and self.steps >= 1 and 0 <= self.jitter < 1):
            raise ValueError(
                f"need step_size > 0, steps ≥ 1 and 0 ≤ jitter < 1; got step_size="
                f"{self.step_size}, steps={self.steps}, jitter={self.jitter}."
            )

    def init(self, position: Tensor, rng: ChainGenerators) -> State:
        """Start at ``position``."""
        return {"position": position}

    def step(
        self, state: State, potential: Potential, batch: Tensor | None, rng: ChainGenerators
    ) -> tuple[State, dict[str, Any]]:
        """One trajectory and its decision; ``steps`` gradients."""
        start = state
        if "force" not in state:
            start = evaluate(state["position"], potential, self.preconditioner)
        before = rng.normal_like(start["position"])
        h: Tensor | float = self.step_size**0.5
        if self.jitter:
            h = (h * (1 + self.jitter * (2 * uniform(rng, before) - 1))).to(before.dtype)
        end, after = leapfrog(start, before, h, self.steps, potential, self.preconditioner)
        return choose(start, end, before, after, rng)

    def freeze(self, state: State) -> State:
        """Nothing adapts."""
        return state
