"""Cross-covariances of traces with Monte-Carlo standard errors: arrays only, no labels.

Shapes: ``x (C, T, Q)`` and ``y (C, T, N)`` for ``C`` chains of ``T`` draws; results ``(Q, N)``.
Means and products are float64 (an uncentred float32 E[xy] − E[x]E[y] returns rounding noise for a
trace of mean 2.5 and standard deviation 10⁻³).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

__all__ = ["CrossCovariance", "batch_slices", "cross_covariance"]

MIN_BATCHES = 20


@dataclass(frozen=True)
class CrossCovariance:
    """Estimates ``(Q, N)``; ``within`` is centred per chain, a check on ``value``."""

    value: np.ndarray
    mcse: np.ndarray
    within: np.ndarray
    batches: int


def batch_slices(chains: int, draws: int, per_chain: int | None = None) -> list[slice]:
    """Consecutive batches of a chain, as long as 20 batches over all chains allow.

    Raises
    ------
    ValueError
        If the draws do not suffice for two batches in all.
    """
    count = -(-MIN_BATCHES // chains) if per_chain is None else per_chain
    count = min(count, max(1, draws // 2))
    if count * chains < 2 or draws < 2:
        raise ValueError(
            f"standard errors need at least two batches of two draws; got {chains} chain(s) of "
            f"{draws} draw(s)."
        )
    edges = np.linspace(0, draws, count + 1).round().astype(int)
    return [slice(a, b) for a, b in pairwise(edges.tolist())]


def cross_covariance(
    x: np.ndarray,
    y: np.ndarray,
    *,
    center: str = "grand",
    correlation: bool = False,
    batches_per_chain: int | None = None,
    block: int = 4096,
) -> CrossCovariance:
    r"""Covariances (or correlations) of every column of ``x`` with every column of ``y``.

    Parameters
    ----------
    x, y
        ``(C, T, Q)`` and ``(C, T, N)``.
    center
        ``"grand"``: the mean over all chains; ``"chain"``: each chain's own (biased towards zero by
        the variance of the chain means, but blind to chains that have not met).
    correlation
        Divide by the standard deviations; the standard error then is that of the correlation, by
        the delta method.
    batches_per_chain
        Default: as few as make 20 in all.
    block
        Columns of ``y`` at a time.

    Returns
    -------
    CrossCovariance
        ``mcse² = Σ_b (P_b − P̄)²/(B(B−1))``, ``P_b`` the mean of centred products over batch ``b``,
        weighted by batch length (batch means; Flegal and Jones 2010).
    """
    chains, draws = x.shape[:2]
    slices = batch_slices(chains, draws, batches_per_chain)
    xs, mean_x = _centred(x, center, correlation)
    out = [np.empty((x.shape[2], y.shape[2])) for _ in range(3)]
    for start in range(0, y.shape[2], block):
        columns = slice(start, start + block)
        ys, mean_y = _centred(y[:, :, columns], center, correlation)
        value, mcse = _batch_means(xs, ys, slices, correlation)
        between = np.einsum("cq,cn->qn", mean_x, mean_y) / chains
        for target, part in zip(out, (value, mcse, value - between), strict=True):
            target[:, columns] = part
    factor = 1.0 if correlation else chains * draws / (chains * draws - 1)
    value, mcse, within = (array * factor for array in out)
    return CrossCovariance(value, mcse, within, len(slices) * chains)


def _centred(values: np.ndarray, center: str, standardise: bool) -> tuple[np.ndarray, np.ndarray]:
    """Centred (and scaled) values, and what the chain means are then."""
    values = values.astype(np.float64)
    axes = (0, 1) if center == "grand" else (1,)
    values -= values.mean(axis=axes, keepdims=True)
    if standardise:
        sd = np.sqrt((values**2).mean(axis=(0, 1)))
        if not (sd > 0).all():
            raise ValueError(
                f"{int((sd == 0).sum())} losses never vary over the draws, so that they have no "
                f"correlation. Use the covariance (normalize=None) or more, hotter draws."
            )
        values /= sd
    return values, values.mean(axis=1)


def _batch_means(
    x: np.ndarray, y: np.ndarray, slices: list[slice], correlation: bool
) -> tuple[np.ndarray, np.ndarray]:
    total = x.shape[0] * x.shape[1]
    value = (
        np.einsum("sq,sn->qn", x.reshape(total, -1), y.reshape(total, -1), optimize=True) / total
    )
    squares, number = np.zeros_like(value), len(slices) * x.shape[0]
    for xc, yc in zip(x, y, strict=True):
        for where in slices:
            xb, yb = xc[where], yc[where]
            product = xb.T @ yb
            if correlation:
                spread = (xb**2).sum(0)[:, None] + (yb**2).sum(0)[None, :]
                deviation = product - 0.5 * value * spread
            else:
                deviation = product - len(xb) * value
            squares += deviation**2
    # deviations are sums over a batch; those of means, weighted by length, divide by total / B
    return value, np.sqrt(squares / (number * (number - 1))) / (total / number)
