"""Picture of the training examples that move one query most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from bayesinf.plots._axes import new_axes
from bayesinf.plots._estimates import CONFIDENCE, monte_carlo
from bayesinf.plots._look import ACCENT, INK, RULE, points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["of_query", "plot_forest"]


def plot_forest(
    scores: xr.Dataset,
    query: Any,
    *,
    k: int = 10,
    ax: Axes | None = None,
    labels: Mapping[Any, str] | None = None,
) -> Axes:
    """Draw the ``k`` most negative and ``k`` most positive influences on a query.

    The most negative are on top (helpful, where φ is the query's loss). Whiskers are 95 %
    intervals by the Monte-Carlo error, ``t·mcse``, where the scores have one; they hold for each
    example by itself. What is certainly among the top is for :func:`bayesinf.top_k` to say.

    Parameters
    ----------
    scores
        ``influence (query, train)`` of any method, of :func:`bayesinf.bayesian.case_influence`, or
        scores that kept the top of each query, ``(query, side, rank)``.
    query
        Id of the query, or name of the quantity φ.
    k
        How many of each side, at most.
    ax
        Where to draw; a new figure by default.
    labels
        Text for a training id.

    Returns
    -------
    Axes
        With two groups of points, negative and positive, from top to bottom by rising influence.

    Raises
    ------
    ValueError
        If the scores have no influence by query and training example, or ``k`` is below 1.
    KeyError
        If the query is unknown.
    ImportError
        If matplotlib is not installed.
    """
    if k < 1:
        raise ValueError(f"k is how many examples of each side are drawn, 1 or more; got {k}.")
    own = of_query(scores, query)
    value, ids = own["influence"].values.ravel(), own["train"].values.ravel().tolist()
    half = monte_carlo(own)
    order = np.argsort(value, kind="stable")
    order = order if 2 * k >= len(order) else np.r_[order[:k], order[-k:]]
    places = np.arange(len(order))[::-1]
    ax = ax if ax is not None else new_axes((6.0, 1.2 + 0.25 * len(order)))
    for color, chosen in ((INK, value[order] < 0), (ACCENT, value[order] >= 0)):
        at = order[chosen]
        bars = None if half is None else half.ravel()[at]
        ax.errorbar(value[at], places[chosen], xerr=bars, **points(color))
    ax.axvline(0.0, **RULE)
    ax.set_yticks(places, [(labels or {}).get(ids[i], str(ids[i])) for i in order])
    ax.set_ylim(-0.6, len(order) - 0.4)
    cases = scores.attrs.get("method") == "case_influence"
    ax.set_ylabel("observation" if cases else "training example")
    interval = "" if half is None else f"\n{100 * CONFIDENCE:g} % interval"
    name = query if cases else f"query {query}"
    what = f"influence on {name}, d E[φ] / d b in units of φ"
    if scores.attrs.get("estimand") == "similarity":
        what = f"−similarity to {name}, no unit"
    ax.set_xlabel(what + interval)
    return ax


def of_query(scores: xr.Dataset, query: Any) -> xr.Dataset:
    """Scores of one query, ``(train)`` or ``(side, rank)``.

    Raises
    ------
    ValueError
        If the scores have no influence by query and training example.
    KeyError
        If the query is unknown.
    """
    dims = set(scores["influence"].dims) if "influence" in scores else set()
    if dims not in ({"query", "train"}, {"query", "side", "rank"}):
        raise ValueError(
            f"a picture of one query needs influence(query, train), or (query, side, rank) of a "
            f"method with top_k=; got dims {sorted(map(str, dims))} among "
            f"{[str(v) for v in scores.data_vars]}. Token scores: token_influence(...) draws them."
        )
    ids = scores["query"].values.tolist()
    if query not in ids:
        raise KeyError(f"no query {query!r}; there are {ids[:5]}{' …' if len(ids) > 5 else ''}.")
    return scores.isel(query=ids.index(query))
