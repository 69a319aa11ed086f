"""What the tables of all judges have in common: estimates, their intervals, and costs, in words."""

from __future__ import annotations

import numpy as np
import xarray as xr
from scipy import stats

__all__ = ["CONFIDENCE", "COST_TITLES", "estimates", "half_widths", "monte_carlo", "title_of"]

CONFIDENCE = 0.95
"""Of the intervals that scores' Monte-Carlo errors give."""

COST_TITLES = {
    "seconds": "seconds",
    "forward_examples": "examples forward",
    "backward_examples": "examples backward",
    "peak_memory": "peak memory, MiB",
}
"""Of what scores cost, as the judges' tables name it."""

_TITLES = {
    "auroc": "AUROC",
    "auroc_difference": "AUROC less baseline",
    "lds": "LDS",
    "mcse": "Monte-Carlo error",
    "relative": "LDS / ceiling",
    "ceiling": "noise ceiling",
    "p_value": "p-value",
    "count": "examples removed",
    "fraction": "share kept",
    "inspected": "share inspected",
    "scorer": "method",
    "other": "other method",
    **COST_TITLES,
}

_MAIN = ("lds", "difference", "effective_queries", "correlation", "ceiling")
"""What plain ``lower`` and ``upper`` belong to, the first that a table has of their dimensions."""


def title_of(name: str) -> str:
    """A variable or dimension in words."""
    return _TITLES.get(name, name.replace("_", " "))


def estimates(table: xr.Dataset) -> dict[str, tuple[str, str]]:
    """Variables with an interval, and the variables that hold its ends.

    The ends of ``name`` are ``name_lower`` and ``name_upper``. Plain ``lower`` and ``upper`` are
    those of what the table is about, one of ``_MAIN`` (the order of variables says nothing: a table
    that was stored and read has another), or else of the only variable that lies between them.
    """
    names = [str(name) for name in table.data_vars]
    ends = {name: (f"{name}_lower", f"{name}_upper") for name in names}
    found = {name: pair for name, pair in ends.items() if set(pair) <= set(names)}
    if {"lower", "upper"} <= set(names):
        dims = table["lower"].dims
        own = [
            name for name in names if table[name].dims == dims and name not in ("lower", "upper")
        ]
        main = [name for name in _MAIN if name in own] or _between(table, own)
        if main:
            found = {main[0]: ("lower", "upper")} | found
    return found


def _between(table: xr.Dataset, names: list[str]) -> list[str]:
    """The only variable that lies between ``lower`` and ``upper`` throughout, if there is one."""
    low, high = table["lower"], table["upper"]
    inside = [name for name in names if bool(((low <= table[name]) & (table[name] <= high)).all())]
    return inside if len(inside) == 1 else []


def half_widths(table: xr.Dataset, name: str) -> np.ndarray:
    """Distances ``(2, …)`` from an estimate down to its lower and up to its upper end."""
    lower, upper = (table[end].values for end in estimates(table)[name])
    value = table[name].values
    return np.maximum(np.stack([value - lower, upper - value]), 0.0)


def monte_carlo(scores: xr.Dataset, name: str = "mcse") -> np.ndarray | None:
    """Half the widths of 95 % intervals by the standard errors ``name``; None without any.

    ``t·mcse`` of Student's t with ``attrs["mcse_df"]`` degrees of freedom, or of the normal where
    scores name none.
    """
    if name not in scores:
        return None
    freedom = float(scores.attrs.get("mcse_df", np.inf))
    half: np.ndarray = stats.t.ppf(0.5 + CONFIDENCE / 2, freedom) * scores[name].values
    return half
