"""What the tables of all judges have in common: estimates, their intervals, and costs, in words."""

from __future__ import annotations

import numpy as np
import xarray as xr

__all__ = ["COST_TITLES", "estimates", "half_widths", "title_of"]

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


def title_of(name: str) -> str:
    """A variable or dimension in words."""
    return _TITLES.get(name, name.replace("_", " "))


def estimates(table: xr.Dataset) -> dict[str, tuple[str, str]]:
    """Variables with an interval, and the variables that hold its ends.

    The ends of ``name`` are ``name_lower`` and ``name_upper``; plain ``lower`` and ``upper`` are
    those of the table's first variable of their dimensions.
    """
    names = [str(name) for name in table.data_vars]
    ends = {name: (f"{name}_lower", f"{name}_upper") for name in names}
    found = {name: pair for name, pair in ends.items() if set(pair) <= set(names)}
    if {"lower", "upper"} <= set(names):
        own = [name for name in names if table[name].dims == table["lower"].dims]
        found = {own[0]: ("lower", "upper")} | found
    return found


def half_widths(table: xr.Dataset, name: str) -> np.ndarray:
    """Distances ``(2, …)`` from an estimate down to its lower and up to its upper end."""
    lower, upper = (table[end].values for end in estimates(table)[name])
    value = table[name].values
    return np.maximum(np.stack([value - lower, upper - value]), 0.0)
