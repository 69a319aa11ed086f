r"""Rows of a Jacobian, as factored as a layer's structure allows, and their inner products.

``B`` examples, ``K`` rows an example, a layer ``(P, M)``; row ``(b, k)`` is a matrix ``(P, M)``:

* :class:`Factored`: ``Σ_t values_bkt a_btᵀ``, ``a`` ``(B, T, M)``, ``values`` ``(B, K, T, P)``;
* :class:`Grouped`: the same in each of ``g`` groups of ``P/g`` rows of the matrix, ``a``
  ``(B, T, g, M)``, ``values`` ``(B, K, T, g, P/g)``;
* :class:`Indexed`: ``Σ_t e_{index_bt} values_bktᵀ``, ``index`` ``(B, T)`` (an embedding's tokens),
  ``values`` ``(B, K, T, M)``;
* :class:`Mixed`: a sum of the above;
* :class:`Explicit`: ``values`` ``(B, K, P, M)``.

A whole row is a list of these, one entry a layer. Inner products of two sets are ``(B·K, B'·K')``,
examples first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any, Self

import torch
from torch import Tensor

__all__ = [
    "Explicit", "Factored", "Grouped", "Indexed", "Mixed", "Rows", "concatenate", "flat_rows",
    "gram", "inner", "mixed", "squared_norms", "stack", "unstack",
    "widen",
]  # fmt: skip

_CHUNK = 2**24
"""Elements of a temporary at a time."""

_TILE = 2**21
"""Elements of a temporary that is written once and read once, which should stay in cache."""


@dataclass(frozen=True)
class _Rows:
    """What all kinds share: ``values`` ``(B, K, …)``, other tensors ``(B, …)``."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """``(B, K)``."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(P, M)``."""
        raise NotImplementedError

    def matrices(self) -> Tensor:
        """Explicit rows, ``(B, K, P, M)``."""
        raise NotImplementedError

    def part(self, where: slice | Tensor) -> Self:
        """Rows of some of the examples."""
        return self.each(lambda leaf: leaf[where])

    def to(self, dtype: torch.dtype) -> Self:
        """Return the rows in another precision."""
        return self.each(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf)

    def flat(self) -> Tensor:
        """Explicit rows, ``(B·K, P·M)``."""
        return self.matrices().flatten(2).flatten(0, 1)

    def compact(self) -> Rows:
        """Keep what is smaller than explicit rows, make everything else explicit."""
        return Explicit(self.matrices())

    def chunks(self, elements: int = _CHUNK) -> Iterator[tuple[slice, Self]]:
        """Blocks of examples whose explicit rows are small."""
        p, m = self.matrix_shape
        step = max(1, elements // max(1, self.shape[1] * p * m))
        for start in range(0, self.shape[0], step):
            where = slice(start, start + step)
            yield where, self.part(where)

    def each(self, function: Callable[[Any], Any]) -> Self:
        """Return the rows with a function applied to every tensor."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in held.items() if not isinstance(v, int)})


@dataclass(frozen=True)
class Explicit(_Rows):
    """Matrices; see the module for shapes."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.values.shape[2], self.values.shape[3]

    def matrices(self) -> Tensor:
        return self.values

    def compact(self) -> Rows:
        return self


@dataclass(frozen=True)
class Factored(_Rows):
    """Sums of outer products over positions; see the module for shapes."""

    a: Tensor

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.values.shape[3], self.a.shape[2]

    @property
    def rank_one(self) -> bool:
        """Whether rows are outer products."""
        return self.a.shape[1] == 1

    def matrices(self) -> Tensor:
        if self.rank_one:
            return self.values.transpose(2, 3) * self.a.unsqueeze(1)
        return self.values.transpose(2, 3) @ self.a.unsqueeze(1)

    def compact(self) -> Rows:
        return self if self.rank_one else Explicit(self.matrices())

    def split(self, tokens: int) -> Factored:
        """Tokens as examples, ``(B·T, 1)``; one row an example."""
        return Factored(
            _tokens(self.values.squeeze(1), tokens).unsqueeze(1), _tokens(self.a, tokens)
        )


@dataclass(frozen=True)
class Grouped(_Rows):
    """Sums of outer products within groups; see the module for shapes."""

    a: Tensor

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.values.shape[3] * self.values.shape[4], self.a.shape[3]

    def matrices(self) -> Tensor:
        return torch.einsum("bktgp,btgm->bkgpm", self.values, self.a).flatten(2, 3)

    def split(self, tokens: int) -> Grouped:
        """Tokens as examples, ``(B·T, 1)``; one row an example."""
        return Grouped(
            _tokens(self.values.squeeze(1), tokens).unsqueeze(1), _tokens(self.a, tokens)
        )


@dataclass(frozen=True)
class Indexed(_Rows):
    """Rows of the matrix that an index chooses; see the module for shapes."""

    index: Tensor
    size: int

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.size, self.values.shape[3]

    def matrices(self) -> Tensor:
        b, k, _, m = self.values.shape
        out = self.values.new_zeros(b, k, self.size, m)
        index = self.index[:, None, :, None].expand_as(self.values)
        return out.scatter_add_(2, index, self.values)

    def compact(self) -> Rows:
        return self

    def split(self, tokens: int) -> Indexed:
        """Tokens as examples, ``(B·T, 1)``; one row an example."""
        values = _tokens(self.values.squeeze(1), tokens).unsqueeze(1)
        return Indexed(values, _tokens(self.index, tokens), self.size)


@dataclass(frozen=True)
class Mixed(_Rows):
    """A sum; ``values`` is only the first part's, for its shape."""

    parts: tuple[Factored | Indexed, ...]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.parts[0].matrix_shape

    def matrices(self) -> Tensor:
        return reduce(torch.add, (part.matrices() for part in self.parts))

    def compact(self) -> Rows:
        return self

    def split(self, tokens: int) -> Mixed:
        """Tokens as examples, ``(B·T, 1)``; one row an example."""
        return mixed(part.split(tokens) for part in self.parts)

    def each(self, function: Callable[[Any], Any]) -> Mixed:
        return mixed(part.each(function) for part in self.parts)


Rows = Explicit | Factored | Grouped | Indexed | Mixed


def mixed(parts: Any) -> Mixed:
    """Sum of factored and indexed rows of the same examples."""
    held = tuple(parts)
    return Mixed(held[0].values, held)


def concatenate(blocks: Sequence[Rows]) -> Rows:
    """Join blocks of examples of one layer; all must be of the same kind."""
    first = blocks[0]
    if isinstance(first, Mixed):
        parts = zip(*(block.parts for block in blocks), strict=True)  # type: ignore[union-attr]
        return mixed(concatenate(part) for part in parts)
    names = [f.name for f in fields(first) if isinstance(getattr(first, f.name), Tensor)]
    joined: dict[str, Any] = {n: torch.cat([getattr(b, n) for b in blocks]) for n in names}
    return replace(first, **joined)


def stack(pulls: Sequence[Rows]) -> Rows:
    """Join rows of the same examples along ``K``; they differ in their ``values`` alone."""
    first = pulls[0]
    if isinstance(first, Mixed):
        parts = zip(*(pull.parts for pull in pulls), strict=True)  # type: ignore[union-attr]
        return mixed(stack(part) for part in parts)
    return replace(first, values=torch.cat([pull.values for pull in pulls], dim=1))


def widen(rows: Rows, k: int) -> Rows:
    """``k`` rows an example, the further ones zero."""
    if isinstance(rows, Mixed):
        return mixed(widen(part, k) for part in rows.parts)
    size, found = rows.shape
    zeros = rows.values.new_zeros(size, k - found, *rows.values.shape[2:])
    return replace(rows, values=torch.cat([rows.values, zeros], dim=1)) if k > found else rows


def unstack(rows: Rows) -> Rows:
    """Every row as an example of its own, ``(B·K, 1)``."""
    k = rows.shape[1]
    if isinstance(rows, Mixed):
        return mixed(unstack(part) for part in rows.parts)
    held: dict[str, Any] = {
        f.name: getattr(rows, f.name).repeat_interleave(k, dim=0)
        for f in fields(rows)
        if f.name in ("a", "index")
    }
    return replace(rows, values=rows.values.flatten(0, 1).unsqueeze(1), **held)


def flat_rows(rows: Sequence[Rows]) -> Tensor:
    """Whole rows ``(B·K, d)``, layer after layer."""
    return torch.cat([layer.flat() for layer in rows], dim=1)


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


def _tokens(x: Tensor, tokens: int) -> Tensor:
    """``(B, c·T, …)``, positions of ``c`` calls one after another, as ``(B·T, c, …)``."""
    if x.shape[1] % tokens:
        raise ValueError(f"{x.shape[1]} positions for {tokens} tokens")
    return x.unflatten(1, (-1, tokens)).transpose(1, 2).flatten(0, 1)


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
    step = max(1, _CHUNK // (k * m * j))
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
        step = max(1, _CHUNK // (matrices[:, :, 0, 0].numel() * y.index.shape[1] * width))
        for start in range(0, y.shape[0], step):
            j = slice(start, start + step)
            chosen = matrices[:, :, y.index[j]]  # (n, k, m, T, M)
            out[i, :, j] += torch.einsum("nkbtm,bjtm->nkbj", chosen, y.values[j].to(out.dtype))


def _add_matching(out: Tensor, x: Indexed, y: Indexed) -> None:
    """``out += Σ_{t,s: index_t = index'_s} ⟨values_t, values'_s⟩``."""
    n, k = out.shape[:2]
    right = y.values.permute(0, 2, 1, 3).to(out.dtype)  # (m, S, j, M)
    step = max(1, _CHUNK // (k * x.index.shape[1] * right[..., 0].numel()))
    for start in range(0, n, step):
        where = slice(start, start + step)
        left = x.values[where].to(out.dtype)
        products = torch.einsum("nktd,msjd->nktmsj", left, right)
        same = x.index[where][:, None, :, None, None, None] == y.index[None, None, None, :, :, None]
        out[where] += (products * same).sum((2, 4))
