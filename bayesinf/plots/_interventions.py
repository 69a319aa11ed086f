"""Pictures of interventions: wrong labels found, and what removing or pruning does, as curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from bayesinf.plots._axes import new_axes
from bayesinf.plots._look import ACCENT, COLORS, GREY, points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_curves", "plot_mislabels"]

_AXES = {
    "count": "training examples removed",
    "fraction": "share of the training examples kept",
    "inspected": "share of the training examples inspected",
}


def plot_mislabels(
    table: xr.Dataset,
    *,
    variable: str = "auroc",
    ax: Axes | None = None,
    labels: Mapping[str, str] | None = None,
) -> Axes:
    """Draw one point with its interval per method, best on top, and the baseline as a line.

    Parameters
    ----------
    table
        From :func:`~bayesinf.evaluation.mislabel_detection`.
    variable
        ``"auroc"`` or ``"average_precision"``.
    ax
        Where to draw; a new figure by default.
    labels
        Text for a scorer's name.

    Returns
    -------
    Axes
        With points, intervals and, where the table has one, the baseline.

    Raises
    ------
    ValueError
        If the table lacks a variable.
    ImportError
        If matplotlib is not installed.
    """
    _require(table, variable, "scorer", "mislabel_detection(...)")
    names = [str(name) for name in table["scorer"].values]
    values = table[variable].values
    places = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    ax = ax if ax is not None else new_axes((6.0, 1.2 + 0.4 * len(names)))
    ax.errorbar(values, places, xerr=_whiskers(table, variable), **points())
    ax.set_yticks(places, [(labels or {}).get(name, name) for name in names])
    ax.set_ylim(-0.6, len(names) - 0.4)
    base = table.attrs.get("baseline")
    if base is not None:
        at = float(values[names.index(str(base))])
        text = f"baseline: {(labels or {}).get(base, base)}"
        ax.axvline(at, color=ACCENT, linestyle="--", zorder=0, label=text)
        ax.legend(frameon=False, loc="lower right")
    title = {"auroc": "AUROC of wrong labels", "average_precision": "average precision"}
    ax.set_xlabel(title.get(variable, variable) + _interval(table))
    return ax


def plot_curves(
    table: xr.Dataset,
    variable: str,
    *,
    along: str,
    scorers: Sequence[str] | None = None,
    ax: Axes | None = None,
    labels: Mapping[str, str] | None = None,
) -> Axes:
    """Draw a curve with its intervals per method; random controls are grey, dashed or dotted.

    Parameters
    ----------
    table
        From :func:`~bayesinf.evaluation.removal_counterfactual`,
        :func:`~bayesinf.evaluation.pruning_curve` or
        :func:`~bayesinf.evaluation.mislabel_detection`.
    variable
        With dims ``scorer`` and ``along``: ``"change"``, ``"flipped"``, ``"brittle"``,
        ``"accuracy"``, ``"recall"``, ….
    along
        ``"count"``, ``"fraction"`` or ``"inspected"``.
    scorers
        Which, in this order; all by default.
    ax
        Where to draw; a new figure by default.
    labels
        Text for a scorer's name.

    Returns
    -------
    Axes
        With a line for each method, named in the legend.

    Raises
    ------
    ValueError
        If the table lacks a variable.
    ImportError
        If matplotlib is not installed.
    """
    _require(table, variable, along, "removal_counterfactual(...) or pruning_curve(...)")
    names = [str(name) for name in table["scorer"].values] if scorers is None else list(scorers)
    ax = ax if ax is not None else new_axes((6.5, 4.0))
    x = table[along].values
    shift = 0.012 * (np.arange(len(names)) - (len(names) - 1) / 2)  # intervals beside each other
    width = x if along == "count" else 0.4 * np.ptp(x)
    controls = [name for name in names if name.startswith("random")]
    methods = [name for name in names if name not in controls]
    for k, name in enumerate(names):
        own = table.sel(scorer=name)
        style: dict[str, Any] = {}
        if name in controls:
            style |= {"color": GREY, "linestyle": ("--", ":")[controls.index(name) % 2]}
        else:
            place = methods.index(name)
            style |= {"color": COLORS[place % len(COLORS)]}
            style |= {"linestyle": "-" if place < len(COLORS) else "-."}
        ax.errorbar(
            x + width * shift[k], own[variable].values, yerr=_whiskers(own, variable), fmt="o",
            markersize=3.5, capsize=2, elinewidth=0.9, linewidth=1.2,
            label=(labels or {}).get(name, name), **style,
        )  # fmt: skip
    if along == "count" and len(x) > 1:
        ax.set_xscale("log")
        ax.set_xticks(x, [str(k) for k in x])
        ax.minorticks_off()
    ax.set_xlabel(_AXES.get(along, along))
    ax.set_ylabel(variable.replace("_", " ") + _interval(table))
    ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return ax


def _require(table: xr.Dataset, variable: str, dim: str, maker: str) -> None:
    needed = [variable, f"{variable}_lower", f"{variable}_upper"]
    missing = [name for name in needed if name not in table]
    if missing or dim not in table.dims or "scorer" not in table.dims:
        raise ValueError(
            f"the table needs the dims 'scorer' and {dim!r} and the variables {needed}; it has "
            f"dims {[str(d) for d in table.dims]} and lacks {missing}. Make it with {maker}."
        )


def _whiskers(table: xr.Dataset, variable: str) -> np.ndarray:
    """Distances ``(2, …)`` from the values down to their lower and up to their upper ends."""
    value = table[variable].values
    low, high = (table[f"{variable}_{end}"].values for end in ("lower", "upper"))
    return np.maximum(np.stack([value - low, high - value]), 0.0)


def _interval(table: xr.Dataset) -> str:
    share = table.attrs.get("confidence")
    return "" if share is None else f", {100 * float(share):g} % interval"
