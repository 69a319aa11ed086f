"""Influence along a training run: curves of groups, their signs and peaks, and contrasts."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr
from scipy.stats import t as student

from bayesinf._chains import FailedChainsWarning
from bayesinf._covariance import batches_of_a_chain, cross_covariance
from bayesinf._diagnostics import ConvergenceWarning
from bayesinf._scores import text_labels, versions
from bayesinf._streaming import StreamingCovariance
from bayesinf._traces import TraceStore
from bayesinf.attribution._group_influence import group_influence
from bayesinf.attribution._susceptibility import differing

__all__ = ["influence_over_checkpoints", "peaks", "signs"]

Pairs = Mapping[str, tuple[Any, Any]]


def influence_over_checkpoints(
    traces: Mapping[Hashable, TraceStore | StreamingCovariance],
    groups: Mapping[str, Sequence[Any] | np.ndarray],
    *,
    contrasts: Pairs | None = None,
    query_contrasts: Pairs | None = None,
    measurement: str = "loss",
    center: Literal["auto", "grand", "chain"] = "auto",
    confidence: float = 0.95,
) -> xr.Dataset:
    r"""Influence of groups of train examples at every checkpoint of a training run.

    At each step the number of :func:`bayesinf.group_influence`, from chains of one setting at all
    of them. The curvature changes along a run, and the size of influence with it: **values at
    different checkpoints are not comparable in absolute terms**. What compares are signs; the place
    of a peak, which says where a posterior of this width and temperature reacts most; and contrasts
    within a checkpoint, of two groups or two queries on the same draws.

    Parameters
    ----------
    traces
        By step, in the order of training: what :func:`bayesinf.sample` returned for
        ``task.at(checkpoint)``; :func:`bayesinf.sample_each` makes them at one setting and with
        common random numbers.
    groups
        ``{name: ids of train examples}``.
    contrasts
        ``{name: (group, group)}``: the first group's influence less the second's.
    query_contrasts
        ``{name: (query id, query id)}``: influence on the difference of two queries' measurements;
        needs traces, not sums.
    measurement, center
        As of :func:`bayesinf.group_influence`.
    confidence
        Of signs and peaks: the probability, at least, that all that is said of one curve is true.

    Returns
    -------
    xr.Dataset
        Dims ``step``, ``query``, ``group``:

        * ``influence``, ``mcse`` and ``mcse_df (step)``;
        * ``sign``: −1 or 1 where it is certain, else 0; ``flips (query, group)``: how often the
          certain sign changes from one step to a later one, so that there are at least as many;
        * ``peak (query, group)``: the step of the largest ``|influence|``; ``peak_set``: True at
          the steps where it may really be;
        * ``contrast_influence (step, query, contrast)`` and ``query_contrast_influence (step,
          query_contrast, group)``, where asked for, each with an ``…_mcse`` of the difference
          itself, not from two errors.

    Raises
    ------
    ValueError
        If there is no checkpoint, settings or examples differ, a group, a contrast or the
        confidence is out of range, or there are too few draws.
    KeyError
        If the measurement was not recorded, or a query contrast names no observed query.
    TypeError
        If query contrasts are wanted of sums.
    StoreError
        If there is no draw or no healthy chain.

    Warns
    -----
    ConvergenceWarning
        By step, if :func:`bayesinf.diagnose` finds fault with the chains.
    FailedChainsWarning
        By step, if chains diverged; they are left out.

    Notes
    -----
    Lee et al. 2025 (arXiv 2510.12071). Signs and peaks are from intervals that hold at all ``K``
    steps of a curve together (t quantiles at ``(1 − confidence)/K``), whatever the dependence
    between steps, which common random numbers cause; they say nothing of several curves together.
    """
    _check(traces, groups, contrasts or {}, confidence)
    rows = [
        _at_step(step, store, groups, contrasts or {}, query_contrasts or {}, measurement, center)
        for step, store in traces.items()
    ]
    out = xr.concat(rows, dim="step", data_vars="all", combine_attrs="drop")
    steps = np.array(list(traces))
    out = out.assign_coords(step=text_labels(steps))
    value, error = out["influence"].values, out["mcse"].values
    quantile = student.ppf(1 - (1 - confidence) / (2 * len(rows)), out["mcse_df"].values)
    half = quantile[:, None, None] * error
    sign, peak_set = signs(value, half), peaks(value, half)
    dims = ("step", "query", "group")
    out = out.assign(
        sign=(dims, sign),
        flips=(dims[1:], flips(sign)),
        peak=(dims[1:], text_labels(steps)[np.abs(value).argmax(axis=0)]),
        peak_set=(dims, peak_set),
    )
    first = next(iter(traces.values()))
    meta = {"measurement": measurement, "confidence": confidence, "n": first.config["task"]["n"]}
    out.attrs = {
        "method": "bif", "estimand": "influence", "checkpoints": len(rows),
        **versions(), **first.config["posterior"], **meta,
    }  # fmt: skip
    return out


# ---------------------------------------------------------------- signs and peaks: arrays (K, …)


def signs(value: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Sign where the interval ``value ± half`` leaves out zero, else 0."""
    certain: np.ndarray = np.where(np.abs(value) > half, np.sign(value), 0).astype(np.int8)
    return certain


