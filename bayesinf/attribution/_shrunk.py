"""Shrinkage of Bayesian influence towards zero, or towards a classical score."""

from __future__ import annotations

import numpy as np
import xarray as xr

from bayesinf._scores import make_scores

__all__ = ["shrink"]


def shrink(scores: xr.Dataset, target: xr.Dataset | None = None) -> xr.Dataset:
    r"""Shrink sampled influences by their own Monte-Carlo errors.

    With ``v`` the sampled influences of a query on the train examples, ``s`` their standard errors
    and ``g`` the target's scores:

    * towards a **target**, per query, ``ŷ = b g + w (v − b g)`` with ``b = ⟨v, g⟩/⟨g, g⟩`` and
      ``w = max(0, 1 − Σ s² / Σ (v − b g)²)``: what is left of the differences once the errors are
      taken off, as a share of them. Exact scores (``s = 0``) stay as they are, useless ones become
      the target. It is a **hybrid** of the two methods, and says so.
    * towards **zero**, per pair, ``ŷ = v · max(0, 1 − s²/v²)``: pairs within the noise are set to
      0, so that sums over many of them carry less of it. Only sampled losses enter.

    The weights come from the scores alone; no ground truth is needed.

    Parameters
    ----------
    scores
        With ``influence`` and ``mcse``, from :func:`bayesinf.bif`.
    target
        Classical scores of the same queries and train examples, in any order. None: zero.

    Returns
    -------
    xr.Dataset
        ``influence``, ``weight`` and ``mcse`` (the sampled one times the weight: what the draws
        still add, not the half-width of an interval, as shrinkage is biased), all
        ``(query, train)``. ``attrs["hybrid"]`` names both parents, or is absent.

    Raises
    ------
    ValueError
        If ``mcse`` is missing, ids differ, or the target is zero for a query.

    Notes
    -----
    Efron and Morris 1973, "Stein's estimation rule and its competitors", eq. 1.10 and section 7,
    with the variances estimated by batch means.

    Examples
    --------
    >>> import numpy as np, bayesinf as bi
    >>> ids, v = np.arange(3), np.array([[1.0, -2.0, 0.1]])
    >>> bif = bi.make_scores(v, query=ids[:1], train=ids, method="bif", estimand="influence",
    ...                      mcse=np.full((1, 3), 0.2))
    >>> bi.shrink(bif).influence.values.round(3)
    array([[ 0.96, -1.98,  0.  ]])
    """
    if "mcse" not in scores:
        raise ValueError(
            f"shrinkage needs the Monte-Carlo error of every score, and these have no 'mcse' "
            f"(method {scores.attrs.get('method')!r}). Give the scores of bif() first, the "
            f"classical ones as target=."
        )
    value, error = scores["influence"].values, scores["mcse"].values
    if target is None:
        squares = np.square(value)
        weight = 1 - np.divide(error**2, squares, out=np.ones_like(squares), where=squares > 0)
        weight, centre, name = np.clip(weight, 0, 1), np.zeros_like(value), None
    else:
        weight, centre = _towards(value, error, _aligned(scores, target))
        name = f"{scores.attrs['method']} + {target.attrs['method']}"
    kept = {k: v for k, v in scores.attrs.items() if k not in ("method", "estimand")}
    return make_scores(
        centre + weight * (value - centre),
        mcse=weight * error,
        weight=weight,
        query=scores["query"].values,
        train=scores["train"].values,
        method=f"shrunk {scores.attrs['method']}" if name is None else f"hybrid {name}",
        estimand=scores.attrs["estimand"],
        attrs={**kept, "hybrid": name},
    )


def _aligned(scores: xr.Dataset, target: xr.Dataset) -> np.ndarray:
    """Influences of the target in the order of the scores."""
    for name in ("query", "train"):
        mine, theirs = scores[name].values.tolist(), target[name].values.tolist()
        if len(mine) != len(theirs) or set(mine) != set(theirs):
            raise ValueError(
                f"scores and target are of different {name} examples ({len(mine)} and "
                f"{len(theirs)}). Score the same task with both, or select the common ids first."
            )
    found = target["influence"].sel(query=scores["query"].values, train=scores["train"].values)
    return found.transpose("query", "train").values


def _towards(
    value: np.ndarray, error: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weight and centre, ``(query, train)``."""
    length = (target**2).sum(1, keepdims=True)
    if not (length > 0).all():
        raise ValueError("the target is zero for a query, so that it has no direction to shrink to")
    centre = (value * target).sum(1, keepdims=True) / length * target
    apart = np.square(value - centre).sum(1, keepdims=True)
    noise = np.square(error).sum(1, keepdims=True)
    weight = 1 - np.divide(noise, apart, out=np.ones_like(apart), where=apart > 0)
    return np.broadcast_to(np.clip(weight, 0, 1), value.shape), centre
