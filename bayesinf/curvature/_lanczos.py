r"""Eigenvalues and eigenvectors at the ends of a spectrum, from products alone.

Eigenpairs come from ARPACK's implicitly restarted Lanczos method, run in float64 whatever the
operator's dtype. With a root ``W = M^{1/2}`` of an inverse preconditioner they are those of
``W (C + λI) W``, which has the eigenvalues of ``M (C + λI)``.

Bounds on a spectrum, to choose step sizes by, need no root: the Lanczos recurrence for ``M A`` in
the inner product ``⟨u, v⟩ = uᵀ M v`` of residual-like vectors.

Sources: Lehoucq, Sorensen & Yang 1998, "ARPACK users' guide"; Zhou, Li & others 2006,
"Self-consistent-field calculations using Chebyshev-filtered subspace iteration" (upper bound).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from bayesinf.curvature._operator import SymmetricOperator

__all__ = ["Eigenpairs", "Spectrum", "estimate_spectrum", "top_eigenpairs"]

Ends = Literal["LA", "SA", "BE"]
"""Largest, smallest, or half from both ends (one more of the largest)."""

_DENSE = 64
"""Up to this size all eigenpairs come from the matrix itself."""


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues with their vectors.

    Attributes
    ----------
    values
        ``(k,)``, float64, descending.
    vectors
        Orthonormal rows ``(k, d)``, in the operator's dtype.
    residuals
        ``‖A v − θ v‖``, ``(k,)``: the distance to a true eigenvalue is at most that.
    products
        Matrix–vector products that it took.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int


def top_eigenpairs(
    operator: SymmetricOperator,
    k: int,
    *,
    preconditioner_root: SymmetricOperator | None = None,
    damping: float = 0.0,
    which: Ends = "LA",
    tolerance: float = 1e-6,
    iterations: int | None = None,
    partial: bool = False,
    seed: int = 0,
) -> Eigenpairs:
    """Compute ``k`` eigenpairs of ``C + λI`` or, preconditioned, of ``W (C + λI) W``.

    Parameters
    ----------
    operator
        ``C``. Vectors are handed to it in its ``dtype`` and on its ``device`` where it has these
        attributes, else in float64 on the CPU.
    k
        How many, ``1 ≤ k ≤ d``.
    preconditioner_root
        ``W``: ``curvature.inverse(λ).sqrt()``.
    damping
        λ.
    which
        ``"LA"`` the largest, ``"SA"`` the smallest, ``"BE"`` half from both ends.
    tolerance
        Relative accuracy of the eigenvalues; in float32 not below about 1e-6.
    iterations
        Restarts at most; ARPACK's default, ``10 d``, if None.
    partial
        Take those that have converged by then, one at least, in place of raising.
    seed
        Of the start vector.

    Returns
    -------
    Eigenpairs

    Raises
    ------
    ValueError
        If ``k`` or ``which`` cannot be, shapes do not fit, or a product is not finite.
    RuntimeError
        If the iteration did not converge; with ``partial``, nowhere.

    Notes
    -----
    All values returned are eigenvalues, but of one that occurs many times (the damping, where
    ``C`` has a null space) fewer copies may be found than there are, and others in their place.
    """
    d = operator.shape[0]
    if not 1 <= k <= d or which not in get_args(Ends):
        raise ValueError(
            f"expected 1 ≤ k ≤ {d} and which in {get_args(Ends)}; got k={k}, which={which!r}."
        )
    if preconditioner_root is not None and preconditioner_root.shape != operator.shape:
        raise ValueError(
            f"the preconditioner's root is {preconditioner_root.shape} and the operator "
            f"{operator.shape}. Usual cause: a curvature of other parameters."
        )
    # Products convert what they are given; an operator that does not is the root.
    dtype, device = placement(preconditioner_root or operator)
    calls = 0

    def apply(rows: Tensor) -> Tensor:
        nonlocal calls
        calls += len(rows)
        w = rows if preconditioner_root is None else preconditioner_root.apply(rows)
        out = operator.apply(w) + damping * w
        out = out if preconditioner_root is None else preconditioner_root.apply(out)
        if not bool(torch.isfinite(out).all()):
            raise ValueError(
                "a product with the operator is not finite. Usual causes: NaN in the weights or "
                "the inputs, or numbers beyond the range of the dtype."
            )
        return out

    if d <= _DENSE or 2 * k + 1 >= d:
        rows = _dense(apply(torch.eye(d, dtype=dtype, device=device)), k, which)
    else:
        rows = _arpack(apply, d, k, dtype, device, seed, which, tolerance, iterations, partial)
    image = apply(rows)
    values = (rows.double() * image.double()).sum(1)
    order = values.argsort(descending=True)
    residuals = (image.double() - values[:, None] * rows.double()).norm(dim=1)
    return Eigenpairs(values[order], rows[order], residuals[order], calls)


def _dense(matrix: Tensor, k: int, which: str) -> Tensor:
    """Rows of eigenvectors at the ends of a matrix."""
    wide = matrix.double()
    vectors = torch.linalg.eigh((wide + wide.T) / 2)[1].T
    low = {"LA": 0, "SA": k, "BE": k // 2}[which]
    return torch.cat([vectors[:low], vectors[len(vectors) - (k - low) :]]).to(matrix.dtype)


def _arpack(
    apply: Callable[[Tensor], Tensor],
    d: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    which: str,
    tolerance: float,
    iterations: int | None,
    partial: bool,
) -> Tensor:
    """Rows of eigenvectors by restarted Lanczos iterations."""

    def product(vector: np.ndarray) -> np.ndarray:
        row = torch.from_numpy(vector.reshape(1, -1)).to(device, dtype)
        return apply(row)[0].double().cpu().numpy()

    start = np.random.default_rng(seed).standard_normal(d)
    linear = LinearOperator((d, d), matvec=product, dtype=np.float64)
    which = "LA" if k == 1 and which == "BE" else which
    options: dict[str, Any] = {"which": which, "v0": start, "tol": tolerance, "maxiter": iterations}
    try:
        vectors = eigsh(linear, k=k, **options)[1]
    except ArpackNoConvergence as error:
        vectors = error.eigenvectors
        if not (partial and vectors.shape[1]):
            raise RuntimeError(
                f"{len(error.eigenvalues)} of {k} eigenpairs converged to a tolerance of "
                f"{tolerance:g}. Allow more iterations, a larger tolerance (rounding in {dtype} "
                f"sets a limit), or fewer eigenpairs."
            ) from error
    return torch.from_numpy(np.ascontiguousarray(vectors.T)).to(device, dtype)


def placement(operator: SymmetricOperator) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of an operator; float64 on the CPU where it does not say."""
    dtype = getattr(operator, "dtype", torch.float64)
    return dtype, torch.device(getattr(operator, "device", "cpu"))


