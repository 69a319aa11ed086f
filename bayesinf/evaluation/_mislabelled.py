"""Finding wrong labels: how well values of training examples put the mislabelled ones first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from scipy.stats import norm

from bayesinf._scores import text_labels
from bayesinf.evaluation._detection import (
    auroc,
    auroc_interval,
    bootstrap,
    recall_and_precision,
)
from bayesinf.evaluation._tables import Named, named, with_costs
from bayesinf.evaluation._values import common_values

__all__ = ["mislabel_detection"]

FEWEST = 2


def mislabel_detection(
    values: Named,
    flipped: Sequence[Any] | np.ndarray,
    *,
    baseline: str | None = "loss",
    inspected: Sequence[float] = (0.05, 0.1, 0.2, 0.3),
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> xr.Dataset:
    r"""Judge values of training examples by how they single out those with a wrong label.

    Three numbers a method: the AUROC, the probability that a mislabelled example has a higher value
    than a rightly labelled one; average precision, which looks at the top alone; and recall, the
    share of the mislabelled among the share of examples that one looks at, highest value first.

    Parameters
    ----------
    values
        By name, or a list: ``value (train)``, high = suspicious (:func:`bayesinf.grand`,
        :func:`bayesinf.el2n`, :func:`bayesinf.vog`, :func:`bayesinf.example_loss`,
        :func:`bayesinf.self_variance`), or a self-influence ``influence (train)`` of any method
        with ``pairs="self"``, where the most negative is the most suspicious.
    flipped
        Train ids of the mislabelled examples.
    baseline
        Scorer that the others are compared with: the plain loss, which costs one forward pass and
        is hard to beat. None: no comparison.
    inspected
        Shares of the examples that are looked at.
    confidence
        Of all intervals.
    resamples, seed
        Of the bootstrap.

    Returns
    -------
    xr.Dataset
        By ``scorer``, with ``…_standard_error``, ``…_lower`` and ``…_upper`` of each: ``auroc``,
        ``average_precision``, ``recall (scorer, inspected)`` and, with a baseline,
        ``auroc_difference``, the scorer's AUROC less the baseline's on the same examples. Then what
        the values cost: ``seconds``, ``forward_examples``, ``backward_examples``, ``peak_memory``.

    Raises
    ------
    ValueError
        If values are missing, not finite or of other examples, fewer than two examples are
        mislabelled or not, the baseline is not among the scorers, or an option is out of range.
    KeyError
        If a mislabelled id is unknown.

    Notes
    -----
    Random in the intervals: which examples there are, mislabelled and not. The networks and which
    labels were flipped are taken as they are; repeat with other seeds for their part. AUROC and its
    differences have DeLong's standard errors, the AUROC's interval on the logit scale (and an
    exact bound at 0 and 1), differences a normal one; average precision and recall have percentile
    intervals of a bootstrap of mislabelled and other examples, each among themselves, and a recall
    of 0 or 1, which resamples cannot leave, Clopper and Pearson's other end.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, such as 0.95; got {confidence}.")
    shares = np.asarray(inspected, dtype=np.float64)
    if shares.ndim != 1 or not len(shares) or not ((shares > 0) & (shares <= 1)).all():
        raise ValueError(f"inspected must be shares between 0 and 1; got {list(inspected)}.")
    methods = named(values)
    names = list(methods)
    if baseline is not None and baseline not in names:
        raise ValueError(
            f"baseline={baseline!r} is not among the scorers {names}. A search for wrong labels is "
            f"compared with the plain loss: add example_loss(task), or give baseline=None."
        )
    matrix, ids = common_values(methods)
    wrong = _mask(flipped, ids)
    area, covariance = auroc(matrix, wrong)
    error = np.sqrt(np.diag(covariance))
    fewest = int(min(wrong.sum(), (~wrong).sum()))
    low, high = auroc_interval(area, error, fewest, confidence)
    variables = _variables("auroc", area, error, low, high)
    if baseline is not None:
        variables |= _differences(area, covariance, names.index(baseline), confidence)
    variables |= _resampled(matrix, wrong, shares, confidence, resamples, seed)
    table = xr.Dataset(
        variables, coords={"scorer": text_labels(np.array(names)), "inspected": shares}
    )
    table.attrs = {
        "examples": len(ids),
        "mislabelled": int(wrong.sum()),
        "confidence": confidence,
        "resamples": resamples,
        "random": "which examples there are",
    }
    if baseline is not None:
        table.attrs["baseline"] = baseline
    return with_costs(table, methods)


def _mask(flipped: Sequence[Any] | np.ndarray, ids: np.ndarray) -> np.ndarray:
    wanted = np.asarray(flipped).tolist()
    unknown = sorted(set(wanted) - set(ids.tolist()), key=str)
    if unknown:
        raise KeyError(
            f"flipped names {len(unknown)} ids that no value is of, such as {unknown[:3]}. It "
            f"holds the train ids of the mislabelled examples (a mask's are ids[mask])."
        )
    mask = np.array([key in set(wanted) for key in ids.tolist()])
    if min(mask.sum(), (~mask).sum()) < FEWEST:
        raise ValueError(
            f"{int(mask.sum())} of {len(ids)} examples are mislabelled; intervals need at least "
            f"{FEWEST} that are and {FEWEST} that are not. flipped= holds ids, not a mask."
        )
    return mask


def _variables(
    name: str,
    value: np.ndarray,
    error: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
    dims: tuple[str, ...] = ("scorer",),
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    parts = {"": value, "_standard_error": error, "_lower": lower, "_upper": upper}
    return {name + suffix: (dims, array) for suffix, array in parts.items()}


def _differences(
    area: np.ndarray, covariance: np.ndarray, base: int, confidence: float
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    variance = np.diag(covariance) + covariance[base, base] - 2 * covariance[base]
    error = np.sqrt(np.maximum(variance, 0.0))
    error[base] = 0.0
    value, half = area - area[base], norm.ppf(0.5 + confidence / 2) * error
    return _variables("auroc_difference", value, error, value - half, value + half)


def _resampled(
    matrix: np.ndarray,
    wrong: np.ndarray,
    shares: np.ndarray,
    confidence: float,
    resamples: int,
    seed: int,
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Average precision and recall; all methods see the same resamples."""
    once = np.ones((1, len(wrong)))
    tails = (1 - confidence) / 2, (1 + confidence) / 2
    edge = tails[0] ** (1 / wrong.sum())
    rows: dict[str, list[list[np.ndarray]]] = {"average_precision": [], "recall": []}
    for values in matrix:
        recall, precision = recall_and_precision(values, wrong, shares, once)
        recalls, precisions = bootstrap(values, wrong, shares, resamples, seed)
        for name, point, draws in (
            ("average_precision", precision[0], precisions),
            ("recall", recall[0], recalls),
        ):
            low, high = np.quantile(draws, tails, axis=0)
            if name == "recall":
                low, high = np.where(point == 1, edge, low), np.where(point == 0, 1 - edge, high)
            rows[name].append([point, draws.std(axis=0, ddof=1), low, high])
    found: dict[str, Any] = {}
    for name, dims in (("average_precision", ("scorer",)), ("recall", ("scorer", "inspected"))):
        columns = [np.stack(column) for column in zip(*rows[name], strict=True)]
        point, error, low, high = columns
        found |= _variables(name, point, error, low, high, dims)
    return found
