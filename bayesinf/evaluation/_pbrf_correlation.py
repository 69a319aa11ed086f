"""How close scores come to measured responses, such as those of the proximal Bregman function."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr

from bayesinf.evaluation._alignment import influence_of
from bayesinf.evaluation._statistics import (
    Correlation,
    Queries,
    correlations,
    delete_one,
    error_and_margin,
    mean_estimate,
    random_parts,
    require_options,
)
from bayesinf.evaluation._tables import Named, named, with_costs

__all__ = ["pbrf_correlation"]

_FEWEST = 4

Statistic = Callable[[np.ndarray, np.ndarray], float]


def pbrf_correlation(
    scores: Named,
    truth: xr.Dataset,
    *,
    correlation: Correlation = "pearson",
    queries: Queries = "random",
    confidence: float = 0.95,
) -> xr.Dataset:
    """Correlate scores with measured responses to single training examples.

    With :func:`pbrf` as the truth this judges *solvers*: what is left is the error of the
    approximation, the question of retraining being the same. Both should be of one damping.

    Parameters
    ----------
    scores
        Scores by name, a list of them, or those of one method, of all examples and queries of
        the truth and maybe more.
    truth
        ``influence (query, train)`` of some training examples, best chosen at random: the most
        influential ones inflate every correlation.
    correlation
        ``"pearson"``, since a solver should have the values right, or ``"spearman"``.
    queries, confidence
        As in :func:`lds`. Random in the intervals are the training examples of the truth and, as
        ``queries`` says, the queries.

    Returns
    -------
    xr.Dataset
        By ``scorer``: ``correlation``, over training examples, the mean over queries of
        ``correlation_query (scorer, query)``, with ``standard_error``, ``lower``, ``upper``;
        ``pooled``, the correlation over all pairs, with ``pooled_lower``, ``pooled_upper``;
        ``slope`` of the truth on the scores through the origin, NaN for similarities, with
        ``slope_lower``, ``slope_upper``; what the scores cost. The last two intervals add the
        jackknife variances over examples and over queries, which is a little wide.

    Raises
    ------
    ValueError
        If the truth has fewer than 4 training examples, scores lack ids of the truth or are of
        another measurement, or an argument is out of range.
    """
    require_options(correlation, queries, confidence)
    if truth.sizes.get("train", 0) < _FEWEST:
        raise ValueError(
            f"a correlation over training examples needs at least {_FEWEST} of them, and 100 to be "
            f"of use; the truth has {truth.sizes.get('train', 0)}: pbrf(task, train_ids=[...])."
        )
    methods, random = named(scores), queries == "random"
    y = influence_of(truth, "the truth", like=truth, owner="the truth", exact=True)
    rows = []
    for name, own in methods.items():
        x = influence_of(own, name, like=truth, owner="the truth", exact=False)
        values = correlations(x, y, correlation)
        mean = mean_estimate(
            values, delete_one(x, y, correlation), random_queries=random, confidence=confidence
        )
        row = {
            "correlation": mean.mean,
            "standard_error": mean.standard_error,
            "lower": mean.lower,
            "upper": mean.upper,
            "correlation_query": ("query", values),
            **_whole("pooled", _pooled(correlation), x, y, random, confidence),
            **_whole("slope", _slope, x, y, random, confidence),
        }
        if own.attrs.get("estimand") == "similarity":
            row |= dict.fromkeys(("slope", "slope_lower", "slope_upper"), np.nan)
        rows.append(xr.Dataset(row, coords={"query": truth["query"].values}))
    table = xr.concat(rows, dim="scorer").assign_coords(scorer=list(methods))
    table.attrs = {
        "measurement": str(truth.attrs.get("measurement", "loss")),
        "truth": str(truth.attrs.get("method", "truth")),
        "correlation": correlation,
        "confidence": confidence,
        **random_parts(queries, "training examples"),
        "examples": truth.sizes["train"],
        **{key: truth.attrs[key] for key in ("damping", "epsilon") if key in truth.attrs},
    }
    return with_costs(table, methods)


# ---------------------------------------------------------------------------- helpers


def _pooled(kind: Correlation) -> Statistic:
    def pooled(x: np.ndarray, y: np.ndarray) -> float:
        return float(correlations(x.reshape(-1, 1), y.reshape(-1, 1), kind)[0])

    return pooled


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    square = float((x * x).sum())
    return float((x * y).sum()) / square if square > 0 else np.nan


def _whole(
    name: str,
    statistic: Statistic,
    x: np.ndarray,
    y: np.ndarray,
    random_queries: bool,
    confidence: float,
) -> dict[str, float]:
    """Statistic of all pairs ``(n, Q)`` with its interval, by leaving out rows, and columns."""
    value, parts = statistic(x, y), []
    for axis in (0, 1) if random_queries and x.shape[1] > 1 else (0,):
        size = x.shape[axis]
        deleted = [
            statistic(np.delete(x, k, axis=axis), np.delete(y, k, axis=axis)) for k in range(size)
        ]
        parts.append(((size - 1) * float(np.var(deleted)), size - 1))
    _, margin = error_and_margin(parts, confidence)
    return {name: value, f"{name}_lower": value - margin, f"{name}_upper": value + margin}
