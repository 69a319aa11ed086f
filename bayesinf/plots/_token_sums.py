r"""Sums of token scores over the query and over training sequences, and their errors.

Monte-Carlo errors of tokens depend on each other, so that the error of a sum does not follow from
them; it is at most their sum, :math:`\mathrm{sd}(\sum_i x_i) \le \sum_i \mathrm{sd}(x_i)`, and
exact where the scores of the sums were made from the same draws.

Shapes as in :mod:`bayesinf.plots._token_scores`: ``R`` rows, ``N`` tokens, ``S`` sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr
from scipy import stats

from bayesinf.plots._token_texts import Axis, read_axis

__all__ = [
    "CONFIDENCE",
    "HalfWidths",
    "bounded_error",
    "exact_error",
    "half_width",
    "over_sequences",
    "sort_tokens",
    "with_whole",
]

CONFIDENCE = 0.95
_AGREEMENT = 0.01  # of the largest sum: rounding is far below, other draws far above


@dataclass(frozen=True)
class HalfWidths:
    """Half the widths of 95 % intervals.

    Attributes
    ----------
    tokens
        ``(R, N)``.
    sums
        ``(R, S)``.
    token_bound, sum_bound
        ``(R,)``: whether a row holds upper bounds.
    """

    tokens: np.ndarray
    sums: np.ndarray
    token_bound: np.ndarray
    sum_bound: np.ndarray


def half_width(scores: xr.Dataset) -> float:
    """Return ``t`` of ``influence ± t·mcse``."""
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, scores.attrs["mcse_df"]))


def sort_tokens(array: xr.DataArray, axis: Axis, rows: Axis | None) -> np.ndarray:
    """Values ``(rows, N)`` in the order of the axes."""
    values = array.values[:, axis.order]
    return values if rows is None else values[rows.order]


def with_whole(values: np.ndarray, rows: Axis | None) -> np.ndarray:
    """Put the sum over query tokens before them, ``(R, N)``; a whole query is that already."""
    if rows is None:
        return values
    whole = values.sum(0, dtype=np.float64).astype(values.dtype)
    return np.concatenate([whole[None], values])


def over_sequences(values: np.ndarray, axis: Axis) -> np.ndarray:
    """Sum tokens ``(R, N)`` over each sequence: ``(R, S)``, in float64."""
    return np.add.reduceat(values, axis.starts[:-1], axis=1, dtype=np.float64)


def bounded_error(half: np.ndarray, axis: Axis, rows: Axis | None) -> HalfWidths:
    """Half widths of tokens, and the bounds they set to those of sums."""
    tokens = with_whole(half, rows)
    bound = np.zeros(len(tokens), dtype=bool)
    bound[0] = rows is not None
    return HalfWidths(tokens, over_sequences(tokens, axis), bound, np.ones(len(tokens), dtype=bool))


def exact_error(
    name: str,
    values: tuple[np.ndarray, np.ndarray],
    error: HalfWidths,
    part: xr.Dataset,
    query: Any,
    axes: tuple[Axis, Axis | None],
) -> HalfWidths:
    """Replace bounds by the errors that scores of sums have.

    Parameters
    ----------
    name
        Of the method.
    values
        Its tokens ``(R, N)`` and their sums ``(R, S)``.
    error
        Its bounds so far.
    part
        Scores with ``mcse``, of dimensions ``(query_token, train)``, ``(query, train_token)`` or
        ``(query, train)``.
    query
        Id of the query.
    axes
        The method's own training and query tokens.

    Raises
    ------
    ValueError
        If dimensions or entries do not fit, or the scores are not the sums of the method's.
    """
    train, rows = axes
    dims = {str(d) for d in part["influence"].dims} if "influence" in part else set()
    allowed = [{"query", "train"}]
    if rows is not None:
        allowed += [{"query_token", "train"}, {"query", "train_token"}]
    if dims not in allowed or "mcse" not in part or "mcse_df" not in part.attrs:
        raise ValueError(
            f"{name}: sums= takes scores of sums, with influence, mcse and attrs['mcse_df'], of "
            f"dimensions {' or '.join(str(tuple(sorted(d))) for d in allowed)}; got influence of "
            f"{tuple(sorted(dims))} among {[str(v) for v in part.data_vars]}. For example "
            f"sums=[bi.bif(traces, tokens='query'), bi.bif(traces)]."
        )
    by_token = "train_token" in dims
    part = _aligned(name, part, query, train, rows)
    where = slice(1, None) if "query_token" in dims else slice(0, 1)
    own = values[0 if by_token else 1][where]
    _require_sums(name, part["influence"].values, own, sorted(dims))
    kind = "token" if by_token else "sum"
    field, flag = f"{kind}s", f"{kind}_bound"
    half, bound = getattr(error, field).copy(), getattr(error, flag).copy()
    half[where], bound[where] = half_width(part) * part["mcse"].values, False
    return replace(error, **{field: half, flag: bound})


def _aligned(name: str, part: xr.Dataset, query: Any, train: Axis, rows: Axis | None) -> xr.Dataset:
    """Rows of the query and columns of the training tokens or sequences, in the same order."""
    row = "query_token" if "query_token" in part["influence"].dims else "query"
    column = "train_token" if "train_token" in part["influence"].dims else "train"
    part = part[["influence", "mcse"]].transpose(row, column)
    part = part.isel({row: [k for k, key in enumerate(part["query"].values.tolist())
                            if key == query]})  # fmt: skip
    same = part.sizes[row] > 0
    if same and row == "query_token":
        found = read_axis(part, "query")
        same = rows is not None and found.same_tokens(rows)
        part = part.isel(query_token=found.order)
    if same and column == "train_token":
        found = read_axis(part, "train", like=train)
        same, part = found.same_tokens(train), part.isel(train_token=found.order)
    elif same:
        place = {key: k for k, key in enumerate(part["train"].values.tolist())}
        same = set(train.ids) <= set(place)
        part = part.isel(train=[place[key] for key in train.ids if key in place])
    if not same:
        raise ValueError(
            f"{name}: the sums of dimensions ({row!r}, {column!r}) lack query {query!r}, or their "
            f"tokens or training sequences are others than the scores'. Make both from the same "
            f"traces, with the same tokens."
        )
    return part.load()


def _require_sums(name: str, given: np.ndarray, own: np.ndarray, dims: list[str]) -> None:
    off = float(np.abs(given - own).max())
    largest = float(np.abs(own).max())
    if not off <= _AGREEMENT * largest:
        raise ValueError(
            f"{name}: the sums of dimensions {tuple(dims)} are not those of the token scores: they "
            f"differ by up to {off:.2g}, and the largest is {largest:.2g}. Usual causes: other "
            f"draws, another normalisation, or NaN. Make both from the same traces."
        )
