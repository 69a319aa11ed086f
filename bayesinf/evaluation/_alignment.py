"""Bringing scores and a bank together by ids, and refusing what does not belong together.

Shapes: ``M`` subsets, ``R`` seeds, ``Q`` queries, ``n`` training examples. The prediction of a
query for a subset is ``+Σ_{i kept} influence[q, i]``; the truth is the measurement of the
retrained models, averaged over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

__all__ = ["Aligned", "align", "check_same_kind", "influence_of", "outcomes"]

CONSTANT = ("raise", "zero")
FEWEST_SUBSETS = 4


@dataclass(frozen=True)
class Aligned:
    """Predictions and truths ``(M, Q)`` of the queries with these ids."""

    prediction: np.ndarray
    truth: np.ndarray
    query: np.ndarray


def outcomes(bank: xr.Dataset, measurement: str, query: np.ndarray | None = None) -> np.ndarray:
    """Return the outcomes ``(M, R, Q)`` of a bank in float64, all queries or those with these ids.

    Raises
    ------
    ValueError
        If the bank lacks the measurement or a query, has too few subsets, or holds NaN.
    """
    if measurement not in bank or "subset_mask" not in bank:
        known = [str(k) for k in bank.data_vars if k != "subset_mask"]
        raise ValueError(
            f"the bank holds no measurement {measurement!r}; it has {known}. A Gaussian task has "
            f"no margin: use measurement='loss'."
        )
    values = bank[measurement].transpose("subset", "seed", "query").values.astype(np.float64)
    if query is not None:
        values = values[:, :, _positions(query, bank["query"].values, "query")]
    if len(values) < FEWEST_SUBSETS:
        raise ValueError(
            f"a rank correlation over subsets needs at least {FEWEST_SUBSETS} of them, and 100 to "
            f"be of use; the bank has {len(values)}."
        )
    bad = ~np.isfinite(values)
    if bad.any():
        raise ValueError(
            f"{measurement} of the bank is not finite for {int(bad.sum())} of {bad.size} outcomes. "
            f"A finished bank has none: run retrain(...) again on its store to complete it."
        )
    return values


def align(
    scores: xr.Dataset, bank: xr.Dataset, measurement: str, constant: str = "raise"
) -> Aligned:
    """Predict and look up the outcome of every subset for the queries of ``scores``.

    Parameters
    ----------
    scores
        Variable ``influence (query, train)``; every training id of the bank, in any order, and
        queries that the bank has.
    bank
        Ground truth.
    measurement
        Must be what the scores were made for, ``scores.attrs["measurement"]`` (``"loss"`` where
        that is not set).
    constant
        What to do with a query whose prediction is the same for all subsets: ``"raise"``, or
        ``"zero"`` to count its correlation as 0.

    Returns
    -------
    Aligned
        Queries in the order of ``scores``.

    Raises
    ------
    ValueError
        For scores of another measurement, ids that do not match, scores that are not finite, and
        predictions or truths that do not vary.
    """
    if constant not in CONSTANT:
        raise ValueError(f"constant must be one of {CONSTANT}; got {constant!r}.")
    name = method_name(scores)
    _check_scores(scores, name, measurement)
    influence = scores["influence"].transpose("query", "train").values.astype(np.float64)
    query = scores["query"].values
    truth = outcomes(bank, measurement, query).mean(axis=1)
    order = _positions(bank["train"].values, scores["train"].values, "train", exact=True)
    influence = influence[:, order]
    mask = bank["subset_mask"].transpose("subset", "train").values.astype(np.float64)
    prediction = mask @ influence.T
    flat = np.ptp(prediction, axis=0) <= 1e-12 * np.abs(influence).sum(axis=1)
    if flat.any() and constant == "raise":
        raise ValueError(
            f"{name}: the prediction of {int(flat.sum())} of {len(query)} queries is the same for "
            f"every subset, first query {query[flat][0]!r}, so it has no rank correlation. Usual "
            f"cause: scores that are all zero or all equal. constant='zero' counts them as 0."
        )
    prediction[:, flat] = 0.0
    still = np.ptp(truth, axis=0) == 0
    if still.any():
        raise ValueError(
            f"the {measurement} of {int(still.sum())} queries is the same after every retraining, "
            f"first query {query[still][0]!r}: it cannot rank anything. Drop these queries: "
            f"scores.sel(query=[...])."
        )
    return Aligned(prediction, truth, query)


def influence_of(
    scores: xr.Dataset, name: str, *, like: xr.Dataset, owner: str, exact: bool
) -> np.ndarray:
    """Influence ``(n, Q)`` in float64 for the training examples and queries of other scores.

    Parameters
    ----------
    scores, name
        Scores, and what to call them.
    like, owner
        The others, with coordinates ``query`` and ``train``, and what to call them.
    exact
        Whether ``scores`` may be of no further training examples.

    Raises
    ------
    ValueError
        If ids are missing or repeat, measurements differ, or a score is not finite.
    """
    _check_scores(scores, name, str(like.attrs.get("measurement", "loss")))
    owners = (owner, name)
    rows = _positions(like["train"].values, scores["train"].values, "train", exact, owners)
    columns = _positions(like["query"].values, scores["query"].values, "query", False, owners)
    influence = scores["influence"].transpose("train", "query").values[np.ix_(rows, columns)]
    return np.asarray(influence, dtype=np.float64)


def method_name(scores: xr.Dataset) -> str:
    """Return the method that made the scores, for messages and tables."""
    return str(scores.attrs.get("method", "scores"))


def checkpoints(scores: xr.Dataset) -> int:
    """How many networks' checkpoints the scores were averaged over; those of one run are one."""
    return int(scores.attrs.get("checkpoints", 1))