@dataclass(frozen=True)
class Spectrum:
    """Estimated ends of a spectrum.

    Attributes
    ----------
    low
        Smallest Ritz value, an upper bound of the smallest eigenvalue.
    high
        Largest Ritz value plus its residual bound, after enough steps an upper bound of the largest
        eigenvalue.
    """

    low: float
    high: float


def estimate_spectrum(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    precondition: Callable[[Tensor], Tensor] | None = None,
    steps: int = 20,
) -> Spectrum:
    """Estimate the smallest and largest eigenvalue of ``M A`` by Lanczos steps.

    Parameters
    ----------
    product
        ``A`` times rows ``(1, d)``.
    start
        Random vector ``(1, d)``.
    precondition
        ``M`` times rows ``(1, d)``; the identity if None.
    steps
        Products with ``A``, at most.

    Raises
    ------
    ValueError
        If a product is not finite.
    """
    m = precondition if precondition is not None else lambda rows: rows
    q, z = _normalised(start, m(start))
    residuals, images, diagonal, off = [q], [z], [], []
    for _ in range(min(steps, start.shape[1])):
        w = product(images[-1])
        diagonal.append(float((images[-1] * w).sum()))
        for _ in range(2):
            for old, image in zip(residuals, images, strict=True):
                w = w - (image * w).sum() * old
        image = m(w)
        squared = float((w * image).sum())
        off.append(max(squared, 0.0) ** 0.5)
        if off[-1] <= 1e3 * torch.finfo(start.dtype).eps * abs(diagonal[0]):
            break
        q, z = _normalised(w, image)
        residuals.append(q)
        images.append(z)
    if not np.isfinite([*diagonal, *off]).all():
        raise ValueError(
            "a product with the operator or the preconditioner is not finite. Usual causes: NaN "
            "in the weights or the inputs, or numbers beyond the range of the dtype."
        )
    t = np.diag(diagonal) + np.diag(off[: len(diagonal) - 1], 1) + np.diag(off[:-1], -1)
    values, vectors = np.linalg.eigh(t)
    return Spectrum(float(values[0]), float(values[-1] + off[-1] * abs(vectors[-1, -1])))


def _normalised(q: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    scale = (q * z).sum().sqrt()
    return q / scale, z / scale
