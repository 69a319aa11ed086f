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
from typing import Any, Literal, get_args

import numpy as np
from scipy.stats import rankdata
from scipy.stats import t as student_t

__all__ = [
    "Correlation",
    "MeanEstimate",
    "Queries",
    "correlate",
    "correlations",
    "delete_one",
    "error_and_margin",
    "mean_estimate",
    "random_parts",
    "ranked",
    "require_options",
    "standardised",
]

Correlation = Literal["spearman", "pearson"]
"""Of ranks, or of the values themselves."""

Queries = Literal["random", "fixed"]
"""Whether an interval is for the population of the queries, or for these."""


def require_options(correlation: str, queries: str, confidence: float) -> None:
    """Check what all judges of correlations share.

    Raises
    ------
    ValueError
        If one of them is out of range.
    """
    if correlation not in get_args(Correlation):
        raise ValueError(f"correlation must be 'spearman' or 'pearson'; got {correlation!r}.")
    if queries not in get_args(Queries):
        raise ValueError(f"queries must be 'random' or 'fixed'; got {queries!r}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, such as 0.95; got {confidence}.")


def random_parts(queries: str, *others: str) -> dict[str, Any]:
    """Attributes that say which queries an interval is for, and what is random in it."""
    parts = [*others, "queries"] if queries == "random" else list(others)
    return {"queries": queries, "random": ", ".join(parts) or "nothing"}


def correlate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson correlation of matching columns ``(Q,)``; 0 where a column is constant."""
    a = a - a.mean(axis=0)
    b = b - b.mean(axis=0)
    scale = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return np.where(scale > 0, (a * b).sum(axis=0) / np.where(scale > 0, scale, 1.0), 0.0)


def ranked(values: np.ndarray, kind: Correlation) -> np.ndarray:
    """Values whose plain correlation is of the wanted kind: ranks over axis 0, or as they are."""
    return rankdata(values, axis=0) if kind == "spearman" else values


def standardised(values: np.ndarray, kind: Correlation) -> np.ndarray:
    """Columns of mean 0 and norm 1, whose products are correlations; 0 where one is constant."""
    x = ranked(values, kind)
    x = x - x.mean(axis=0)
    norm = np.sqrt((x**2).sum(axis=0))
    return np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)


def correlations(prediction: np.ndarray, truth: np.ndarray, kind: Correlation) -> np.ndarray:
    """Correlation over subsets of each query ``(Q,)``; 0 where a column is constant."""
    return correlate(ranked(prediction, kind), ranked(truth, kind))


def delete_one(prediction: np.ndarray, truth: np.ndarray, kind: Correlation) -> np.ndarray:
    """Correlations without subset ``j``, in row ``j`` of the result ``(M, Q)``.

    Leaving out ``x_j`` lowers the rank of every larger value by 1 and of a tied one by ½.
    """
    pair = [(x, ranked(x, kind)) for x in (prediction, truth)]
    result = np.empty(prediction.shape)
    for j in range(len(prediction)):
        keep = np.arange(len(prediction)) != j
        if kind == "spearman":
            left = [(r - (x > x[j]) - 0.5 * (x == x[j]))[keep] for x, r in pair]
        else:
            left = [x[keep] for x, _ in pair]
        result[j] = correlate(*left)
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


def error_and_margin(parts: list[tuple[float, int]], confidence: float) -> tuple[float, float]:
    """Standard error and half-width of a t interval, from variances and their degrees of freedom.

    The degrees of freedom of the sum are Satterthwaite's.
    """
    total = sum(variance for variance, _ in parts)
    if total <= 0:
        return 0.0, 0.0
    freedom = total**2 / sum(v**2 / own for v, own in parts if v > 0)
    error = float(np.sqrt(total))
    return error, float(student_t.ppf(0.5 + confidence / 2, freedom)) * error


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
    mean = float(values.mean())
    parts = [(subset_variance, m - 1), (query_variance, q - 1)]
    error, margin = error_and_margin(parts, confidence)
    return MeanEstimate(
        mean=mean,
        standard_error=error,
        subset_error=float(np.sqrt(subset_variance)),
        query_error=float(np.sqrt(query_variance)),
        lower=mean - margin,
        upper=mean + margin,
    )
