"""Picture of two methods' influences against each other, pair by pair."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from bayesinf.plots._axes import new_axes
from bayesinf.plots._estimates import CONFIDENCE, monte_carlo
from bayesinf.plots._look import ACCENT, INK, points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_agreement"]


def plot_agreement(x: xr.Dataset, y: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Draw ``y``'s influences against ``x``'s, each pair a point with its errors, and ``x = y``.

    Both estimate one number, so that points should lie on the line as far as errors and the
    methods' own approximations allow. Choose pairs by ``.sel(query=…)`` where they are many.

    Parameters
    ----------
    x, y
        ``influence (query, train)`` of the same queries and training examples, in any order; for
        example conjugate gradients and the BIF. Whiskers are 95 % intervals by the Monte-Carlo
        error, of those that have one.
    ax
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
        With points, the line, and a title that holds the correlation.

    Raises
    ------
    ValueError
        If one of them only ranks (``estimand`` is not ``"influence"``), or pairs differ.
    ImportError
        If matplotlib is not installed.
    """
    for scores in (x, y):
        _require(scores)
    try:
        y = y.sel(query=x["query"].values, train=x["train"].values)
    except KeyError as error:
        raise ValueError(
            f"both must score the same pairs, and one lacks {error.args[0]}. Make them from one "
            f"task, or choose those in common by .sel(query=…, train=…)."
        ) from error
    x, y = (scores.transpose("query", "train", ...) for scores in (x, y))
    value = np.stack([scores["influence"].values.ravel() for scores in (x, y)])
    half = [monte_carlo(scores) for scores in (x, y)]
    bars = [None if h is None else h.ravel() for h in half]
    ax = ax if ax is not None else new_axes((4.8, 4.4))
    style = points(INK) | {"markersize": 2.5, "capsize": 0, "elinewidth": 0.5, "alpha": 0.5}
    ax.errorbar(value[0], value[1], xerr=bars[0], yerr=bars[1], **style)
    ax.axline((0, 0), slope=1, color=ACCENT, linestyle="--", linewidth=1.2, label="x = y")
    names = [str(scores.attrs.get("method", name)) for scores, name in ((x, "x"), (y, "y"))]
    ends = [f", {100 * CONFIDENCE:g} % interval" if h is not None else "" for h in half]
    ax.set_xlabel(f"{names[0]}: d E[φ] / d b,\nunits of φ{ends[0]}")
    ax.set_ylabel(f"{names[1]}: d E[φ] / d b,\nunits of φ{ends[1]}")
    constant = np.ptp(value, axis=1).min() == 0
    r = "undefined" if constant else f"{np.corrcoef(value)[0, 1]:.3f}"
    ax.set_title(f"{value.shape[1]} pairs, correlation {r}", fontsize="small")
    ax.legend(frameon=False, loc="upper left")
    return ax


def _require(scores: xr.Dataset) -> None:
    found = set(scores["influence"].dims) if "influence" in scores else set()
    if found != {"query", "train"} or scores.attrs.get("estimand", "influence") != "influence":
        raise ValueError(
            f"points can lie on x = y only where both estimate the influence of pairs (query, "
            f"train); got {scores.attrs.get('method', 'scores')} of dims {sorted(map(str, found))}"
            f" with the estimand {scores.attrs.get('estimand')!r}. Methods that only rank are "
            f"compared by their LDS: plot_lds(lds_table(…))."
        )
