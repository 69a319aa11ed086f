"""EK-FAC influence, corrected in the directions that EK-FAC misses."""

from __future__ import annotations

from typing import Unpack

import xarray as xr
from torch import Tensor

from bayesinf._task import Task
from bayesinf.attribution._needs import GAUSS_NEWTON_PRODUCTS
from bayesinf.attribution._pairwise import Attribution, require_damping, score
from bayesinf.attribution._registry import register
from bayesinf.attribution._scoring import Scoring, resolve
from bayesinf.attribution._solved import Of, Preconditioner, product
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._curvature import Curvature
from bayesinf.curvature._find import find_layers
from bayesinf.curvature._fit import Fisher
from bayesinf.curvature._rows import Rows
from bayesinf.curvature._sources import GradientSource

__all__ = ["deflated_ekfac"]


@register(
    "influence",
    "EK-FAC corrected in the directions that it misses most",
    needs=GAUSS_NEWTON_PRODUCTS,
    one_of=(("fisher", "curvature"),),
)
def deflated_ekfac(
    task: Task,
    *,
    damping: float,
    of: Of = "gauss_newton",
    fisher: Fisher | None = None,
    curvature: Curvature | None = None,
    deflate: int = 100,
    seed: int = 0,
    **scoring: Unpack[Scoring],
) -> xr.Dataset:
    r"""Influence ``−(1/n) ∇φ_qᵀ M ∇ℓ_t`` with ``M = W [I + Σ_i (1/θ_i − 1) u_i u_iᵀ] W``.

    ``W = (P + λI)^{-1/2}`` of the EK-FAC curvature ``P``; ``(θ_i, u_i)`` are the eigenpairs of
    ``W (C + λI) W`` farthest from 1, found by Lanczos. No system is solved for the queries, so
    that its cost does not grow with their number beyond EK-FAC's own.

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
    seed
        Of sampled labels and of the Lanczos start vector.
    **scoring
        What to pair, tokens, modules, batch sizes, top-k, a Zarr store and the like: see
        :class:`bayesinf.Scoring`.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)``; negative = helpful. Attributes as :func:`bayesinf.ekfac`, and
        of, deflate, deflated (directions found), products (in passes over the training set).

    Raises
    ------
    ValueError
        If an argument is out of range, or a gradient is not finite.
    NotPositiveDefiniteError
        If the curvature plus damping is not positive definite (a ``ValueError``).

    References
    ----------
    Deflation: Saad et al. 2000, "A deflated version of the conjugate gradient algorithm".
    """
    options, costs = resolve(scoring), Costs()
    damping = require_damping(damping)
    operator = product(task, of, options.batch_size, costs)
    if deflate == 0:
        raise ValueError("deflate must be at least 1 direction; without any it is bi.ekfac.")
    preconditioner = Preconditioner(
        task, operator, damping, deflate, fisher, curvature, seed, scoring, costs
    )
    with GradientSource(task, find_layers(task, costs), costs) as source:

        def precondition(rows: list[Rows]) -> list[Rows]:
            flat: Tensor = source.flat(rows)
            return source.unflat(preconditioner.inverse.apply(flat))

        method = Attribution(
            "deflated_ekfac",
            "influence",
            precondition,
            -1 / task.n,
            attrs={"damping": damping, "of": of, **preconditioner.attrs},
            report={"products": operator.products},
        )
        return score(task, source, method, options, costs)
