r"""Array mathematics of finding few among many by a value: AUROC, average precision, recall.

Shapes: ``K`` methods, ``n`` examples of which ``m`` are sought (``flipped``) and ``l = n − m`` are
not; values ``(K, n)``, high = suspicious. Nothing is random but which examples there are: intervals
are for other examples, sought and not, drawn as these were, with the values' model as it is.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import norm, rankdata

__all__ = ["auroc", "auroc_interval", "bootstrap", "recall_and_precision"]

_BLOCK_VALUES = 1 << 22


def auroc(values: np.ndarray, flipped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Areas under the ROC curve and their covariance by DeLong, DeLong & Clarke-Pearson 1988.

    ``A = P(v⁺ > v⁻) + ½ P(v⁺ = v⁻)``. With ``V_i`` the share of the others that sought example i
    exceeds and ``W_j`` the share of the sought that exceed j, ``Cov(A) = Cov(V)/m + Cov(W)/l``; by
    midranks (Sun & Xu 2014).

    Parameters
    ----------
    values
        ``(K, n)``.
    flipped
        ``(n,)`` booleans.

    Returns
    -------
    area, covariance
        ``(K,)`` and ``(K, K)``.
    """
    positive, negative = values[:, flipped], values[:, ~flipped]
    m, others = positive.shape[1], negative.shape[1]
    ranks = rankdata(values, axis=1)
    v = (ranks[:, flipped] - rankdata(positive, axis=1)) / others
    w = 1 - (ranks[:, ~flipped] - rankdata(negative, axis=1)) / m
    covariance = np.atleast_2d(np.cov(v)) / m + np.atleast_2d(np.cov(w)) / others
    return v.mean(axis=1), covariance


def auroc_interval(
    area: np.ndarray, error: np.ndarray, fewest: int, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
    r"""Intervals of areas on the logit scale, ``logit A ± z·SE/(A(1−A))``.

    Where the sought are all above the others (or below), the standard error is 0 and says nothing.
    The lower end is then ``((1−c)/2)^{1/f}``, ``f = min(m, l)``: were the area smaller, ``f``
    disjoint pairs of examples would all be in order with probability below ``(1−c)/2``.

    Parameters
    ----------
    area, error
        ``(K,)``.
    fewest
        ``f``.
    confidence
        ``c``.
    """
    z = norm.ppf(0.5 + confidence / 2)
    inside = (area > 0) & (area < 1)
    safe = np.where(inside, area, 0.5)
    center, half = np.log(safe / (1 - safe)), z * error / (safe * (1 - safe))
    lower, upper = (1 / (1 + np.exp(-(center + sign * half))) for sign in (-1, 1))
    edge = ((1 - confidence) / 2) ** (1 / fewest)
    lower = np.where(inside, lower, np.where(area == 1, edge, 0.0))
    upper = np.where(inside, upper, np.where(area == 1, 1.0, 1 - edge))
    return lower, upper


def recall_and_precision(
    values: np.ndarray, flipped: np.ndarray, inspected: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    r"""Recall among the examples of highest value, and average precision, of weighted examples.

    Average precision is ``Σ_t (R_t − R_{t−1}) P_t`` over distinct values ``t`` from high to low.
    Recall at an inspected share is that of a random order among equal values.

    Parameters
    ----------
    values, flipped
        ``(n,)`` each.
    inspected
        Shares ``(F,)`` of the examples.
    counts
        ``(B, n)``: how often each example is there.

    Returns
    -------
    recall, precision
        ``(B, F)`` and ``(B,)``.
    """
    order = np.argsort(-values, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(values[order]) != 0]))
    sorted_counts = counts[:, order].astype(np.float64)
    everyone = np.add.reduceat(sorted_counts, starts, axis=1).cumsum(axis=1)
    found = np.add.reduceat(sorted_counts * flipped[order], starts, axis=1).cumsum(axis=1)
    recall = found / found[:, -1:]
    precision = found / np.maximum(everyone, 1)
    average = (np.diff(recall, axis=1, prepend=0.0) * precision).sum(axis=1)
    at = [
        np.interp(inspected * own[-1], np.concatenate([[0], own]), np.concatenate([[0], line]))
        for own, line in zip(everyone, recall, strict=True)
    ]
    return np.stack(at), average


def bootstrap(
    values: np.ndarray, flipped: np.ndarray, inspected: np.ndarray, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Recall ``(R, F)`` and average precision ``(R,)`` of resampled examples.

    Sought examples and others are resampled among themselves, so that their numbers stay.
    """
    rng = np.random.default_rng(seed)
    n = len(flipped)
    recalls, precisions = [], []
    step = max(1, _BLOCK_VALUES // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        counts = np.zeros((rows, n))
        for kind in (flipped, ~flipped):
            size = int(kind.sum())
            counts[:, kind] = rng.multinomial(size, np.full(size, 1 / size), size=rows)
        recall, precision = recall_and_precision(values, flipped, inspected, counts)
        recalls.append(recall)
        precisions.append(precision)
    return np.concatenate(recalls), np.concatenate(precisions)
