"""What a bank can tell at best: its noise ceiling, and how many queries it counts for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from bayesinf.evaluation._alignment import outcomes
from bayesinf.evaluation._reliability import split_half
from bayesinf.evaluation._statistics import (
    Correlation,
    Queries,
    mean_estimate,
    random_parts,
    require_options,
    standardised,
)

__all__ = ["effective_queries", "noise_ceiling"]


def noise_ceiling(
    bank: xr.Dataset,
    measurement: str = "loss",
    *,
    query: Sequence[Any] | np.ndarray | None = None,
    seeds: int | None = None,
    correlation: Correlation = "spearman",
    queries: Queries = "random",
    confidence: float = 0.95,
) -> xr.Dataset:
    """LDS that the true effect of every subset would reach, given the noise of the seeds.

    From split seeds: see :mod:`bayesinf.evaluation._reliability`. It is the ceiling of *any*
    prediction; an additive one may not reach it, as effects need not add up. Ranks take the noise
    of the seeds to be Gaussian: of losses, whose noise has a long tail, an LDS over its ceiling
    falls a little with the number of seeds, of margins it stays.

    Parameters
    ----------
    bank
        Ground truth with at least two seeds.
    measurement
        ``"loss"``, ``"margin"``, ….
    query
        Ids to restrict it to; all by default.
    seeds
        The ceiling of means of so many retrainings, ``seeds=1`` that of a single one; by default
        of as many as the bank has.
    correlation, queries, confidence
        As in :func:`lds`.

    Returns
    -------
    xr.Dataset
        Scalars ``ceiling``, the mean over queries, ``standard_error``, ``lower``, ``upper``;
        ``ceiling_query (query)``, each from its own halves alone, so that those of weak signals
        are low on average and their mean is below ``ceiling``.

    Raises
    ------
    ValueError
        If the bank has a single seed or lacks the measurement, or an argument is out of range.
    """
    require_options(correlation, queries, confidence)
    ids = bank["query"].values if query is None else np.asarray(query)
    values = outcomes(bank, measurement, ids)
    if values.shape[1] < 2:
        raise ValueError(
            "the noise ceiling compares seeds, and the bank has one. Retrain with two seeds or "
            "more: retrain(..., seeds=range(6))."
        )
    runs = values.shape[1] if seeds is None else seeds
    if runs < 1:
        raise ValueError(f"seeds must be at least 1, the retrainings in a mean; got {seeds}.")
    half = split_half(values, correlation)
    mean, error, lower, upper = half.ceiling_estimate(
        runs, random_queries=queries == "random", confidence=confidence
    )
    return xr.Dataset(
        {
            "ceiling": mean,
            "standard_error": error,
            "lower": lower,
            "upper": upper,
            "ceiling_query": ("query", half.ceilings(runs)),
        },
        coords={"query": ids},
        attrs={
            "measurement": measurement,
            "correlation": correlation,
            "confidence": confidence,
            **random_parts(queries, "subsets", "seeds"),
            "seeds": runs,
            "seeds_of_bank": values.shape[1],
            "subsets": len(values),
        },
    )


def effective_queries(
    bank: xr.Dataset,
    measurement: str = "loss",
    *,
    query: Sequence[Any] | np.ndarray | None = None,
    correlation: Correlation = "spearman",
    confidence: float = 0.95,
) -> xr.Dataset:
    r"""How many queries with effects of their own the queries of a bank are worth.

    With ``c`` the mean of ``ρ²`` over pairs of queries, ``ρ`` the correlation of their outcomes
    over subsets,

    .. math:: Q_\mathrm{eff} = \frac{Q}{1 + (Q-1) c}.

    A mean over queries of correlations that are zero in truth has the variance
    ``1/((M−1) Q_eff)`` if the predictions of two queries are related as their outcomes are; were
    they independent it would be ``1/((M−1) Q)``. From ``r²`` of a sample of ``M`` subsets, ``ρ²``
    is estimated by ``r² − (1 − r²)/(M − 2)``, which is 0 on average for independent queries.

    Parameters
    ----------
    bank, measurement, query, correlation, confidence
        As in :func:`noise_ceiling`.

    Returns
    -------
    xr.Dataset
        Scalars ``effective_queries``, ``lower``, ``upper`` (a jackknife over subsets of ``c``; the
        queries are taken as they are), at most ``Q``; ``correlation``, the mean ``|r|``, and
        ``independent``, what it would be about if the queries were independent.

    Raises
    ------
    ValueError
        If there are fewer than two queries, the bank lacks the measurement, or an argument is out
        of range.
    """
    require_options(correlation, "fixed", confidence)
    ids = bank["query"].values if query is None else np.asarray(query)
    if len(ids) < 2:
        raise ValueError(f"queries are compared with one another, which needs two; got {len(ids)}.")
    truth = outcomes(bank, measurement, ids).mean(axis=1)
    subsets = len(truth)
    shared = _shared(truth, correlation)
    kept = (np.delete(truth, j, axis=0) for j in range(subsets))
    deleted = np.array([_shared(rest, correlation) for rest in kept])
    found = mean_estimate(
        np.array([shared]), deleted[:, None], random_queries=False, confidence=confidence
    )

    def number(c: float) -> float:
        return len(ids) / (1 + (len(ids) - 1) * min(max(c, 0.0), 1.0))

    r = _between(truth, correlation)[np.triu_indices(len(ids), 1)]
    return xr.Dataset(
        {
            "effective_queries": number(found.mean),
            "lower": number(found.upper),
            "upper": number(found.lower),
            "correlation": np.abs(r).mean(),
            "independent": np.sqrt(2 / np.pi / (subsets - 1)),
        },
        attrs={
            "measurement": measurement,
            "correlation": correlation,
            "confidence": confidence,
            **random_parts("fixed", "subsets", "seeds"),
            "of_queries": len(ids),
            "subsets": subsets,
        },
    )


# ---------------------------------------------------------------------------- helpers


def _between(values: np.ndarray, kind: Correlation) -> np.ndarray:
    """Correlations between queries ``(Q, Q)``; 0 with one that is constant."""
    z = standardised(values, kind)
    return z.T @ z


def _shared(values: np.ndarray, kind: Correlation) -> float:
    """Mean of ``ρ²`` over pairs of queries, less what chance makes of it."""
    subsets, queries = values.shape
    square = _between(values, kind) ** 2
    mean = (square.sum() - np.trace(square)) / (queries * (queries - 1))
    return float(mean - (1 - mean) / (subsets - 2))
