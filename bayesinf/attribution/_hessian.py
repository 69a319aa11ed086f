"""Influence with the exact Hessian."""

from __future__ import annotations

import torch
import xarray as xr

from bayesinf._task import Measurement, Task
from bayesinf.attribution._pairwise import (
    pairwise,
    require_batch_size,
    require_damping,
    score_attrs,
)
from bayesinf.attribution._scores import make_scores, register
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._hessian import fit_hessian
from bayesinf.curvature._sources import GradientSource

__all__ = ["hessian"]


@register("influence", "exact Hessian of the mean loss, small networks")
def hessian(
    task: Task,
    *,
    damping: float,
    measurement: Measurement = "loss",
    batch_size: int = 256,
    memory_limit: float = 8.0,
) -> xr.Dataset:
    r"""Influence ``−(1/n) ∇φ_qᵀ (C + λI)⁻¹ ∇ℓ_t`` with ``C = (1/n) Σ_i ∇²ℓ_i``.

    Exact, over all selected parameters of any twice differentiable network, computed in float64
    whatever the model's dtype. What the Bayesian influence function tends to at low temperature.
    Weight decay is no part of ``C``; it is part of λ.

    Parameters
    ----------
    task
        Network, likelihood, training and query examples.
    damping
        λ = γ/(nβ) + weight decay, in units of the mean loss.
    measurement
        φ of the queries: ``"loss"``, ``"margin"``, or ``f(task, params, batch) -> (B,)``.
    batch_size
        Examples at a time. Scores do not depend on it.
    memory_limit
        GiB that the matrices may take; more is refused before anything is computed.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)``; negative = helpful. Attributes: damping, lambda_min
        (``λ_min(C) + λ``), measurement, seconds by stage, forward_examples, backward_examples,
        checkpoint.

    Raises
    ------
    ValueError
        If an argument is out of range, the matrix does not fit, or a gradient is not finite.
    NotPositiveDefiniteError
        If ``λ_min(C) + λ ≤ 0`` (a ``ValueError``), with the smallest damping that would do.

    References
    ----------
    Koh & Liang 2017, "Understanding black-box predictions via influence functions", Eq. 2.
    """
    damping = require_damping(damping, positive=False)
    require_batch_size(batch_size)
    costs = Costs()
    double = task.to(dtype=torch.float64)
    inverse = fit_hessian(
        double, damping, batch_size=batch_size, memory_limit=memory_limit, costs=costs
    )
    with GradientSource(double, None, costs) as source:
        inner = pairwise(
            double,
            source,
            inverse.bind,
            measurement=measurement,
            batch_size=batch_size,
            costs=costs,
        )
    attrs = score_attrs(
        task,
        costs,
        measurement,
        batch_size,
        damping=damping,
        lambda_min=inverse.lambda_min,
        fisher="hessian",
    )
    return make_scores(
        inner / -task.n,
        query=task.query.ids,
        train=task.train.ids,
        method="hessian",
        estimand="influence",
        attrs=attrs,
    )
