"""Influence with the exact Hessian."""

from __future__ import annotations

from typing import Unpack

import torch
import xarray as xr

from bayesinf._task import Task
from bayesinf.attribution._needs import GRADIENTS, dense_matrix
from bayesinf.attribution._pairwise import Attribution, require_damping, score
from bayesinf.attribution._registry import register
from bayesinf.attribution._scoring import Scoring, resolve
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._find import find_layers
from bayesinf.curvature._hessian import fit_hessian
from bayesinf.curvature._sources import GradientSource

__all__ = ["hessian"]


@register(
    "influence",
    "exact Hessian of the mean loss, small networks",
    needs=(*GRADIENTS, dense_matrix(4, lambda task: task.dimension)),
)
def hessian(
    task: Task,
    *,
    damping: float,
    memory_limit: float = 8.0,
    **scoring: Unpack[Scoring],
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
    memory_limit
        GiB that the matrices may take; more is refused before anything is computed.
    **scoring
        What to pair, tokens, modules, batch sizes, top-k, a Zarr store and the like: see
        :class:`bayesinf.Scoring`.

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
    options, costs = resolve(scoring), Costs()
    damping = require_damping(damping, positive=False)
    task.require_full_precision("a classical method")
    double = task.to(dtype=torch.float64)
    with GradientSource(double, find_layers(double, costs), costs) as source:
        inverse = fit_hessian(
            double,
            source,
            damping,
            batch_size=options.batch_size,
            memory_limit=memory_limit,
            costs=costs,
        )
        attrs = {"damping": damping, "lambda_min": inverse.lambda_min, "fisher": "hessian"}
        method = Attribution("hessian", "influence", inverse, -1 / task.n, attrs=attrs)
        return score(task, source, method, options, costs)
