"""Several methods on one task, judged by retrained models: one table, one figure.

The top of the library: it needs methods, judges and figures, and nothing needs it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from bayesinf._attribute import attribute, checked_method
from bayesinf._run import DivergenceError
from bayesinf._scores import text_labels
from bayesinf._task import Task
from bayesinf.attribution._entry_points import MethodWarning, find_method
from bayesinf.curvature import SolverDivergenceError
from bayesinf.evaluation import lds_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Methods", "compare"]

Methods = Sequence[str] | Mapping[str, str | tuple[str, Mapping[str, Any]] | xr.Dataset]
"""Names of methods; or by label a name, a name with its options, or scores that were made."""

_REFUSALS = (
    ValueError,
    MemoryError,
    NotImplementedError,
    DivergenceError,
    SolverDivergenceError,
)
_OF_ALL = {"ensemble", "device", "dtype"}


def compare(
    task: Task, methods: Methods, bank: xr.Dataset, **options: Any
) -> tuple[xr.Dataset, Figure]:
    r"""Score a task with several methods, and judge them by retrained models.

    Parameters
    ----------
    task
        Network, likelihood, training and query examples, with the ids of the bank.
    methods
        Names of :func:`bayesinf.available_methods`; or by label a name, ``(name, options)``, or
        scores that were made elsewhere.
    bank
        Ground truth, from :func:`bayesinf.retrain`.
    **options
        Of all: each goes to every method that takes it (``damping``, ``fisher``, ``batch_size``,
        ``progress``, …); a method's own come first. ``device``, ``dtype`` and ``ensemble`` as of
        :func:`bayesinf.attribute`. ``measurement`` is what is judged.

    Returns
    -------
    table
        :func:`bayesinf.lds_table` by ``scorer``, the label, with ``method``, ``estimand`` and
        ``ensemble`` (networks that scores are averaged over; rows of different numbers are not to
        be compared with each other). ``attrs["not_run"]`` says why a method is absent.
    figure
        LDS with intervals, and LDS against seconds.

    Raises
    ------
    ValueError
        If a method is unknown, none ran, or scores and bank do not belong together.
    TypeError
        If an option is unknown or missing, or no method takes one that was given for all.
    ImportError
        If matplotlib is not installed, or a method of another package does not load.

    Warns
    -----
    MethodWarning
        By method that cannot run on this task, or failed; it is left out.
    """
    given = _given(methods)
    runs = _planned(given, options)
    measurement = options.get("measurement", "loss")
    scores: dict[str, xr.Dataset] = {}
    reasons: dict[str, str] = {}
    for label, own in given.items():
        if isinstance(own, xr.Dataset):
            scores[label] = own
            continue
        name, chosen = runs[label]
        try:
            if measurement != "loss" and "measurement" not in chosen:
                raise ValueError(f"{name} scores the loss alone, not {measurement!r}")
            scores[label] = attribute(task, name, **chosen)
        except _REFUSALS as error:
            reasons[label] = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"{label!r} is left out of the comparison: {reasons[label]}",
                MethodWarning,
                stacklevel=2,
            )
    if not scores:
        raise ValueError(f"no method ran, so that there is nothing to compare: {reasons}")
    table = _table(scores, bank, measurement)
    table.attrs["not_run"] = json.dumps(reasons)
    return table, _figure(table)


def _given(methods: Methods) -> dict[str, str | tuple[str, Mapping[str, Any]] | xr.Dataset]:
    """Methods by label."""
    if isinstance(methods, Mapping):
        found = dict(methods)
    elif isinstance(methods, str):
        raise TypeError(f"methods is a list of names or a mapping by label; got {methods!r} alone.")
    else:
        found = {name: name for name in methods}
        if len(found) < len(methods):
            raise ValueError(
                f"a name stands twice among {list(methods)}. Give labels: "
                f"{{'weak damping': ('ekfac', {{'damping': 1e-3}}), …}}."
            )
    if not found:
        raise ValueError("there is no method to compare; available_methods(task) lists them.")
    return found


def _planned(
    given: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name and options of each run, checked before the first."""
    runs: dict[str, tuple[str, dict[str, Any]]] = {}
    taken = {*_OF_ALL, "measurement"}
    for label, own in given.items():
        if isinstance(own, xr.Dataset):
            continue
        name, alone = (own, {}) if isinstance(own, str) else own
        takes = find_method(name).takes
        row = {key: value for key, value in options.items() if key in takes | _OF_ALL} | {**alone}
        checked_method(name, {key: value for key, value in row.items() if key not in _OF_ALL})
        runs[label] = name, row
        taken |= takes
    unknown = sorted(set(options) - taken)
    if unknown:
        raise TypeError(
            f"no method among {list(given)} takes {', '.join(unknown)}. available_methods(task) "
            f"lists what each takes."
        )
    return runs


def _table(scores: dict[str, xr.Dataset], bank: xr.Dataset, measurement: str) -> xr.Dataset:
    """LDS of all, those of one number of networks together."""
    kinds: dict[int, dict[str, xr.Dataset]] = {}
    for label, own in scores.items():
        kinds.setdefault(int(own.attrs.get("checkpoints", 1)), {})[label] = own
    tables = [
        lds_table(part, bank, measurement=measurement, constant="zero") for part in kinds.values()
    ]
    table = xr.concat(
        tables, "scorer", data_vars="minimal", coords="minimal", compat="override", join="inner"
    ).sel(scorer=list(scores))
    columns = {
        "method": text_labels(np.array([own.attrs["method"] for own in scores.values()])),
        "estimand": text_labels(np.array([own.attrs["estimand"] for own in scores.values()])),
        "ensemble": np.array([int(own.attrs.get("ensemble", 1)) for own in scores.values()]),
    }
    return table.assign({name: ("scorer", values) for name, values in columns.items()})


def _figure(table: xr.Dataset) -> Figure:
    from bayesinf.plots import plot_lds, plot_lds_time  # not before somebody wants a figure
    from bayesinf.plots._axes import new_axes

    left = new_axes((11.0, 1.5 + 0.4 * table.sizes["scorer"]))
    figure = left.figure.get_figure(root=True)
    assert figure is not None
    labels = {
        str(name): f"{name} (ensemble of {int(size)})"
        for name, size in zip(table["scorer"].values, table["ensemble"].values, strict=True)
        if size > 1
    }
    plot_lds(table, ax=left, labels=labels)
    timed = table["seconds"].values
    if (timed[np.isfinite(timed)] > 0).any():
        grid = figure.add_gridspec(1, 2)
        left.set_subplotspec(grid[0])
        plot_lds_time(table, ax=figure.add_subplot(grid[1]), labels=labels)
    return figure
