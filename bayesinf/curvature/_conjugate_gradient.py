r"""Preconditioned conjugate gradients for many right-hand sides, in one Krylov space or in many.

Row by row, ``x_i ← x_i + α_i p_i`` with ``α_i = r_iᵀz_i / p_iᵀAp_i``, ``z_i = M r_i``: each
right-hand side sees the products of its own directions alone. In a block, every right-hand side
uses the directions of all,

    S = P A Pᵀ,   X ← X + (S⁻¹ P Rᵀ)ᵀ P,   R ← R − (S⁻¹ P Rᵀ)ᵀ P A,
    P ← orth(Z − (S⁻¹ (P A) Zᵀ)ᵀ P),   Z = R M,

so that ``k`` right-hand sides search ``k`` times as many dimensions after the same number of
products each. The rows of ``P`` are orthonormal, and directions that have become dependent are
dropped.

Residuals that a recurrence calls small are computed afresh, and where they are not, the iteration
starts again from there: rounding cannot make a solution look better than it is.

Sources: Hestenes & Stiefel 1952; O'Leary 1980, "The block conjugate gradient algorithm and related
methods"; Ji & Li 2017, "A breakdown-free block conjugate gradient method".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bayesinf.curvature._definite import NotPositiveDefiniteError
from bayesinf.curvature._operator import SymmetricOperator
from bayesinf.curvature._solvers import (
    DampedSystem,
    Solution,
    finish,
    indefinite,
    relative,
    require_system,
)

__all__ = ["conjugate_gradient"]

_Precondition = Callable[[Tensor], Tensor]


def conjugate_gradient(
    operator: SymmetricOperator,
    rhs: Tensor,
    *,
    damping: float,
    preconditioner: SymmetricOperator | None = None,
    block: bool = True,
    tolerance: float = 1e-4,
    iterations: int = 100,
) -> Solution:
    r"""Solve ``(C + λI) x = b`` for every row ``b``.

    Parameters
    ----------
    operator
        ``C``, positive semi-definite.
    rhs
        Right-hand sides ``(k, d)``.
    damping
        λ.
    preconditioner
        ``M ≈ (C + λI)⁻¹``, symmetric positive definite: ``curvature.inverse(λ)``, or the deflated
        inverse. None: the identity.
    block
        True: one Krylov space for all right-hand sides, fewer products, and ``O(d k²)`` operations
        and ``O(k²)`` numbers more an iteration. False: one for each.
    tolerance
        On the residual of every row.
    iterations
        At most so many.

    Returns
    -------
    Solution

    Raises
    ------
    ValueError
        If arguments do not fit.
    NotPositiveDefiniteError
        If a direction of curvature ``≤ 0`` is met, with that curvature.

    Warns
    -----
    SolverWarning
        If rows miss the tolerance.
    """
    system = require_system(operator, rhs, damping, preconditioner)
    apply = torch.clone if preconditioner is None else preconditioner.apply
    cycle = _block_cycle if block else _row_cycle
    norms = rhs.norm(dim=1, keepdim=True)
    b = rhs / torch.where(norms == 0, torch.ones_like(norms), norms)
    x, r = torch.zeros_like(b), b.clone()
    open_rows = (r.norm(dim=1) > tolerance).nonzero()[:, 0]
    done = 0
    while done < iterations and len(open_rows):
        before = r[open_rows].norm(dim=1)
        part_x, part_r = x[open_rows], r[open_rows]
        done += cycle(system, apply, part_x, part_r, tolerance, iterations - done)
        x[open_rows] = part_x
        r[open_rows] = system.residual(part_x, b[open_rows])
        now = r[open_rows].norm(dim=1)
        open_rows = open_rows[(now > tolerance) & (now < 0.5 * before)]
    residual = relative(r, b)
    solution = Solution(x * norms, residual, done, system.products, residual <= tolerance)
    advice = (
        "Allow more iterations, or a better preconditioner (deflate), or a larger damping."
        if done >= iterations
        else f"Starting again does not help: {rhs.dtype} arithmetic ends here. Use a larger "
        f"tolerance, or float64 (task.to(dtype=torch.float64))."
    )
    return finish("conjugate_gradient", solution, tolerance, advice)


def _row_cycle(
    system: DampedSystem,
    precondition: _Precondition,
    x: Tensor,
    r: Tensor,
    tolerance: float,
    limit: int,
) -> int:
    """Iterate on ``x`` and ``r`` in place until ``r`` looks small; the number of iterations."""
    active = torch.arange(len(x), device=x.device)
    p = precondition(r)
    rz = _positive((r * p).sum(1))
    for done in range(1, limit + 1):
        ap = system(p)
        pap = (p * ap).sum(1)
        _require_finite(pap)
        if not bool((pap > 0).all()):
            quotient = pap / p.square().sum(1)
            raise indefinite(float(quotient.min()), system.damping, preconditioned=False)
        alpha = (rz / pap)[:, None]
        x[active] += alpha * p
        r[active] -= alpha * ap
        going = r[active].norm(dim=1) > tolerance
        active = active[going]
        if not len(active):
            return done
        z = precondition(r[active])
        new = _positive((r[active] * z).sum(1))
        p = z + (new / rz[going])[:, None] * p[going]
        rz = new
    return limit


def _block_cycle(
    system: DampedSystem,
    precondition: _Precondition,
    x: Tensor,
    r: Tensor,
    tolerance: float,
    limit: int,
) -> int:
    """Iterate on ``x`` and ``r`` in place until ``r`` looks small; the number of iterations."""
    active = torch.arange(len(x), device=x.device)
    z = precondition(r)
    _positive((r * z).sum(1))
    p = _orthonormal(z)
    for done in range(1, limit + 1):
        ap = system(p)
        inverse = _inverse(p @ ap.T, system.damping)
        alpha = (r[active] @ p.T) @ inverse
        x[active] += alpha @ p
        r[active] -= alpha @ ap
        active = active[r[active].norm(dim=1) > tolerance]
        if not len(active):
            return done
        z = precondition(r[active])
        _positive((r[active] * z).sum(1))
        p = _orthonormal(z - (z @ ap.T) @ inverse @ p)
    return limit


def _orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows with the same span, as many as its numerical dimension."""
    q, triangle = torch.linalg.qr((rows / rows.norm(dim=1, keepdim=True)).T)
    _require_finite(triangle)
    left, values, _ = torch.linalg.svd(triangle, full_matrices=False)
    return (q @ left[:, values > 100 * torch.finfo(rows.dtype).eps * values[0]]).T


