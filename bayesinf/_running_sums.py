"""Sums over draws that never stop: covariances and diagnostics in memory that draws do not touch.

Shapes: ``C`` chains, ``Q`` query values and ``N`` train values of a draw, side by side in rows of
``W = Q + N``. All sums are of values **less those of the first draw**, so that nothing cancels in
them (losses of mean 2.5 and standard deviation 10⁻³ keep their digits).

* ``product (C, slots, Q, N)``: sums of ``x yᵀ`` over batches of ``2^k`` draws;
* ``moments (C, slots, 2, F)``: sums of values and of their squares, over segments
  as long or shorter, of the ``F`` values of examples: losses of tokens are summed first;
* ``slope (C, F)``: sums of draw number times value;
* ``token_moments (C, slots, 2, K)``: as ``moments``, of the ``K`` tokens, over batches;
* ``tail (C, block, W)``: the last draws, fewer than a block, as they came.

All are float64, but those with ``N`` or ``K`` may be float32: a block of draws is summed in float64
and added to them. When batches get too many, neighbours become one. Draws enter in whole blocks,
counted from the first, so that sums do not depend, to the last bit, on how the draws were handed
over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from bayesinf._axes import as_slice
from bayesinf._batch_sums import BatchSums
from bayesinf._covariance import (
    batch_edges,
    batch_length,
    batches_of_a_chain,
    columns_at_a_time,
)

__all__ = ["Part", "RunningSums", "Segments", "Terms", "multiplied"]

_LEAST_SEGMENTS = 8
_TAIL_VALUES = 1 << 22


@dataclass(frozen=True)
class Segments:
    """Sums over ``S`` consecutive segments of each chain's draws, values less a constant.

    ``length (S,)``; ``total`` and ``square (C, S, columns)``; ``slope (C, columns)``, sums of
    draw number times value.
    """

    length: np.ndarray
    total: np.ndarray
    square: np.ndarray
    slope: np.ndarray


@dataclass(frozen=True)
class Part:
    """``size`` neighbouring values of a row; ``starts``: where each example's tokens begin."""

    size: int
    starts: np.ndarray | None = None


@dataclass(frozen=True)
class Terms:
    """Rows or columns of a covariance: values of a draw, or sums over runs of them.

    ``entries``: of the ``Q`` or of the ``N`` values; ``starts``: where among them each sum begins,
    None for every value by itself; ``moments``: where the sums and squares of the result are, in
    ``token_moments`` or in ``moments``.
    """

    entries: np.ndarray
    moments: np.ndarray
    starts: np.ndarray | None = None
    tokens: bool = False

    def part(self, where: slice) -> Terms:
        """Some of the results."""
        moments = self.moments[where]
        if self.starts is None:
            return Terms(self.entries[where], moments, None, self.tokens)
        edges = np.append(self.starts, len(self.entries))
        first, last = edges[where.start], edges[where.start + len(moments)]
        starts = self.starts[where] - first
        return Terms(self.entries[first:last], moments, starts, self.tokens)

    def sums(self, values: np.ndarray, axis: int) -> np.ndarray:
        """Add up the values of each result."""
        return values if self.starts is None else np.add.reduceat(values, self.starts, axis=axis)


