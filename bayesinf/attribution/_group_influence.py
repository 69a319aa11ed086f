"""Influence of groups of training examples or tokens, with the error of the sum."""

from __future__ import annotations

from typing import Any, Literal

import xarray as xr

from bayesinf._axes import Selection
from bayesinf._scores import label_scores, text_labels
from bayesinf._store import check_recorded, covariance_of
from bayesinf._streaming import StreamingCovariance
from bayesinf._traces import TraceStore
from bayesinf.attribution._bif import checked_center, damping_of
from bayesinf.attribution._groups import Grouping, GroupsLike, resolve_groups

__all__ = ["group_influence"]


def group_influence(
    traces: TraceStore | StreamingCovariance,
    groups: GroupsLike,
    *,
    query_groups: GroupsLike | None = None,
    measurement: str = "loss",
    center: Literal["auto", "grand", "chain"] = "auto",
    batches_per_chain: int | None = None,
) -> xr.Dataset:
    r"""Influence of every group of train examples on every query, with its standard error.

    .. math:: \sum_{i \in S} \frac{d E[\phi_q]}{d b_i}
              = -\frac{n_\beta}{n}\,\mathrm{Cov}\Big(\sum_{i \in S} \ell_i, \phi_q\Big)

    The sum of :func:`bayesinf.bif`'s scores, to rounding; but its error is not theirs added up,
    in squares or otherwise, as the errors of examples depend on each other.

    Parameters
    ----------
    traces
        What :func:`bayesinf.sample` returned, traces or sums.
    groups
        One of

        * ``{name: ids}`` of train examples;
        * an array of **labels** along ``train`` (by id) or ``train_token``: one group for each
          label, such as a document, a class of tokens, a bucket of positions. NaN, None and the
          empty text mean: in no group. Token labels are those of the store's tokens in its order
          (``traces.values("train", tokens=True)`` has their coordinates);
        * an array of **weights** with one of these dimensions and another, such as the masks of
          :func:`bayesinf.random_subsets`.
    query_groups
        The same for queries (or ``query_token``): φ is then summed over each group.
    measurement, center, batches_per_chain
        As of :func:`bayesinf.bif`.

    Returns
    -------
    xr.Dataset
        ``influence``, ``mcse`` and ``influence_within``, dims ``query`` (or ``query_group``) and
        ``group`` (or an array's own dimension).

    Raises
    ------
    KeyError
        If the measurement, or its tokens, were not recorded.
    StoreError
        If there is no draw or no healthy chain.
    ValueError
        If a group is empty, or has an example that was not observed or stands in it twice, or
        labels do not fit the tokens.

    Warns
    -----
    ConvergenceWarning
        If :func:`bayesinf.diagnose` finds fault with the chains.
    FailedChainsWarning
        If chains diverged; they are left out.
    """
    check_recorded(traces, measurement)
    traces.warn_of_failures(stacklevel=2)
    columns = resolve_groups(groups, traces, "train", "group")
    rows: Grouping | None = None
    if query_groups is not None:
        rows = resolve_groups(query_groups, traces, "query", "query_group")
    how = checked_center(traces, center, stacklevel=2)
    result = covariance_of(
        traces,
        measurement,
        query=Selection(rows is not None and rows.tokens),
        train=Selection(columns.tokens),
        center=how,
        batches_per_chain=batches_per_chain,
        mix=columns.weights,
        query_mix=None if rows is None else rows.weights,
    )
    dims = ("query" if rows is None else rows.dim, columns.dim)
    coords: dict[str, Any] = {
        dims[0]: text_labels(traces.ids("query") if rows is None else rows.names),
        dims[1]: text_labels(columns.names),
    }
    posterior = traces.config["posterior"]
    scale = posterior["n_beta"] / traces.config["task"]["n"]
    arrays = {
        "influence": -scale * result.value,
        "mcse": scale * result.mcse,
        "influence_within": -scale * result.within,
    }
    return label_scores(
        {name: (dims, array) for name, array in arrays.items()},
        coords,
        "bif",
        "influence",
        {
            **posterior,
            "damping": damping_of(posterior),
            "measurement": measurement,
            "center": how,
            "mcse_df": result.freedom,
            "chains": len(traces.healthy),
            "draws": traces.draws,
            "checkpoint": traces.config["task"]["checkpoint"],
        },
    )
