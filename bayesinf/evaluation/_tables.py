"""What the tables of all judges share: scores by name, and what the scores cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import xarray as xr

from bayesinf.evaluation._alignment import method_name

__all__ = ["COSTS", "Named", "named", "with_costs"]

Named = Mapping[str, xr.Dataset] | Sequence[xr.Dataset] | xr.Dataset
"""Scores by name, a list of them, or those of one method."""

COSTS = (
    "seconds",
    "processor_seconds",
    "forward_examples",
    "backward_examples",
    "peak_memory",
    "disk",
)
"""Attributes of scores: seconds by stage and of processors, examples passed, bytes."""


def named(scores: Named) -> dict[str, xr.Dataset]:
    """Scores by name, those without one by ``attrs["method"]``.

    Raises
    ------
    ValueError
        If there are none, or two of a list are of one method.
    """
    if isinstance(scores, xr.Dataset):
        return {method_name(scores): scores}
    if not len(scores):
        raise ValueError("a table needs the scores of at least one method; got none.")
    if isinstance(scores, Mapping):
        return dict(cast(Mapping[str, xr.Dataset], scores))
    names = [method_name(own) for own in scores]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"several scores are of the method {repeated}. Name them: "
            f"{{'{repeated[0]}, damping 0.1': a, …}}."
        )
    return dict(zip(names, scores, strict=True))


def with_costs(table: xr.Dataset, scores: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """Add what the scores cost by ``scorer``: each of ``COSTS``, NaN where unknown.

    Seconds are summed over stages.
    """
    found = {name: [_total(own.attrs.get(name)) for own in scores.values()] for name in COSTS}
    return table.assign({name: ("scorer", values) for name, values in found.items()})


def _total(value: Any) -> float:
    if isinstance(value, str):
        value = json.loads(value)
    if isinstance(value, dict):
        return float(sum(value.values()))
    return np.nan if value is None else float(value)
