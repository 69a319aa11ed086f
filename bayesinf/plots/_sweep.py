"""Picture of what a setting does: LDS or influences against the damping or the temperature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from bayesinf.plots._axes import new_axes
from bayesinf.plots._estimates import CONFIDENCE, estimates, half_widths, monte_carlo, title_of
from bayesinf.plots._look import ACCENT, RULE, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_sweep"]

_SETTINGS = {
    "damping": "damping λ, curvature of the mean loss",
    "n_beta": "nβ (hot ← → cold)",
    "gamma": "localisation γ",
    "step_size": "step size ε",
}


def plot_sweep(
    found: Mapping[float, xr.Dataset],
    variable: str = "lds",
    *,
    along: str = "damping",
    ax: Axes | None = None,
    labels: Mapping[str, str] | None = None,
) -> Axes:
    """Draw curves with their intervals as bands over the values of a setting.

    Parameters
    ----------
    found
        By the value of the setting: LDS tables, ``{λ: lds_table(scores_of[λ], bank)}``, or scores,
        ``{nβ: scores.sel(query=3, train=[0, 17])}``.
    variable
        ``"lds"``, ``"influence"`` or another estimate of at most one dimension, whose entries are
        the curves. Its band is its interval, or ``t·mcse`` of scores; without either, there is
        none.
    along
        The setting: ``"damping"``, ``"n_beta"`` or any other name.
    ax
        Where to draw; a new figure by default.
    labels
        Text for a curve's entry.

    Returns
    -------
    Axes
        With a line for each entry, named in the legend; a logarithmic axis where all settings are
        positive; the noise ceiling where tables have one.

    Raises
    ------
    ValueError
        If there are fewer than two settings, they hold different entries, or the variable is
        missing or has more than one dimension.
    ImportError
        If matplotlib is not installed.
    """
    settings = sorted(found)
    entries = _require([found[x] for x in settings], variable)
    values, low, high = (np.stack(rows) for rows in zip(
        *(_with_ends(found[x], variable, entries) for x in settings), strict=True
    ))  # fmt: skip
    ax = ax if ax is not None else new_axes((6.0, 3.6))
    for k, name in enumerate(entries or [variable]):
        style = style_of(k)
        text = (labels or {}).get(name, name)
        ax.plot(settings, values[:, k], markersize=3.5, linewidth=1.2, label=text, **style)
        if np.isfinite(low[:, k]).any():
            band = {"color": style["color"], "alpha": 0.2, "linewidth": 0}
            ax.fill_between(settings, low[:, k], high[:, k], **band)
    ceilings = {float(t["ceiling"]) for t in found.values() if "ceiling" in t} or {np.nan}
    if variable == "lds" and len(ceilings) == 1 and np.isfinite([*ceilings]).all():
        ax.axhline(*ceilings, color=ACCENT, linestyle="--", label="noise ceiling")
    ax.axhline(0.0, **RULE)
    if min(settings) > 0:
        ax.set_xscale("log")
    ax.set_xlabel(_SETTINGS.get(along, along.replace("_", " ")))
    unit = {"influence": "influence, d E[φ] / d b,\nunits of φ"}
    ax.set_ylabel(unit.get(variable, title_of(variable)) + _interval(found[settings[0]], low))
    if entries or ax.get_legend_handles_labels()[1] != [variable]:
        ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return ax


def _require(tables: list[xr.Dataset], variable: str) -> list[str]:
    """Entries of the variable's dimension; none for a scalar."""
    if len(tables) < 2:
        raise ValueError(
            f"a curve needs two settings or more, by their values; got {len(tables)}: "
            f"plot_sweep({{0.01: …, 0.1: …}})."
        )
    shapes = []
    for table in tables:
        dims = list(table[variable].dims) if variable in table else None
        if dims is None or len(dims) > 1:
            raise ValueError(
                f"{variable!r} must be there for every setting, with at most one dimension, whose "
                f"entries are the curves; got dims {dims} among "
                f"{[str(v) for v in table.data_vars]}. Choose, as in scores.sel(query=3)."
            )
        shapes.append([str(key) for dim in dims for key in table[dim].values.tolist()])
    if any(set(names) != set(shapes[0]) for names in shapes):
        raise ValueError(f"settings hold different entries: {shapes}. Give the same for each.")
    return shapes[0]


def _with_ends(
    table: xr.Dataset, variable: str, entries: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, lower and upper ends in the order of the entries; ends are NaN where unknown."""
    value = np.atleast_1d(table[variable].values).astype(np.float64)
    below = above = np.full_like(value, np.nan)
    half = monte_carlo(table) if variable == "influence" else None
    if half is not None:
        below = above = np.atleast_1d(half)
    elif variable in estimates(table):
        below, above = half_widths(table, variable).reshape(2, -1)
    if entries:
        names = [str(key) for key in table[table[variable].dims[0]].values.tolist()]
        order = [names.index(name) for name in entries]
        value, below, above = value[order], below[order], above[order]
    return value, value - below, value + above


def _interval(table: xr.Dataset, low: np.ndarray) -> str:
    if not np.isfinite(low).any():
        return ""
    return f", {100 * float(table.attrs.get('confidence', CONFIDENCE)):g} % interval"
