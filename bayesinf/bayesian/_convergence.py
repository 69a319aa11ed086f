"""R-hat and effective draws of columns, and what they say of a covariance."""

from __future__ import annotations

import warnings

import numpy as np

from bayesinf._diagnostics import ConvergenceWarning

__all__ = ["chosen_center", "effective_share", "rhat_and_ess"]


def rhat_and_ess(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank-normalised split R-hat and bulk effective draws of the columns of ``(C, T, n)``.

    Both are NaN for a column that never varies; R-hat of one chain compares its halves.
    """
    from arviz_stats.base import array_stats  # late: it takes a second

    rhat, ess = np.full((2, values.shape[2]), np.nan)
    moves = np.flatnonzero(np.ptp(values, axis=(0, 1)) > 0)
    if values.shape[1] < 4 or not len(moves):
        return rhat, ess
    columns = values[:, :, moves]
    half = values.shape[1] // 2
    halves = columns if len(values) > 1 else columns[:, : 2 * half].reshape(2, half, -1)
    rhat[moves] = array_stats.rhat(halves, chain_axis=0, draw_axis=1)
    ess[moves] = array_stats.ess(columns, chain_axis=0, draw_axis=1, method="bulk")
    return rhat, ess


def effective_share(ess: np.ndarray, draws: int) -> float:
    """Mean of effective draws over all draws, at most 1; 1 where nothing varies."""
    seen = ess[np.isfinite(ess)]
    return min(1.0, float(seen.mean()) / draws) if len(seen) else 1.0


def chosen_center(
    center: str, chains: int, rhat: dict[str, np.ndarray], ess: dict[str, np.ndarray], level: int
) -> str:
    """``"grand"`` or ``"chain"``, by the diagnostics where ``center="auto"``; warns of trouble.

    Raises
    ------
    ValueError
        If ``center`` is none of auto, grand and chain.
    """
    if center not in ("auto", "grand", "chain"):
        raise ValueError(f"center must be 'auto', 'grand' or 'chain'; got {center!r}.")
    problems = []
    apart = False
    for name in rhat:
        seen = rhat[name][np.isfinite(rhat[name])]
        if not len(seen):
            problems.append(f"{name} cannot be judged: they never vary, or draws are fewer than 4")
            continue
        worst, fewest = float(np.quantile(seen, 0.95)), float(np.nanquantile(ess[name], 0.05))
        if worst > 1.05:
            apart = True
            problems.append(f"R-hat of the {name} reaches {worst:.2f} (at most 1.05 is fine)")
        if fewest < 100:
            problems.append(f"one of the {name} has {fewest:.0f} effective draws (100 are wanted)")
    if chains == 1:
        problems.append("there is one chain, so that R-hat compares only its halves: run four")
    if problems:
        warnings.warn(
            f"these scores come from chains in doubt: {'; '.join(problems)}.",
            ConvergenceWarning,
            stacklevel=level + 1,
        )
    return center if center != "auto" else "chain" if apart else "grand"
