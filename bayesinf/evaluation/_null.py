r"""What correlations come to by chance: their law if what belongs together is shuffled.

Predictions and truths ``(M, Q)`` as in :mod:`bayesinf.evaluation._statistics`. A permutation is
*for all queries at once*, so that what queries share stays shared. It says

* which training example each influence belongs to: the null of a score that knows nothing of the
  examples, and exact for one that is random; or
* which subset's truth belongs to which prediction: the null of a score whose correlation with the
  effects is *exactly* zero. A random score's is not, but of the size ``1/√n`` over ``n`` examples,
  which makes the variance of its LDS larger by about ``1 + M/n``.

For the second, with columns standardised to ``p`` and ``t`` (of mean 0 and norm 1), the mean
correlation under the permutation ``π`` is ``Σ_j K[j, π(j)]``, ``K = p tᵀ/Q``; over all permutations
its mean is 0 and its variance exactly

.. math:: \frac{1}{M-1} \sum_{jk} K_{jk}^2
    = \frac{1}{(M-1)\,Q^2} \sum_{qr} ρ^p_{qr} ρ^t_{qr},

``ρ`` the correlations between queries of the predictions and of the truths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import xarray as xr

from bayesinf.evaluation._alignment import Aligned, align, check_same_kind, influence_of
from bayesinf.evaluation._lds import Constant
from bayesinf.evaluation._statistics import (
    Correlation,
    correlate,
    correlations,
    ranked,
    require_options,
    standardised,
)
from bayesinf.evaluation._tables import Named, named, with_costs

__all__ = ["Null", "lds_null", "null_sd", "permuted"]

Permute = Literal["examples", "subsets"]


@dataclass(frozen=True)
class Null:
    """A mean correlation and its law by chance.

    Attributes
    ----------
    value
        Mean correlation over queries.
    sd
        Standard deviation: exact for permuted subsets, else that of the permutations.
    lower, upper
        Quantiles of the drawn permutations.
    p_value
        Share of permutations, with the one that was observed, whose mean correlation is as far
        from 0 or farther.
    """

    value: float
    sd: float
    lower: float
    upper: float
    p_value: float


def null_sd(p: np.ndarray, t: np.ndarray) -> float:
    """Exact standard deviation by chance of the mean correlation of standardised columns."""
    rows, queries = p.shape
    shared = ((p.T @ p) * (t.T @ t)).sum()  # never negative, but for rounding
    return float(np.sqrt(max(shared, 0.0) / (rows - 1))) / queries


def permuted(
    prediction: np.ndarray,
    truth: np.ndarray,
    kind: Correlation,
    *,
    permutations: int,
    seed: int,
    confidence: float,
) -> Null:
    """Law of a mean correlation under permuted subsets; see the module.

    Parameters
    ----------
    prediction, truth
        ``(M, Q)``.
    kind
        Of the correlation.
    permutations, seed
        How many are drawn, and from which seed.
    confidence
        The quantiles are ``(1 ± confidence)/2``.
    """
    p, t = standardised(prediction, kind), standardised(truth, kind)
    between = p @ t.T / p.shape[1]
    rng, rows = np.random.default_rng(seed), np.arange(len(p))
    drawn = np.array([between[rows, rng.permutation(len(p))].sum() for _ in range(permutations)])
    return _null(float(np.trace(between)), null_sd(p, t), drawn, confidence)


def relabelled(
    influence: np.ndarray,
    mask: np.ndarray,
    pair: Aligned,
    kind: Correlation,
    *,
    permutations: int,
    seed: int,
    confidence: float,
) -> Null:
    """Law of a mean correlation under permuted training examples; see the module.

    Parameters
    ----------
    influence, mask
        ``(n, Q)``, and what each subset keeps ``(M, n)``.
    pair
        The predictions ``mask @ influence`` and the truths.
    kind, permutations, seed, confidence
        As in :func:`permuted`.
    """
    rng, truth = np.random.default_rng(seed), ranked(pair.truth, kind)
    drawn = np.array(
        [
            correlate(ranked(mask[:, rng.permutation(mask.shape[1])] @ influence, kind), truth)
            for _ in range(permutations)
        ]
    ).mean(axis=1)
    value = float(correlations(pair.prediction, pair.truth, kind).mean())
    return _null(value, float(drawn.std()), drawn, confidence)


def _null(value: float, sd: float, drawn: np.ndarray, confidence: float) -> Null:
    lower, upper = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2])
    extreme = int((np.abs(drawn) >= abs(value) * (1 - 1e-12)).sum())
    return Null(value, sd, float(lower), float(upper), (1 + extreme) / (1 + len(drawn)))


def lds_null(
    scores: Named,
    bank: xr.Dataset,
    *,
    measurement: str = "loss",
    correlation: Correlation = "spearman",
    permute: Permute = "examples",
    permutations: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    constant: Constant = "raise",
) -> xr.Dataset:
    """LDS that scores would have by chance.

    Influences are given to other training examples, or predictions to other subsets' truths, for
    all queries alike. A method whose scores are
    much the same for every query has far fewer independent chances than there are queries, and
    reaches a larger LDS by luck; ``null_sd`` shows it.

    Parameters
    ----------
    scores
        Scores by name, a list of them, or those of one method.
    bank, measurement, correlation, constant
        As in :func:`lds`.
    permute
        ``"examples"``: the law of an LDS of scores that are unrelated to the training examples, as
        random ones are. ``"subsets"``: of scores whose population correlation with the outcomes
        is zero; quick, and too narrow for random scores where the examples are not many more than
        the subsets.
    permutations
        How many are drawn.
    seed
        Of the draw.
    confidence
        Between the two quantiles.

    Returns
    -------
    xr.Dataset
        By ``scorer``: ``lds``; of its law by chance, ``null_sd`` (exact over all permutations of
        subsets), ``null_lower``, ``null_upper``, and ``p_value``, two-sided; what the scores cost.
        Random is the permutation; scores, queries and outcomes are as they are.

    Raises
    ------
    ValueError
        As in :func:`lds`, and if ``permute`` is unknown or ``permutations`` not positive.
    """
    require_options(correlation, "fixed", confidence)
    if permute not in get_args(Permute):
        raise ValueError(f"permute must be 'examples' or 'subsets'; got {permute!r}.")
    if permutations < 1:
        raise ValueError(
            f"permutations must be at least 1, and 1000 to be of use; got {permutations}."
        )
    methods = named(scores)
    check_same_kind(list(methods.values()), list(methods))
    options: dict[str, Any] = {
        "permutations": permutations,
        "seed": seed,
        "confidence": confidence,
    }
    mask = bank["subset_mask"].transpose("subset", "train").values.astype(np.float64)
    found = []
    for name, own in methods.items():
        pair = align(own, bank, measurement, constant)
        if permute == "subsets":
            null = permuted(pair.prediction, pair.truth, correlation, **options)
        else:
            like = bank[["train"]].assign_coords(query=own["query"])
            like.attrs["measurement"] = measurement
            influence = influence_of(own, name, like=like, owner="the bank", exact=True)
            null = relabelled(influence, mask, pair, correlation, **options)
        found.append(null)
    table = xr.Dataset(
        {
            "lds": ("scorer", [null.value for null in found]),
            "null_sd": ("scorer", [null.sd for null in found]),
            "null_lower": ("scorer", [null.lower for null in found]),
            "null_upper": ("scorer", [null.upper for null in found]),
            "p_value": ("scorer", [null.p_value for null in found]),
        },
        coords={"scorer": list(methods)},
        attrs={
            "measurement": measurement,
            "correlation": correlation,
            "confidence": confidence,
            "random": f"permutation of {permute}",
            "permutations": permutations,
            "seed": seed,
            "subsets": bank.sizes["subset"],
            "seeds": bank.sizes["seed"],
        },
    )
    return with_costs(table, methods)
