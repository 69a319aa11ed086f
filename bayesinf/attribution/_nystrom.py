"""Influence with Nyström's approximation of the Gauss–Newton matrix."""

from __future__ import annotations

from typing import Unpack

import xarray as xr

from bayesinf._task import Task
from bayesinf.attribution._needs import GAUSS_NEWTON_PRODUCTS
from bayesinf.attribution._pairwise import Attribution, require_damping, score
from bayesinf.attribution._registry import register
from bayesinf.attribution._scoring import Scoring, resolve
from bayesinf.attribution._solved import require_one_sketch
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._definite import require_memory
from bayesinf.curvature._find import find_layers
from bayesinf.curvature._nystrom import NystromApproximation, nystrom_approximation
from bayesinf.curvature._products import GaussNewtonProduct
from bayesinf.curvature._rows import Rows
from bayesinf.curvature._sources import GradientSource

__all__ = ["nystrom"]


@register(
    "influence",
    "Nyström's approximation of the Gauss–Newton matrix",
    needs=GAUSS_NEWTON_PRODUCTS,
    one_of=(("rank", "approximation"),),
)
def nystrom(
    task: Task,
    *,
    damping: float,
    rank: int | None = None,
    approximation: NystromApproximation | None = None,
    memory_limit: float = 8.0,
    seed: int = 0,
    **scoring: Unpack[Scoring],
) -> xr.Dataset:
    r"""Influence ``−(1/n) ∇φ_qᵀ (Ĉ + λI)⁻¹ ∇ℓ_t`` with ``Ĉ = Yᵀ (Ω Yᵀ)⁺ Y``, ``Y = Ω C``.

    ``C`` is the Gauss–Newton matrix of the mean loss over all selected parameters and ``Ω``
    ``(rank, d)`` random orthonormal rows. ``Ĉ ≤ C`` is exact where ``Ω`` looks; orthogonal to its
    range the curvature counts as 0 and gradients are divided by λ, so that a small rank is closer
    to :func:`~bayesinf.grad_dot` over λ (:func:`~bayesinf.arnoldi` drops that part instead). With
    as many vectors as parameters the influence is that of the dense matrix.

    Parameters
    ----------
    task
        Network, likelihood, training and query examples.
    damping
        λ = γ/(nβ) + weight decay, in units of the mean loss, > 0.
    rank
        Random vectors, each one product with the curvature: a pass over the training set.
    approximation
        In place of ``rank``: of :func:`bayesinf.curvature.nystrom_approximation`, which does not
        depend on the damping, so that a sweep pays for it once.
    memory_limit
        GiB that the vectors may take: ``4 rank d`` numbers in float64.
    seed
        Of the vectors.
    **scoring
        What to pair, tokens, modules, batch sizes, top-k, a Zarr store and the like: see
        :class:`bayesinf.Scoring`.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)``; negative = helpful. Attributes: damping, rank, found_rank
        (directions with curvature), products, measurement, seconds by stage, forward_examples,
        backward_examples, checkpoint.

    Raises
    ------
    ValueError
        If both or neither of ``rank`` and ``approximation`` are given, an argument is out of range,
        memory would not suffice, or a gradient is not finite.
    TypeError
        If the network's outputs are not one tensor.

    References
    ----------
    Hataya & Yamada 2023, "Nyström method for accurate and scalable implicit differentiation",
    Eqs. 4-6.
    """
    options, costs = resolve(scoring), Costs()
    damping = require_damping(damping)
    require_one_sketch("nystrom", "approximation", rank, approximation, task)
    with GradientSource(task, find_layers(task, costs), costs) as source:
        with costs.stage("curvature"):
            found = (
                _found(task, rank, memory_limit, seed, options.batch_size, costs)
                if approximation is None
                else approximation
            )

        def precondition(rows: list[Rows]) -> list[Rows]:
            return source.unflat(found.solve(source.flat(rows), damping))

        method = Attribution(
            "nystrom",
            "influence",
            precondition,
            -1 / task.n,
            attrs={
                "damping": damping,
                "rank": len(found.vectors) if rank is None else rank,
                "seed": seed if approximation is None else None,
            },
            report={"found_rank": len(found.values), "products": 0 if rank is None else rank},
        )
        return score(task, source, method, options, costs)


def _found(
    task: Task,
    rank: int | None,
    memory_limit: float,
    seed: int,
    batch_size: int,
    costs: Costs,
) -> NystromApproximation:
    assert rank is not None
    if isinstance(rank, int):
        what = f"nystrom (rank={rank}, d={task.dimension:,} parameters)"
        gib = 4 * rank * task.dimension * 8 / 2**30
        require_memory(gib, memory_limit, what, "Use a smaller rank or select fewer parameters")
    operator = GaussNewtonProduct(task, batch_size=batch_size, costs=costs)
    return nystrom_approximation(operator, rank, seed=seed)
