"""What judges read of scores: a value for each training example, or each query's best examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

__all__ = ["common_values", "most_helpful", "value_of"]


def value_of(scores: xr.Dataset, name: str) -> xr.DataArray:
    """Values ``(train)`` in float64, high = hard or suspicious.

    ``value`` where the scores have it (:func:`bayesinf.grand`, :func:`bayesinf.self_variance`), or
    minus a self-influence ``influence (train)`` (``ekfac(task, pairs="self", …)``), which is
    negative by the sign of the estimand: an example helps itself.

    Raises
    ------
    ValueError
        If there is neither, a value is not finite, or ids repeat.
    """
    if "value" in scores and scores["value"].dims == ("train",):
        found = scores["value"]
    elif "influence" in scores and scores["influence"].dims == ("train",):
        found = -scores["influence"]
    else:
        have = {str(k): v.dims for k, v in scores.data_vars.items()}
        raise ValueError(
            f"{name} holds no value of each training example: it has {have}. Wanted is value(train)"
            f", as of grand(task), or a self-influence: ekfac(task, ..., pairs='self')."
        )
    values = found.values.astype(np.float64)
    bad = ~np.isfinite(values)
    if bad.any():
        raise ValueError(f"{name} is not finite for {int(bad.sum())} of {len(values)} examples.")
    ids = scores["train"].values
    if len(set(ids.tolist())) < len(ids):
        raise ValueError(f"the train ids of {name} repeat; they must be unique.")
    return xr.DataArray(values, {"train": ids}, ("train",))


def common_values(methods: Mapping[str, xr.Dataset], train: np.ndarray | None = None) -> Any:
    """Values ``(K, n)`` of all methods in one order of training ids, and these ids.

    Parameters
    ----------
    methods
        Scores by name.
    train
        The ids wanted; those of the first method by default.

    Raises
    ------
    ValueError
        If two methods value other examples.
    """
    rows = {name: value_of(own, name) for name, own in methods.items()}
    ids = next(iter(rows.values()))["train"].values if train is None else train
    for name, row in rows.items():
        own, wanted = set(row["train"].values.tolist()), set(ids.tolist())
        if own != wanted:
            raise ValueError(
                f"{name} values {len(own)} training examples where {len(wanted)} are wanted, "
                f"{len(own & wanted)} of them in common. Value the whole training set, with the "
                f"same train_ids."
            )
    return np.stack([row.sel(train=ids).values for row in rows.values()]), ids


def most_helpful(scores: xr.Dataset, name: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Train ids ``(Q, k)`` of most negative influence, most helpful first, and query ids ``(Q,)``.

    Of whole scores ``influence (query, train)`` (of equal ones the earlier first), or of those that
    kept the top of each query, dims ``(query, side, rank)``.

    Raises
    ------
    ValueError
        If scores are of neither form, not finite, or hold fewer than ``k`` examples.
    """
    if "influence" not in scores or "query" not in scores.dims:
        raise ValueError(
            f"{name}: scores must hold influence(query, train), or (query, side, rank) of a method "
            f"with top_k=; got {dict(scores.sizes)} with {[str(v) for v in scores.data_vars]}."
        )
    if "rank" in scores.dims:
        top = scores.sel(side="helpful")
        kept, ids = top.sizes["rank"], top["train"].transpose("query", "rank").values
    else:
        influence = scores["influence"].transpose("query", "train").values
        kept = influence.shape[1]
        if not np.isfinite(influence).all():
            raise ValueError(f"{name}: influence is not finite for some pairs.")
    if not 1 <= k <= kept:
        raise ValueError(
            f"{name} holds {kept} training examples for each query, and the {k} most helpful are "
            f"wanted. Take fewer, or score with a larger top_k."
        )
    if "rank" not in scores.dims:
        order = np.argsort(influence, axis=1, kind="stable")[:, :k]
        ids = scores["train"].values[order]
    return ids[:, :k], scores["query"].values