def check_same_kind(all_scores: Sequence[xr.Dataset], names: Sequence[str]) -> None:
    """Refuse to compare scores of one checkpoint with those of an ensemble, or other queries.

    Raises
    ------
    ValueError
        If the numbers of checkpoints or the sets of queries differ.
    """
    counts = {name: checkpoints(s) for name, s in zip(names, all_scores, strict=True)}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"scores of different numbers of checkpoints are never compared: {counts}. Averaging "
            f"over networks raises any method's LDS; make one comparison for each number."
        )
    first = set(all_scores[0]["query"].values.tolist())
    for name, scores in zip(names, all_scores, strict=True):
        own = set(scores["query"].values.tolist())
        if own != first:
            raise ValueError(
                f"{names[0]} and {name} score different queries ({len(first)} and {len(own)}, "
                f"{len(first & own)} in common). Compare on the common ones: scores.sel(query=...)."
            )


def _check_scores(scores: xr.Dataset, name: str, measurement: str) -> None:
    if "influence" not in scores or set(scores["influence"].dims) != {"query", "train"}:
        raise ValueError(
            f"scores must hold a variable influence(query, train); got {dict(scores.sizes)} with "
            f"variables {[str(k) for k in scores.data_vars]}. make_scores(...) builds it."
        )
    made_for = scores.attrs.get("measurement", "loss")
    if made_for != measurement:
        raise ValueError(
            f"{name} scores the measurement {made_for!r} and was to be judged on {measurement!r}. "
            f"Use measurement={made_for!r} or make scores for {measurement!r}."
        )
    bad = ~np.isfinite(scores["influence"].values)
    if bad.any():
        raise ValueError(f"{name}: influence is not finite for {int(bad.sum())} pairs.")


def _positions(
    wanted: np.ndarray,
    there: np.ndarray,
    kind: str,
    exact: bool = False,
    owners: tuple[str, str] | None = None,
) -> np.ndarray:
    """Positions of the ids ``wanted`` among ``there``; with ``exact`` the sets must be equal."""
    first, second = owners or (("the bank", "the scores") if exact else ("the scores", "the bank"))
    for owner, ids in zip((first, second), (wanted, there), strict=True):
        if len(set(ids.tolist())) < len(ids):
            raise ValueError(f"the {kind} ids of {owner} repeat; they must be unique.")
    place: dict[Any, int] = {key: i for i, key in enumerate(there.tolist())}
    missing = [key for key in wanted.tolist() if key not in place]
    surplus = sorted(set(place) - set(wanted.tolist()), key=str) if exact else []
    if missing or surplus:
        parts = [f"{second} lack {len(missing)} ({missing[:5]})"] if missing else []
        parts += [f"{second} have {len(surplus)} that {first} lacks ({surplus[:5]})"] * bool(
            surplus
        )
        raise ValueError(
            f"{kind} ids of {first} and {second} do not match: {' and '.join(parts)}. Usual cause: "
            f"another split, or {kind}_ids= given on one side only."
        )
    return np.array([place[key] for key in wanted.tolist()], dtype=np.int64)
