"""Independent draws from the Gaussian of an EK-FAC curvature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from bayesinf._posterior import LocalPosterior, Potential
from bayesinf._rng import ChainGenerators
from bayesinf.curvature import Curvature, DeflatedInverse
from bayesinf.samplers._laplace import require_stationary
from bayesinf.samplers._protocol import State

__all__ = ["EKFACLaplace"]

_Root = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class EKFACLaplace:
    r"""``w = w0 + (nβ(C + λI))^{−1/2} ξ``, ``ξ ~ N(0, I)``, a fresh draw at every step.

    The Laplace approximation of the posterior with ``C`` an approximate curvature of the mean loss
    and the posterior's own ``nβ`` and ``λ``: no chain, no mixing, no gradient. What BIF scores from
    these draws lack, compared with those from a sampler, is what is not Gaussian (and what EK-FAC
    gets wrong). Losses are evaluated at the draws as they are, not linearised.

    Parameters
    ----------
    curvature
        ``C``: :func:`bayesinf.fit_curvature` of the task. Or :func:`bayesinf.curvature.deflate`'s
        approximate ``(C + λI)⁻¹``, which must have been made at the posterior's ``damping``.

    Raises
    ------
    ValueError
        At the first step, if the curvature is not of the posterior's task, the potential is plain,
        or a deflated inverse is used at ``n_beta=0``.
    NotPositiveDefiniteError
        At the first step, if ``C + λI`` is not positive definite.

    References
    ----------
    MacKay 1992; George et al. 2018 (arXiv 1806.03884) for the curvature.
    """

    curvature: Curvature | DeflatedInverse

    full_batch: ClassVar[bool] = True

    @property
    def step_size(self) -> float:
        """NaN: there are no steps."""
        return float("nan")

    def init(self, position: Tensor, rng: ChainGenerators) -> State:
        """Start at ``position``, which the first step forgets."""
        return {"position": position}

    def step(
        self, state: State, potential: Potential, batch: Tensor | None, rng: ChainGenerators
    ) -> tuple[State, dict[str, Any]]:
        """Draw afresh, whatever the state."""
        posterior = potential.posterior
        if posterior not in self._roots:
            self._roots[posterior] = self._root(posterior)
        root = self._roots[posterior]
        return {"position": potential.center + root(rng.normal_like(state["position"]))}, {}

    @cached_property
    def _roots(self) -> dict[LocalPosterior, _Root]:
        """Square roots of the covariances that were needed so far."""
        return {}

    def _root(self, posterior: LocalPosterior) -> _Root:
        """``F`` with ``F Fᵀ = (nβ(C + λI))⁻¹``, as a product with rows."""
        require_stationary("EKFACLaplace", posterior)
        n_beta, precision = posterior.n_beta, posterior.prior_precision
        if isinstance(self.curvature, Curvature):
            self.curvature.require_task(posterior.task)
            scaled = self.curvature.map(lambda values: n_beta * values + precision)
            return scaled.inverse(0.0).factor().apply
        d = posterior.task.dimension
        if self.curvature.shape != (d, d) or n_beta == 0:
            raise ValueError(
                f"a deflated inverse of shape {self.curvature.shape} is the covariance of no "
                f"posterior of {d} parameters at n_beta={n_beta:g}. Deflate the curvature of this "
                f"task; for the n_beta=0 control give the curvature itself."
            )
        factor = self.curvature.factor()
        return lambda rows: factor.apply(rows) * n_beta**-0.5

    def freeze(self, state: State) -> State:
        """Nothing adapts."""
        return state
