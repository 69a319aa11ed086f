"""Groups of examples or tokens as sparse weights, from names, masks or labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import xarray as xr
from scipy.sparse import csr_array

from bayesinf._axes import Axis

__all__ = ["Grouping", "GroupsLike", "HasAxes", "resolve_groups"]

GroupsLike = Mapping[str, Sequence[Any] | np.ndarray] | xr.DataArray


class HasAxes(Protocol):
    """What groups are of."""

    def axis(self, split: str, *, tokens: bool = False) -> Axis:
        """Axis of the train examples or queries, or of their tokens."""


@dataclass(frozen=True)
class Grouping:
    """Weights ``(N, G)`` of the entries of an axis, which are tokens or examples."""

    dim: str
    names: np.ndarray
    weights: csr_array
    tokens: bool


def resolve_groups(groups: GroupsLike, store: HasAxes, split: str, dim: str) -> Grouping:
    """Resolve groups of the train examples or queries of a store, or of scores.

    Parameters
    ----------
    groups
        ``{name: ids}``; an array of labels along ``split`` or ``split_token``; or an array of
        weights along one of them and another dimension.
    store
        Traces, sums, or whatever else has axes.
    split
        ``"train"`` or ``"query"``.
    dim
        Name of the dimension of groups, where ``groups`` has none.

    Raises
    ------
    ValueError
        If groups are empty, do not fit the store, or name what was not observed.
    KeyError
        If tokens are grouped that were not recorded.
    """
    if not isinstance(groups, xr.DataArray):
        return _named(groups, store.axis(split), dim)
    along = [str(d) for d in groups.dims if d in (split, f"{split}_token")]
    if len(along) != 1 or groups.ndim > 2:
        raise ValueError(
            f"an array of groups has the dimension {split} (or {split}_token), alone for labels or "
            f"with one more for weights; got {groups.dims}."
        )
    tokens = along[0] != split
    axis = store.axis(split, tokens=tokens)
    place = _token_places(groups, axis) if tokens else _example_places(groups, axis)
    if groups.ndim == 1:
        return _labelled(groups, axis, place, dim, tokens)
    return _weighted(groups, axis, place, along[0], tokens)


def _named(groups: Mapping[str, Any], axis: Axis, dim: str) -> Grouping:
    if not groups:
        raise ValueError(f"groups is empty; give {{name: ids of {axis.split} examples}}.")
    place = {key: i for i, key in enumerate(axis.examples.tolist())}
    rows: list[int] = []
    columns: list[int] = []
    for g, (name, members) in enumerate(groups.items()):
        found = np.asarray(members).tolist()
        if not found or len(set(found)) < len(found):
            what = "is empty" if not found else "holds an example twice"
            raise ValueError(f"group {name!r} {what}; a group is a set of {axis.split} ids.")
        unknown = [key for key in found if key not in place]
        _refuse_unknown(unknown, f"group {name!r}", axis.split)
        rows += [place[key] for key in found]
        columns += [g] * len(found)
    shape = (axis.size, len(groups))
    weights = csr_array((np.ones(len(rows)), (np.array(rows), np.array(columns))), shape=shape)
    return Grouping(dim, np.array(list(groups)), weights, False)


def _labelled(
    groups: xr.DataArray, axis: Axis, place: np.ndarray, dim: str, tokens: bool
) -> Grouping:
    """One group a label; NaN, None and the empty text stand for no group."""
    labels = groups.values
    if labels.dtype.kind == "f":
        kept = ~np.isnan(labels)
    elif labels.dtype.kind in "OUT":
        kept = np.array([not (x is None or x == "" or x != x) for x in labels.tolist()])
    else:
        kept = np.ones(len(labels), dtype=bool)
    _refuse_places(groups, axis, kept & (place < 0))
    if not kept.any():
        raise ValueError("every label is NaN, None or empty: there is no group.")
    chosen = labels[kept]
    names, column = np.unique(chosen.astype(str) if chosen.dtype.kind == "O" else chosen,
                              return_inverse=True)  # fmt: skip
    entries = (np.ones(len(column)), (place[kept], column))
    return Grouping(dim, names, csr_array(entries, shape=(axis.size, len(names))), tokens)


def _weighted(
    groups: xr.DataArray, axis: Axis, place: np.ndarray, along: str, tokens: bool
) -> Grouping:
    (dim,) = (str(d) for d in groups.dims if d != along)
    given = groups.transpose(along, dim)
    values = csr_array(np.asarray(given.values, dtype=np.float64))
    used = np.diff(values.indptr) > 0
    _refuse_places(groups, axis, used & (place < 0))
    if not np.bincount(values.indices, minlength=values.shape[1]).all():
        raise ValueError("a group of the array is empty: its weights are all zero.")
    found = values.tocoo()
    entries = (found.data, (place[found.coords[0]], found.coords[1]))
    weights = csr_array(entries, shape=(axis.size, values.shape[1]))
    return Grouping(dim, given[dim].values, weights, tokens)


def _example_places(groups: xr.DataArray, axis: Axis) -> np.ndarray:
    """Entry of each label by its id, −1 where it was not observed."""
    known = {key: i for i, key in enumerate(axis.examples.tolist())}
    return np.array([known.get(key, -1) for key in groups[axis.split].values.tolist()])


def _token_places(groups: xr.DataArray, axis: Axis) -> np.ndarray:
    """Entry of each token: those of the store, in its order."""
    coords = {k: v[1] for k, v in axis.coords().items() if k in groups.coords}
    fits = groups.sizes[axis.dim] == axis.size and all(
        groups[name].values.tolist() == np.asarray(values).tolist()
        for name, values in coords.items()
    )
    if not fits:
        raise ValueError(
            f"labels along {axis.dim} must be those of the store's {axis.size} tokens, in its "
            f"order; got {groups.sizes[axis.dim]}, or other coordinates. Make them from "
            f"traces.values({axis.split!r}, tokens=True), whose coordinates say which they are."
        )
    return np.arange(axis.size)


def _refuse_places(groups: xr.DataArray, axis: Axis, unknown: np.ndarray) -> None:
    if unknown.any():
        found = groups[axis.split].values[unknown].tolist()
        _refuse_unknown(found, "the array of groups", axis.split)


def _refuse_unknown(unknown: list[Any], where: str, split: str) -> None:
    if unknown:
        raise ValueError(
            f"{where} holds {len(unknown)} {split} examples that were not observed, first "
            f"{unknown[0]!r}. Observe them: sample(..., observe={{{split!r}: ids}}); or score a "
            f"task that has them."
        )
