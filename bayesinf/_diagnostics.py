"""Whether chains can be believed: R-hat, nested R-hat, effective draws, drift."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from bayesinf._axes import Selection
from bayesinf._stream_diagnostics import segment_statistics

if TYPE_CHECKING:
    from bayesinf._streaming import StreamingCovariance
    from bayesinf._traces import TraceStore

__all__ = ["ConvergenceWarning", "diagnose", "rhat_of_means", "trend_share"]


class ConvergenceWarning(UserWarning):
    """Scores come from chains, or from minimisations, that have not converged."""


def rhat_of_means(means: np.ndarray) -> float:
    """Rank-normalised split R-hat of one quantity ``(chain, draw)``, failed chains left out."""
    from arviz_stats.base import array_stats  # late: it takes a second, and matplotlib with it

    kept = means[np.isfinite(means).all(axis=1)]
    if len(kept) < 1 or kept.shape[1] < 4 or np.ptp(kept) == 0:
        return float("nan")
    return float(array_stats.rhat(kept, chain_axis=0, draw_axis=1))


def trend_share(values: np.ndarray) -> np.ndarray:
    """Share of each quantity's within-chain variance that a line in time explains.

    Parameters
    ----------
    values
        ``(chain, draw, quantity)``.

    Returns
    -------
    np.ndarray
        ``(quantity,)``, in [0, 1]. Near 0 for a chain that mixes; drift makes it large.
    """
    draws = values.shape[1]
    time = np.arange(draws) - (draws - 1) / 2
    centred = values - values.mean(axis=1, keepdims=True, dtype=np.float64)
    slope = np.einsum("t,ctq->cq", time, centred) / (time @ time)
    explained = (slope**2).sum(0) * (time @ time)
    total = (centred**2).sum((0, 1))
    return np.divide(explained, total, out=np.zeros_like(total), where=total > 0)


def diagnose(
    traces: TraceStore | StreamingCovariance, *, max_examples: int | None = None
) -> xr.Dataset:
    r"""Diagnose every recorded loss and say in words whether the chains can be believed.

    Parameters
    ----------
    traces
        What :func:`bayesinf.sample` returned.
    max_examples
        Look at this many evenly spaced examples of each group only; None for all.

    Returns
    -------
    xr.Dataset
        Per train and per query example: ``rhat_*`` (rank-normalised split R-hat), ``rhat_nested_*``
        (over superchains, where there are at least two), ``ess_bulk_*``, ``trend_*`` (share of the
        within-chain variance that a linear trend explains). Attributes: ``ok`` (1 or 0) and
        ``verdict``, in words.

    Raises
    ------
    ValueError
        If there are fewer than 4 draws.

    Notes
    -----
    Good means: 95 % of the losses have R-hat and nested R-hat ≤ 1.05 and effective draws ≥ 100,
    and the median trend share is ≤ 0.1. R-hat and effective draws: Vehtari et al. 2021; nested
    R-hat: Margossian et al. 2024. Losses that never vary are left out.

    From a :class:`bayesinf.StreamingCovariance`, which has no draws to rank, R-hat and nested R-hat
    are the classic ones of split chains and effective draws are by batch means, all from sums over
    8 to 16 segments per chain (more for one chain); drift and the rules are the same.
    """
    out: dict[str, tuple[str, np.ndarray]] = {}
    coords: dict[str, np.ndarray] = {}
    if traces.draws and traces.draws < 4:
        raise ValueError(
            f"diagnostics need at least 4 draws per chain; this store has {traces.draws}. Call "
            f"sample() again with more draws and the same store."
        )
    traces.warn_of_failures(stacklevel=2)
    for group in ("train", "query"):
        ids = traces.ids(group)
        pick = np.arange(len(ids))
        if max_examples is not None and len(ids) > max_examples:
            pick = np.unique(np.linspace(0, len(ids) - 1, max_examples).round().astype(int))
        coords[group] = ids[pick]
        for name, array in _table(traces, group, pick).items():
            out[f"{name}_{group}"] = (group, array)
    data = xr.Dataset(out, coords=coords)
    problems = _problems(data, traces)
    data.attrs["ok"] = int(not problems)
    data.attrs["verdict"] = (
        "the chains show no sign of trouble" if not problems else "; ".join(problems)
    )
    return data


def _table(
    traces: TraceStore | StreamingCovariance, group: str, pick: np.ndarray
) -> dict[str, np.ndarray]:
    """Statistics of some examples, from draws where there are draws."""
    if hasattr(traces, "segments"):
        return segment_statistics(traces.segments(group, pick), traces.superchains)
    return _statistics(traces.read(group, "loss", Selection(pick=pick)), traces.superchains)


def _statistics(values: np.ndarray, superchains: np.ndarray) -> dict[str, np.ndarray]:
    """Per quantity of ``(chain, draw, quantity)``."""
    from arviz_stats.base import array_stats

    quantities = values.shape[2]
    kinds = ["rhat", "ess_bulk"]
    groups = np.unique(superchains, return_counts=True)[1]
    nested = len(groups) > 1 and len(set(groups.tolist())) == 1
    if nested:
        kinds.append("rhat_nested")
    out = {kind: np.full(quantities, np.nan) for kind in kinds}
    for q in range(quantities):
        x = values[:, :, q].astype(np.float64)
        if np.ptp(x) == 0:
            continue
        halves = x if len(x) > 1 else x[:, : x.shape[1] // 2 * 2].reshape(2, -1)
        out["rhat"][q] = array_stats.rhat(halves, chain_axis=0, draw_axis=1)
        out["ess_bulk"][q] = array_stats.ess(x, chain_axis=0, draw_axis=1, method="bulk")
        if nested:
            out["rhat_nested"][q] = array_stats.rhat_nested(
                x, superchain_ids=superchains, chain_axis=0, draw_axis=1
            )
    out["trend"] = trend_share(values)
    return out


def _problems(data: xr.Dataset, traces: TraceStore | StreamingCovariance) -> list[str]:
    """Each sentence: what was seen, and what to do."""
    problems = []
    for group in ("train", "query"):
        if not np.isfinite(data[f"rhat_{group}"]).any():
            problems.append(f"no {group} loss ever varies: the chains do not move")
            continue
        for kind, words in (("rhat", "R-hat"), ("rhat_nested", "nested R-hat")):
            if f"{kind}_{group}" not in data:
                continue
            worst = float(np.nanquantile(data[f"{kind}_{group}"], 0.95))
            if worst > 1.05:
                problems.append(
                    f"{words} of the {group} losses reaches {worst:.2f} (95 % quantile; at most "
                    f"1.05 is fine): chains disagree, so lengthen warmup and thin or raise the step"
                )
        fewest = float(np.nanquantile(data[f"ess_bulk_{group}"], 0.05))
        if fewest < 100:
            problems.append(
                f"a {group} loss has {fewest:.0f} effective draws (5 % quantile; 100 are wanted): "
                f"draw more, or thin more"
            )
        drift = float(np.median(data[f"trend_{group}"]))
        if drift > 0.1:
            problems.append(
                f"{drift:.0%} of the variance of the median {group} loss is linear drift (at most "
                f"10 % is fine): the chains have not arrived, so lengthen warmup"
            )
    if len(traces.healthy) == 1:
        problems.append("there is one chain, so that R-hat compares only its halves: run four")
    return problems