def _inverse(matrix: Tensor, damping: float) -> Tensor:
    """Inverse of ``P A Pᵀ`` for orthonormal ``P``, where it exceeds rounding."""
    _require_finite(matrix)
    wide = matrix.double()
    values, vectors = torch.linalg.eigh((wide + wide.T) / 2)
    rounding = torch.finfo(matrix.dtype).eps * len(values) * float(values.abs().max())
    if float(values[0]) < -rounding or float(values[-1]) <= 0:
        raise indefinite(float(values[0]), damping, preconditioned=False)
    kept = values > rounding
    return ((vectors[:, kept] / values[kept]) @ vectors[:, kept].T).to(matrix.dtype)


def _require_finite(products: Tensor) -> None:
    if not bool(torch.isfinite(products).all()):
        raise ValueError(
            "a product with the operator or the preconditioner is not finite. Usual causes: NaN "
            "in the weights or the inputs, or numbers beyond the range of the dtype."
        )


def _positive(rz: Tensor) -> Tensor:
    """Return ``rᵀMr``, which must be positive."""
    _require_finite(rz)
    low = float(rz.min())
    if low <= 0:
        raise NotPositiveDefiniteError(
            f"the preconditioner is not positive definite: a residual r has rᵀMr = {low:.4g}. "
            f"Pass the inverse of a positive curvature, such as curvature.inverse(damping).",
            low,
        )
    return rz
