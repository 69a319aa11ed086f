"""Sums over draws that never stop: covariances and diagnostics in memory that draws do not touch.

Shapes: ``C`` chains, ``Q`` query values and ``N`` train values of a draw, side by side in rows of
``W = Q + N``. All sums are float64, of values **less those of the first draw**, so that nothing
cancels in them (losses of mean 2.5 and standard deviation 10⁻³ keep their digits).

* ``product (C, slots, Q, N)``: sums of ``x yᵀ`` over batches of ``2^k`` draws;
* ``moments (C, slots, 2, W)``: sums of values and of their squares, over segments
  as long or shorter;
* ``slope (C, W)``: sums of draw number times value;
* ``tail (C, block, W)``: the last draws, fewer than a block, as they came.

When batches get too many, neighbours become one. Draws enter in whole blocks, counted from the
first, so that sums do not depend, to the last bit, on how the draws were handed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from bayesinf._batch_sums import BatchSums
from bayesinf._covariance import (
    batch_edges,
    batch_length,
    batches_of_a_chain,
    columns_at_a_time,
)

__all__ = ["RunningSums", "Segments"]

_LEAST_SEGMENTS = 8


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


class RunningSums:
    """See the module. Everything mutable is in ``arrays`` and ``draws``, to be written and read.

    Parameters
    ----------
    chains, queries, trains
        ``C``, ``Q`` and ``N``.
    """

    def __init__(self, chains: int, queries: int, trains: int) -> None:
        self.chains, self.queries, self.trains = chains, queries, trains
        self.least = batches_of_a_chain(chains)
        self.least_segments = max(self.least, _LEAST_SEGMENTS)
        self.block = 1 << int(np.clip(queries, 8, 64)).bit_length() - 1
        self.draws = 0
        width, slots = queries + trains, 2 * self.least if self.least > 1 else 1
        self.arrays: dict[str, np.ndarray] = {
            "product": np.zeros((chains, slots, queries, trains)),
            "moments": np.zeros((chains, 2 * self.least_segments, 2, width)),
            "slope": np.zeros((chains, width)),
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
        _fold(self.arrays["moments"], segment, new_segment)
        q = self.queries
        for piece in _pieces(before, self.draws, new_segment):
            values = self._tail(piece, before)
            out = self.arrays["moments"][:, piece.start // new_segment]
            out[:, 0] += values.sum(axis=1)
            out[:, 1] += (values**2).sum(axis=1)
            self.arrays["slope"] += np.einsum(
                "t,ctw->cw", np.arange(piece.start, piece.stop), values
            )
        for piece in _pieces(before, self.draws, new_length if self.least > 1 else self.draws):
            values = self._tail(piece, before)
            slot = piece.start // new_length if self.least > 1 else 0
            for c in range(self.chains):
                _add_products(self.arrays["product"][c, slot], values[c, :, :q], values[c, :, q:])

    def _lengths(self, draws: int) -> tuple[int, int]:
        """Draws of a batch and of a segment, after so many draws."""
        return batch_length(draws, self.least), batch_length(draws, self.least_segments)

    def _tail(self, piece: slice, flushed: int) -> np.ndarray:
        """Draws ``piece`` of the tail, less the reference, ``(C, k, W)``."""
        raw = self.arrays["tail"][:, piece.start - flushed : piece.stop - flushed]
        return raw.astype(np.float64) - self.arrays["reference"][:, None]

    # ------------------------------------------------------------------ reading

    def blocks(
        self,
        chains: list[int],
        rows: slice,
        per_chain: int | None,
        width: int,
        mix: np.ndarray | None = None,
    ) -> Iterator[tuple[slice, BatchSums]]:
        """Sums over the batches of :func:`~bayesinf._covariance.batch_slices`, by columns.

        Parameters
        ----------
        chains
            Those that count.
        rows
            Query values.
        per_chain
            Batches per chain, at least; None for as few as make 12.
        width
            Train values at a time, at most.
        mix
            ``(N, G)``: sums of ``y @ mix`` instead of ``y``, all columns at once.

        Raises
        ------
        ValueError
            If the draws do not suffice, or for more batches than the sums keep apart.
        """
        edges = self._edges(len(chains), per_chain)
        per = len(edges) - 1
        length = np.tile(np.diff(edges).astype(np.float64), len(chains))
        owner = np.repeat(np.arange(len(chains)), per)
        q, n = self.queries, self.trains
        moments = self._by_batch(edges)[chains].reshape(len(length), 2, -1)
        step = columns_at_a_time(width, len(length), rows.stop - rows.start)
        parts = []
        for start in range(0, n, step):
            columns = slice(start, min(start + step, n))
            product = self._products(edges, chains, rows, columns)
            if mix is None:
                own = moments[:, :, q:][:, :, columns]
                yield columns, BatchSums(
                    length, owner, moments[:, 0, rows], own[:, 0],
                    moments[:, 1, rows], own[:, 1], product,
                )  # fmt: skip
            else:
                parts.append(product @ mix[columns])
        if mix is not None:
            y = moments[:, 0, q:] @ mix
            unknown = np.full_like(y, np.nan)  # squares of sums are not sums of squares
            yield (
                slice(0, mix.shape[1]),
                BatchSums(
                    length, owner, moments[:, 0, rows], y, moments[:, 1, rows], unknown, sum(parts)
                ),
            )

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

    def _by_batch(self, edges: np.ndarray) -> np.ndarray:
        """Sums and squares ``(C, batches, 2, W)`` between ``edges``."""
        out = np.zeros((self.chains, len(edges) - 1, *self.arrays["moments"].shape[2:]))
        segment = self._lengths(self.flushed)[1]
        for slot, start in enumerate(range(0, self.flushed, segment)):
            out[:, _batch_of(start, edges)] += self.arrays["moments"][:, slot]
        with np.errstate(invalid="ignore", over="ignore"):
            for piece, batch in self._tail_pieces(edges):
                values = self._tail(piece, self.flushed)
                out[:, batch, 0] += values.sum(axis=1)
                out[:, batch, 1] += (values**2).sum(axis=1)
        return out

    def _products(
        self, edges: np.ndarray, chains: list[int], rows: slice, columns: slice
    ) -> np.ndarray:
        """Sums of products ``(chains × batches, rows, columns)`` between ``edges``."""
        kept, per = self.arrays["product"], len(edges) - 1
        shape = (len(chains) * per, rows.stop - rows.start, columns.stop - columns.start)
        out = np.zeros(shape)
        length = self._lengths(self.flushed)[0] if self.least > 1 else max(1, self.flushed)
        for slot, start in enumerate(range(0, self.flushed, length)):
            for k, c in enumerate(chains):
                out[k * per + _batch_of(start, edges)] += kept[c, slot, rows, columns]
        for piece, batch in self._tail_pieces(edges):
            values = self._tail(piece, self.flushed)
            x, y = (
                values[:, :, : self.queries][..., rows],
                values[:, :, self.queries :][..., columns],
            )
            for k, c in enumerate(chains):
                out[k * per + batch] += x[c].T @ y[c]
        return out

    def _tail_pieces(self, edges: np.ndarray) -> Iterator[tuple[slice, int]]:
        """Draws of the tail by the batch that they are in."""
        inner = edges[(edges > self.flushed) & (edges < self.draws)]
        for a, b in pairwise([self.flushed, *inner.tolist(), self.draws]):
            if b > a:
                yield slice(a, b), _batch_of(a, edges)

    def segments(self, chains: list[int], columns: np.ndarray) -> Segments:
        """8 segments per chain or more, of some of the ``W`` columns, for diagnostics."""
        length = batch_length(self.draws, self.least_segments)
        edges = np.append(np.arange(0, self.draws, length), self.draws)
        sums = self._by_batch(edges)[chains][..., columns]
        piece = slice(self.flushed, self.draws)
        late = np.einsum(
            "t,ctw->cw", np.arange(piece.start, piece.stop), self._tail(piece, piece.start)
        )
        slope = (self.arrays["slope"] + late)[chains][:, columns]
        return Segments(np.diff(edges).astype(np.float64), sums[:, :, 0], sums[:, :, 1], slope)

    # ------------------------------------------------------------------ as arrays

    def used(self) -> dict[str, np.ndarray]:
        """Those parts of the arrays that are not zero, for writing."""
        length, segment = self._lengths(self.flushed)
        slots = -(-self.flushed // length) if self.least > 1 else 1
        return {
            **self.arrays,
            "product": self.arrays["product"][:, :slots],
            "moments": self.arrays["moments"][:, : -(-self.flushed // segment)],
            "tail": self.arrays["tail"][:, : self.draws - self.flushed],
        }

    def restore(self, draws: int, arrays: dict[str, Any]) -> None:
        """Take what :meth:`used` gave after so many draws."""
        self.draws = draws
        for name, array in arrays.items():
            mine = self.arrays[name]
            where = slice(0, array.shape[1])
            mine[:, where] = array
            mine[:, array.shape[1] :] = 0


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


def _add_products(out: np.ndarray, x: np.ndarray, y: np.ndarray, width: int = 4096) -> None:
    """``out += xᵀ y``, with little memory beside."""
    for start in range(0, y.shape[1], width):
        columns = slice(start, start + width)
        out[:, columns] += x.T @ y[:, columns]
