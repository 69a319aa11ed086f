"""Influence by EK-FAC-preconditioned (stochastic) iterations, ASTRA."""

from __future__ import annotations

from functools import partial
from typing import Any, Unpack

import xarray as xr

from bayesinf._task import Task
from bayesinf.attribution._needs import GAUSS_NEWTON_PRODUCTS
from bayesinf.attribution._pairwise import require_damping
from bayesinf.attribution._registry import register
from bayesinf.attribution._scoring import Scoring, resolve
from bayesinf.attribution._solved import Of, Preconditioner, product, solved_scores
from bayesinf.curvature import _astra as solver
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._curvature import Curvature
from bayesinf.curvature._fit import Fisher

__all__ = ["astra"]


@register(
    "influence",
    "exact curvature by EK-FAC-preconditioned iterations",
    needs=GAUSS_NEWTON_PRODUCTS,
    one_of=(("fisher", "curvature"),),
)
def astra(
    task: Task,
    *,
    damping: float,
    of: Of = "gauss_newton",
    fisher: Fisher | None = None,
    curvature: Curvature | None = None,
    deflate: int = 40,
    minibatch: int | None = None,
    step: float | None = None,
    momentum: float | None = None,
    tolerance: float = 1e-3,
    iterations: int = 100,
    seed: int = 0,
    **scoring: Unpack[Scoring],
) -> xr.Dataset:
    r"""Influence ``−(1/n) ∇φ_qᵀ (C + λI)⁻¹ ∇ℓ_t`` by ``x ← x − α M [(C̃ + λI) x − ∇φ]``.

    ``M`` is EK-FAC's damped inverse, deflated; the iteration starts at its solution. Steps come
    from the estimated spectrum of ``M (C + λI)``: Chebyshev's over all examples, a constant one
    over minibatches. The published steps (α ∝ λ) barely move.

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
    minibatch
        Examples of a product ``C̃``; None: all.
    step, momentum
        α and the heavy ball's β, constant; None: chosen from the spectrum.
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
    SolverDivergenceError
        If the iterates grow, with the step below which they would not.

    Warns
    -----
    SolverWarning
        If the residual of a query is above the tolerance.

    References
    ----------
    Wang et al. 2025, "Better training data attribution via better inverse Hessian-vector products",
    arXiv 2507.14740.
    """
    damping, costs = require_damping(damping), Costs()
    operator = product(task, of, resolve(scoring).batch_size, costs)
    preconditioner = Preconditioner(
        task, operator, damping, deflate, fisher, curvature, seed, scoring, costs
    )
    settings: dict[str, Any] = {
        "step": step,
        "momentum": momentum,
        "tolerance": tolerance,
        "iterations": iterations,
    }
    solve = partial(
        solver.astra,
        damping=damping,
        preconditioner=preconditioner.inverse,
        batch_size=minibatch,
        seed=seed,
        **settings,
    )
    attrs = {**settings, "minibatch": minibatch, **preconditioner.attrs}
    return solved_scores(
        task,
        "astra",
        of=of,
        damping=damping,
        solve=solve,
        operator=operator,
        attrs=attrs,
        scoring=scoring,
        costs=costs,
    )
