"""Influence with the exact Gauss–Newton matrix."""

from __future__ import annotations

from typing import Unpack

import torch
import xarray as xr

from bayesinf._task import Task
from bayesinf.attribution._needs import GRADIENTS, dense_matrix, likelihood_part
from bayesinf.attribution._pairwise import Attribution, require_damping, score
from bayesinf.attribution._registry import register
from bayesinf.attribution._scoring import Scoring, resolve
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._find import find_layers
from bayesinf.curvature._gauss_newton import DenseInverse, fit_gauss_newton
from bayesinf.curvature._sources import GradientSource

__all__ = ["gauss_newton"]


def _side(task: Task) -> int:
    """Of the smaller matrix: parameters, or a row for each output of each example."""
    if not hasattr(task.likelihood, "fisher_factor"):
        return task.dimension
    batch = task.train.batch(slice(0, 1))
    with torch.no_grad():
        rows = len(task.likelihood.fisher_factor(task.outputs(task.params, batch), batch[1]))
    return min(task.dimension, task.n * rows)


@register(
    "influence",
    "exact generalised Gauss–Newton matrix, small networks",
    needs=(*GRADIENTS, likelihood_part("fisher_factor"), dense_matrix(2, _side)),
)
def gauss_newton(
    task: Task,
    *,
    damping: float,
    solver: str = "auto",
    memory_limit: float = 8.0,
    **scoring: Unpack[Scoring],
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
    solver
        ``"dense"``: Cholesky in parameter space ``(d, d)``. ``"woodbury"``: in example space
        ``(nK, nK)``, ``K`` outputs or classes an example. ``"auto"``: the smaller.
    memory_limit
        GiB that the matrices may take; more is refused before anything is computed.
    **scoring
        What to pair, tokens, modules, batch sizes, top-k, a Zarr store and the like: see
        :class:`bayesinf.Scoring`.

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
    options, costs = resolve(scoring), Costs()
    damping = require_damping(damping, positive=False)
    task.require_full_precision("a classical method")
    double = task.to(dtype=torch.float64)
    with GradientSource(double, find_layers(double, costs), costs) as source:
        inverse = fit_gauss_newton(
            double,
            source,
            damping,
            solver=solver,
            batch_size=options.batch_size,
            memory_limit=memory_limit,
            costs=costs,
        )
        attrs = {
            "damping": damping,
            "lambda_min": inverse.lambda_min,
            "solver": "dense" if isinstance(inverse, DenseInverse) else "woodbury",
            "fisher": "enumerated",
        }
        method = Attribution("gauss_newton", "influence", inverse, -1 / task.n, attrs=attrs)
        return score(task, source, method, options, costs)
