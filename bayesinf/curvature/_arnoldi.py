r"""Eigenpairs of largest magnitude from one Krylov space, a stated number of products.

Arnoldi's iteration builds an orthonormal basis ``V`` ``(m, d)`` of ``span(v, Av, …, A^{m−1}v)``;
the eigenpairs ``(θ, s)`` of ``V A Vᵀ`` give approximations ``(θ, sᵀV)`` of those of ``A``, the best
at the ends of the spectrum. Where the space closes before ``m`` steps, a random direction
orthogonal to it opens the next, so that ``m = d`` finds every eigenpair.

Source: Schioppa et al. 2022, "Scaling up influence functions", algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesinf.curvature._lanczos import Eigenpairs, placement
from bayesinf.curvature._operator import SymmetricOperator

__all__ = ["arnoldi_eigenpairs"]

_CLOSED = 1e4
"""Times rounding: a new direction shorter than that, relative to the largest, is none."""


def arnoldi_eigenpairs(
    operator: SymmetricOperator, k: int, *, iterations: int, seed: int = 0
) -> Eigenpairs:
    """Compute the ``k`` eigenpairs of largest magnitude, approximately.

    Parameters
    ----------
    operator
        ``A`` ``(d, d)``; vectors are handed to it in its dtype and on its device.
    k
        How many.
    iterations
        Steps ``m``, one product each; ``k ≤ m ≤ d``. The basis takes ``m·d`` numbers.
    seed
        Of the start.

    Returns
    -------
    Eigenpairs
        By descending eigenvalue.

    Raises
    ------
    ValueError
        If ``k`` or ``iterations`` cannot be, or a product is not finite.
    """
    d = operator.shape[0]
    if not 1 <= k <= iterations <= d:
        raise ValueError(
            f"expected 1 ≤ rank ≤ iterations ≤ {d}, the number of parameters; got rank={k} and "
            f"iterations={iterations}."
        )
    dtype, device = placement(operator)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.empty(iterations, d, dtype=dtype, device=device)
    images = torch.empty_like(basis)
    largest = 0.0
    tiny = _CLOSED * torch.finfo(dtype).eps
    direction = _fresh(basis[:0], generator)
    for i in range(iterations):
        basis[i] = direction
        images[i] = operator.apply(direction[None])[0]
        size = float(images[i].norm())
        if not size < float("inf"):
            raise ValueError(
                "a product with the operator is not finite. Usual causes: NaN in the weights or "
                "the inputs, or numbers beyond the range of the dtype."
            )
        largest = max(largest, size)
        rest = _orthogonal(images[i], basis[: i + 1])
        length = float(rest.norm())
        if length > tiny * largest:
            direction = rest / length
        elif i + 1 < iterations:
            direction = _fresh(basis[: i + 1], generator)
    small = (basis @ images.T).double()
    values, mixing = torch.linalg.eigh((small + small.T) / 2)
    chosen = values.abs().argsort(descending=True, stable=True)[:k]
    chosen = chosen[values[chosen].argsort(descending=True, stable=True)]
    weights = mixing[:, chosen].T.to(dtype)
    vectors = weights @ basis
    gap = weights @ images - values[chosen, None].to(dtype) * vectors
    return Eigenpairs(values[chosen], vectors, gap.double().norm(dim=1), iterations)


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """What of a vector is orthogonal to rows; twice, since once leaves rounding."""
    for _ in range(2):
        vector = vector - (vector @ basis.T) @ basis
    return vector


def _fresh(basis: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector orthogonal to rows."""
    drawn = torch.randn(basis.shape[1], generator=generator, dtype=torch.float64).to(basis)
    rest = _orthogonal(drawn, basis)
    return rest / rest.norm()