class RunningSums:
    """See the module. Everything mutable is in ``arrays`` and ``draws``, to be written and read.

    Parameters
    ----------
    chains, queries, trains
        ``C``, ``Q`` and ``N``.
    parts
        What the ``W`` values of a draw are, in order; by default none of them is a token.
    dtype
        Of the products and of the moments of tokens.
    """

    def __init__(
        self,
        chains: int,
        queries: int,
        trains: int,
        parts: Sequence[Part] | None = None,
        dtype: str = "float64",
    ) -> None:
        self.chains, self.queries, self.trains = chains, queries, trains
        width = queries + trains
        self.parts = (Part(width),) if parts is None else tuple(parts)
        self.least = batches_of_a_chain(chains)
        self.least_segments = max(self.least, _LEAST_SEGMENTS)
        self.block = 1 << int(np.clip(queries, 8, 64)).bit_length() - 1
        tokens = sum(part.size for part in self.parts if part.starts is not None)
        while tokens and self.block > 4 and chains * self.block * width > _TAIL_VALUES:
            self.block //= 2
        self.draws = 0
        slots = 2 * self.least if self.least > 1 else 1
        followed = sum(p.size if p.starts is None else len(p.starts) for p in self.parts)
        self.arrays: dict[str, np.ndarray] = {
            "product": np.zeros((chains, slots, queries, trains), dtype),
            "moments": np.zeros((chains, 2 * self.least_segments, 2, followed)),
            "slope": np.zeros((chains, followed)),
            "token_moments": np.zeros((chains, slots, 2, tokens), dtype),
            "tail": np.zeros((chains, self.block, width), dtype=np.float32),
            "reference": np.zeros((chains, width)),
        }

    @property
    def flushed(self) -> int:
        """Draws that are in the sums."""
        return self.draws // self.block * self.block

    # ------------------------------------------------------------------ adding

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Add draws ``(C, k, Q)`` and ``(C, k, N)``; those of failed chains may be NaN."""
        if self.draws == 0 and x.shape[1]:
            self._refer(np.concatenate([x[:, 0], y[:, 0]], axis=1))
        tail, done = self.arrays["tail"], 0
        with np.errstate(invalid="ignore", over="ignore"):
            while done < x.shape[1]:
                at = self.draws % self.block
                step = min(self.block - at, x.shape[1] - done)
                tail[:, at : at + step, : self.queries] = x[:, done : done + step]
                tail[:, at : at + step, self.queries :] = y[:, done : done + step]
                done += step
                self.draws += step
                if self.draws % self.block == 0:
                    self._flush()

    def _refer(self, first: np.ndarray) -> None:
        healthy = first[np.isfinite(first).all(axis=1)]
        if len(healthy):
            self.arrays["reference"][:] = healthy[0]

    def _flush(self) -> None:
        before = self.draws - self.block
        length, segment = self._lengths(before)
        new_length, new_segment = self._lengths(self.draws)
        if self.least > 1:
            _fold(self.arrays["product"], length, new_length)
            _fold(self.arrays["token_moments"], length, new_length)
        _fold(self.arrays["moments"], segment, new_segment)
        batch = new_length if self.least > 1 else self.draws
        for c in range(self.chains):
            for piece in _pieces(before, self.draws, new_segment):
                values = self._followed(self._tail(c, piece, before))
                _add_moments(self.arrays["moments"][c, piece.start // new_segment], values)
                self.arrays["slope"][c] += np.arange(piece.start, piece.stop) @ values
            for piece in _pieces(before, self.draws, batch):
                values = self._tail(c, piece, before)
                slot = piece.start // new_length if self.least > 1 else 0
                q = self.queries
                _add_products(self.arrays["product"][c, slot], values[:, :q], values[:, q:])
                for own, columns in self._token_columns():
                    _add_moments(self.arrays["token_moments"][c, slot][:, own], values[:, columns])

    def _followed(self, values: np.ndarray) -> np.ndarray:
        """Values of examples ``(k, F)`` from rows ``(k, W)``."""
        found, start = [], 0
        for part in self.parts:
            own = values[:, start : start + part.size]
            start += part.size
            found.append(own if part.starts is None else np.add.reduceat(own, part.starts, axis=1))
        return found[0] if len(found) == 1 else np.concatenate(found, axis=1)

    def _token_columns(self) -> Iterator[tuple[slice, slice]]:
        """Where parts of tokens are in ``token_moments``, and in a row."""
        own = start = 0
        for part in self.parts:
            if part.starts is not None:
                yield slice(own, own + part.size), slice(start, start + part.size)
                own += part.size
            start += part.size

    def _lengths(self, draws: int) -> tuple[int, int]:
        """Draws of a batch and of a segment, after so many draws."""
        return batch_length(draws, self.least), batch_length(draws, self.least_segments)

    def _tail(self, chain: int, piece: slice, flushed: int) -> np.ndarray:
        """Draws ``piece`` of a chain's tail, less the reference, ``(k, W)``."""
        raw = self.arrays["tail"][chain, piece.start - flushed : piece.stop - flushed]
        with np.errstate(invalid="ignore", over="ignore"):
            return raw - self.arrays["reference"][chain]

    # ------------------------------------------------------------------ reading

    def blocks(
        self,
        chains: list[int],
        rows: Terms,
        columns: Terms,
        per_chain: int | None,
        width: int,
        mix: csr_array | None = None,
        query_mix: csr_array | None = None,
    ) -> Iterator[tuple[slice, BatchSums]]:
        """Sums over the batches of :func:`~bayesinf._covariance.batch_slices`, by columns.

        Parameters
        ----------
        chains
            Those that count.
        rows, columns
            Query and train values.
        per_chain
            Batches per chain, at least; None for as few as make 12.
        width
            Columns at a time, at most.
        mix, query_mix
            ``(columns, G)``: sums of ``y @ mix`` instead of ``y``, all at once; of ``x @
            query_mix``, ``(rows, H)``.

        Raises
        ------
        ValueError
            If the draws do not suffice, or for more batches than the sums keep apart.
        """
        edges = self._edges(len(chains), per_chain)
        length = np.tile(np.diff(edges).astype(np.float64), len(chains))
        owner = np.repeat(np.arange(len(chains)), len(edges) - 1)
        x = _mixed(self._moments(edges, chains, rows), query_mix)
        fit = columns_at_a_time(width, len(length), len(rows.entries))
        step = max(1, fit * len(columns.moments) // len(columns.entries))
        total: Any = 0.0
        for start in range(0, len(columns.moments), step):
            where = slice(start, min(start + step, len(columns.moments)))
            own = columns.part(where)
            product = self._products(edges, chains, rows, own)
            if query_mix is not None:
                product = multiplied(product.swapaxes(1, 2), query_mix).swapaxes(1, 2)
            if mix is not None:
                total = total + multiplied(product, mix[where])
                continue
            y = self._moments(edges, chains, own)
            yield where, BatchSums(length, owner, x[:, 0], y[:, 0], x[:, 1], y[:, 1], product)
        if mix is not None:
            y = _mixed(self._moments(edges, chains, columns), mix)
            every = slice(0, mix.shape[1])
            yield every, BatchSums(length, owner, x[:, 0], y[:, 0], x[:, 1], y[:, 1], total)

    def _edges(self, chains: int, per_chain: int | None) -> np.ndarray:
        """Where batches begin; they must be unions of those that are kept."""
        edges = batch_edges(chains, self.draws, per_chain)
        kept = np.arange(0, self.flushed, self._lengths(self.flushed)[0])
        if self.least == 1:
            kept = kept[:1]
        inner = edges[1:-1]
        if not np.isin(inner[inner < self.flushed], kept).all():
            raise ValueError(
                f"{per_chain or 'so many'} batches per chain were asked for, and a stream keeps "
                f"apart {self.least} to {2 * self.least} of each of {self.chains} chains. Ask for "
                f"at most {self.least}, or record traces (store= a path)."
            )
        return edges

    def _moments(self, edges: np.ndarray, chains: list[int], what: Terms) -> np.ndarray:
        """Sums and squares ``(chains × batches, 2, n)`` between ``edges``."""
        batch, segment = self._lengths(self.flushed)
        length = segment if not what.tokens else batch if self.least > 1 else max(1, self.flushed)
        kept = self.arrays["token_moments" if what.tokens else "moments"]
        per, columns = len(edges) - 1, as_slice(what.moments)
        out = np.zeros((len(chains), per, 2, len(what.moments)))
        for k, c in enumerate(chains):
            for slot, start in enumerate(range(0, self.flushed, length)):
                out[k, _batch_of(start, edges)] += kept[c, slot][:, columns]
            for piece, b in self._tail_pieces(edges):
                values = self._tail(c, piece, self.flushed)
                values = self._of_tokens(values) if what.tokens else self._followed(values)
                _add_moments(out[k, b], values[:, columns])
        return out.reshape(len(chains) * per, 2, -1)

    def _of_tokens(self, values: np.ndarray) -> np.ndarray:
        return np.concatenate([values[:, columns] for _, columns in self._token_columns()], axis=1)

    def _products(
        self, edges: np.ndarray, chains: list[int], rows: Terms, columns: Terms
    ) -> np.ndarray:
        """Sums of products ``(chains × batches, rows, columns)`` between ``edges``."""
        kept, per = self.arrays["product"], len(edges) - 1
        left, right = as_slice(rows.entries), as_slice(columns.entries)
        shape = (len(chains) * per, len(rows.entries), len(columns.entries))
        out = np.zeros(shape)
        length = self._lengths(self.flushed)[0] if self.least > 1 else max(1, self.flushed)
        for k, c in enumerate(chains):
            for slot, start in enumerate(range(0, self.flushed, length)):
                out[k * per + _batch_of(start, edges)] += kept[c, slot][:, right][left]
            for piece, batch in self._tail_pieces(edges):
                values = self._tail(c, piece, self.flushed)
                x, y = values[:, : self.queries][:, left], values[:, self.queries :][:, right]
                out[k * per + batch] += x.T @ y
        return columns.sums(rows.sums(out, 1), 2)

    def _tail_pieces(self, edges: np.ndarray) -> Iterator[tuple[slice, int]]:
        """Draws of the tail by the batch that they are in."""
        inner = edges[(edges > self.flushed) & (edges < self.draws)]
        for a, b in pairwise([self.flushed, *inner.tolist(), self.draws]):
            if b > a:
                yield slice(a, b), _batch_of(a, edges)

    def segments(self, chains: list[int], columns: np.ndarray) -> Segments:
        """8 segments per chain or more, of some of the ``F`` values, for diagnostics."""
        length = batch_length(self.draws, self.least_segments)
        edges = np.append(np.arange(0, self.draws, length), self.draws)
        sums = self._moments(edges, chains, Terms(columns, columns))
        sums = sums.reshape(len(chains), len(edges) - 1, 2, -1)
        piece = slice(self.flushed, self.draws)
        late = [
            np.arange(piece.start, piece.stop)
            @ self._followed(self._tail(c, piece, piece.start))[:, columns]
            for c in chains
        ]
        slope = self.arrays["slope"][chains][:, columns] + np.stack(late)
        return Segments(np.diff(edges).astype(np.float64), sums[:, :, 0], sums[:, :, 1], slope)

    # ------------------------------------------------------------------ as arrays

    def used(self) -> dict[str, np.ndarray]:
        """Views of those parts of the arrays that are not zero, in the second dimension."""
        length, segment = self._lengths(self.flushed)
        slots = -(-self.flushed // length) if self.least > 1 else 1
        return {
            **self.arrays,
            "product": self.arrays["product"][:, :slots],
            "token_moments": self.arrays["token_moments"][:, :slots],
            "moments": self.arrays["moments"][:, : -(-self.flushed // segment)],
            "tail": self.arrays["tail"][:, : self.draws - self.flushed],
        }


def _fold(array: np.ndarray, length: int, wanted: int) -> None:
    """Join neighbouring slots (dimension 1) until they are of the wanted length."""
    while length < wanted:
        half = array.shape[1] // 2
        for i in range(half):
            np.add(array[:, 2 * i], array[:, 2 * i + 1], out=array[:, i])
        array[:, half:] = 0
        length *= 2


def _pieces(start: int, stop: int, length: int) -> Iterator[slice]:
    """``start … stop`` cut at the multiples of ``length``."""
    while start < stop:
        end = min(stop, (start // length + 1) * length)
        yield slice(start, end)
        start = end


def _batch_of(draw: int, edges: np.ndarray) -> int:
    return int(np.searchsorted(edges, draw, side="right")) - 1


def _add_moments(out: np.ndarray, values: np.ndarray) -> None:
    """Add sums over the draws of ``(k, n)`` to ``out[0]``, those of squares to ``out[1]``."""
    with np.errstate(invalid="ignore", over="ignore"):
        out[0] += values.sum(axis=0)
        out[1] += np.einsum("tn,tn->n", values, values)


def multiplied(values: np.ndarray, mix: csr_array) -> np.ndarray:
    """``values @ mix`` over the last dimension, in float64."""
    flat = values.reshape(-1, values.shape[-1])
    product: np.ndarray = (mix.T @ flat.T).T
    return product.reshape(*values.shape[:-1], mix.shape[1])


def _mixed(moments: np.ndarray, mix: csr_array | None) -> np.ndarray:
    """Sums of weighted sums; their squares are not sums of squares, and unknown."""
    if mix is None:
        return moments
    total = multiplied(moments[:, 0], mix)
    return np.stack([total, np.full_like(total, np.nan)], axis=1)


def _add_products(out: np.ndarray, x: np.ndarray, y: np.ndarray, width: int = 4096) -> None:
    """``out += xᵀ y``, with little memory beside."""
    for start in range(0, y.shape[1], width):
        columns = slice(start, start + width)
        out[:, columns] += x.T @ y[:, columns]
