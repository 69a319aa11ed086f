r"""What correlations come to by chance: their law if subsets and predictions are shuffled.

Predictions and truths ``(M, Q)`` as in :mod:`bayesinf.evaluation._statistics`. A permutation says
which subset's truth belongs to which prediction, *for all queries at once*, so that what queries
share stays shared. With columns standardised to ``p`` and ``t`` (of mean 0 and norm 1), the mean
correlation under the permutation ``π`` is ``Σ_j K[j, π(j)]``, ``K = p tᵀ/Q``; over all permutations
its mean is 0 and its variance exactly

.. math:: \frac{1}{M-1} \sum_{jk} K_{jk}^2
    = \frac{1}{(M-1)\,Q^2} \sum_{qr} ρ^p_{qr} ρ^t_{qr},

``ρ`` the correlations between queries of the predictions and of the truths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from bayesinf.evaluation._alignment import align, check_same_kind
from bayesinf.evaluation._lds import Constant
from bayesinf.evaluation._statistics import Correlation, require_options, standardised
from bayesinf.evaluation._tables import Named, named, with_costs

__all__ = ["Null", "lds_null", "permuted"]


@dataclass(frozen=True)
class Null:
    """A mean correlation and its law by chance.

    Attributes
    ----------
    value
        Mean correlation over queries.
    sd
        Its standard deviation over all permutations, exact.
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


def permuted(
    prediction: np.ndarray,
    truth: np.ndarray,
    kind: Correlation,
    *,
    permutations: int,
    seed: int,
    confidence: float,
) -> Null:
    """Permutation law of a mean correlation; see the module.

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
    value = float(np.trace(between))
    rng, rows = np.random.default_rng(seed), np.arange(len(p))
    drawn = np.array([between[rows, rng.permutation(len(p))].sum() for _ in range(permutations)])
    lower, upper = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2])
    extreme = int((np.abs(drawn) >= abs(value) * (1 - 1e-12)).sum())
    return Null(
        value,
        float(np.sqrt((between**2).sum() / (len(p) - 1))),
        float(lower),
        float(upper),
        (1 + extreme) / (1 + permutations),
    )


def lds_null(
    scores: Named,
    bank: xr.Dataset,
    *,
    measurement: str = "loss",
    correlation: Correlation = "spearman",
    permutations: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    constant: Constant = "raise",
) -> xr.Dataset:
    """LDS that scores would have by chance, if they knew nothing of the subsets.

    Predictions are given to other subsets' truths, all queries alike. A method whose scores are
    much the same for every query has far fewer independent chances than there are queries, and
    reaches a larger LDS by luck; ``null_sd`` shows it.

    Parameters
    ----------
    scores
        Scores by name, a list of them, or those of one method.
    bank, measurement, correlation, constant
        As in :func:`lds`.
    permutations
        How many are drawn for quantiles and p value.
    seed
        Of the draw.
    confidence
        Between the two quantiles.

    Returns
    -------
    xr.Dataset
        By ``scorer``: ``lds``; of its law by chance, whose mean is 0, ``null_sd`` (exact over all
        permutations), ``null_lower``, ``null_upper``, and ``p_value``, two-sided; what the scores
        cost. Random is which subset meets which truth; scores, queries and outcomes are as they
        are.

    Raises
    ------
    ValueError
        As in :func:`lds`, and if ``permutations`` is not positive.
    """
    require_options(correlation, "fixed", confidence)
    if permutations < 1:
        raise ValueError(
            f"permutations must be at least 1, and 1000 to be of use; got {permutations}."
        )
    methods = named(scores)
    check_same_kind(list(methods.values()), list(methods))
    found = []
    for own in methods.values():
        pair = align(own, bank, measurement, constant)
        found.append(
            permuted(
                pair.prediction,
                pair.truth,
                correlation,
                permutations=permutations,
                seed=seed,
                confidence=confidence,
            )
        )
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
            "random": "which subset's outcome belongs to which prediction",
            "permutations": permutations,
            "seed": seed,
            "subsets": bank.sizes["subset"],
            "seeds": bank.sizes["seed"],
        },
    )
    return with_costs(table, methods)