def flips(sign: np.ndarray) -> np.ndarray:
    """Changes of sign along the first dimension, over zeros."""
    last, count = np.zeros_like(sign[0]), np.zeros(sign.shape[1:], dtype=np.int64)
    for now in sign:
        count += (now * last) < 0
        last = np.where(now == 0, last, now)
    return count


def peaks(value: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Where ``|value|`` may be largest: its upper bound reaches the largest lower bound."""
    size = np.abs(value)
    lower, upper = np.maximum(size - half, 0), size + half
    reaches: np.ndarray = upper >= lower.max(axis=0)
    return reaches


# ---------------------------------------------------------------- one checkpoint


def _at_step(
    step: Hashable,
    store: TraceStore | StreamingCovariance,
    groups: Mapping[str, Sequence[Any] | np.ndarray],
    contrasts: Pairs,
    query_contrasts: Pairs,
    measurement: str,
    center: Literal["auto", "grand", "chain"],
) -> xr.Dataset:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = group_influence(store, groups, measurement=measurement, center=center)
    _say_again(caught, step)
    how = scores.attrs["center"]
    out = scores[["influence", "mcse"]].assign(mcse_df=((), scores.attrs["mcse_df"]))
    weights = _weights(groups, store.ids("train"))
    with warnings.catch_warnings():  # said just now
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", FailedChainsWarning)
        if contrasts:
            mix = xr.concat(
                [weights.sel(group=a) - weights.sel(group=b) for a, b in contrasts.values()],
                dim="contrast",
                coords="minimal",
                compat="override",
            ).assign_coords(contrast=text_labels(np.array(list(contrasts))))
            found = group_influence(store, mix, measurement=measurement, center=how)
            out = out.assign(contrast_influence=found["influence"], contrast_mcse=found["mcse"])
        if query_contrasts:
            out = _query_contrasts(out, store, query_contrasts, weights.values, measurement, how)
    return out


def _query_contrasts(
    out: xr.Dataset,
    store: TraceStore | StreamingCovariance,
    pairs: Pairs,
    weights: np.ndarray,
    measurement: str,
    how: str,
) -> xr.Dataset:
    if not isinstance(store, TraceStore):
        raise TypeError(
            "query_contrasts need traces: sums over draws do not hold the difference of two "
            "queries. Sample with store=None or a path, or leave query_contrasts out."
        )
    place = {key: i for i, key in enumerate(store.ids("query").tolist())}
    for name, pair in pairs.items():
        for key in pair:
            if key not in place:
                raise KeyError(f"query contrast {name!r} names {key!r}, which was not observed.")
    x = store.values("query", measurement).values.astype(np.float64)
    a, b = (np.array([place[pair[k]] for pair in pairs.values()]) for k in (0, 1))
    y = np.stack([chain.astype(np.float64) @ weights for chain in store.values("train").values])
    least = batches_of_a_chain(store.chains) if len(store.healthy) > 1 else None
    result = cross_covariance(x[:, :, a] - x[:, :, b], y, center=how, batches_per_chain=least)
    scale = store.config["posterior"]["n_beta"] / store.config["task"]["n"]
    dims = ("query_contrast", "group")
    return out.assign(
        query_contrast_influence=(dims, -scale * result.value),
        query_contrast_mcse=(dims, scale * result.mcse),
    ).assign_coords(query_contrast=text_labels(np.array(list(pairs))))


def _weights(groups: Mapping[str, Sequence[Any] | np.ndarray], ids: np.ndarray) -> xr.DataArray:
    """Membership ``(train, group)`` of groups that were checked."""
    members = [np.isin(ids, np.asarray(group)) for group in groups.values()]
    return xr.DataArray(
        np.stack(members, axis=1).astype(np.float64),
        dims=("train", "group"),
        coords={"train": ids, "group": list(groups)},
    )


def _say_again(caught: list[warnings.WarningMessage], step: Hashable) -> None:
    for one in caught:
        warnings.warn(f"step {step!r}: {one.message}", one.category, stacklevel=4)


def _check(
    traces: Mapping[Hashable, Any],
    groups: Mapping[str, Sequence[Any] | np.ndarray],
    contrasts: Pairs,
    confidence: float,
) -> None:
    if not traces:
        raise ValueError("there is no checkpoint; give {step: traces}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1; got {confidence}.")
    for name, pair in contrasts.items():
        if len(set(pair)) < 2 or not set(pair) <= set(groups):
            raise ValueError(
                f"contrast {name!r} must be of two groups among {list(groups)}; got {pair!r}."
            )
    steps = list(traces)
    for step, store in traces.items():
        odd = differing(traces[steps[0]].config, store.config, {"task.checkpoint"})
        if odd:
            raise ValueError(
                f"step {step!r} was sampled at another setting than {steps[0]!r}: {odd[0]}. Curves "
                f"need one setting at all checkpoints: sample_each(…) keeps it."
            )
