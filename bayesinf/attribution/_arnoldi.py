"""Influence in the leading eigenvectors of the curvature, by Arnoldi's iteration."""

from __future__ import annotations

from typing import Unpack

import xarray as xr

from bayesinf._task import Task
from bayesinf.attribution._needs import GAUSS_NEWTON_PRODUCTS
from bayesinf.attribution._pairwise import Attribution, require_damping, score
from bayesinf.attribution._projected import ProjectedGradients, keep_gradients, refuse
from bayesinf.attribution._registry import register
from bayesinf.attribution._scoring import Scoring, resolve
from bayesinf.attribution._solved import Of, product, require_one_sketch
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._arnoldi import arnoldi_eigenpairs
from bayesinf.curvature._bases import StandardBasis
from bayesinf.curvature._curvature import Block, Curvature
from bayesinf.curvature._definite import NotPositiveDefiniteError, require_memory
from bayesinf.curvature._find import find_layers
from bayesinf.curvature._lanczos import Eigenpairs
from bayesinf.curvature._projections import Coordinates, plain_layer
from bayesinf.curvature._rows import flat_rows
from bayesinf.curvature._sources import GradientSource

__all__ = ["arnoldi"]


@register(
    "influence",
    "leading eigenvectors of the curvature, by Arnoldi's iteration",
    needs=GAUSS_NEWTON_PRODUCTS,
    one_of=(("rank", "eigenpairs"),),
)
def arnoldi(
    task: Task,
    *,
    damping: float,
    rank: int | None = None,
    iterations: int | None = None,
    eigenpairs: Eigenpairs | None = None,
    of: Of = "gauss_newton",
    memory_limit: float = 8.0,
    seed: int = 0,
    **scoring: Unpack[Scoring],
) -> xr.Dataset:
    r"""Influence ``−(1/n) Σ_j ⟨v_j, ∇φ_q⟩ ⟨v_j, ∇ℓ_t⟩ / (θ_j + λ)`` over leading eigenpairs.

    ``(θ_j, v_j)`` are the ``rank`` eigenpairs of largest magnitude that Arnoldi's iteration finds
    in the curvature of the mean loss, over all selected parameters. What of a gradient is
    orthogonal to them is dropped, as if it were infinitely stiff; with all of them the influence is
    that of the dense matrix.

    Parameters
    ----------
    task
        Network, likelihood, training and query examples.
    damping
        λ = γ/(nβ) + weight decay, in units of the mean loss; 0 in the paper.
    rank
        Eigenpairs that are found and kept.
    iterations
        Products with the curvature, each a pass over the training set; as many again as ``rank``
        by default, at most the number of parameters.
    eigenpairs
        In place of ``rank``: of :func:`bayesinf.curvature.arnoldi_eigenpairs`, which does not
        depend on the damping, so that a sweep pays for it once.
    of
        ``"gauss_newton"`` or ``"hessian"`` (the paper's).
    memory_limit
        GiB that bases (``2 (iterations + rank) d`` numbers) and the kept coordinates
        (``n rank``) may take.
    seed
        Of the start vector.
    **scoring
        As of :class:`bayesinf.Scoring`, without ``modules``.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)``; negative = helpful. Attributes: damping, of, rank, iterations,
        worst_residual (of ``‖Cv − θv‖`` relative to the largest eigenvalue), measurement, seconds
        by stage, forward_examples, backward_examples, checkpoint.

    Raises
    ------
    ValueError
        If both or neither of ``rank`` and ``eigenpairs`` are given, an argument is out of range,
        memory would not suffice, or a gradient is not finite.
    NotPositiveDefiniteError
        If ``θ_j + λ ≤ 0`` for an eigenpair that is kept (a ``ValueError``).

    References
    ----------
    Schioppa et al. 2022, "Scaling up influence functions", algorithm 1 and Eq. 5.
    """
    options, costs = resolve(scoring), Costs()
    damping = require_damping(damping, positive=False)
    refuse("arnoldi", options, {"modules": "its directions run through all layers"})
    require_one_sketch("arnoldi", "eigenpairs", rank, eigenpairs, task)
    with GradientSource(task, find_layers(task, costs), costs) as source:
        with costs.stage("eigenvectors"):
            pairs = (
                _found(task, rank, iterations, of, memory_limit, seed, options.batch_size, costs)
                if eigenpairs is None
                else eigenpairs
            )
        inverse = _inverse(pairs, damping, of)
        directions = flat_rows(source.unflat(pairs.vectors)).T.contiguous()
        projected = ProjectedGradients(source, Coordinates(directions))
        if options.train_tokens is None:
            keep_gradients(
                projected,
                measurement="loss",
                path=None,
                identity={},
                batch_size=options.batch_size,
                memory_limit=memory_limit,
                costs=costs,
            )
        worst = float(pairs.residuals.max() / pairs.values.abs().max())
        method = Attribution(
            "arnoldi",
            "influence",
            inverse.precondition,
            -1 / task.n,
            attrs={
                "damping": damping,
                "of": of,
                "rank": len(pairs.values),
                "iterations": pairs.products,
                "seed": seed if eigenpairs is None else None,
            },
            report={"worst_residual": worst, "products": pairs.products * (eigenpairs is None)},
        )
        return score(task, projected, method, options, costs)


def _found(
    task: Task,
    rank: int | None,
    iterations: int | None,
    of: Of,
    memory_limit: float,
    seed: int,
    batch_size: int,
    costs: Costs,
) -> Eigenpairs:
    for name, value in (("rank", rank), ("iterations", iterations)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{name} must be an integer; got {value!r}.")
    assert rank is not None
    steps = min(2 * rank, task.dimension) if iterations is None else iterations
    gib = (2 * steps + 2 * rank) * task.dimension * task.dtype.itemsize / 2**30
    what = f"arnoldi (iterations={steps}, d={task.dimension:,} parameters)"
    require_memory(gib, memory_limit, what, "Use fewer iterations or select fewer parameters")
    operator = product(task, of, batch_size, costs)
    return arnoldi_eigenpairs(operator, rank, iterations=steps, seed=seed)


def _inverse(pairs: Eigenpairs, damping: float, of: str) -> Curvature:
    """``1/(θ + λ)`` in the coordinates."""
    low = float(pairs.values.min()) + damping
    if low <= 0:
        raise NotPositiveDefiniteError(
            f"an eigenpair that arnoldi keeps has θ + λ = {low:.4g} at damping={damping:g}, of="
            f"{of!r}. The damping must exceed {damping - low:.4g}, or fewer eigenpairs be kept; "
            f"of='gauss_newton' has none below 0.",
            low,
        )
    dtype = pairs.vectors.dtype
    values = pairs.values.to(pairs.vectors.device, dtype)[None]
    layer = plain_layer("directions", (1, values.shape[1]))
    block = Block(layer, "diagonal", StandardBasis(), values)
    return Curvature((block,), {layer.name: layer.shape}).inverse(damping)
