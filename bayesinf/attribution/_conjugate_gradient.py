"""Influence by preconditioned conjugate gradients."""

from __future__ import annotations

from functools import partial
from typing import Unpack

import xarray as xr

from bayesinf._task import Task
from bayesinf.attribution._needs import GAUSS_NEWTON_PRODUCTS
from bayesinf.attribution._pairwise import require_damping
from bayesinf.attribution._registry import register
from bayesinf.attribution._scoring import Scoring, resolve
from bayesinf.attribution._solved import Of, Preconditioner, product, solved_scores
from bayesinf.curvature import _conjugate_gradient as solver
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._curvature import Curvature
from bayesinf.curvature._fit import Fisher

__all__ = ["conjugate_gradient"]


@register(
    "influence",
    "exact curvature by EK-FAC-preconditioned conjugate gradients",
    needs=GAUSS_NEWTON_PRODUCTS,
    one_of=(("fisher", "curvature"),),
)
def conjugate_gradient(
    task: Task,
    *,
    damping: float,
    of: Of = "gauss_newton",
    fisher: Fisher | None = None,
    curvature: Curvature | None = None,
    deflate: int = 0,
    tolerance: float = 1e-3,
    iterations: int = 100,
    seed: int = 0,
    **scoring: Unpack[Scoring],
) -> xr.Dataset:
    r"""Influence ``−(1/n) ∇φ_qᵀ (C + λI)⁻¹ ∇ℓ_t`` by conjugate gradients on products with ``C``.

    Exact up to the tolerance, over all selected parameters, without the matrix: each iteration is
    one Gauss–Newton or Hessian product a query. The queries of a block share their Krylov spaces.

    Parameters
    ----------
    task
        Network, likelihood, training and query examples.
    damping
        λ = γ/(nβ) + weight decay, in units of the mean loss.
    of
        ``"gauss_newton"`` (positive definite at any damping) or ``"hessian"`` (what BIF tends to at
        low temperature; refused where a direction of negative curvature is met).
    fisher, curvature
        Labels of the EK-FAC preconditioner that is fitted, or one that was: exactly one of them.
    deflate
        Number of directions at most in which the preconditioner is corrected first
        (:func:`bayesinf.curvature.deflate`).
    tolerance
        On the residual ``‖(C + λI) x − ∇φ‖ / ‖∇φ‖`` of every query.
    iterations
        At most so many.
    seed
        Of sampled labels and of the solver.
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

    Warns
    -----
    SolverWarning
        If the residual of a query is above the tolerance.

    References
    ----------
    Martens 2010, "Deep learning via Hessian-free optimization"; Koh & Liang 2017, §3; O'Leary 1980
    (block conjugate gradients).
    """
    damping, costs = require_damping(damping), Costs()
    operator = product(task, of, resolve(scoring).batch_size, costs)
    preconditioner = Preconditioner(
        task, operator, damping, deflate, fisher, curvature, seed, scoring, costs
    )
    solve = partial(
        solver.conjugate_gradient,
        damping=damping,
        preconditioner=preconditioner.inverse,
        tolerance=tolerance,
        iterations=iterations,
    )
    attrs = {"tolerance": tolerance, "iterations": iterations, **preconditioner.attrs}
    return solved_scores(
        task,
        "conjugate_gradient",
        of=of,
        damping=damping,
        solve=solve,
        operator=operator,
        attrs=attrs,
        scoring=scoring,
        costs=costs,
    )
