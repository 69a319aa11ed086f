"""Covariances of a store as scores, block by block, so that the whole matrix need not exist."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bayesinf._accuracy import median_relative
from bayesinf._axes import Axis, Selection
from bayesinf._covariance import CrossCovariance
from bayesinf._layout import identity
from bayesinf._store import Store, covariance_of
from bayesinf.attribution._sinks import (
    COLUMNS,
    ROWS,
    Block,
    Leading,
    MatrixSink,
    StoreSink,
    TopSink,
)

__all__ = ["Side", "make_sink", "score_pairs", "sides"]

_BLOCK_VALUES = 1 << 19
_NAMES = ("influence", "mcse", "influence_within")
_REPLICATES: dict[str, Leading] = {
    "influence_replicate": ("batch", None),
    "influence_half": ("half", None),
}


@dataclass(frozen=True)
class Side:
    """Queries or train examples, or their tokens: ``pick`` of a store's entries, and labels."""

    axis: Axis
    tokens: bool
    pick: np.ndarray

    def selection(self, where: slice) -> Selection:
        """Some of the entries."""
        return Selection(self.tokens, self.pick[where])


def sides(store: Any, tokens: str | None, query: Any, train: Any) -> tuple[Side, Side]:
    """What is paired: of both groups all or some examples, by id, or their tokens.

    Raises
    ------
    ValueError
        If ``tokens`` is none of None, train, query and both.
    KeyError
        If tokens were not recorded, or ids not observed.
    """
    if tokens not in (None, "train", "query", "both"):
        raise ValueError(f"tokens must be None, 'train', 'query' or 'both'; got {tokens!r}.")
    found = []
    for group, ids in (("query", query), ("train", train)):
        split = tokens in (group, "both")
        axis: Axis = store.axis(group, tokens=split)
        examples = None if ids is None else axis.find(ids)
        every = np.arange(axis.size)
        pick = every if examples is None else axis.tokens(examples)
        found.append(Side(axis.part(examples), split, pick))
    return found[0], found[1]


def make_sink(
    path: str | os.PathLike[str] | None,
    top_k: int | None,
    replicates: bool,
    errors: bool,
    query: Side,
    train: Side,
    config: dict[str, Any],
) -> MatrixSink | TopSink | StoreSink:
    """Where the scores go.

    Raises
    ------
    ValueError
        If two places are asked for, ``top_k`` is no positive integer, or the store is of another
        run.
    """
    asked = {"top_k": top_k is not None, "store": path is not None, "replicates": replicates}
    if sum(asked.values()) > 1:
        raise ValueError(
            f"{' and '.join(name for name, given in asked.items() if given)} exclude each other: "
            f"top_k= keeps no whole matrix, store= writes it to disk, and replicates= keeps many "
            f"of them in memory. Give one."
        )
    if top_k is not None:
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
            raise ValueError(f"top_k must be a positive integer; got {top_k!r}.")
        return TopSink(query.axis, train.axis, top_k)
    if path is None:
        return MatrixSink(query.axis, train.axis, _REPLICATES if replicates else {})
    whole = {**config, "query": _digest(query), "train": _digest(train)}
    names = _NAMES if errors else _NAMES[:1]
    return StoreSink(path, query.axis, train.axis, dict.fromkeys(names), whole, "float32")


def score_pairs(
    store: Store,
    measurement: str,
    query: Side,
    train: Side,
    sink: MatrixSink | TopSink | StoreSink,
    scale: float,
    errors: bool,
    **options: Any,
) -> float:
    """Write ``−scale · Cov`` of all pairs to a sink.

    Parameters
    ----------
    store
        Traces or sums.
    measurement
        Of the queries.
    query, train
        What is paired.
    sink
        Where blocks go.
    scale
        Of influence per covariance, without its sign.
    errors
        With standard errors and what is centred per chain.
    **options
        Of :func:`~bayesinf._store.covariance_of`.

    Returns
    -------
    float
        :func:`~bayesinf._accuracy.relative_mcse` of all pairs; NaN without errors.
    """
    spread = _Spread(query.axis.size) if errors else None
    for rows, columns in _blocks(query.axis.size, train.axis.size):
        if isinstance(sink, StoreSink) and sink.done(rows, columns):
            if spread is not None:
                spread.add(rows, sink.read(rows, columns))
            continue
        found = covariance_of(
            store,
            measurement,
            query=query.selection(rows),
            train=train.selection(columns),
            errors=errors,
            **options,
        )
        block = _scores(found, scale, errors)
        sink.write(rows, columns, block)
        if spread is not None:
            spread.add(rows, block)
    if spread is None:
        return float("nan")
    return median_relative(spread.signal / spread.count, spread.noise / spread.count)


def _scores(found: CrossCovariance, scale: float, errors: bool) -> dict[str, np.ndarray]:
    block = {"influence": found.value}
    if errors:
        block |= {"mcse": found.mcse, "influence_within": found.within}
    for name, array in block.items():  # in place: a block is as large as a cache
        array *= scale if name == "mcse" else -scale
    if len(found.deleted):
        block["influence_replicate"] = -scale * found.deleted
        block["influence_half"] = -scale * found.halves
    return block


class _Spread:
    """Sums over the columns of every row, from blocks: squared deviations, squared errors."""

    def __init__(self, rows: int) -> None:
        self.count, self.mean, self.signal, self.noise = np.zeros((4, rows))

    def add(self, rows: slice, block: Block) -> None:
        """Add a block (two means of parts give that of the whole: Chan et al. 1983)."""
        value, error = np.asarray(block["influence"]), np.asarray(block["mcse"])
        size, mean = value.shape[1], value.mean(axis=1, dtype=np.float64)
        before, gap = self.count[rows], mean - self.mean[rows]
        total = before + size
        deviation = value - mean.astype(value.dtype)[:, None]
        self.signal[rows] += np.einsum("qn,qn->q", deviation, deviation)
        self.signal[rows] += gap**2 * before * size / total
        self.mean[rows] += gap * size / total
        self.noise[rows] += np.einsum("qn,qn->q", error, error)
        self.count[rows] = total


def _blocks(queries: int, trains: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of bounded size, along the chunks of scores on disk; columns are the outer loop."""
    height = min(queries, ROWS)
    width = max(COLUMNS, _BLOCK_VALUES // height // COLUMNS * COLUMNS)
    for column in range(0, trains, width):
        for row in range(0, queries, height):
            yield (
                slice(row, min(row + height, queries)),
                slice(column, min(column + width, trains)),
            )


def _digest(side: Side) -> str:
    return f"{side.axis.size}, {identity({'ids': side.axis.examples.tolist()})}"
