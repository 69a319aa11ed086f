"""Scores averaged over checkpoints or seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from bayesinf._scores import label_scores

__all__ = ["ensemble"]

_SUMS = ("processor_seconds", "forward_examples", "backward_examples", "disk")
_LARGEST = ("peak_memory", "peak_device_memory")


def ensemble(scores: Sequence[xr.Dataset]) -> xr.Dataset:
    r"""Mean of scores that one method gave at several checkpoints, or with several seeds.

    .. math:: \frac1K \sum_k \mathrm{influence}_k[q, t]

    A single network's scores carry what is particular to its own training; the mean has less of it,
    and a higher LDS for any method. Rows of ensembles are therefore labelled apart, by ``ensemble``
    and ``checkpoints``, and never compared with those of one network.

    Parameters
    ----------
    scores
        At least two, of one method, measurement and the same examples, in any order.

    Returns
    -------
    xr.Dataset
        ``influence``, and ``influence_by_module`` and ``mcse`` where all have them. ``mcse`` is the
        mean of the members', which bounds the error of the mean however members depend on each
        other. ``attrs["ensemble"]`` is ``K``, ``attrs["checkpoints"]`` the sum of the members';
        passes and seconds are summed.

    Raises
    ------
    ValueError
        If there are fewer than two, or methods, measurements, dimensions or examples differ.

    References
    ----------
    Park et al. 2023, "TRAK: attributing model behavior at scale", §3.2; Bae et al. 2024 (SOURCE),
    who report both.
    """
    if len(scores) < 2:
        raise ValueError(f"an ensemble has at least two members; got {len(scores)}.")
    first, *others = scores
    _require_alike(first, others)
    names = [
        name
        for name in ("influence", "influence_by_module", "mcse")
        if all(name in own for own in scores)
    ]
    dims = first["influence"].dims
    members = [
        first,
        *(own.sel({d: first[d] for d in dims if d in first.indexes}) for own in others),
    ]
    arrays = {
        name: (
            tuple(map(str, first[name].dims)),
            np.mean([own[name].transpose(*first[name].dims).values for own in members], axis=0),
        )
        for name in names
    }
    return label_scores(
        arrays,
        {str(name): value for name, value in first.coords.items()},
        first.attrs["method"],
        first.attrs["estimand"],
        _attrs(scores),
    )


def _require_alike(first: xr.Dataset, others: Sequence[xr.Dataset]) -> None:
    for own in others:
        for name in ("method", "estimand", "measurement", "normalize", "relative"):
            if own.attrs.get(name) != first.attrs.get(name):
                raise ValueError(
                    f"members of an ensemble must be of one {name}; got "
                    f"{first.attrs.get(name)!r} and {own.attrs.get(name)!r}."
                )
        for dim, size in first["influence"].sizes.items():
            same = dim in own["influence"].dims and own.sizes[dim] == size
            if same and dim in first.indexes:
                same = set(own[dim].values.tolist()) == set(first[dim].values.tolist())
            elif same and str(dim).removesuffix("_token") in first.coords:
                ids = str(dim).removesuffix("_token")
                same = own[ids].values.tolist() == first[ids].values.tolist()
            if not same:
                raise ValueError(
                    f"members of an ensemble must score the same examples; they differ in "
                    f"{dim!r}. Score the same task at every checkpoint: task.at(checkpoint)."
                )


def _attrs(scores: Sequence[xr.Dataset]) -> dict[str, Any]:
    """Settings that all have, and costs of them all."""
    first = scores[0].attrs
    found = {k: v for k, v in first.items() if all(own.attrs.get(k) == v for own in scores)}
    for names, total in ((_SUMS, sum), (_LARGEST, max)):
        for name in names:
            found.pop(name, None)
            if all(name in own.attrs for own in scores):
                found[name] = total(own.attrs[name] for own in scores)
    seconds: dict[str, float] = {}
    for own in scores:
        for stage, spent in json.loads(own.attrs.get("seconds", "{}")).items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    freedom = [own.attrs["mcse_df"] for own in scores if "mcse_df" in own.attrs]
    return {
        **{k: v for k, v in found.items() if k not in ("method", "estimand", "relative_mcse")},
        "mcse_df": min(freedom) if len(freedom) == len(scores) else None,
        "seconds": seconds,
        "ensemble": len(scores),
        "checkpoints": sum(int(own.attrs.get("checkpoints", 1)) for own in scores),
    }
