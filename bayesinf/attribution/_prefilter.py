r"""Candidates for influence: which training examples are worth observing, and what that loses.

Observing every training example at every draw is what sampling a language model costs. A cheap
score (BM25, GradDot, a short chain) picks candidates, :func:`bayesinf.sample` observes these, and
the rest in a second pass, where there is time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xarray as xr
from scipy.stats import beta

__all__ = ["Candidates", "prefilter"]

Direction = Literal["helpful", "harmful", "both"]
_SIGNS = {"helpful": (1.0,), "harmful": (-1.0,), "both": (1.0, -1.0)}


@dataclass(frozen=True)
class Candidates:
    """What :func:`prefilter` found.

    Attributes
    ----------
    kept, rest
        Ids of the candidates and of the other training examples, for ``observe={"train": …}``.
    report
        ``kept(train)``, true or false; attribute ``share`` kept. With a reference also
        ``recall(query)`` and attributes ``recall``, ``lower``, ``upper``.
    """

    kept: np.ndarray
    rest: np.ndarray
    report: xr.Dataset


def prefilter(
    scores: xr.Dataset,
    k: int,
    *,
    direction: Direction = "helpful",
    reference: xr.Dataset | None = None,
    top: int = 10,
    confidence: float = 0.95,
) -> Candidates:
    r"""Keep the ``k`` best training examples of each query, together, and say what that loses.

    The recall of a query is the share of the reference's ``top`` training examples that were kept,
    by whichever query. A random choice would reach ``report.attrs["share"]``.

    Parameters
    ----------
    scores
        A cheap score with ``influence(query, train)``.
    k
        How many each query nominates.
    direction
        ``"helpful"``: the most negative scores; ``"harmful"``: the most positive; ``"both"``:
        ``k``, and ``top``, from either end (not for similarities, whose other end says nothing).
    reference
        What the cheap score stands for, on a sample: some of the queries, or some of the training
        examples (the top of these is then meant), or both.
    top
        How many of the reference's best should have been kept.
    confidence
        Of the interval of the mean recall over queries like those of the reference.

    Returns
    -------
    Candidates
        Ids and report.

    Raises
    ------
    ValueError
        If ``k``, ``top``, ``direction`` or ``confidence`` is out of range, or the reference has
        ids that the scores lack.

    Notes
    -----
    The interval is Clopper and Pearson's for as many independent trials as the spread between
    queries tells: ``p(1 − p)/var(mean)``, and one trial a query where all queries agree.

    Examples
    --------
    First words, then gradients among what words have left, then a chain that observes these::

        first = bi.prefilter(bi.bm25(task), 500)
        found = bi.prefilter(bi.grad_dot(task).sel(train=first.kept), 50, reference=reference)
        traces = bi.sample(posterior, sampler, observe={"train": found.kept}, …)
    """
    if direction not in _SIGNS:
        raise ValueError(f"direction must be one of {sorted(_SIGNS)}; got {direction!r}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, such as 0.95; got {confidence}.")
    if direction != "helpful" and scores.attrs.get("estimand") == "similarity":
        raise ValueError(
            f"direction={direction!r} asks for training examples that harm, and "
            f"{scores.attrs.get('method', 'these scores')} only rank by similarity: what is least "
            f"similar is not harmful. Use direction='helpful', or a score of influence."
        )
    kept = _best(scores, k, direction, "k").any(axis=0)
    ids = scores["train"].values
    report = xr.Dataset(
        {"kept": ("train", kept)},
        coords={"train": ids},
        attrs={
            "method": str(scores.attrs.get("method", "scores")),
            "k": int(k),
            "direction": direction,
            "share": float(kept.mean()),
        },
    )
    if reference is not None:
        report = _with_recall(report, reference, direction, top, confidence)
    return Candidates(ids[kept], ids[~kept], report)


def _with_recall(
    report: xr.Dataset, reference: xr.Dataset, direction: Direction, top: int, confidence: float
) -> xr.Dataset:
    unknown = np.setdiff1d(reference["train"].values, report["train"].values)
    if len(unknown):
        raise ValueError(
            f"the reference has {len(unknown)} train ids that the scores lack, such as "
            f"{unknown[:3].tolist()}. Score the reference on a sample of the same training set; "
            f"after a first filter, report.attrs of both tell what each of them lost."
        )
    wanted = _best(reference, top, direction, "top")
    kept = report["kept"].sel(train=reference["train"]).values
    recall = (wanted & kept).sum(axis=1) / wanted.sum(axis=1)
    lower, upper = _interval(recall, int(wanted[0].sum()), confidence)
    report = report.assign(recall=("query", recall)).assign_coords(query=reference["query"].values)
    return report.assign_attrs(
        top=int(top),
        reference=str(reference.attrs.get("method", "scores")),
        confidence=confidence,
        recall=float(recall.mean()),
        lower=lower,
        upper=upper,
    )


def _best(scores: xr.Dataset, k: Any, direction: Direction, name: str) -> np.ndarray:
    """Which ``(query, train)`` pairs are among a query's ``k`` best, earlier ids first on ties."""
    value = scores["influence"].transpose("query", "train").values
    n = value.shape[1]
    if not isinstance(k, (int, np.integer)) or not 1 <= k <= n:
        raise ValueError(f"{name} must be an integer from 1 to {n}, the train examples; got {k!r}.")
    best = np.zeros(value.shape, dtype=bool)
    for sign in _SIGNS[direction]:
        order = np.argsort(sign * value, axis=1, kind="stable")[:, :k]
        np.put_along_axis(best, order, True, axis=1)
    return best


def _interval(recall: np.ndarray, top: int, confidence: float) -> tuple[float, float]:
    """Clopper–Pearson with the number of trials that the spread between queries tells."""
    queries, mean = len(recall), float(recall.mean())
    variance = float(recall.var(ddof=1)) / queries if queries > 1 else 0.0
    trials = float(queries)
    if variance > 0:
        trials = min(mean * (1 - mean) / variance, float(queries * top))
    tail = (1 - confidence) / 2
    hits = mean * trials
    lower = beta.ppf(tail, hits, trials - hits + 1) if hits > 0 else 0.0
    upper = beta.ppf(1 - tail, hits + 1, trials - hits) if hits < trials else 1.0
    return float(lower), float(upper)
