"""Pictures of an LDS table: methods beside the noise ceiling, and what their LDS costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_lds", "plot_lds_time"]

INK, CEILING = "#1f4e79", "#b5651d"


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
    ax = ax if ax is not None else _new_axes((6.0, 1.2 + 0.4 * len(names)))
    ax.errorbar(table["lds"].values, places, xerr=_whiskers(table), **_points())
    ax.set_yticks(places, [(labels or {}).get(name, name) for name in names])
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.axvline(0.0, color="0.7", linewidth=0.8, zorder=0)
    if "ceiling" in table:
        ax.axvline(float(table["ceiling"]), color=CEILING, linestyle="--", label="noise ceiling")
        ax.legend(frameon=False, loc="lower right")
    ax.set_xlabel(_axis_label(table))
    return ax


def plot_lds_time(
    table: xr.Dataset,
    *,
    ax: Axes | None = None,
    labels: Mapping[str, str] | None = None,
) -> Axes:
    """Draw LDS with its interval against seconds, on a logarithmic axis.

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
    table = table.isel(scorer=np.isfinite(table["seconds"].values))
    if not table.sizes["scorer"]:
        raise ValueError(
            "no method of the table has its seconds; attrs['seconds'] of the scores sets them."
        )
    ax = ax if ax is not None else _new_axes((7.0, 4.0))
    seconds, score, whiskers = table["seconds"].values, table["lds"].values, _whiskers(table)
    for k, name in enumerate(table["scorer"].values):
        text = (labels or {}).get(str(name), str(name))
        style = {**_points(), "color": f"C{k}", "label": text}
        own = slice(k, k + 1)
        ax.errorbar(seconds[own], score[own], yerr=whiskers[:, own], **style)
    if "ceiling" in table:
        ax.axhline(float(table["ceiling"]), color=CEILING, linestyle="--", label="noise ceiling")
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    ax.set_xscale("log")
    ax.margins(x=0.2)
    ax.set_xlabel("seconds")
    ax.set_ylabel(_axis_label(table))
    return ax


def _require(table: xr.Dataset, names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in table]
    if missing or "scorer" not in table.dims:
        raise ValueError(
            f"an LDS table has the dim 'scorer' and the variables {list(names)}; this one has dims "
            f"{[str(d) for d in table.dims]} and lacks {missing}. Make it with lds_table(...)."
        )


def _new_axes(size: tuple[float, float]) -> Axes:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib, which is not installed: pip install 'bayesinf[plots]'"
        ) from error
    _, ax = plt.subplots(figsize=size, layout="constrained")
    return ax


def _whiskers(table: xr.Dataset) -> np.ndarray:
    """Distances ``(2, scorers)`` from the LDS down to ``lower`` and up to ``upper``."""
    low = table["lds"] - table["lower"]
    return np.stack([low.values, (table["upper"] - table["lds"]).values])


def _points() -> dict[str, Any]:
    return {"fmt": "o", "color": INK, "markersize": 5, "capsize": 3, "elinewidth": 1.2}


def _axis_label(table: xr.Dataset) -> str:
    share = table.attrs.get("confidence")
    return "LDS" if share is None else f"LDS, {100 * float(share):g} % interval"
