"""Picture of all influences at once, in blocks of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from bayesinf.plots._axes import new_axes
from bayesinf.plots._estimates import CONFIDENCE, monte_carlo

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_heat_map"]

_QUANTILE = 0.95


def plot_heat_map(
    scores: xr.Dataset,
    *,
    train_classes: Sequence[Any] | np.ndarray | None = None,
    query_classes: Sequence[Any] | np.ndarray | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the influence of every training example on every query as colour: blue lowers φ.

    The scale ends at the 95th percentile of sizes, as a few pairs are far above the others. A pixel
    has no room for an error: the title says which share of pairs has a 95 % interval without 0.

    Parameters
    ----------
    scores
        ``influence (query, train)``.
    train_classes, query_classes
        A class for each example, in the scores' order: rows and columns are sorted by it, lines
        stand between classes, and their names at the middle of their blocks.
    ax
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
        With the image and a colour bar.

    Raises
    ------
    ValueError
        If the scores have no such influence, or there is not one class per example.
    ImportError
        If matplotlib is not installed.
    """
    if "influence" not in scores or set(scores["influence"].dims) != {"query", "train"}:
        raise ValueError(
            f"a heat map needs influence(query, train); got "
            f"{ {str(k): v.dims for k, v in scores.data_vars.items()} }. Scores with top_k= hold "
            f"the largest alone: make them without."
        )
    scores = scores.transpose("query", "train", ...)
    rows, row_edges, row_names = _blocks(query_classes, scores.sizes["query"], "query")
    columns, column_edges, column_names = _blocks(train_classes, scores.sizes["train"], "train")
    value = scores["influence"].values[np.ix_(rows, columns)]
    end = float(np.quantile(abs(value), _QUANTILE)) or float(abs(value).max()) or 1.0
    ax = ax if ax is not None else new_axes((7.0, 4.0))
    image = ax.imshow(
        value, aspect="auto", cmap="RdBu_r", vmin=-end, vmax=end, interpolation="nearest"
    )
    similar = scores.attrs.get("estimand") == "similarity"
    ax.figure.colorbar(
        image,
        ax=ax,
        extend="both" if abs(value).max() > end else "neither",
        label="−similarity, no unit" if similar else "influence, d E[φ] / d b in units of φ",
    )
    for edges, names, line, ticks in (
        (row_edges, row_names, ax.axhline, ax.set_yticks),
        (column_edges, column_names, ax.axvline, ax.set_xticks),
    ):
        for edge in edges[1:-1]:
            line(edge - 0.5, color="0.3", linewidth=0.5)
        if names:
            ticks((edges[1:] + edges[:-1] - 1) / 2, names)
    ax.set_ylabel("query, by class" if row_names else "query")
    ax.set_xlabel("training example, by class" if column_names else "training example")
    half = monte_carlo(scores)
    if half is not None:
        clear = float((abs(scores["influence"].values) > half).mean())
        ax.set_title(
            f"{clear:.0%} of the {100 * CONFIDENCE:g} % intervals are without 0", fontsize="small"
        )
    return ax


def _blocks(
    classes: Sequence[Any] | np.ndarray | None, n: int, dim: str
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Order of the examples, where blocks begin and the last one ends, names of the classes."""
    if classes is None:
        return np.arange(n), np.array([0, n]), []
    kinds = np.asarray(classes)
    if kinds.shape != (n,):
        raise ValueError(
            f"{dim}_classes= must hold one class for each of the {n} examples of {dim!r}, in the "
            f"scores' order; got {kinds.shape}."
        )
    names, counts = np.unique(kinds, return_counts=True)
    return np.argsort(kinds, kind="stable"), np.r_[0, np.cumsum(counts)], list(map(str, names))
