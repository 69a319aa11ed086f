"""Pictures of an LDS table: methods beside the noise ceiling, and what their LDS costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from bayesinf.plots._axes import new_axes
from bayesinf.plots._estimates import half_widths
from bayesinf.plots._frontier import plot_frontier
from bayesinf.plots._look import ACCENT, points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_lds", "plot_lds_time"]


def plot_lds(
    table: xr.Dataset,
    *,
    ax: Axes | None = None,
    order: str = "lds",
    labels: Mapping[str, str] | None = None,
) -> Axes:
    """Draw one point with its interval per method, best on top, and the noise ceiling.

    Parameters
    ----------
    table
        From :func:`~bayesinf.evaluation.lds_table`.
    ax
        Where to draw; a new figure by default.
    order
        ``"lds"``: by LDS; ``"table"``: as in the table, first on top.
    labels
        Text for a scorer's name.

    Returns
    -------
    Axes
        With points, intervals and, where the table has one, the ceiling.

    Raises
    ------
    ValueError
        If the table lacks a variable, or ``order`` is unknown.
    ImportError
        If matplotlib is not installed.
    """
    _require(table, ("lds", "lower", "upper"))
    if order not in ("lds", "table"):
        raise ValueError(f"order must be 'lds' or 'table'; got {order!r}.")
    names = [str(name) for name in table["scorer"].values]
    if order == "lds":
        places = np.argsort(np.argsort(table["lds"].values, kind="stable"), kind="stable")
    else:
        places = np.arange(len(names))[::-1]
    ax = ax if ax is not None else new_axes((6.0, 1.2 + 0.4 * len(names)))
    ax.errorbar(table["lds"].values, places, xerr=half_widths(table, "lds"), **points())
    ax.set_yticks(places, [(labels or {}).get(name, name) for name in names])
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.axvline(0.0, color="0.7", linewidth=0.8, zorder=0)
    if "ceiling" in table:
        ax.axvline(float(table["ceiling"]), color=ACCENT, linestyle="--", label="noise ceiling")
        ax.legend(frameon=False, loc="lower right")
    ax.set_xlabel(_axis_label(table))
    return ax


def plot_lds_time(
    table: xr.Dataset,
    *,
    ax: Axes | None = None,
    labels: Mapping[str, str] | None = None,
) -> Axes:
    """Draw LDS with its interval against seconds: :func:`plot_frontier` of an LDS table.

    Parameters
    ----------
    table
        From :func:`~bayesinf.evaluation.lds_table`, with ``seconds`` by scorer; methods whose
        seconds are unknown are left out.
    ax
        Where to draw; a new figure by default.
    labels
        Text for a scorer's name.

    Returns
    -------
    Axes
        With a point for each method, named in the legend.

    Raises
    ------
    ValueError
        If the table lacks a variable or no method has seconds.
    ImportError
        If matplotlib is not installed.
    """
    _require(table, ("lds", "lower", "upper", "seconds"))
    return plot_frontier(table, "lds", ax=ax, labels=labels)


def _require(table: xr.Dataset, names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in table]
    if missing or "scorer" not in table.dims:
        raise ValueError(
            f"an LDS table has the dim 'scorer' and the variables {list(names)}; this one has dims "
            f"{[str(d) for d in table.dims]} and lacks {missing}. Make it with lds_table(...)."
        )


def _axis_label(table: xr.Dataset) -> str:
    share = table.attrs.get("confidence")
    return "LDS" if share is None else f"LDS, {100 * float(share):g} % interval"
