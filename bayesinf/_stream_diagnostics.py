"""R-hat, effective draws and drift from sums over segments of chains, without the draws."""

from __future__ import annotations

import numpy as np

from bayesinf._running_sums import Segments

__all__ = ["segment_statistics"]


def segment_statistics(segments: Segments, superchains: np.ndarray) -> dict[str, np.ndarray]:
    r"""Diagnose every column of some sums; as :func:`bayesinf.diagnose` does the traces.

    Parameters
    ----------
    segments
        Sums over ``S`` consecutive segments of ``C`` chains.
    superchains
        ``(C,)``, the superchain of each chain.

    Returns
    -------
    dict
        Per column: ``rhat``, the classic split R-hat (Gelman et al. 2013, eq. 11.4), with halves of
        whole segments, without ranks, which would need the draws; ``rhat_nested``, the same over
        superchains (Margossian et al. 2024), where they are of one size and at least two;
        ``ess_bulk``, effective draws by batch means over the segments of all chains (high where
        draws are correlated over a tenth of a chain or more, which R-hat and the trend then show);
        ``trend``, exactly as from traces. NaN for a column that never varies.
    """
    means, variances, counts = _halves(segments)
    draws = segments.length.sum()
    within = np.average(variances, axis=0, weights=counts)
    varies = within > 0
    between = _spread(means, counts)
    out = {"rhat": _ratio(between, within, counts.mean())}
    groups = np.unique(superchains, return_counts=True)[1]
    if len(groups) > 1 and len(set(groups.tolist())) == 1:
        out["rhat_nested"] = _nested(means, variances, np.tile(superchains, 2))
    out["ess_bulk"] = _effective(segments, within, means)
    for array in out.values():
        array[~varies] = np.nan
    mean = segments.total.sum(axis=1) / draws
    squares = (segments.square.sum(axis=1) - draws * mean**2).sum(axis=0)
    slope = segments.slope - (draws - 1) / 2 * segments.total.sum(axis=1)
    explained = (slope**2).sum(axis=0) / (draws * (draws**2 - 1) / 12)
    out["trend"] = np.divide(explained, squares, out=np.zeros(len(within)), where=varies)
    return out


def _halves(s: Segments) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means and variances ``(2C, columns)`` and counts ``(2C,)`` of the halves of every chain."""
    draws = s.length.sum()
    middle = int(np.argmin(np.abs(s.length.cumsum() - draws / 2))) + 1
    means, variances, counts = [], [], []
    for part in (slice(0, middle), slice(middle, None)):
        count = s.length[part].sum()
        mean = s.total[:, part].sum(axis=1) / count
        spread = s.square[:, part].sum(axis=1) - count * mean**2
        means.append(mean)
        variances.append(np.maximum(spread, 0) / (count - 1))
        counts.append(np.full(len(mean), count))
    return np.concatenate(means), np.concatenate(variances), np.concatenate(counts)


def _spread(means: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Variance of the means of halves, weighted by their lengths."""
    center = np.average(means, axis=0, weights=counts)
    weights = counts / counts.mean()
    spread: np.ndarray = (weights[:, None] * (means - center) ** 2).sum(axis=0) / (len(means) - 1)
    return spread


def _ratio(between: np.ndarray, within: np.ndarray, count: float) -> np.ndarray:
    share = np.divide(between, within, out=np.full_like(within, np.nan), where=within > 0)
    return np.asarray(np.sqrt(share + (count - 1) / count))


def _nested(means: np.ndarray, variances: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """``√(1 + B/W)``: superchain means against what varies within superchains."""
    members = [owner == k for k in np.unique(owner)]
    centers = np.stack([means[m].mean(axis=0) for m in members])
    within = np.mean(
        [means[m].var(axis=0, ddof=1) + variances[m].mean(axis=0) for m in members], axis=0
    )
    between = centers.var(axis=0, ddof=1)
    share = np.divide(between, within, out=np.full_like(within, np.nan), where=within > 0)
    return np.asarray(np.sqrt(1 + share))


def _effective(s: Segments, within: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Draws times the variance of one, over the variance that batch means show."""
    chains, draws = len(s.total), s.length.sum() * len(s.total)
    center = s.total.sum(axis=(0, 1)) / draws
    deviation = s.total - s.length[:, None] * center
    second = chains * (s.length**2).sum()
    long_run = (deviation**2).sum(axis=(0, 1)) / (draws - second / draws)
    variance = within + means.var(axis=0, ddof=1)
    effective = np.divide(
        draws * variance, long_run, out=np.full_like(within, np.nan), where=long_run > 0
    )
    return np.asarray(np.minimum(effective, draws * np.log10(draws)))
