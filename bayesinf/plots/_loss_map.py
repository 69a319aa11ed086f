"""Picture of the loss kernel: near each other are examples whose losses move together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from bayesinf.plots._axes import new_axes
from bayesinf.plots._look import INK, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_loss_map"]


def plot_loss_map(
    found: xr.Dataset,
    *,
    classes: Sequence[Any] | np.ndarray | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the embedding of a loss map, a point for each example.

    Parameters
    ----------
    found
        From :func:`bayesinf.bayesian.loss_map`.
    classes
        Of the examples, in the map's order, shown by colour and marker; by default its clusters,
        if it has any.
    ax
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
        With axes of one scale, which say what share of the squared distances they show.

    Raises
    ------
    ValueError
        If this is no loss map, or there is not one class per example.
    ImportError
        If matplotlib is not installed.
    """
    missing = [name for name in ("embedding", "share") if name not in found]
    if missing:
        raise ValueError(
            f"this dataset lacks {missing}. Give a map: plot_loss_map(loss_map(data))."
        )
    place, share = found["embedding"].transpose("train", "axis").values, found["share"].values
    title = "class"
    if classes is None and "cluster" in found:
        classes, title = found["cluster"].values, "cluster"
    kinds = None if classes is None else np.asarray(classes)
    if kinds is not None and kinds.shape != (len(place),):
        raise ValueError(
            f"classes= must hold one class for each of the {len(place)} examples, in the map's "
            f"order; got {kinds.shape}."
        )
    ax = ax if ax is not None else new_axes((5.6, 4.4))
    style: dict[str, Any] = {"linestyle": "none", "markersize": 4, "alpha": 0.8}
    if kinds is None:
        ax.plot(*place.T, color=INK, marker="o", **style)
    else:
        for k, name in enumerate(np.unique(kinds).tolist()):
            ax.plot(*place[kinds == name].T, label=str(name), **style, **style_of(k))
        ax.legend(
            frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0),
            title=title,
        )  # fmt: skip
    ax.set_aspect("equal", "datalim")
    ax.set_xlabel(f"axis 1, {share[0]:.0%} of the squared distances 2(1 − ρ)")
    ax.set_ylabel(f"axis 2, {share[1]:.0%} of the squared distances 2(1 − ρ)")
    return ax
