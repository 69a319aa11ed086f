r"""How much of what retrained models measure is signal: seeds compared with other seeds.

Seeds are split into two halves of ``h = ⌊R/2⌋`` runs, what the halves say is correlated over
subsets, and the correlation averaged over splits: ``ρ_h`` of each query, on the Pearson scale of a
Gaussian pair. The mean of ``R'`` runs then has the reliability ``kρ_h/(1 + (k−1)ρ_h)``, ``k =
R'/h`` (Spearman 1910; Brown 1910), and its root is the correlation that the true effect of a subset
reaches with it, the *ceiling* ``c(ρ_h)``.

A root of a noisy ``ρ_h`` is too low on average, so the mean ceiling over queries is taken from
the mean ``ρ̄`` and from the spread ``σ`` over queries that is no noise of the subsets, by the
two-point rule ``½[c(ρ̄ − σ) + c(ρ̄ + σ)]``, exact to second order in ``σ``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from bayesinf.evaluation._statistics import (
    Correlation,
    MeanEstimate,
    correlations,
    delete_one,
    mean_estimate,
)

__all__ = [
    "SplitHalf",
    "Statistic",
    "ceiling",
    "halves",
    "pearson_to_spearman",
    "spearman_brown",
    "spearman_to_pearson",
    "split_half",
]

_DELETIONS = 20  # splits that are repeated without each subset

Statistic = Callable[[np.ndarray], np.ndarray]
"""What some seeds say of each subset and query: ``(M, h, Q)`` to ``(M, Q)``."""


def spearman_to_pearson(rho: np.ndarray) -> np.ndarray:
    """Pearson correlation of a Gaussian pair with Spearman correlation ``ρ``: ``2 sin(πρ/6)``."""
    return 2 * np.sin(np.pi * np.asarray(rho) / 6)


def pearson_to_spearman(rho: np.ndarray) -> np.ndarray:
    """Spearman correlation of a Gaussian pair with Pearson correlation ``ρ``: ``6/π asin(ρ/2)``."""
    return 6 / np.pi * np.arcsin(np.asarray(rho) / 2)


def spearman_brown(reliability: np.ndarray, factor: float) -> np.ndarray:
    """Reliability of a mean of ``factor`` times as many runs, ``kρ / (1 + (k−1)ρ)``."""
    return factor * reliability / (1 + (factor - 1) * reliability)


def ceiling(half: np.ndarray, factor: float, kind: Correlation) -> np.ndarray:
    """Correlation of the true effect with the mean of ``factor·h`` runs, from ``ρ_h``.

    A negative ``ρ_h`` counts as 0.
    """
    root = np.sqrt(spearman_brown(np.clip(half, 0.0, 1.0), factor))
    return pearson_to_spearman(root) if kind == "spearman" else root


@dataclass(frozen=True)
class SplitHalf:
    """Agreement of two halves of the seeds.

    Attributes
    ----------
    values
        ``(Q,)``: ``ρ_h`` of each query.
    deleted
        ``(M, Q)``: the same without subset ``j``, from up to 20 of the splits.
    size
        ``h``, runs in a half.
    kind
        Of the correlation.
    """

    values: np.ndarray
    deleted: np.ndarray
    size: int
    kind: Correlation

    def estimate(self, *, random_queries: bool, confidence: float) -> MeanEstimate:
        """Mean of ``ρ_h`` over queries."""
        return mean_estimate(
            self.values, self.deleted, random_queries=random_queries, confidence=confidence
        )

    def mean_ceiling(self, half: float, runs: float) -> float:
        """Mean ceiling over queries of means of ``runs`` runs, if the mean ``ρ_h`` is ``half``."""
        all_queries = self.estimate(random_queries=True, confidence=0.95)
        spread = all_queries.query_error * len(self.values) ** 0.5
        points = np.array([half - spread, half + spread])
        return float(ceiling(points, runs / self.size, self.kind).mean())

    def ceilings(self, runs: float) -> np.ndarray:
        """``(Q,)`` ceilings of means of ``runs`` runs, each with the noise of its own ``ρ_h``."""
        return ceiling(self.values, runs / self.size, self.kind)

    def ceiling_estimate(
        self, runs: float, *, random_queries: bool, confidence: float
    ) -> tuple[float, float, float, float]:
        """Mean ceiling, its standard error and interval, carried over from those of ``ρ_h``."""
        rho = self.estimate(random_queries=random_queries, confidence=confidence)
        low, high = (
            self.mean_ceiling(rho.mean + sign * rho.standard_error, runs) for sign in (-1, 1)
        )
        mean, lower, upper = (self.mean_ceiling(x, runs) for x in (rho.mean, rho.lower, rho.upper))
        return mean, (high - low) / 2, lower, upper

    def relative(
        self,
        values: np.ndarray,
        deleted: np.ndarray,
        runs: float,
        *,
        random_queries: bool,
        confidence: float,
    ) -> MeanEstimate:
        """Mean of correlations with outcomes of ``runs`` runs over the mean ceiling.

        Parameters
        ----------
        values, deleted
            ``(Q,)`` and ``(M, Q)`` correlations of a prediction, all and without subset ``j``.
        runs, random_queries, confidence
            As of the ceiling.

        Returns
        -------
        MeanEstimate
            The error is that of the ratio, linearised in the mean correlation and in ``ρ̄``.
        """
        rho = self.estimate(random_queries=random_queries, confidence=confidence)
        step = max(rho.standard_error, 1e-6)
        low, top, high = (self.mean_ceiling(rho.mean + k * step, runs) for k in (-1, 0, 1))
        ratio, slope = values.mean() / top, (high - low) / (2 * step)

        def linear(x: np.ndarray, half: np.ndarray) -> np.ndarray:
            moved = (x - values.mean()) - ratio * slope * (half - self.values.mean())
            return np.asarray(ratio + moved / top)

        return mean_estimate(
            linear(values, self.values),
            linear(deleted, self.deleted),
            random_queries=random_queries,
            confidence=confidence,
        )


def _mean(outcomes: np.ndarray) -> np.ndarray:
    return np.asarray(outcomes.mean(axis=1))


def split_half(
    outcomes: np.ndarray,
    kind: Correlation,
    *,
    statistic: Statistic = _mean,
    splits: int = 200,
    seed: int = 0,
) -> SplitHalf:
    """Correlate halves of the seeds; see the module.

    Parameters
    ----------
    outcomes
        ``(M, R, Q)`` with ``R ≥ 2``.
    kind
        Of the correlation over subsets.
    statistic
        Of the runs of a half; their mean by default.
    splits
        All splits are used where there are no more than these, else so many random ones.
    seed
        Of the random splits.
    """
    runs = outcomes.shape[1]
    pairs = halves(runs, runs // 2, splits, seed)
    step = -(-len(pairs) // _DELETIONS)
    values, deleted = np.zeros(outcomes.shape[2]), np.zeros((len(outcomes), outcomes.shape[2]))
    for k, parts in enumerate(pairs):
        a, b = (statistic(outcomes[:, list(part)]) for part in parts)
        values += correlations(a, b, kind) / len(pairs)
        if k % step == 0:
            deleted += delete_one(a, b, kind) / len(pairs[::step])
    if kind == "spearman":
        values, deleted = spearman_to_pearson(values), spearman_to_pearson(deleted)
    return SplitHalf(values, deleted, runs // 2, kind)


def halves(
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
