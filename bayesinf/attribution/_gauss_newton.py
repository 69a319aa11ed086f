"""Influence with the exact Gauss–Newton matrix."""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr

from bayesinf._task import Measurement, Task
from bayesinf.attribution._pairwise import (
    all_layers,
    pairwise,
    require_batch_size,
    require_damping,
    score_attrs,
)
from bayesinf.attribution._scores import make_scores, register
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._gauss_newton import DenseInverse, fit_gauss_newton
from bayesinf.curvature._sources import GradientSource

__all__ = ["gauss_newton"]


@register("influence", "exact generalised Gauss–Newton matrix, small networks")
def gauss_newton(
    task: Task,
    *,
    damping: float,
    measurement: Measurement = "loss",
    solver: str = "auto",
    batch_size: int = 256,
    memory_limit: float = 8.0,
) -> xr.Dataset:
    r"""Influence ``−(1/n) ∇φ_qᵀ (C + λI)⁻¹ ∇ℓ_t`` with ``C = (1/n) Σ_i J_iᵀ (∇²_f ℓ_i) J_i``.

    Exact, over all selected parameters of any network, computed in float64 whatever the model's
    dtype. ``C`` equals the Fisher information of the likelihoods here; it is the Hessian where the
    network is linear in its parameters or the outputs fit perfectly, and can be far from it
    elsewhere.

    Parameters
    ----------
    task
        Network, likelihood, training and query examples.
    damping
        λ = γ/(nβ) + weight decay, in units of the mean loss.
    measurement
        φ of the queries: ``"loss"``, ``"margin"``, or ``f(task, params, batch) -> (B,)``.
    solver
        ``"dense"``: Cholesky in parameter space ``(d, d)``. ``"woodbury"``: in example space
        ``(nK, nK)``, ``K`` outputs or classes an example. ``"auto"``: the smaller.
    batch_size
        Examples at a time. Scores do not depend on it.
    memory_limit
        GiB that the matrices may take; more is refused before anything is computed.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)``; negative = helpful. Attributes: damping, lambda_min
        (``λ_min(C) + λ``), solver, fisher, measurement, seconds by stage, forward_examples,
        backward_examples, checkpoint.

    Raises
    ------
    ValueError
        If an argument is out of range, the matrix does not fit, or a gradient is not finite.
    NotPositiveDefiniteError
        If ``C + λI`` is numerically singular (a ``ValueError``).
    NotImplementedError
        If the likelihood lacks ``fisher_factor`` or the measurement.

    References
    ----------
    Martens 2020, "New insights and perspectives on the natural gradient method", §8; Koh & Liang
    2017, Eq. 2 (influence).
    """
    damping = require_damping(damping, positive=False)
    require_batch_size(batch_size)
    costs = Costs()
    double = task.to(dtype=torch.float64)
    with GradientSource(double, all_layers(double), costs) as source:
        inverse = fit_gauss_newton(
            double,
            source,
            damping,
            solver=solver,
            batch_size=batch_size,
            memory_limit=memory_limit,
            costs=costs,
        )
        inner = pairwise(
            double,
            source,
            inverse.bind,
            measurement=measurement,
            batch_size=batch_size,
            costs=costs,
        )
    more: dict[str, Any] = {
        "damping": damping,
        "lambda_min": inverse.lambda_min,
        "solver": "dense" if isinstance(inverse, DenseInverse) else "woodbury",
        "fisher": "enumerated",
    }
    return make_scores(
        inner / -task.n,
        query=task.query.ids,
        train=task.train.ids,
        method="gauss_newton",
        estimand="influence",
        attrs=score_attrs(task, costs, measurement, batch_size, **more),
    )
