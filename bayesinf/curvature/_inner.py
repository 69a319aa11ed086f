"""Inner products of rows, by whichever way their factors make cheapest.

Rows are as in :mod:`bayesinf.curvature._rows`, whole ones as lists with one entry a layer. Inner
products of two sets are ``(B·K, B'·K')``, examples first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesinf.curvature._rows import CHUNK, Factored, Indexed, Mixed, Rows

__all__ = ["gram", "inner", "squared_norms"]

_TILE = 2**21
"""Elements of a temporary that is written once and read once, which should stay in cache."""


def gram(left: Sequence[Rows], right: Sequence[Rows], dtype: torch.dtype | None = None) -> Tensor:
    """Inner products ``(B·K, B'·K')`` of rows, summed over layers.

    Parameters
    ----------
    left, right
        One entry a layer, the same layers in the same order.
    dtype
        In which to multiply and add; that of the left rows by default.
    """
    (n, k), (m, j) = left[0].shape, right[0].shape
    dtype = dtype or left[0].values.dtype
    out = left[0].values.new_zeros(n, k, m, j, dtype=dtype)
    for x, y in zip(left, right, strict=True):
        _add(out, x, y)
    return out.view(n * k, m * j)


def squared_norms(rows: Sequence[Rows]) -> Tensor:
    """Squared norms ``(B·K,)`` of whole rows."""
    n, k = rows[0].shape
    total = rows[0].values.new_zeros(n, k)
    for layer in rows:
        if isinstance(layer, Factored) and layer.rank_one:
            squares = layer.values.square().sum((2, 3))
            total += squares * layer.a.square().sum((1, 2))[:, None]
        elif isinstance(layer, Indexed):
            same = layer.index[:, :, None] == layer.index[:, None, :]
            products = layer.values @ layer.values.transpose(2, 3)
            total += (products * same[:, None]).sum((2, 3))
        else:
            for where, part in layer.chunks():
                total[where] += part.matrices().square().sum((2, 3))
    return total.flatten()


def inner(left: Sequence[Rows], right: Sequence[Rows]) -> Tensor:
    """Inner products ``(B·K,)`` of rows with their counterparts, summed over layers."""
    n, k = left[0].shape
    total = left[0].values.new_zeros(n, k)
    for x, y in zip(left, right, strict=True):
        for where, part in x.chunks():
            total[where] += (part.matrices() * y.part(where).matrices()).sum((2, 3))
    return total.flatten()


def _add(out: Tensor, x: Rows, y: Rows) -> None:
    """``out += ⟨x, y⟩`` for one layer, ``out`` ``(B, K, B', K')``."""
    if isinstance(x, Mixed):
        for part in x.parts:
            _add(out, part, y)
    elif isinstance(y, Mixed):
        for part in y.parts:
            _add(out, x, part)
    elif isinstance(x, Indexed) and isinstance(y, Indexed):
        _add_matching(out, x, y)
    elif isinstance(y, Indexed):
        _add_gathered(out, x, y)
    elif isinstance(x, Indexed):
        _add_gathered(out.permute(2, 3, 0, 1), y, x)
    elif isinstance(x, Factored) and isinstance(y, Factored) and x.rank_one and y.rank_one:
        _add_products(out, x, y)
    elif isinstance(y, Factored) and _contracts(x, y):
        _add_contracted(out, x, y)
    else:
        _add_explicit(out, x, y)


def _contracts(x: Rows, y: Factored) -> bool:
    """Whether few matrices meet many outer products, which are then best left unformed."""
    return y.rank_one and 2 * x.shape[0] * x.shape[1] <= max(y.matrix_shape)


def _add_products(out: Tensor, x: Factored, y: Factored) -> None:
    """``out += (a·a')(ds·ds')``, a block of examples at a time."""
    n, k, m, j = out.shape
    a, values = y.a.flatten(1).to(out.dtype), y.values.reshape(m * j, -1).to(out.dtype)
    step = max(1, CHUNK // (k * m * j))
    for start in range(0, n, step):
        where = slice(start, start + step)
        inner = x.values[where].reshape(-1, values.shape[1]).to(out.dtype) @ values.T
        inputs = x.a[where].flatten(1).to(out.dtype) @ a.T
        out[where].addcmul_(inner.view(-1, k, m, j), inputs[:, None, :, None])


def _add_contracted(out: Tensor, x: Rows, y: Factored) -> None:
    """``out += dsᵀ X a``: first over the longer side by a GEMM, then over the shorter."""
    n, k, m, j = out.shape
    matrices = x.matrices().flatten(0, 1).to(out.dtype)  # (n·k, P, M)
    a = y.a.to(out.dtype).expand(m, j, -1).reshape(m * j, -1)
    ds = y.values.to(out.dtype).reshape(m * j, -1)
    if ds.shape[1] < a.shape[1]:
        matrices, a, ds = matrices.transpose(1, 2), ds, a
    short = a.shape[1]
    wide = matrices.permute(1, 0, 2).reshape(ds.shape[1], -1)  # (long, n·k·short)
    result = out.new_empty(m * j, n * k)
    step = min(m * j, max(1, _TILE // wide.shape[1]))
    buffer = out.new_empty(step, wide.shape[1])
    for start in range(0, m * j, step):
        where = slice(start, min(start + step, m * j))
        tile = torch.mm(ds[where], wide, out=buffer[: where.stop - start])
        part = tile.view(-1, n * k, short).mul_(a[where].unsqueeze(1))
        torch.sum(part, 2, out=result[where])
    out += result.T.view(n, k, m, j)


def _add_explicit(out: Tensor, x: Rows, y: Rows) -> None:
    """``out += ⟨G, G'⟩`` from explicit rows, a block of examples on both sides at a time."""
    for i, left in x.chunks():
        flat = left.flat().to(out.dtype)
        for j, right in y.chunks():
            block = out[i, :, j]
            block += (flat @ right.flat().to(out.dtype).T).view(block.shape)


def _add_gathered(out: Tensor, x: Rows, y: Indexed) -> None:
    """``out += Σ_t ⟨X[index_t], values_t⟩``."""
    width = x.matrix_shape[1]
    for i, left in x.chunks():
        matrices = left.matrices().to(out.dtype)
        step = max(1, CHUNK // (matrices[:, :, 0, 0].numel() * y.index.shape[1] * width))
        for start in range(0, y.shape[0], step):
            j = slice(start, start + step)
            chosen = matrices[:, :, y.index[j]]  # (n, k, m, T, M)
            out[i, :, j] += torch.einsum("nkbtm,bjtm->nkbj", chosen, y.values[j].to(out.dtype))


def _add_matching(out: Tensor, x: Indexed, y: Indexed) -> None:
    """``out += Σ_{t,s: index_t = index'_s} ⟨values_t, values'_s⟩``."""
    n, k = out.shape[:2]
    right = y.values.permute(0, 2, 1, 3).to(out.dtype)  # (m, S, j, M)
    step = max(1, CHUNK // (k * x.index.shape[1] * right[..., 0].numel()))
    for start in range(0, n, step):
        where = slice(start, start + step)
        left = x.values[where].to(out.dtype)
        products = torch.einsum("nktd,msjd->nktmsj", left, right)
        same = x.index[where][:, None, :, None, None, None] == y.index[None, None, None, :, :, None]
        out[where] += (products * same).sum((2, 4))
