"""Picture of the gaps between retraining and influence functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from bayesinf.plots._axes import new_axes
from bayesinf.plots._look import ACCENT, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_response_gaps"]

_NAMES = {
    "warm_start": "warm-start gap",
    "proximity": "proximity gap",
    "non_convergence": "non-convergence gap",
    "linearization": "linearisation error",
}


def plot_response_gaps(
    gaps: xr.Dataset, *, ax: Axes | None = None, labels: Mapping[str, str] | None = None
) -> Axes:
    """Draw how far consecutive stages are apart, from retraining (top) to solvers.

    A point is the root-mean-square difference of two stages over queries and groups, on a
    logarithmic axis, with their mean correlation over groups beside it; an open diamond is the
    part that the seeds of cold starts explain. A gap of exactly 0 has no point.

    Parameters
    ----------
    gaps
        From :func:`~bayesinf.evaluation.response_gaps`.
    ax
        Where to draw; a new figure by default.
    labels
        Text for a gap's name.

    Returns
    -------
    Axes
        With the points.

    Raises
    ------
    ValueError
        If the dataset lacks a variable.
    ImportError
        If matplotlib is not installed.
    """
    missing = [name for name in ("rms", "noise", "correlation") if name not in gaps]
    if missing or "gap" not in gaps.dims:
        raise ValueError(
            f"gaps have the dim 'gap' and the variables rms, noise and correlation; this has dims "
            f"{[str(d) for d in gaps.dims]} and lacks {missing}. Make them with response_gaps(...)."
        )
    names = [str(name) for name in gaps["gap"].values]
    ax = ax if ax is not None else new_axes((6.5, 1.2 + 0.4 * len(names)))
    places = np.arange(len(names))[::-1]
    rms, noise = gaps["rms"].values, gaps["noise"].values
    drawn, noisy = rms > 0, noise > 0
    ax.plot(rms[drawn], places[drawn], "o", color=INK, markersize=5, label="difference")
    if noisy.any():
        style: dict[str, Any] = {"markerfacecolor": "none", "color": ACCENT, "markersize": 6}
        ax.plot(noise[noisy], places[noisy], "D", label="noise of the seeds", **style)
        ax.legend(frameon=False, fontsize="small")
    for place, correlation in zip(places, gaps["correlation"].values, strict=True):
        if np.isfinite(correlation):
            ax.annotate(
                f"r = {correlation:.3f}",
                (1.01, place),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize="small",
            )
    texts = {**_NAMES, **(labels or {})}
    ax.set_yticks(places, [texts.get(name, f"solver error: {name}") for name in names])
    ax.set_ylim(-0.6, len(names) - 0.4)
    if drawn.any():
        ax.set_xscale("log")
    ax.set_xlabel(f"root-mean-square difference of the {gaps.attrs.get('measurement', 'change')}")
    return ax
