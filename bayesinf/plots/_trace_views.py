"""Views of the chains of a store through arviz-plots, of a few variables that tell the most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from bayesinf._traces import TraceStore
from bayesinf.plots._look import ACCENT, COLORS, INK

if TYPE_CHECKING:
    from arviz_plots import PlotCollection

__all__ = ["plot_ess_evolution", "plot_rank", "plot_trace"]

_OPTIONS: dict[str, dict[str, Any]] = {
    "plot_trace": {
        "color": list(COLORS),
        "visuals": {"trace": {"width": 0.6, "alpha": 0.8}},
    },
    "plot_rank": {
        "color": list(COLORS),
        # for several chains arviz-stats 0.8 makes a band that reaches from 0 to 1
        "stats": {"ecdf_pit": {"n_chains": 1}},
    },
    "plot_ess_evolution": {
        "visuals": {
            f"ess_{kind}{line}": {"color": color}
            for kind, color in (("bulk", INK), ("tail", ACCENT))
            for line in ("", "_line")
        }
    },
}


def plot_trace(
    traces: TraceStore, *, train: Sequence[Any] = (), query: Sequence[Any] = (), **options: Any
) -> PlotCollection:
    """Draw chains over draws: mean losses, the distance to the checkpoint, ``lp`` and some losses.

    Of healthy chains alone. A good trace is level, and all chains cover the same ground.

    Parameters
    ----------
    traces
        What :func:`bayesinf.sample` returned.
    train, query
        Ids of examples whose losses are drawn, too.
    **options
        Of ``arviz_plots.plot_trace``.

    Returns
    -------
    PlotCollection
        A panel for each variable. Save it by ``.savefig(path)``.

    Raises
    ------
    TypeError
        If this is no store of traces.
    KeyError
        If an example is unknown or was not recorded.
    ImportError
        If arviz-plots is not installed.

    Warns
    -----
    FailedChainsWarning
        If chains diverged; they are left out.
    """
    return _draw("plot_trace", traces, train, query, options)


def plot_rank(
    traces: TraceStore, *, train: Sequence[Any] = (), query: Sequence[Any] = (), **options: Any
) -> PlotCollection:
    """Draw how the ranks of each chain's draws among all are distributed, less the uniform law.

    Lines that leave the grey band say that a chain is not like the others. The band holds 99 % of
    chains of independent draws; chains that move slowly leave it sooner.

    Parameters
    ----------
    traces, train, query
        As of :func:`plot_trace`.
    **options
        Of ``arviz_plots.plot_rank``.

    Returns
    -------
    PlotCollection
        A panel for each variable. Save it by ``.savefig(path)``.

    Raises
    ------
    TypeError
        If this is no store of traces.
    KeyError
        If an example is unknown or was not recorded.
    ImportError
        If arviz-plots is not installed.

    Warns
    -----
    FailedChainsWarning
        If chains diverged; they are left out.
    """
    return _draw("plot_rank", traces, train, query, options)


def plot_ess_evolution(
    traces: TraceStore, *, train: Sequence[Any] = (), query: Sequence[Any] = (), **options: Any
) -> PlotCollection:
    """Draw how effective draws grow with draws: a line where the chains mix.

    Dark blue: of the bulk, what means are made of; brown: of the tails. The dashed line is at 400.

    Parameters
    ----------
    traces, train, query
        As of :func:`plot_trace`.
    **options
        Of ``arviz_plots.plot_ess_evolution``.

    Returns
    -------
    PlotCollection
        A panel for each variable. Save it by ``.savefig(path)``.

    Raises
    ------
    TypeError
        If this is no store of traces.
    KeyError
        If an example is unknown or was not recorded.
    ImportError
        If arviz-plots is not installed.

    Warns
    -----
    FailedChainsWarning
        If chains diverged; they are left out.
    """
    return _draw("plot_ess_evolution", traces, train, query, options)


def _draw(
    name: str,
    traces: TraceStore,
    train: Sequence[Any],
    query: Sequence[Any],
    options: dict[str, Any],
) -> PlotCollection:
    if not isinstance(traces, TraceStore):
        raise TypeError(
            f"{name} shows the traces of a TraceStore; got a {type(traces).__name__}. Sums over "
            f"draws keep none: sample with store=None or a path. ArviZ's own data are drawn by "
            f"arviz_plots.{name}(data)."
        )
    try:
        import arviz_plots
    except ImportError as error:
        raise ImportError(
            "views of chains need arviz-plots, which is not installed: "
            "pip install 'bayesinf[plots]'"
        ) from error
    traces.warn_of_failures(stacklevel=3)
    tree = _selected(traces, train, query)
    panels = len(tree["posterior"].data_vars)
    columns = min(panels, options.setdefault("col_wrap", 3))
    size = {"figsize": (3.0 * columns, 2.1 * -(-panels // columns)), "layout": "constrained"}
    options["figure_kwargs"] = size | options.get("figure_kwargs", {})
    view: Callable[..., PlotCollection] = getattr(arviz_plots, name)
    return view(tree, backend="matplotlib", **{**_OPTIONS[name], **options})


def _selected(traces: TraceStore, train: Sequence[Any], query: Sequence[Any]) -> xr.DataTree:
    """The store in ArviZ's layout, with ``lp`` and chosen losses among the variables."""
    tree = traces.to_arviz()
    posterior, stats = tree["posterior"].to_dataset(), tree["sample_stats"].to_dataset()
    if np.isfinite(stats["lp"].values).all():  # NaN where the whole training set is not seen
        posterior["lp"] = stats["lp"]
    for group, chosen in (("train", train), ("query", query)):
        if not len(chosen):
            continue
        losses = traces.values(group)
        unknown = sorted(set(chosen) - set(losses[group].values.tolist()), key=str)
        if unknown:
            raise KeyError(
                f"no losses of the {group} examples {unknown[:5]} were recorded; there are "
                f"{losses.sizes[group]}, such as {losses[group].values[:5].tolist()}."
            )
        for key in chosen:
            own = losses.sel({group: key}, drop=True)
            posterior[f"loss of {group} {key}"] = own
    return xr.DataTree.from_dict({"posterior": posterior, "sample_stats": stats})
