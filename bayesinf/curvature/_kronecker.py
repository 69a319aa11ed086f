r"""Moments of rows: what the curvature of one layer is estimated from.

Rows are as in :mod:`bayesinf.curvature._rows`, ``B`` examples with ``K = 1``; the gradient of an
example is the matrix ``G_b`` ``(P, M)``. Sums are over the examples of a batch:

* ``second_moment`` ``Σ_b G_b²``, entry by entry, ``(P, M)``: with rotated rows ``n`` times the
  EK-FAC ``Λ`` (George et al. 2018, Eq. 7);
* ``outer_moment`` ``Σ_b vec(G_b) vec(G_b)ᵀ``, ``(P·M, P·M)``;
* ``eigenbasis`` of a covariance, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesinf.curvature._rows import Factored, Indexed, Rows

__all__ = ["eigenbasis", "outer_moment", "second_moment"]

_TILE = 2**18
"""Elements of explicit gradients at a time, which should stay in cache."""


def eigenbasis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (not below 0, ascending) and eigenvectors of covariances ``(..., M, M)``."""
    double = matrix.double()
    values, vectors = torch.linalg.eigh((double + double.mT) / 2)
    return values.clamp_min(0), vectors


def second_moment(rows: Rows) -> Tensor:
    """``Σ_b G_b²``.

    At one position the square of an outer product is the outer product of squares, one GEMM; of an
    embedding only the rows of tokens that occur are formed.
    """
    if isinstance(rows, Factored) and rows.rank_one:
        return rows.values.flatten(0, 2).square().T @ rows.a.flatten(0, 1).square()
    if isinstance(rows, Indexed):
        return _indexed_moment(rows)
    total = rows.values.new_zeros(rows.matrix_shape)
    for _, part in rows.chunks(_TILE):
        total += part.matrices().square().sum((0, 1))
    return total


def outer_moment(rows: Rows) -> Tensor:
    """``Σ_b vec(G_b) vec(G_b)ᵀ``."""
    size = rows.matrix_shape[0] * rows.matrix_shape[1]
    total = rows.values.new_zeros(size, size)
    for _, part in rows.chunks():
        flat = part.flat()
        total.addmm_(flat.T, flat)
    return total


def _indexed_moment(rows: Indexed) -> Tensor:
    """Sum positions that share example and token, square, then sum over examples by token."""
    examples = torch.arange(len(rows.index), device=rows.index.device)[:, None]
    key = (examples * rows.size + rows.index).flatten()
    unique, place = key.unique(return_inverse=True)
    width = rows.values.shape[3]
    sums = rows.values.new_zeros(len(unique), width)
    sums.index_add_(0, place, rows.values.reshape(-1, width))
    total = rows.values.new_zeros(rows.size, width)
    return total.index_add_(0, unique % rows.size, sums.square())
