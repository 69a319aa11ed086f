"""A judge's table as rows and columns: which variables stand side by side, and which stay out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr

from bayesinf.plots._estimates import COST_TITLES, estimates, title_of

__all__ = ["Column", "Grid", "Sheet", "read_table"]

_ROWS = {"scorer", "gap"}
_MIB = 2.0**20


@dataclass(frozen=True)
class Column:
    """Values of one kind, with the ends of their intervals where they have any.

    Attributes
    ----------
    title
        In words.
    values
        ``(rows,)``: float64, or text as objects.
    lower, upper
        ``(rows,)``, or None.
    best_first
        Whether a reader wants the highest on top.
    """

    title: str
    values: np.ndarray
    lower: np.ndarray | None = None
    upper: np.ndarray | None = None
    best_first: bool = False

    @property
    def is_text(self) -> bool:
        """Whether the values are text."""
        return bool(self.values.dtype == object)


@dataclass(frozen=True)
class Grid:
    """Rows that are named by the first ``labels`` columns."""

    columns: list[Column]
    labels: int


@dataclass(frozen=True)
class Sheet:
    """All that is shown of a table: its numbers without a dimension, grids, and what is left out.

    Attributes
    ----------
    facts
        Columns of one row.
    grids
        One for every set of dimensions.
    hidden
        Names of variables that are not shown.
    attrs
        What the judge says of itself.
    """

    facts: list[Column]
    grids: list[Grid]
    hidden: list[str]
    attrs: dict[str, Any]


def read_table(table: xr.Dataset, name: str) -> Sheet:
    """Lay out a judge's table.

    Variables stand in one grid with those of their dimensions: labels, estimates, then what the
    method cost, then the others. Shown is what has the dimensions of an estimate with an interval,
    or ``scorer`` alone; numbers by query and standard errors, which intervals repeat, stay out.

    Raises
    ------
    TypeError
        If it is no Dataset.
    ValueError
        If nothing of it can be shown.
    """
    if not isinstance(table, xr.Dataset):
        raise TypeError(
            f"table {name!r} must be an xr.Dataset as the judges return; got "
            f"{type(table).__name__}. A report of one table is report({{'LDS': table}}, title=…)."
        )
    ends = estimates(table)
    rows = _ROWS.union(*(map(str, table[key].dims) for key in ends))
    shown = {
        str(key): table[key]
        for key in table.data_vars
        if set(table[key].dims) <= rows and not _is_part(str(key), ends)
    }
    if not shown:
        raise ValueError(
            f"table {name!r} has nothing by 'scorer' and no estimate with an interval: dims "
            f"{[str(d) for d in table.dims]}, variables {[str(v) for v in table.data_vars]}. "
            f"Scores are judged first: report({{{name!r}: lds_table(scores, bank)}}, title=…)."
        )
    groups: dict[frozenset[Any], list[str]] = {}
    for key, array in shown.items():
        groups.setdefault(frozenset(array.dims), []).append(key)
    facts = [_column(table, key, ends, ()) for key in groups.pop(frozenset(), [])]
    drawn = {str(key) for key in shown} | {end for key in ends if key in shown for end in ends[key]}
    hidden = [str(key) for key in table.data_vars if str(key) not in drawn]
    return Sheet(facts, _grids(table, groups, ends), hidden, dict(table.attrs))


def _is_part(name: str, ends: dict[str, tuple[str, str]]) -> bool:
    """Whether it is the end of an interval or a standard error that one repeats."""
    main = {f"{key}_standard_error" for key in ends}
    return name == "standard_error" or name in main.union(*ends.values())


def _grids(
    table: xr.Dataset, groups: dict[frozenset[Any], list[str]], ends: dict[str, tuple[str, str]]
) -> list[Grid]:
    single = frozenset({"scorer"})
    costs = [key for key in COST_TITLES if key in groups.get(single, [])]
    beside = [  # grids of pairs say nothing of one method: without others, costs stand alone
        dims
        for dims, names in groups.items()
        if single <= dims and "other" not in dims and not set(names) <= set(costs)
    ]
    grids = []
    for dims, names in groups.items():
        own = [name for name in ends if name in names]
        if dims in (beside or [single]):
            own += costs
        own += [name for name in names if name not in [*ends, *costs]]
        if own:
            order = sorted(map(str, dims), key=lambda d: (d != "scorer", list(table.dims).index(d)))
            grids.append(_grid(table, tuple(order), own, ends))
    return grids


def _grid(
    table: xr.Dataset, dims: tuple[str, ...], names: list[str], ends: dict[str, tuple[str, str]]
) -> Grid:
    places = np.meshgrid(*(np.arange(table.sizes[d]) for d in dims), indexing="ij")
    keys = [
        Column(title_of(d), _plain(table[d].values[place.ravel()]))
        for d, place in zip(dims, places, strict=True)
    ]
    columns = [*keys, *(_column(table, name, ends, dims) for name in names)]
    if {"scorer", "other"} <= set(dims):  # symmetric: each pair once
        once = (places[dims.index("scorer")] < places[dims.index("other")]).ravel()
        columns = [_picked(column, once) for column in columns]
    return Grid(columns, len(dims))


def _column(
    table: xr.Dataset, name: str, ends: dict[str, tuple[str, str]], dims: tuple[str, ...]
) -> Column:
    like = xr.DataArray(np.zeros([table.sizes[d] for d in dims]), dims=dims)

    def values(key: str) -> np.ndarray:
        array = table[key].variable
        return _plain(array.set_dims(dict(like.sizes)).transpose(*dims).values.ravel())

    found = values(name)
    if name == "peak_memory":
        found = found / _MIB
    lower, upper = map(values, ends[name]) if name in ends else (None, None)
    return Column(title_of(name), found, lower, upper, best_first=name in ends)


def _picked(column: Column, rows: np.ndarray) -> Column:
    lower, upper = (None if end is None else end[rows] for end in (column.lower, column.upper))
    return replace(column, values=column.values[rows], lower=lower, upper=upper)


def _plain(values: np.ndarray) -> np.ndarray:
    """As float64 where they are numbers, else as text."""
    if values.dtype.kind in "iuf":
        return values.astype(np.float64)
    return np.array([str(value) for value in values.tolist()], dtype=object)
