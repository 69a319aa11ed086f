r"""Array mathematics of rank correlations that share their subsets.

Shapes, used throughout: predictions and truths ``(M, Q)``, one row a subset and one column a query;
outcomes of single retrainings ``(M, R, Q)``. All queries are judged on the same ``M`` subsets, so
their correlations are not independent: errors over subsets are found by leaving out one
subset for all queries at once (the jackknife), errors over queries from the spread that is left.

With ``θ_q`` the correlation of query q, ``θ̄`` their mean, ``θ̄₍ⱼ₎`` the mean without subset j:

* subset variance ``V = (M−1)/M Σ_j (θ̄₍ⱼ₎ − mean_j θ̄₍ⱼ₎)²``, and ``V_q`` the same of each query;
* query variance ``σ² = max(0, s² − (mean_q V_q − V) Q/(Q−1))``, ``s²`` the sample variance of the
  ``θ_q``: their spread less the part that is subset noise not shared between queries;
* the mean over new subsets **and** new queries has variance ``V + σ²/Q``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from scipy.stats import rankdata
from scipy.stats import t as student_t

__all__ = [
    "MeanEstimate",
    "delete_one_spearman",
    "mean_estimate",
    "pearson_to_spearman",
    "spearman",
    "spearman_brown",
    "spearman_to_pearson",
    "split_half_ceiling",
]


def correlate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson correlation of matching columns ``(Q,)``; 0 where a column is constant."""
    a = a - a.mean(axis=0)
    b = b - b.mean(axis=0)
    scale = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return np.where(scale > 0, (a * b).sum(axis=0) / np.where(scale > 0, scale, 1.0), 0.0)


def spearman(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Spearman correlation over subsets of each query ``(Q,)``; 0 where a column is constant."""
    return correlate(rankdata(prediction, axis=0), rankdata(truth, axis=0))


def delete_one_spearman(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Spearman correlations without subset ``j``, in row ``j`` of the result ``(M, Q)``.

    Leaving out ``x_j`` lowers the rank of every larger value by 1 and of a tied one by ½.
    """
    ranks = rankdata(prediction, axis=0), rankdata(truth, axis=0)
    result = np.empty(prediction.shape)
    for j in range(len(prediction)):
        keep = np.arange(len(prediction)) != j
        pair = [
            (r - (x > x[j]) - 0.5 * (x == x[j]))[keep]
            for x, r in zip((prediction, truth), ranks, strict=True)
        ]
        result[j] = correlate(*pair)
    return result


@dataclass(frozen=True)
class MeanEstimate:
    """A mean over queries with its error and interval."""

    mean: float
    standard_error: float
    subset_error: float
    query_error: float
    lower: float
    upper: float


def mean_estimate(
    values: np.ndarray, deleted: np.ndarray, *, random_queries: bool, confidence: float
) -> MeanEstimate:
    """Mean over queries, with the error that the module describes and a t interval.

    Parameters
    ----------
    values
        ``(Q,)`` estimates, one a query.
    deleted
        ``(M, Q)`` the same without subset ``j``.
    random_queries
        True: the interval is for the mean over the population that the queries were drawn from.
        False: for the mean over these queries.
    confidence
        Such as 0.95.

    Returns
    -------
    MeanEstimate
        The degrees of freedom are Satterthwaite's, of ``M−1`` for subsets and ``Q−1`` for queries.
    """
    m, q = deleted.shape
    subset_variance = (m - 1) * deleted.mean(axis=1).var()
    own = (m - 1) * deleted.var(axis=0).mean()
    query_variance = 0.0
    if random_queries and q > 1:
        unshared = (own - subset_variance) * q / (q - 1)
        query_variance = max(0.0, float(values.var(ddof=1) - unshared)) / q
    total = subset_variance + query_variance
    error = float(np.sqrt(total))
    mean = float(values.mean())
    margin = 0.0
    if total > 0:
        query_part = query_variance**2 / (q - 1) if q > 1 else 0.0
        freedom = total**2 / (subset_variance**2 / (m - 1) + query_part)
        margin = float(student_t.ppf(0.5 + confidence / 2, freedom)) * error
    return MeanEstimate(
        mean=mean,
        standard_error=error,
        subset_error=float(np.sqrt(subset_variance)),
        query_error=float(np.sqrt(query_variance)),
        lower=mean - margin,
        upper=mean + margin,
    )


def spearman_to_pearson(rho: np.ndarray) -> np.ndarray:
    """Pearson correlation of a Gaussian pair with Spearman correlation ``ρ``: ``2 sin(πρ/6)``."""
    return 2 * np.sin(np.pi * np.asarray(rho) / 6)


def pearson_to_spearman(rho: np.ndarray) -> np.ndarray:
    """Spearman correlation of a Gaussian pair with Pearson correlation ``ρ``: ``6/π asin(ρ/2)``."""
    return 6 / np.pi * np.arcsin(np.asarray(rho) / 2)


def spearman_brown(reliability: np.ndarray, factor: float) -> np.ndarray:
    """Reliability of a mean of ``factor`` times as many runs, ``kρ / (1 + (k−1)ρ)``."""
    return factor * reliability / (1 + (factor - 1) * reliability)


def split_half_ceiling(outcomes: np.ndarray, *, splits: int = 200, seed: int = 0) -> np.ndarray:
    r"""Spearman correlation that the true effect of a subset reaches with the mean of ``R`` runs.

    Seeds are split into two halves of ``h = ⌊R/2⌋`` runs, the halves' means rank-correlated over
    subsets, and the correlation averaged over splits: ``ρ_h`` on the Pearson scale. The mean of all
    runs then has reliability ``ρ_R = kρ_h/(1 + (k−1)ρ_h)``, ``k = R/h``, a perfect prediction
    reaches Pearson ``√ρ_R`` and Spearman ``(6/π) asin(√ρ_R/2)``.

    Parameters
    ----------
    outcomes
        ``(M, R, Q)`` with ``R ≥ 2``.
    splits
        All splits are used where there are no more than these, else so many random ones.
    seed
        Of the random splits.

    Returns
    -------
    np.ndarray
        ``(Q,)``; a negative ``ρ_h`` counts as 0.
    """
    runs = outcomes.shape[1]
    half = runs // 2
    rank_correlations = [
        spearman(outcomes[:, list(a)].mean(axis=1), outcomes[:, list(b)].mean(axis=1))
        for a, b in _halves(runs, half, splits, seed)
    ]
    pearson = spearman_to_pearson(np.mean(rank_correlations, axis=0))
    reliability = spearman_brown(np.clip(pearson, 0.0, 1.0), runs / half)
    return pearson_to_spearman(np.sqrt(reliability))


def _halves(
    runs: int, half: int, limit: int, seed: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Pairs of disjoint sets of ``half`` runs: all of them, or ``limit`` at random."""
    total = comb(runs, half) * comb(runs - half, half) // 2
    if total <= limit:
        return [
            (a, b)
            for a in combinations(range(runs), half)
            for b in combinations(sorted(set(range(runs)) - set(a)), half)
            if a < b
        ]
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(runs).tolist() for _ in range(limit)]
    return [(tuple(order[:half]), tuple(order[half : 2 * half])) for order in orders]
