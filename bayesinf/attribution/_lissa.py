"""Influence by the Neumann series, LiSSA."""

from __future__ import annotations

from functools import partial
from typing import Any, Unpack

import xarray as xr

from bayesinf._task import Task
from bayesinf.attribution._needs import GAUSS_NEWTON_PRODUCTS
from bayesinf.attribution._pairwise import require_damping
from bayesinf.attribution._registry import register
from bayesinf.attribution._scoring import Scoring, resolve
from bayesinf.attribution._solved import Of, product, solved_scores
from bayesinf.curvature import _neumann as solver
from bayesinf.curvature._accounting import Costs

__all__ = ["lissa"]


@register(
    "influence",
    "exact curvature by the (stochastic) Neumann series",
    needs=GAUSS_NEWTON_PRODUCTS,
)
def lissa(
    task: Task,
    *,
    damping: float,
    of: Of = "gauss_newton",
    minibatch: int | None = None,
    step: float | None = None,
    tolerance: float = 1e-2,
    iterations: int = 500,
    seed: int = 0,
    **scoring: Unpack[Scoring],
) -> xr.Dataset:
    r"""Influence ``−(1/n) ∇φ_qᵀ (C + λI)⁻¹ ∇ℓ_t`` by the series ``x ← x − α [(C̃ + λI) x − ∇φ]``.

    From ``x = 0``, without preconditioner: directions of low curvature come last, and stopped after
    ``J`` iterations the answer is about that of the larger damping ``λ + 1/(αJ)``. For comparison,
    and for networks whose EK-FAC does not fit.

    Parameters
    ----------
    task
        Network, likelihood, training and query examples.
    damping
        λ = γ/(nβ) + weight decay, in units of the mean loss.
    of
        ``"gauss_newton"`` (positive definite at any damping) or ``"hessian"`` (what BIF tends to at
        low temperature; refused where a direction of negative curvature is met).
    minibatch
        Examples of a product ``C̃``; None: all.
    step
        α; None: the inverse of the largest eigenvalue of ``C + λI``, estimated.
    tolerance
        On the residual ``‖(C + λI) x − ∇φ‖ / ‖∇φ‖`` of every query.
    iterations
        At most so many.
    seed
        Of the solver.
    **scoring
        What to pair, tokens, modules, batch sizes, top-k, a Zarr store and the like: see
        :class:`bayesinf.Scoring`. Queries of a block are solved together.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)``; negative = helpful. Attributes: damping, of, tolerance,
        worst_residual, unconverged (queries that missed the tolerance), products (in passes over
        the training set, over all queries, deflation included), chosen_step (where there is a
        constant one), seconds by stage, forward_examples, backward_examples, checkpoint.

    Raises
    ------
    ValueError
        If an argument is out of range, or a gradient is not finite.
    NotPositiveDefiniteError
        If the curvature plus damping has a direction of curvature ≤ 0 (a ``ValueError``).
    SolverDivergenceError
        If the iterates grow, with the step below which they would not.

    Warns
    -----
    SolverWarning
        If the residual of a query is above the tolerance.

    References
    ----------
    Agarwal, Bullins & Hazan 2017, "Second-order stochastic optimization for machine learning in
    linear time"; Koh & Liang 2017, §3.
    """
    damping, costs = require_damping(damping), Costs()
    operator = product(task, of, resolve(scoring).batch_size, costs)
    settings: dict[str, Any] = {
        "step": step,
        "tolerance": tolerance,
        "iterations": iterations,
        "seed": seed,
    }
    solve = partial(solver.neumann, damping=damping, batch_size=minibatch, **settings)
    attrs = {**settings, "minibatch": minibatch}
    return solved_scores(
        task,
        "lissa",
        of=of,
        damping=damping,
        solve=solve,
        operator=operator,
        attrs=attrs,
        scoring=scoring,
        costs=costs,
    )
