r"""The damped generalised Gauss–Newton matrix, exactly, for networks small enough.

``C = (1/n) Σ_i J_iᵀ (∇²_f ℓ_i) J_i = Rᵀ R`` with rows ``√(1/n) f_kᵀ J_i``, ``N = n·K`` of them and
``d`` columns. Two ways to the same inverse, in float64:

* dense: Cholesky of ``Rᵀ R + λI`` ``(d, d)``;
* example space (Woodbury): ``(RᵀR + λI)⁻¹ = [I − Rᵀ (R Rᵀ + λI)⁻¹ R] / λ``, Cholesky of
  ``(N, N)``; where layers act at one position its entries come from inner products of inputs and
  of output derivatives, and no row of length ``d`` is ever formed.

Source: Martens 2020, "New insights and perspectives on the natural gradient method", §8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesinf._likelihoods import require
from bayesinf._task import Task
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._definite import cholesky, require_memory, smallest_eigenvalue
from bayesinf.curvature._inner import gram
from bayesinf.curvature._rows import Explicit, Factored, Rows, concatenate, widen
from bayesinf.curvature._sources import GradientSource

__all__ = ["DenseInverse", "ExampleSpaceInverse", "fit_gauss_newton"]

SOLVERS = ("auto", "dense", "woodbury")
_CHUNK = 2**25


@dataclass(frozen=True)
class DenseInverse:
    """``(C + λI)⁻¹`` from the Cholesky factor ``(d, d)``, in the order of :meth:`Task.flatten`.

    Attributes
    ----------
    source
        Whose layers the rows have.
    factor
        Lower Cholesky factor of ``C + λI``.
    lambda_min
        ``λ_min(C) + λ``.
    """

    source: GradientSource
    factor: Tensor
    lambda_min: float

    def __call__(self, rows: list[Rows]) -> list[Rows]:
        """``(C + λI)⁻¹`` times every row."""
        return self.source.unflat(torch.cholesky_solve(self.source.flat(rows).T, self.factor).T)


@dataclass(frozen=True)
class ExampleSpaceInverse:
    """``(RᵀR + λI)⁻¹`` from the Cholesky factor ``(N, N)`` of ``RRᵀ + λI``.

    Attributes
    ----------
    rows
        ``√n R``, one entry a layer.
    n
        Number of training examples.
    factor
        Lower Cholesky factor of ``RRᵀ + λI``.
    damping
        λ > 0.
    lambda_min
        ``λ_min(C) + λ``.
    """

    rows: tuple[Rows, ...]
    n: int
    factor: Tensor
    damping: float
    lambda_min: float

    def __call__(self, rows: list[Rows]) -> list[Rows]:
        """``(C + λI)⁻¹`` times every row."""
        solved = torch.cholesky_solve(gram(self.rows, rows), self.factor) / self.n  # (N, Q)
        return [
            Explicit((q.matrices().flatten(0, 1).unsqueeze(1) - combine(r, solved)) / self.damping)
            for q, r in zip(rows, self.rows, strict=True)
        ]


def fit_gauss_newton(
    task: Task,
    source: GradientSource,
    damping: float,
    *,
    solver: str = "auto",
    batch_size: int = 256,
    memory_limit: float = 8.0,
    costs: Costs | None = None,
) -> DenseInverse | ExampleSpaceInverse:
    """Build and factorise the damped Gauss–Newton matrix.

    Parameters
    ----------
    task
        In float64.
    source
        Open source of its gradients and rows.
    damping
        λ, in units of the mean loss.
    solver
        ``"dense"``, ``"woodbury"``, or ``"auto"``: the smaller of ``d`` and ``N``.
    batch_size
        Examples at a time.
    memory_limit
        GiB.
    costs
        Account to which seconds are added.

    Returns
    -------
    DenseInverse or ExampleSpaceInverse

    Raises
    ------
    ValueError
        If the solver is unknown, cannot run at this damping, or memory would not suffice.
    NotPositiveDefiniteError
        If ``C + λI`` is numerically singular.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}; got {solver!r}.")
    costs = costs if costs is not None else Costs()
    d, count, explicit = task.dimension, *_example_space(task, source, batch_size)
    if solver == "auto":
        solver = "woodbury" if count < d and damping > 0 else "dense"
    if solver == "woodbury" and damping == 0:
        raise ValueError(
            "solver='woodbury' divides by the damping and needs damping > 0. Use solver='dense', "
            "or a small positive damping."
        )
    size, extra = (d, 0) if solver == "dense" else (count, count * explicit)
    gib = (2 * size**2 + extra) * 8 / 2**30
    what = f"gauss_newton ({solver}, d={d:,} parameters, n·K={count:,} rows)"
    require_memory(gib, memory_limit, what, "Select fewer parameters, or use ekfac")
    if solver == "dense":
        return _dense(task, source, damping, batch_size, costs)
    return _example_space_inverse(task, source, damping, batch_size, costs)


