"""Pictures of observations one by one: what they move, and how hard they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from bayesinf.plots._axes import new_axes
from bayesinf.plots._estimates import CONFIDENCE, monte_carlo
from bayesinf.plots._forest import of_query
from bayesinf.plots._look import ACCENT, INK, RULE, points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_case_influence", "plot_case_summary"]

_INTERVAL = f"{100 * CONFIDENCE:g} % interval"
_FUNCTIONAL_VARIANCE = 0.4
_SMALL: dict[str, Any] = points() | {"markersize": 3, "capsize": 0, "elinewidth": 0.7}
_MARK: dict[str, Any] = {
    "marker": "D", "markersize": 7, "markerfacecolor": "none", "color": ACCENT, "linestyle": "none",
    "zorder": 4,
    "markeredgewidth": 1.6,
}  # fmt: skip


def plot_case_influence(
    scores: xr.Dataset,
    query: str,
    *,
    summary: xr.Dataset | None = None,
    named: int = 5,
    ax: Axes | None = None,
) -> Axes:
    """Draw the influence of each observation on one quantity, in the order of the data.

    Parameters
    ----------
    scores
        From :func:`bayesinf.bayesian.case_influence`.
    query
        The quantity φ.
    summary
        From :func:`bayesinf.bayesian.case_summary`: diamonds mark observations whose Pareto k is
        at its threshold or above, for which leaving them out is no small change.
    named
        How many of the greatest influence are named.
    ax
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
        With a point and its 95 % interval for each observation, in posterior standard deviations
        of φ: by so much its mean moves when the observation counts once more.

    Raises
    ------
    ValueError
        If these are no scores of cases, φ never varies, or the summary is of other observations.
    KeyError
        If φ is unknown.
    ImportError
        If matplotlib is not installed.
    """
    own = of_query(scores, query)
    if "posterior_sd" not in own or not float(own["posterior_sd"]) > 0:
        raise ValueError(
            "the picture is in posterior standard deviations, and the scores have none of "
            f"{query!r}, or it is 0. Make them with case_influence(data); scores of other methods "
            "are drawn by plot_forest(scores, query)."
        )
    spread, half = float(own["posterior_sd"]), monte_carlo(own)
    value = own["influence"].values / spread
    ax = ax if ax is not None else new_axes((7.5, 3.2))
    at = np.arange(len(value))
    ax.errorbar(at, value, yerr=None if half is None else half / spread, **_SMALL)
    ax.axhline(0.0, **RULE)
    if summary is not None:
        _mark_heavy(ax, summary, own["train"].values, value)
    _name(ax, own["train"].values, value, named)
    ax.set_xlabel("observation, in the order of the data")
    ax.set_ylabel(f"influence on {query},\nposterior sd, {_INTERVAL}")
    return ax


def plot_case_summary(summary: xr.Dataset, *, named: int = 3) -> np.ndarray:
    """Draw what is known of every observation: what it moves, how hard it is, and Pareto's k.

    Parameters
    ----------
    summary
        From :func:`bayesinf.bayesian.case_summary`.
    named
        How many of the greatest of each panel are named.

    Returns
    -------
    np.ndarray
        Three axes of a new figure, one below the other: the greatest shift of any quantity in
        posterior standard deviations, the functional variance with the 0.4 above which WAIC fails,
        each with its 95 % interval, and Pareto's k with its threshold. Save it by
        ``axes[0].figure.savefig(…)``.

    Raises
    ------
    ValueError
        If this is no summary of cases.
    ImportError
        If matplotlib is not installed.
    """
    needed = ["largest_shift", "largest_shift_mcse", "p_waic", "p_waic_mcse", "pareto_k"]
    missing = [name for name in needed if name not in summary]
    if missing:
        raise ValueError(
            f"this dataset lacks {missing}. Give a summary: plot_case_summary(case_summary(data))."
        )
    figure = new_axes((7.5, 6.0)).figure
    figure.clear()
    axes: np.ndarray = figure.subplots(3, 1, sharex=True)
    ids, at = summary["train"].values, np.arange(summary.sizes["train"])
    panels = (
        ("largest_shift", f"largest shift,\nposterior sd, {_INTERVAL}", None),
        ("p_waic", f"functional variance,\nnats², {_INTERVAL}", _FUNCTIONAL_VARIANCE),
        ("pareto_k", "Pareto's k", float(summary.attrs["pareto_threshold"])),
    )
    for ax, (name, title, limit) in zip(axes, panels, strict=True):
        value = summary[name].values
        ax.errorbar(at, value, yerr=monte_carlo(summary, f"{name}_mcse"), **_SMALL)
        ax.axhline(0.0, **RULE)
        if limit is not None:
            ax.axhline(limit, color=ACCENT, linestyle="--", linewidth=1.2, label=f"{limit:.2g}")
            ax.legend(frameon=False, fontsize="small", loc="upper right")
        _name(ax, ids, value, named)
        ax.set_ylabel(title)
    axes[-1].set_xlabel("observation, in the order of the data")
    return axes


def _mark_heavy(ax: Axes, summary: xr.Dataset, ids: np.ndarray, value: np.ndarray) -> None:
    same = "pareto_k" in summary and summary["train"].values.tolist() == ids.tolist()
    if not same:
        raise ValueError(
            "the summary is of other observations, or in another order. Make both from one tree: "
            "case_influence(data), case_summary(data)."
        )
    limit = float(summary.attrs["pareto_threshold"])
    heavy = np.flatnonzero(summary["pareto_k"].values >= limit)
    if len(heavy):
        ax.plot(heavy, value[heavy], label=f"Pareto k ≥ {limit:.2g}", **_MARK)
        ax.legend(frameon=False, fontsize="small", loc="best")


def _name(ax: Axes, ids: np.ndarray, value: np.ndarray, named: int) -> None:
    """Write the ids of the values of greatest size beside them."""
    for i in np.argsort(-abs(value), kind="stable")[:named].tolist():
        style: dict[str, Any] = {"fontsize": "small", "color": INK, "textcoords": "offset points"}
        ax.annotate(str(ids[i]), (i, value[i]), xytext=(4, 2), **style)
