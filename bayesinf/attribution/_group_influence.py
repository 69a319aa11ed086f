"""Influence of groups of training examples, with the error of the sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr

from bayesinf._scores import label_scores, text_labels
from bayesinf._store import check_recorded, covariance_of
from bayesinf._streaming import StreamingCovariance
from bayesinf._traces import TraceStore
from bayesinf.attribution._bif import checked_center, damping_of

__all__ = ["group_influence"]


def group_influence(
    traces: TraceStore | StreamingCovariance,
    groups: Mapping[str, Sequence[Any] | np.ndarray] | xr.DataArray,
    *,
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
        ``{name: ids}``, or an array of weights with a dimension ``train`` and another, such as the
        masks of :func:`bayesinf.random_subsets`.
    measurement, center, batches_per_chain
        As of :func:`bayesinf.bif`.

    Returns
    -------
    xr.Dataset
        ``influence``, ``mcse`` and ``influence_within``, dims ``query`` and ``group`` (or the
        array's own dimension).

    Raises
    ------
    KeyError
        If the measurement was not recorded.
    StoreError
        If there is no draw or no healthy chain.
    ValueError
        If a group is empty, or has an example that was not observed or stands in it twice.

    Warns
    -----
    ConvergenceWarning
        If :func:`bayesinf.diagnose` finds fault with the chains.
    FailedChainsWarning
        If chains diverged; they are left out.
    """
    check_recorded(traces, measurement)
    dim, names, weights = _weights(groups, traces.ids("train"))
    how = checked_center(traces, center, stacklevel=2)
    result = covariance_of(
        traces, measurement, center=how, batches_per_chain=batches_per_chain, mix=weights
    )
    posterior = traces.config["posterior"]
    scale = posterior["n_beta"] / traces.config["task"]["n"]
    arrays = {
        "influence": -scale * result.value,
        "mcse": scale * result.mcse,
        "influence_within": -scale * result.within,
    }
    return label_scores(
        {name: (("query", dim), array) for name, array in arrays.items()},
        {"query": text_labels(traces.ids("query")), dim: text_labels(names)},
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


def _weights(
    groups: Mapping[str, Sequence[Any] | np.ndarray] | xr.DataArray, ids: np.ndarray
) -> tuple[str, np.ndarray, np.ndarray]:
    """Name of the dimension, labels ``(G,)`` and weights ``(N, G)``."""
    place = {key: i for i, key in enumerate(ids.tolist())}
    if isinstance(groups, xr.DataArray):
        return _from_array(groups, place)
    if not groups:
        raise ValueError("groups is empty; give {name: ids of train examples}.")
    weights = np.zeros((len(ids), len(groups)))
    for g, (name, members) in enumerate(groups.items()):
        found = np.asarray(members).tolist()
        if not found or len(set(found)) < len(found):
            what = "is empty" if not found else "holds an example twice"
            raise ValueError(f"group {name!r} {what}; a group is a set of train ids.")
        _refuse_unknown([key for key in found if key not in place], f"group {name!r}")
        weights[[place[key] for key in found], g] = 1.0
    return "group", np.array(list(groups)), weights


def _from_array(groups: xr.DataArray, place: dict[Any, int]) -> tuple[str, np.ndarray, np.ndarray]:
    others = [str(d) for d in groups.dims if d != "train"]
    if "train" not in groups.dims or len(others) != 1:
        raise ValueError(
            f"an array of groups has the dimension train and one more; got {groups.dims}."
        )
    (dim,) = others
    given = groups.transpose("train", dim).astype(np.float64)
    used = (given != 0).any(dim).values
    labels = given["train"].values.tolist()
    _refuse_unknown(
        [key for key, u in zip(labels, used, strict=True) if u and key not in place],
        "the array of groups",
    )
    weights = np.zeros((len(place), given.sizes[dim]))
    for key, row in zip(labels, given.values, strict=True):
        if key in place:
            weights[place[key]] = row
    if not (weights != 0).any(axis=0).all():
        raise ValueError("a group of the array is empty: its weights are all zero.")
    return dim, given[dim].values, weights


def _refuse_unknown(unknown: list[Any], where: str) -> None:
    if unknown:
        raise ValueError(
            f"{where} holds {len(unknown)} train examples that were not observed, first "
            f"{unknown[0]!r}. Observe them: sample(..., observe={{'train': ids}})."
        )
