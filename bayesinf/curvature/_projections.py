r"""Projections of gradients to few numbers, layer by layer and without forming the gradients.

Rows are as in :mod:`bayesinf.curvature._rows`. A projection ``P`` turns them into rows of layers of
its own, and a random one is scaled so that inner products are right on average,
``E⟨P g, P g'⟩ = ⟨g, g'⟩``:

* :class:`RandomProjection`: ``k`` numbers of the whole gradient, entries of ``P`` ``(k, d)``
  independent ±1/√k (Rademacher) or N(0, 1/k), or in each column a few ±1/√s at random places
  (sparse Johnson–Lindenstrauss, SJLT);
* :class:`KroneckerProjection`: in each layer ``(P, M)`` the matrix ``P_o G P_iᵀ`` ``(k_o, k_i)``,
  from inputs and output derivatives that are projected each by themselves. Random ``P_o`` has
  orthonormal rows of uniform direction times ``√(P/k_o)``, so that a square one is a rotation;
* :class:`Coordinates`: along given orthonormal directions.

Sources: Park et al. 2023 (TRAK), appendix B; Kane & Nelson 2014 (SJLT); Choe et al. 2024 (LoGra),
§3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from bayesinf.curvature._layers import Layer
from bayesinf.curvature._rows import Explicit, Factored, Indexed, Rows, flat_rows

__all__ = [
    "Coordinates",
    "KroneckerProjection",
    "Projection",
    "ProjectionKind",
    "RandomProjection",
    "plain_layer",
    "random_sides",
]

ProjectionKind = Literal["rademacher", "normal", "sjlt"]

_BLOCK = 2**22
"""Most entries of a random matrix at a time."""

_NONZEROS = 4
"""Entries of a column of a sparse projection."""


class Projection(Protocol):
    """A linear map of rows.

    Attributes
    ----------
    layers
        Of what it returns.
    """

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Of what it returns."""
        ...

    def __call__(self, rows: list[Rows]) -> list[Rows]:
        """Project rows ``(B, K)`` of whole gradients."""
        ...


def plain_layer(name: str, shape: tuple[int, int]) -> Layer:
    """Return a layer of numbers that belong to no module."""
    return Layer(name, "projected", name, None, (), shape, shape)


# ---------------------------------------------------------------------------- random, flat