def _example_space(task: Task, source: GradientSource, batch_size: int) -> tuple[int, int]:
    """Number of rows ``N = n·K``, and the width of what must be stored explicitly."""
    factor = require(task.likelihood, "fisher_factor", "the Gauss–Newton matrix")
    first = task.train.batch(slice(0, batch_size))
    with torch.no_grad():
        k = len(factor(task.outputs(task.params, first), first[1]))
    rows = source.curvature_rows(slice(0, 1), task.train.batch(slice(0, 1)))
    return task.n * k, sum(r.values[0, 0].numel() for r in rows if isinstance(r, Explicit))


def _dense(
    task: Task, source: GradientSource, damping: float, batch_size: int, costs: Costs
) -> DenseInverse:
    d = task.dimension
    matrix = torch.zeros(d, d, dtype=torch.float64, device=task.device)
    with costs.stage("curvature"):
        for where, batch in task.train.batches(batch_size):
            rows = source.curvature_rows(where, batch)
            size, k = rows[0].shape
            step = max(1, _CHUNK // (k * d))
            for start in range(0, size, step):
                part = source.flat([r.part(slice(start, start + step)) for r in rows])
                matrix.addmm_(part.T, part, alpha=1 / task.n)
    with costs.stage("factorization"):
        factor = cholesky(matrix, damping, "Gauss–Newton matrix")
        return DenseInverse(source, factor, smallest_eigenvalue(factor))


def _example_space_inverse(
    task: Task, source: GradientSource, damping: float, batch_size: int, costs: Costs
) -> ExampleSpaceInverse:
    with costs.stage("curvature"):
        blocks = [
            source.curvature_rows(where, batch) for where, batch in task.train.batches(batch_size)
        ]
        k = max(block[0].shape[1] for block in blocks)  # unequal where tokens are left out
        rows = tuple(
            concatenate([widen(part, k) for part in layer]) for layer in zip(*blocks, strict=True)
        )
        del blocks
        matrix = gram(rows, rows).div_(task.n)
    with costs.stage("factorization"):
        surplus = len(matrix) - task.dimension
        low = float(torch.linalg.eigvalsh(matrix)[surplus]) if surplus >= 0 else 0.0
        factor = cholesky(matrix, damping, "Gauss–Newton matrix")
    return ExampleSpaceInverse(rows, task.n, factor, damping, max(low, 0.0) + damping)


def combine(rows: Rows, weights: Tensor) -> Tensor:
    """Sums of rows, ``Σ_r weights_rq G_r``: weights ``(B·K, Q)`` give ``(Q, 1, P, M)``."""
    p, m = rows.matrix_shape
    out = weights.new_zeros(weights.shape[1], 1, p, m)
    if isinstance(rows, Factored) and rows.rank_one:
        k = rows.shape[1]
        ds, a = rows.values.flatten(0, 2), rows.a.flatten(0, 1).repeat_interleave(k, dim=0)
        for q, column in enumerate(weights.T):
            out[q, 0] = (ds * column[:, None]).T @ a
        return out
    weights = weights.view(*rows.shape, -1)
    for where, part in rows.chunks():
        out += (weights[where].flatten(0, 1).T @ part.flat()).view(out.shape)
    return out
