r"""The exact Hessian of the mean loss, as a dense float64 matrix, for networks small enough.

``C = (1/n) Σ_i ∇²ℓ_i`` in the order of :meth:`Task.flatten`, in blocks of rows: the gradient is
differentiated once more in many directions at a time.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.func import grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from bayesinf._data import Batch
from bayesinf._task import Task
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._capture import quiet_fallbacks
from bayesinf.curvature._definite import (
    cholesky,
    not_definite,
    require_memory,
    smallest_eigenvalue,
)
from bayesinf.curvature._gauss_newton import DenseInverse
from bayesinf.curvature._sources import GradientSource

__all__ = ["dense_hessian", "fit_hessian"]


_NEAR, _NEAR_ROWS = 64, 16
"""Examples and rows at a time that a processor keeps near it, where second derivatives of
convolutions are twice as fast as with four times as many of both."""


def dense_hessian(
    task: Task, *, batch_size: int = 256, rows: int = 64, costs: Costs | None = None
) -> Tensor:
    """Hessian ``(d, d)`` of the mean training loss at the checkpoint.

    Parameters
    ----------
    task
        Its dtype is that of the result; convert it first for float64.
    batch_size
        Examples at a time, at most; 64 on a processor.
    rows
        Rows at a time, at most; 16 on a processor. Memory grows with ``rows · batch_size``.
    costs
        Account to which passes are added: one backward pass an example and row.
    """
    task.require_full_precision("a Hessian")
    flat = task.flatten(task.params)
    d = len(flat)
    matrix = flat.new_zeros(d, d)
    if task.device.type == "cpu":
        batch_size, rows = min(batch_size, _NEAR), min(rows, _NEAR_ROWS)
    for where, batch in task.train.batches(batch_size):
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has first derivatives only
            pull = _gradient_pullback(task, flat, batch)
        for start in range(0, d, rows):
            stop = min(start + rows, d)
            basis = flat.new_zeros(stop - start, d)
            basis[:, start:stop].fill_diagonal_(1)
            with quiet_fallbacks():
                matrix[start:stop] += pull(basis)
        if costs is not None:
            size = where.stop - where.start
            costs.forward_examples += size
            costs.backward_examples += size * (1 + d)
    matrix /= task.n
    return (matrix + matrix.T) / 2


def fit_hessian(
    task: Task,
    source: GradientSource,
    damping: float,
    *,
    batch_size: int = 256,
    memory_limit: float = 8.0,
    costs: Costs | None = None,
) -> DenseInverse:
    """Build and factorise the damped Hessian.

    Parameters
    ----------
    task
        In float64.
    source
        Open source of its gradients.
    damping
        λ, in units of the mean loss, weight decay included.
    batch_size
        Examples at a time.
    memory_limit
        GiB.
    costs
        Account to which seconds and passes are added.

    Returns
    -------
    DenseInverse

    Raises
    ------
    ValueError
        If memory would not suffice.
    NotPositiveDefiniteError
        If ``λ_min(C) + λ ≤ 0``, with the smallest damping that would do.
    """
    costs = costs if costs is not None else Costs()
    what = f"hessian (d={task.dimension:,} parameters)"
    gib = 4 * task.dimension**2 * 8 / 2**30
    require_memory(gib, memory_limit, what, "Select fewer parameters, or use ekfac")
    with costs.stage("curvature"):
        matrix = dense_hessian(task, batch_size=batch_size, costs=costs)
    with costs.stage("factorization"):
        factor = cholesky(matrix, damping, "Hessian")
        low = smallest_eigenvalue(factor)
        if low <= 0:
            raise not_definite(low, damping, "Hessian")
        return DenseInverse(source, factor, low)


def _gradient_pullback(task: Task, flat: Tensor, batch: Batch) -> Callable[[Tensor], Tensor]:
    def total(w: Tensor) -> Tensor:
        return task.losses(task.unflatten(w), batch).sum()

    pull = vjp(grad(total), flat)[1]
    return lambda basis: vmap(pull)(basis)[0]
