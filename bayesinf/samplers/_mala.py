"""The Metropolis-adjusted Langevin algorithm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from bayesinf._posterior import Potential
from bayesinf._rng import ChainGenerators
from bayesinf.samplers._metropolis import choose, evaluate, leapfrog
from bayesinf.samplers._preconditioner import Preconditioner
from bayesinf.samplers._protocol import State

__all__ = ["MALA"]


@dataclass(frozen=True)
class MALA:
    r""":class:`SGLD` with exact gradients, and a decision that makes its law exact.

    The proposal ``w' = w − (ε/2) P ∇U(w) + √ε S ξ`` is accepted with probability
    ``min(1, e^{U(w) − U(w')} q(w|w')/q(w'|w))``, ``q`` the density of proposals. It is one leapfrog
    step of size ``h = √ε`` from fresh momenta ``ξ``, and the probability the same number as
    ``min(1, e^{H − H'})``, which is how it is computed. Stationary law: ``p`` itself, any step.

    Chains whose proposals are all rejected stand still: look at ``sample_stats/acceptance_rate``,
    where about 0.57 is best. The step that reaches it shrinks as ``d^{−1/3}``. Precision of the
    decision in float32: :mod:`bayesinf.samplers._metropolis`.

    Parameters
    ----------
    step_size
        ``ε > 0``, that of :class:`SGLD`.
    preconditioner
        ``P = S Sᵀ``; None is the identity.

    Raises
    ------
    ValueError
        If the step size is not positive.

    References
    ----------
    Roberts and Tweedie 1996; Roberts and Rosenthal 1998 for the best acceptance.
    """

    step_size: float
    preconditioner: Preconditioner | None = None

    full_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.step_size > 0:
            raise ValueError(f"step_size must be > 0; got {self.step_size}.")

    def init(self, position: Tensor, rng: ChainGenerators) -> State:
        """Start at ``position``."""
        return {"position": position}

    def step(
        self, state: State, potential: Potential, batch: Tensor | None, rng: ChainGenerators
    ) -> tuple[State, dict[str, Any]]:
        """Propose and decide; one gradient."""
        start = state
        if "force" not in state:
            start = evaluate(state["position"], potential, self.preconditioner)
        before = rng.normal_like(start["position"])
        h = self.step_size**0.5
        end, after = leapfrog(start, before, h, 1, potential, self.preconditioner)
        return choose(start, end, before, after, rng)

    def freeze(self, state: State) -> State:
        """Nothing adapts."""
        return state
