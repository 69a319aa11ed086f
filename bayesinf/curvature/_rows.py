r"""Rows of a Jacobian, factored where a layer's structure allows, and their inner products.

Shapes (``B`` examples, ``K`` rows an example, a layer ``(P, M)``):

* factored: ``a`` ``(B, T, M)`` and ``values`` ``(B, K, T, P)``; row ``(b, k)`` is the matrix
  ``Σ_t values_bkt a_btᵀ``;
* explicit: ``a`` is None and ``values`` ``(B, K, P, M)`` holds the matrices.

A whole row is a list of these, one entry a layer. Inner products of two sets are ``(B·K, B'·K')``,
examples first. At one position they cost ``M + P`` instead of ``P·M`` a pair:
``⟨ds aᵀ, ds' a'ᵀ⟩ = (ds·ds')(a·a')``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rows", "concatenate", "gram", "squared_norms"]

_CHUNK = 2**24
"""Elements of a temporary at a time, in the inner products."""


@dataclass(frozen=True)
class Rows:
    """Rows of one layer; see the module for shapes."""

    a: Tensor | None
    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """``(B, K)``."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def rank_one(self) -> bool:
        """Whether rows are outer products: factored, at one position."""
        return self.a is not None and self.a.shape[1] == 1

    def matrices(self) -> Tensor:
        """Explicit rows, ``(B, K, P, M)``."""
        if self.a is None:
            return self.values
        if self.rank_one:
            return self.values.transpose(2, 3) * self.a.unsqueeze(1)
        return self.values.transpose(2, 3) @ self.a.unsqueeze(1)

    def flat(self) -> Tensor:
        """Explicit rows, ``(B·K, P·M)``."""
        return self.matrices().flatten(2).flatten(0, 1)

    def compact(self) -> Rows:
        """Keep outer products, make everything else explicit."""
        return self if self.rank_one else Rows(None, self.matrices())

    def rotate(self, q_a: Tensor, q_s: Tensor) -> Rows:
        """Rows in a Kronecker basis: ``q_sᵀ G q_a``."""
        if self.a is None:
            return Rows(None, q_s.T @ self.values @ q_a)
        return Rows(self.a @ q_a, self.values @ q_s)

    def part(self, where: slice) -> Rows:
        """Rows of some of the examples."""
        return Rows(None if self.a is None else self.a[where], self.values[where])


def concatenate(blocks: Sequence[Rows]) -> Rows:
    """Join blocks of examples of one layer; all must be of the same kind."""
    values = torch.cat([block.values for block in blocks])
    factors = [block.a for block in blocks if block.a is not None]
    return Rows(torch.cat(factors) if factors else None, values)


def gram(left: Sequence[Rows], right: Sequence[Rows], dtype: torch.dtype | None = None) -> Tensor:
    """Inner products ``(B·K, B'·K')`` of rows, summed over layers.

    Parameters
    ----------
    left, right
        One entry a layer, the same layers in the same order.
    dtype
        In which to multiply and add; that of the rows by default.
    """
    (n, k), (m, j) = left[0].shape, right[0].shape
    dtype = dtype or left[0].values.dtype
    out = left[0].values.new_zeros(n, k, m, j, dtype=dtype)
    for x, y in zip(left, right, strict=True):
        if x.rank_one and y.rank_one:
            _add_products(out, x, y)
        else:
            _add_explicit(out, x, y)
    return out.view(n * k, m * j)


def squared_norms(rows: Sequence[Rows]) -> Tensor:
    """Squared norms ``(B·K,)`` of whole rows."""
    total = rows[0].values.new_zeros(rows[0].shape[0] * rows[0].shape[1])
    for layer in rows:
        if layer.rank_one and layer.a is not None:
            squares = layer.values.square().sum((2, 3)) * layer.a.square().sum((1, 2))[:, None]
            total += squares.flatten()
        else:
            total += layer.flat().square().sum(1)
    return total


def _add_products(out: Tensor, x: Rows, y: Rows) -> None:
    """``out += (a·a')(ds·ds')``, a block of examples at a time."""
    n, k, m, j = out.shape
    assert x.a is not None
    assert y.a is not None
    a, values = y.a.flatten(1).to(out.dtype), y.values.reshape(m * j, -1).to(out.dtype)
    step = max(1, _CHUNK // (k * m * j))
    for start in range(0, n, step):
        where = slice(start, start + step)
        inner = x.values[where].reshape(-1, values.shape[1]).to(out.dtype) @ values.T
        inputs = x.a[where].flatten(1).to(out.dtype) @ a.T
        out[where].addcmul_(inner.view(-1, k, m, j), inputs[:, None, :, None])


def _add_explicit(out: Tensor, x: Rows, y: Rows) -> None:
    """``out += ⟨G, G'⟩`` from explicit rows, a block of examples on both sides at a time."""
    n, k, m, j = out.shape
    width = x.part(slice(0, 1)).flat().shape[1]
    rows, columns = max(1, _CHUNK // (k * width)), max(1, _CHUNK // (j * width))
    for start in range(0, n, rows):
        left = x.part(slice(start, start + rows)).flat().to(out.dtype)
        for first in range(0, m, columns):
            right = y.part(slice(first, first + columns)).flat().to(out.dtype)
            block = out[start : start + rows, :, first : first + columns]
            block += (left @ right.T).view(block.shape)
