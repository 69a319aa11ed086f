"""Picture of quality against cost, of any judge's table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from bayesinf.plots._axes import new_axes
from bayesinf.plots._estimates import COST_TITLES, estimates, half_widths, title_of
from bayesinf.plots._look import ACCENT, points, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_frontier"]

_MIB = 2.0**20


def plot_frontier(
    table: xr.Dataset,
    variable: str,
    *,
    cost: str = "seconds",
    ax: Axes | None = None,
    labels: Mapping[str, str] | None = None,
) -> Axes:
    """Draw an estimate with its interval against what it cost, on a logarithmic axis.

    A grey line steps through the frontier: the methods that no cheaper (or equally cheap) one
    beats, by their point estimates, high being good.

    Parameters
    ----------
    table
        Of any judge. Methods whose cost is unknown or 0 are left out.
    variable
        With an interval, by ``scorer`` alone: ``"lds"``, ``"auroc"``; or ``"change"`` of
        ``table.sel(count=16)``.
    cost
        ``"seconds"``, ``"forward_examples"``, ``"backward_examples"`` or ``"peak_memory"``.
    ax
        Where to draw; a new figure by default.
    labels
        Text for a scorer's name.

    Returns
    -------
    Axes
        With a point for each method, named in the legend, and the table's noise ceiling.

    Raises
    ------
    ValueError
        If the table lacks the cost or an estimate by scorer alone, or no method has its cost.
    ImportError
        If matplotlib is not installed.
    """
    _require(table, variable, cost)
    known = np.isfinite(table[cost].values) & (table[cost].values > 0)
    known &= np.isfinite(table[variable].values)
    table = table.isel(scorer=known)
    if not known.any():
        raise ValueError(
            f"no method of the table has its {cost}; attrs[{cost!r}] of the scores sets them."
        )
    ax = ax if ax is not None else new_axes((7.0, 4.0))
    x = table[cost].values / (_MIB if cost == "peak_memory" else 1.0)
    y, whiskers = table[variable].values, half_widths(table, variable)
    for k, name in enumerate(table["scorer"].values):
        text = (labels or {}).get(str(name), str(name))
        own = slice(k, k + 1)
        style = points() | style_of(k)
        ax.errorbar(x[own], y[own], yerr=whiskers[:, own], label=text, **style)
    best = _frontier(x, y)
    ax.step(x[best], y[best], where="post", color="0.7", linewidth=1, zorder=0, label="_frontier")
    if "ceiling" in table and not table["ceiling"].ndim:
        ax.axhline(float(table["ceiling"]), color=ACCENT, linestyle="--", label="noise ceiling")
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    ax.set_xscale("log")
    ax.margins(x=0.2)
    ax.set_xlabel(title_of(cost))
    share = table.attrs.get("confidence")
    interval = "" if share is None else f", {100 * float(share):g} % interval"
    ax.set_ylabel(title_of(variable) + interval)
    return ax


def _frontier(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Positions, cheapest first, of points that are above all cheaper and equally cheap ones."""
    best, highest = [], -np.inf
    for k in np.lexsort((-y, x)):
        if y[k] > highest:
            best.append(int(k))
            highest = float(y[k])
    return np.array(best)


def _require(table: xr.Dataset, variable: str, cost: str) -> None:
    if cost not in COST_TITLES:
        raise ValueError(f"cost must be one of {list(COST_TITLES)}; got {cost!r}.")
    found = estimates(table)
    alone = [name for name in found if table[name].dims == ("scorer",)]
    if variable in found and variable not in alone:
        further = [str(d) for d in table[variable].dims if d != "scorer"]
        raise ValueError(
            f"{variable!r} has the dims {further} besides 'scorer', and a point is one number. "
            f"Choose: table.sel({further[0] if further else 'scorer'}=…)."
        )
    if variable not in alone or cost not in table:
        raise ValueError(
            f"a frontier needs an estimate with an interval by 'scorer' and {cost!r}; the table "
            f"has the estimates {alone} and the variables {[str(v) for v in table.data_vars]}. "
            f"Make it with a judge: lds_table(scores, bank)."
        )