class RandomProjection:
    """``k`` random numbers of the whole gradient.

    The matrix is made in blocks of at most 2²² entries (one row of a layer's matrix at least),
    each from a generator of its own, the same on every device. Blocks are kept up to ``keep``
    entries in all and made again for every call beyond that: large networks do better with large
    batches.

    Parameters
    ----------
    kind
        ``"rademacher"``, ``"normal"`` or ``"sjlt"`` (4 entries a column).
    size
        ``k``.
    source_layers
        Layers of the rows to project.
    seed
        Numbers that determine the matrix.
    keep
        Entries that may stay in memory.

    Raises
    ------
    ValueError
        If the kind is unknown or the size not positive.
    """

    def __init__(
        self,
        kind: ProjectionKind,
        size: int,
        source_layers: Sequence[Layer],
        seed: tuple[int, ...],
        keep: int = 2**26,
    ) -> None:
        if kind not in get_args(ProjectionKind):
            raise ValueError(f"projection must be one of {get_args(ProjectionKind)}; got {kind!r}.")
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"dimension must be a positive integer; got {size!r}.")
        self.kind, self.size, self.seed = kind, size, seed
        self._shapes = [layer.shape for layer in source_layers]
        entries = sum(p * m for p, m in self._shapes) * self._entries
        self._kept: dict[tuple[int, int], Any] | None = {} if entries <= keep else None
        self.layers = (plain_layer("projected", (1, size)),)

    def __call__(self, rows: list[Rows]) -> list[Rows]:
        """``P g``, ``(B, K, 1, k)``."""
        b, k = rows[0].shape
        first = rows[0].values
        out = first.new_zeros(self.size, b * k)
        for i, (layer, (p, m)) in enumerate(zip(rows, self._shapes, strict=True)):
            step = max(1, _BLOCK // (self.size * m))
            for start in range(0, p, step):
                stop = min(start + step, p)
                band = _band(layer, start, stop)  # (B·K, entries)
                matrix = self._block(i, start, (stop - start) * m, first)
                if isinstance(matrix, Tensor):
                    out.addmm_(matrix.T, band.T)
                else:
                    _scatter(out, band, *matrix)
        return [Explicit(out.T.reshape(b, k, 1, self.size))]

    @property
    def _entries(self) -> int:
        """Numbers held for each parameter."""
        return 2 * _NONZEROS if self.kind == "sjlt" else self.size

    def _block(self, layer: int, start: int, width: int, like: Tensor) -> Any:
        """Rows of ``Pᵀ`` for some parameters: a matrix ``(width, k)``, or places and values."""
        if self._kept is not None and (layer, start) in self._kept:
            return self._kept[layer, start]
        key = np.random.SeedSequence(self.seed, spawn_key=(layer, start))
        made = _random_block(self.kind, np.random.default_rng(key), width, self.size, like)
        if self._kept is not None:
            self._kept[layer, start] = made
        return made


def _random_block(
    kind: str, generator: np.random.Generator, width: int, size: int, like: Tensor
) -> Any:
    if kind == "normal":
        normal = generator.standard_normal((width, size), dtype=np.float32)
        return torch.from_numpy(normal).to(like).div_(size**0.5)
    if kind == "rademacher":
        return _signs(generator, width * size, like).view(width, size).div_(size**0.5)
    places = torch.from_numpy(generator.integers(size, size=(_NONZEROS, width)))
    values = _signs(generator, _NONZEROS * width, like).view(_NONZEROS, width)
    return places.to(like.device), values.div_(_NONZEROS**0.5)


def _signs(generator: np.random.Generator, count: int, like: Tensor) -> Tensor:
    drawn = np.frombuffer(generator.bytes(-(-count // 8)), dtype=np.uint8)
    bits = torch.from_numpy(np.unpackbits(drawn, count=count))
    return bits.to(like).mul_(2).sub_(1)


def _scatter(out: Tensor, band: Tensor, places: Tensor, values: Tensor) -> None:
    """``out += P band`` for a sparse ``P``, ``out`` ``(k, B·K)``."""
    for place, value in zip(places, values, strict=True):
        out.index_add_(0, place, band.T * value[:, None])


def _band(rows: Rows, start: int, stop: int) -> Tensor:
    """Some rows of every gradient matrix, ``(B·K, (stop − start)·M)``."""
    if isinstance(rows, Factored):
        part: Rows = Factored(rows.values[..., start:stop], rows.a)
    elif isinstance(rows, Explicit):
        part = Explicit(rows.values[:, :, start:stop])
    elif isinstance(rows, Indexed):
        outside = (rows.index < start) | (rows.index >= stop)
        values = rows.values.masked_fill(outside[:, None, :, None], 0)
        index = (rows.index - start).clamp(0, stop - start - 1)
        part = Indexed(values, index, stop - start)
    else:
        part = Explicit(rows.matrices()[:, :, start:stop])
    return part.flat()


# ---------------------------------------------------------------------------- Kronecker


@dataclass(frozen=True)
class KroneckerProjection:
    """``P_o G P_iᵀ`` in every layer.

    Attributes
    ----------
    source_layers
        Layers of the rows to project, ``(P, M)``.
    sides
        ``(P_oᵀ, P_iᵀ)`` of every layer, ``(P, k_o)`` and ``(M, k_i)``.
    """

    source_layers: tuple[Layer, ...]
    sides: tuple[tuple[Tensor, Tensor], ...]

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Under the names of the layers that they come from."""
        return tuple(
            plain_layer(layer.name, (left.shape[1], right.shape[1]))
            for layer, (left, right) in zip(self.source_layers, self.sides, strict=True)
        )

    def __call__(self, rows: list[Rows]) -> list[Rows]:
        """Matrices ``(B, K, k_o, k_i)`` by layer."""
        return [Explicit(_sandwich(r, *s)) for r, s in zip(rows, self.sides, strict=True)]


def _sandwich(rows: Rows, left: Tensor, right: Tensor) -> Tensor:
    """``Lᵀ G R`` ``(B, K, k_o, k_i)``."""
    if isinstance(rows, Factored):
        return Factored(rows.values @ left, rows.a @ right).matrices()
    if isinstance(rows, Indexed):
        chosen = left[rows.index].mT.unsqueeze(1)  # (B, 1, k_o, T)
        return chosen @ (rows.values @ right)
    parts = [left.T @ part.matrices() @ right for _, part in rows.chunks()]
    return torch.cat(parts)


def random_sides(
    layers: Sequence[Layer], rank: tuple[int, int], seed: int, like: Tensor
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Random sides of a :class:`KroneckerProjection`, ``(P, k_o)`` and ``(M, k_i)`` by layer.

    Columns are orthonormal, of uniform direction, times ``√(P/k_o)`` and ``√(M/k_i)``.

    Parameters
    ----------
    layers
        The layers.
    rank
        ``(k_o, k_i)``; a shorter side is rotated as a whole.
    seed
        Of the directions.
    like
        A tensor with the dtype and the device.
    """
    found = []
    for i, layer in enumerate(layers):
        key = np.random.SeedSequence(seed, spawn_key=(i,))
        generator = np.random.default_rng(key)
        pair = [
            _directions(generator, n, min(n, k)) for n, k in zip(layer.shape, rank, strict=True)
        ]
        found.append((pair[0].to(like), pair[1].to(like)))
    return tuple(found)


def _directions(generator: np.random.Generator, n: int, k: int) -> Tensor:
    q, r = np.linalg.qr(generator.standard_normal((n, k)))
    uniform = q * np.sign(np.diag(r))  # of uniform direction only with these signs
    return torch.from_numpy(np.ascontiguousarray(uniform * (n / k) ** 0.5))


# ---------------------------------------------------------------------------- given directions


@dataclass(frozen=True)
class Coordinates:
    """Inner products with given directions.

    Attributes
    ----------
    vectors
        ``(d, k)``, layer after layer as in :func:`bayesinf.curvature._rows.flat_rows`.
    """

    vectors: Tensor

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """One."""
        return (plain_layer("directions", (1, self.vectors.shape[1])),)

    def __call__(self, rows: list[Rows]) -> list[Rows]:
        """``(B, K, 1, k)``."""
        found = flat_rows(rows) @ self.vectors
        return [Explicit(found.view(*rows[0].shape, 1, -1))]
