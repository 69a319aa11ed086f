"""Cross-covariances of traces with Monte-Carlo standard errors: arrays only, no labels.

Shapes: ``x (C, T, Q)`` and ``y (C, T, N)`` for ``C`` chains of ``T`` draws; results ``(Q, N)``.
Means and products are float64 (an uncentred float32 E[xy] − E[x]E[y] returns rounding noise for a
trace of mean 2.5 and standard deviation 10⁻³). Where draws are few, so that Monte-Carlo noise is
far above rounding, products of centred float32 traces are float32.

**Batches.** Standard errors are batch means (Flegal and Jones 2010). All batches of a chain have
one length, a power of two, but the last, which takes the rest as well: a run can then be extended
without its traces, as pairs of batches become one. They are as long as 12 batches over all chains
allow (so there are 12 to 24, or one per chain where there are more chains): long batches are what
strongly correlated draws need, and the t quantiles pay for the fewness.

**Short batches.** With products ``P_b = Σ_{t∈b} x_t y_t`` over a batch, ``Σ_b P_b²`` is a matrix
product too, of all ``x_s x_t`` with all ``y_s y_t`` of pairs of draws of one batch. For batches of
up to four draws it costs less than to make every ``P_b``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from bayesinf._batch_sums import (
    BatchSums,
    Estimates,
    degrees_of_freedom,
    estimate,
    require_varying,
)

__all__ = [
    "CrossCovariance",
    "batch_edges",
    "batch_length",
    "batch_slices",
    "batches_of_a_chain",
    "columns_at_a_time",
    "combine",
    "cross_covariance",
]

MIN_BATCHES = 12
_BLOCK_VALUES = 1 << 23
_SHORT, _TILE = 4, (128, 512)
"""Longest of the short batches, and the rows and columns of results that stay in a cache."""


@dataclass(frozen=True)
class CrossCovariance:
    """Estimates ``(Q, N)``; ``within`` is centred per chain, a check on ``value``.

    ``freedom`` are the degrees of freedom of ``mcse`` (``batches − 1`` where all are of one
    length), ``share (B,)`` the share of the draws that each batch holds. Where asked for,
    ``deleted (B, Q, N)`` is the estimate without each batch and ``halves (2, Q, N)`` that of each
    half of the chains (of the draws, for one chain); else they are empty.
    """

    value: np.ndarray
    mcse: np.ndarray
    within: np.ndarray
    batches: int
    freedom: float
    share: np.ndarray
    deleted: np.ndarray
    halves: np.ndarray


def batches_of_a_chain(chains: int) -> int:
    """Batches per chain, at least: as few as make 12 over all chains."""
    return -(-MIN_BATCHES // chains)


def batch_length(draws: int, least: int) -> int:
    """Length of a batch: the largest power of two that gives at least ``least`` whole batches."""
    length = 1
    while draws // (2 * length) >= least:
        length *= 2
    return length


def batch_edges(chains: int, draws: int, per_chain: int | None = None) -> np.ndarray:
    """First draw of every batch of a chain, and the number of draws.

    Parameters
    ----------
    chains, draws
        ``C`` and ``T``.
    per_chain
        Batches per chain, at least, of those that powers of two allow; default: as few as make 12
        over all chains.

    Returns
    -------
    np.ndarray
        ``0, L, 2L, …, T``; 0 and T alone where one batch per chain is enough.

    Raises
    ------
    ValueError
        If the draws do not suffice for two batches in all.
    """
    count = batches_of_a_chain(chains) if per_chain is None else per_chain
    count = min(count, max(1, draws // 2))
    if count * chains < 2 or draws < 2:
        raise ValueError(
            f"standard errors need at least two batches of two draws; got {chains} chain(s) of "
            f"{draws} draw(s)."
        )
    if count == 1:
        return np.array([0, draws])
    length = batch_length(draws, count)
    return np.append(np.arange(draws // length) * length, draws)


def batch_slices(chains: int, draws: int, per_chain: int | None = None) -> list[slice]:
    """Batches of a chain as slices of its draws; arguments and errors of :func:`batch_edges`."""
    return [slice(a, b) for a, b in pairwise(batch_edges(chains, draws, per_chain).tolist())]


def cross_covariance(
    x: np.ndarray,
    y: np.ndarray,
    *,
    center: str = "grand",
    correlation: bool = False,
    batches_per_chain: int | None = None,
    block: int = 4096,
    replicates: bool = False,
    errors: bool = True,
) -> CrossCovariance:
    r"""Covariances (or correlations) of every column of ``x`` with every column of ``y``.

    Parameters
    ----------
    x, y
        ``(C, T, Q)`` and ``(C, T, N)``.
    center
        ``"grand"``: the mean over all chains; ``"chain"``: each chain's own (biased towards zero by
        the variance of the chain means, but blind to chains that have not met).
    correlation
        Divide by the standard deviations; the standard error then is that of the correlation, by
        the delta method.
    batches_per_chain
        At least; default: as few as make 12 in all.
    block
        Columns of ``y`` at a time, at most.
    replicates
        Also the estimates without each batch, and of each half.
    errors
        False: ``value`` alone, in one pass over it; ``mcse`` and ``within`` are empty.

    Returns
    -------
    CrossCovariance
        ``mcse² = Σ_b (P_b − L_b P̄)²/(T²C²(1 − Σ_b s_b²))``, ``P_b`` the sum of centred products
        over a batch of ``L_b`` draws, ``s_b`` its share of the draws, ``P̄`` the mean product.

    Raises
    ------
    ValueError
        If there are too few draws, or a correlation is wanted of a loss that never varies.
    """
    slices = batch_slices(x.shape[0], x.shape[1], batches_per_chain)
    if not errors:
        return _alone(x, y, slices, center == "chain", correlation, block)
    if slices[0].stop <= _SHORT and not (correlation or replicates):
        return _of_short_batches(x, y, slices, center == "chain", block)
    blocks = _blocks(x, y, slices, columns_at_a_time(block, x.shape[0] * len(slices), x.shape[2]))
    return combine(blocks, (x.shape[2], y.shape[2]), center, correlation, replicates)


def columns_at_a_time(block: int, batches: int, rows: int) -> int:
    """Columns whose products, of all batches, take at most 64 MiB."""
    return max(1, min(block, _BLOCK_VALUES // (batches * rows)))


def combine(
    blocks: Iterable[tuple[slice, BatchSums]],
    shape: tuple[int, int],
    center: str,
    correlation: bool,
    replicates: bool,
) -> CrossCovariance:
    """Estimate from sums over batches, given for a block of columns at a time."""
    wide: dict[str, np.ndarray] = {}
    for columns, sums in blocks:
        part = estimate(sums, center, correlation, replicates)
        for name, array in part.arrays().items():
            if name not in wide:
                wide[name] = np.empty((*array.shape[:-1], shape[1]))
            wide[name][..., columns] = array
        last: Estimates = part
    return CrossCovariance(batches=len(last.share), freedom=last.freedom, share=last.share, **wide)


def _blocks(
    x: np.ndarray, y: np.ndarray, slices: list[slice], width: int
) -> Iterator[tuple[slice, BatchSums]]:
    """Sums over the batches of arrays, less their means, ``width`` columns at a time."""
    chains, per = len(x), len(slices)
    length = np.array([s.stop - s.start for s in slices] * chains, dtype=np.float64)
    mean_x, mean_y = (values.mean(axis=(0, 1), dtype=np.float64) for values in (x, y))
    for start in range(0, y.shape[2], width):
        columns = slice(start, min(start + width, y.shape[2]))
        product = np.empty((chains * per, x.shape[2], columns.stop - start))
        x_sum, x_square = np.empty((2, len(product), x.shape[2]))
        y_sum, y_square = np.empty((2, len(product), product.shape[2]))
        for c in range(chains):  # one at a time: a chain may be large
            xs, ys = x[c] - mean_x, y[c, :, columns] - mean_y[columns]
            for b, where in enumerate(slices, start=c * per):
                xb, yb = xs[where], ys[where]
                np.matmul(xb.T, yb, out=product[b])
                x_sum[b], x_square[b] = xb.sum(axis=0), np.einsum("tq,tq->q", xb, xb)
                y_sum[b], y_square[b] = yb.sum(axis=0), np.einsum("tn,tn->n", yb, yb)
        owner = np.repeat(np.arange(chains), per)
        yield columns, BatchSums(length, owner, x_sum, y_sum, x_square, y_square, product)


def _alone(
    x: np.ndarray,
    y: np.ndarray,
    slices: list[slice],
    by_chain: bool,
    correlation: bool,
    block: int,
) -> CrossCovariance:
    """Covariances or correlations without their errors."""
    dtype, total = np.result_type(x, y), x.shape[0] * x.shape[1]
    value = np.empty((x.shape[2], y.shape[2]), dtype)
    rows = _centred(x, by_chain)
    rows = _standard(rows) if correlation else rows / (total - 1)
    rows = rows.astype(dtype).T
    for start in range(0, value.shape[1], block):
        columns = _centred(y[:, :, start : start + block], by_chain)
        columns = _standard(columns) if correlation else columns
        np.matmul(rows, columns.astype(dtype), out=value[:, start : start + block])
    length = np.array([s.stop - s.start for s in slices] * len(x), dtype=np.float64)
    empty, none = np.empty((0, 0)), value[None][:0]
    return CrossCovariance(
        value, empty, empty, len(length), degrees_of_freedom(length), length / total, none, none
    )


def _centred(values: np.ndarray, by_chain: bool) -> np.ndarray:
    """Draws of all chains, ``(C·T, n)`` in float64, less their means."""
    mean = values.mean(axis=1 if by_chain else (0, 1), dtype=np.float64, keepdims=True)
    flat: np.ndarray = (values - mean).reshape(-1, values.shape[2])
    return flat


def _standard(centred: np.ndarray) -> np.ndarray:
    """Centred values over the root of the sum of their squares."""
    squares = np.einsum("tn,tn->n", centred, centred)
    require_varying(squares)
    scaled: np.ndarray = centred / np.sqrt(squares)
    return scaled


def _of_short_batches(
    x: np.ndarray, y: np.ndarray, slices: list[slice], by_chain: bool, block: int
) -> CrossCovariance:
    """Covariances and errors from products of draws, and of pairs of draws in one batch.

    ``Σ_b (P_b − L_b V)² = Σ_b P_b² − V Σ_b (2L_b − Σ L²/Σ L) P_b``; all factors go to the narrow
    arrays before the products, so that the wide ones are passed over as seldom as can be.
    """
    chains, draws = x.shape[:2]
    length = np.array([s.stop - s.start for s in slices] * chains, dtype=np.float64)
    total, second = chains * draws, (length**2).sum()
    factor, scale = total / (total - 1), 1 / ((total - second / total) * total)
    shape = (x.shape[2], y.shape[2])
    dtype = np.result_type(x, y)
    value, mcse, within = np.empty((3, *shape), dtype)
    of_length = (2 * length - second / total) * total * scale
    xs, x_pairs, x_means = _centred_parts(x, slices, by_chain)
    by_length = xs * np.repeat(of_length, length.astype(int))[:, None]
    equal = np.ptp(length) == 0
    xs, x_pairs = xs * (factor / total), x_pairs * (factor**2 * scale)
    x_means, by_length = x_means * (factor / chains), by_length * (factor / total)
    xs, x_pairs, x_means, by_length = (
        part.astype(dtype) for part in (xs, x_pairs, x_means, by_length)
    )
    buffers = np.empty((3, _TILE[0] * _TILE[1]), dtype)
    for start in range(0, shape[1], block):
        columns_of = _centred_parts(y[:, :, start : start + block], slices, by_chain)
        ys, y_pairs, y_means = (part.astype(dtype, copy=False) for part in columns_of)
        for rows, columns in _tiles(shape[0], ys.shape[1]):
            size = rows.stop - rows.start, columns.stop - columns.start
            v, squares, rest = (b[: size[0] * size[1]].reshape(size) for b in buffers)
            out = rows, slice(start + columns.start, start + columns.stop)
            np.matmul(xs[:, rows].T, ys[:, columns], out=v)
            np.matmul(x_pairs[:, rows].T, y_pairs[:, columns], out=squares)
            if equal:
                np.multiply(v, dtype.type(of_length[0]), out=rest)
            else:
                np.matmul(by_length[:, rows].T, ys[:, columns], out=rest)
            rest *= v
            squares -= rest
            np.abs(squares, out=squares)  # rounding may leave less than 0
            np.sqrt(squares, out=mcse[out])
            value[out] = v
            np.matmul(x_means[:, rows].T, y_means[:, columns], out=rest)
            np.subtract(v, rest, out=within[out])
    empty = value[None][:0]
    return CrossCovariance(
        value, mcse, within, len(length), degrees_of_freedom(length), length / total, empty, empty
    )


def _tiles(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    for i in range(0, rows, _TILE[0]):
        for j in range(0, columns, _TILE[1]):
            yield slice(i, min(i + _TILE[0], rows)), slice(j, min(j + _TILE[1], columns))


def _centred_parts(
    values: np.ndarray, slices: list[slice], by_chain: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centred values ``(C·T, n)``, products of their pairs in a batch, and means of the chains."""
    chains, draws, n = values.shape
    centred = _centred(values, by_chain).reshape(values.shape)
    pairs, weight = [], []
    for batch in slices:
        for s in range(batch.start, batch.stop):
            for t in range(s, batch.stop):
                pairs.append((s, t))
                weight.append(1.0 if s == t else np.sqrt(2.0))
    first, then = np.array(pairs).T
    products = centred[:, first] * centred[:, then]
    products *= np.array(weight)[:, None]
    flat = centred.reshape(chains * draws, n)
    return flat, products.reshape(chains * len(pairs), n), centred.mean(axis=1)
