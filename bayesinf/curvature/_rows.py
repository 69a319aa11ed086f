r"""Rows of a Jacobian, as factored as a layer's structure allows.

``B`` examples, ``K`` rows an example, a layer ``(P, M)``; row ``(b, k)`` is a matrix ``(P, M)``:

* :class:`Factored`: ``Σ_t values_bkt a_btᵀ``, ``a`` ``(B, T, M)``, ``values`` ``(B, K, T, P)``;
* :class:`Grouped`: the same in each of ``g`` groups of ``P/g`` rows of the matrix, ``a``
  ``(B, T, g, M)``, ``values`` ``(B, K, T, g, P/g)``;
* :class:`Indexed`: ``Σ_t e_{index_bt} values_bktᵀ``, ``index`` ``(B, T)`` (an embedding's tokens),
  ``values`` ``(B, K, T, M)``;
* :class:`Mixed`: a sum of the above;
* :class:`Explicit`: ``values`` ``(B, K, P, M)``.

A whole row is a list of these, one entry a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any, Self

import torch
from torch import Tensor

__all__ = [
    "CHUNK", "Explicit", "Factored", "Grouped", "Indexed", "Mixed", "Rows", "concatenate",
    "flat_rows", "mixed", "stack", "unstack", "widen",
]  # fmt: skip

CHUNK = 2**24
"""Elements of a temporary at a time."""


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

    def chunks(self, elements: int = CHUNK) -> Iterator[tuple[slice, Self]]:
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


def _tokens(x: Tensor, tokens: int) -> Tensor:
    """``(B, c·T, …)``, positions of ``c`` calls one after another, as ``(B·T, c, …)``."""
    if x.shape[1] % tokens:
        raise ValueError(f"{x.shape[1]} positions for {tokens} tokens")
    return x.unflatten(1, (-1, tokens)).transpose(1, 2).flatten(0, 1)
