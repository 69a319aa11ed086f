"""Which training examples are in a query's top k, with a confidence that holds for all at once."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import xarray as xr
from scipy.stats import t as student_t

__all__ = ["top_k"]


def top_k(
    scores: xr.Dataset,
    k: int,
    *,
    confidence: float = 0.95,
    direction: Literal["helpful", "harmful"] = "helpful",
) -> xr.Dataset:
    r"""Train examples that are certainly, and those that are possibly, among a query's top ``k``.

    For each query, with the stated confidence, **all** of these hold together: every certain
    example is in the true top ``k``, every example of the true top ``k`` is possible, and the rank
    of every example lies between its two bounds.

    Parameters
    ----------
    scores
        With ``influence`` and ``mcse (query, train)`` and ``attrs["mcse_df"]``, as from
        :func:`bayesinf.bif`.
    k
        Size of the top, ``1 ≤ k < N``.
    confidence
        Of the statement about one query; for ``m`` queries at once give ``1 − (1 − c)/m``.
    direction
        ``"helpful"``: most negative influence first; ``"harmful"``: most positive first.

    Returns
    -------
    xr.Dataset
        ``certain`` and ``possible`` (query, train), true or false; ``rank_best`` and
        ``rank_worst`` (query, train), from 1. ``attrs["quantile"]`` is the half-width of the
        intervals in standard errors.

    Raises
    ------
    ValueError
        If there is no ``mcse``, or ``k``, ``confidence`` or ``direction`` is out of range.

    Notes
    -----
    Intervals ``influence ± t·mcse`` that hold for all ``N`` train examples at once bound every
    rank: nothing is ahead of an example whose interval it does not reach (Klein, Wright and
    Wieczorek 2020, theorem 1). They are Bonferroni's: ``t`` is the quantile ``1 − (1 − c)/(2N)`` of
    Student's t, which is valid however the errors of examples depend on each other. The law of
    their maximum would give narrower ones, but cannot be learnt from one or two dozen batches,
    which are fewer than the examples. More chains give more degrees of freedom and a smaller
    quantile.
    """
    value, error, freedom = _checked(scores, k, confidence, direction)
    quantile = float(student_t.ppf(1 - (1 - confidence) / (2 * value.shape[1]), freedom))
    sign = 1.0 if direction == "helpful" else -1.0
    low, high = sign * value - quantile * error, sign * value + quantile * error
    best, worst = np.empty(value.shape, dtype=np.int64), np.empty(value.shape, dtype=np.int64)
    for q, (lower, upper) in enumerate(zip(low, high, strict=True)):
        best[q] = 1 + np.searchsorted(np.sort(upper), lower, side="left")
        reached = np.searchsorted(np.sort(lower), upper, side="left")
        worst[q] = 1 + reached - (lower < upper)  # itself is not ahead of itself
    dims = ("query", "train")
    return xr.Dataset(
        {
            "certain": (dims, worst <= k),
            "possible": (dims, best <= k),
            "rank_best": (dims, best),
            "rank_worst": (dims, worst),
        },
        coords={name: scores[name] for name in dims},
        attrs={
            "k": int(k),
            "confidence": confidence,
            "direction": direction,
            "quantile": quantile,
            "method": str(scores.attrs.get("method", "scores")),
        },
    )


def _checked(
    scores: xr.Dataset, k: Any, confidence: float, direction: str
) -> tuple[np.ndarray, np.ndarray, float]:
    if "mcse" not in scores or "mcse_df" not in scores.attrs:
        raise ValueError(
            "top_k needs scores with Monte-Carlo standard errors, a variable mcse(query, train) "
            "and attrs['mcse_df']; bif(traces) makes them. Classical methods have none: their "
            "order is exact, and scores.influence.argsort() is their top k."
        )
    n = scores.sizes["train"]
    if not 1 <= k < n:
        raise ValueError(f"k must lie between 1 and {n - 1}, one less than the examples; got {k}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, such as 0.95; got {confidence}.")
    if direction not in ("helpful", "harmful"):
        raise ValueError(f"direction must be 'helpful' or 'harmful'; got {direction!r}.")
    pair = (scores[name].transpose("query", "train").values for name in ("influence", "mcse"))
    value, error = (np.asarray(array, dtype=np.float64) for array in pair)
    return value, error, float(scores.attrs["mcse_df"])
