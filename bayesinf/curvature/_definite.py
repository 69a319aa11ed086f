"""Damped dense systems: solve, or say how far from positive definite the matrix is."""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import cho_solve
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

__all__ = ["NotPositiveDefiniteError", "cholesky", "require_memory", "smallest_eigenvalue"]

_DIRECT = 1500
"""Up to this size the smallest eigenvalue comes from a full decomposition."""


class NotPositiveDefiniteError(ValueError):
    """``C + λI`` is not positive definite, so that the influence is not defined.

    Attributes
    ----------
    lambda_min
        ``λ_min(C) + λ``.
    """

    def __init__(self, message: str, lambda_min: float) -> None:
        super().__init__(message)
        self.lambda_min = lambda_min


def cholesky(matrix: Tensor, damping: float, name: str) -> Tensor:
    """Lower Cholesky factor of ``C + λI``.

    Parameters
    ----------
    matrix
        Symmetric ``C`` ``(d, d)``; its diagonal is damped in place.
    damping
        λ.
    name
        What ``C`` is, for the message.

    Raises
    ------
    NotPositiveDefiniteError
        If ``λ_min(C) + λ ≤ 0``, with the smallest damping that would do.
    """
    matrix.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not int(failed):
        return factor
    low = float(torch.linalg.eigvalsh(matrix)[0])
    raise not_definite(low, damping, name)


def not_definite(lambda_min: float, damping: float, name: str) -> NotPositiveDefiniteError:
    """Build the error for ``λ_min(C) + λ ≤ 0``."""
    needed = damping - lambda_min
    return NotPositiveDefiniteError(
        f"the {name} plus damping is not positive definite: λ_min(C) + λ = {lambda_min:.4g} at "
        f"damping={damping:g}. The local posterior does not exist there and influence would have "
        f"arbitrary sign. The damping must exceed {needed:.4g}, and well above it is better; "
        f"gauss_newton is positive definite at any damping > 0.",
        lambda_min,
    )


def smallest_eigenvalue(factor: Tensor) -> float:
    """Smallest eigenvalue of ``L Lᵀ`` from its Cholesky factor ``L``.

    Directly for small matrices, else by Lanczos iterations on the inverse.
    """
    size = len(factor)
    if size <= _DIRECT:
        return float(torch.linalg.eigvalsh(factor @ factor.T)[0])

    array = factor.cpu().numpy()
    held = (array, True) if array.flags.f_contiguous else (array.T, False)  # no copies in solves

    def solve(vector: np.ndarray) -> np.ndarray:
        return cho_solve(held, vector.ravel(), check_finite=False)

    inverse = LinearOperator((size, size), matvec=solve, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)
    top = eigsh(inverse, k=1, which="LA", v0=start, tol=1e-3, return_eigenvectors=False)
    return float(1 / top[0])


def require_memory(gib: float, limit: float, what: str, advice: str) -> None:
    """Raise ``ValueError`` if a computation would need more memory than allowed.

    Parameters
    ----------
    gib, limit
        Needed and allowed, in GiB.
    what, advice
        What needs it, and what else to do.
    """
    if gib > limit:
        raise ValueError(
            f"{what} needs about {gib:.1f} GiB and memory_limit={limit:g} GiB. {advice}, or raise "
            f"memory_limit if this machine has more."
        )
