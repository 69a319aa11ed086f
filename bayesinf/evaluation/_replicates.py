r"""Means over queries of what was measured with replicates (seeds, random sets), with intervals.

A *part* ``(R, Q)`` holds ``R`` independent replicates of a measurement of ``Q`` queries. The value
of a query is the sum over parts of its mean over replicates; parts share no randomness. Replicates
are shared by the queries (one retrained network measures all of them), so their noise does not
average out over queries. With ``V = Σ_parts var_r(mean_q)/R``, ``V_q`` the same of each query and
``s²`` the sample variance of the queries' values, the mean over new replicates **and** new queries
has variance ``V + σ²/Q``, ``σ² = max(0, s² − (mean_q V_q − V) Q/(Q−1))``, as in
:mod:`bayesinf.evaluation._statistics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import xarray as xr
from scipy.stats import beta, norm
from scipy.stats import t as student_t

__all__ = ["Estimate", "mean_over_queries", "share_over_queries", "stack_estimates"]


@dataclass(frozen=True)
class Estimate:
    """A mean over queries with its error and t interval."""

    mean: float
    standard_error: float
    lower: float
    upper: float


def mean_over_queries(parts: Sequence[np.ndarray], confidence: float) -> Estimate:
    """Mean over queries and its interval; see the module.

    Parameters
    ----------
    parts
        Arrays ``(R, Q)``, with signs so that they add up. A single replicate counts as exact.
    confidence
        Such as 0.95.

    Returns
    -------
    Estimate
        Degrees of freedom are Satterthwaite's, of ``R − 1`` for each part and ``Q − 1``; with a
        single query its spread is unknown, and only replicates count.
    """
    value = sum(part.mean(axis=0) for part in parts)
    queries = parts[0].shape[1]
    shared = [float(p.mean(axis=1).var(ddof=1)) / len(p) for p in parts if len(p) > 1]
    own = sum(float(p.var(axis=0, ddof=1).mean()) / len(p) for p in parts if len(p) > 1)
    freedom = [len(p) - 1 for p in parts if len(p) > 1]
    if queries > 1:
        unshared = (own - sum(shared)) * queries / (queries - 1)
        shared.append(max(0.0, float(np.var(value, ddof=1)) - unshared) / queries)
        freedom.append(queries - 1)
    total, mean = sum(shared), float(np.mean(value))
    margin = 0.0
    if total > 0:
        degrees = total**2 / sum(v**2 / f for v, f in zip(shared, freedom, strict=True))
        margin = float(student_t.ppf(0.5 + confidence / 2, degrees)) * float(np.sqrt(total))
    return Estimate(mean, float(np.sqrt(total)), mean - margin, mean + margin)


def share_over_queries(part: np.ndarray, confidence: float) -> Estimate:
    """The same of a share, ``part`` between 0 and 1, with an interval that stays there.

    Clopper and Pearson's, for as many independent trials as have the width of the t interval,
    ``p(1 − p)/(half-width/z)²`` (at most all entries), and one a query where all agree.
    """
    found = mean_over_queries([part], confidence)
    replicates, queries = part.shape
    share = min(max(found.mean, 0.0), 1.0)
    spread = share * (1 - share)
    known = (found.upper - found.mean) / float(norm.ppf(0.5 + confidence / 2))
    trials = min(spread / known**2, replicates * queries) if known > 0 < spread else queries
    tail, hits = (1 - confidence) / 2, share * trials
    lower = float(beta.ppf(tail, hits, trials - hits + 1)) if hits > 0 else 0.0
    upper = float(beta.ppf(1 - tail, hits + 1, trials - hits)) if hits < trials else 1.0
    return Estimate(share, found.standard_error, lower, upper)


def stack_estimates(
    name: str, dims: tuple[str, ...], estimates: np.ndarray
) -> dict[str, xr.Variable]:
    """Variables ``name``, ``name_standard_error``, ``name_lower`` and ``name_upper``.

    Parameters
    ----------
    name, dims
        Of the variables.
    estimates
        Object array of :class:`Estimate`, of these dims.
    """
    rows = [asdict(one) for one in estimates.ravel()]
    found = {}
    for field in ("mean", "standard_error", "lower", "upper"):
        values = np.array([row[field] for row in rows]).reshape(estimates.shape)
        found[name if field == "mean" else f"{name}_{field}"] = xr.Variable(dims, values)
    return found
