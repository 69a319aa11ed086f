r"""How far the LDS of sampled scores is off because the draws are finite: by chance, and downwards.

**By chance.** With ``θ`` the LDS, ``θ₍b₎`` that of the scores without batch ``b`` of the draws,
``s_b`` the batch's share and ``B`` batches, the delete-m_j jackknife (Busing, Meijer and van der
Leeden 1999, eq. 9): ``θ̃_b = θ₍b₎ + (θ − θ₍b₎)/s_b``, ``θ_J = Bθ − Σ_b (1 − s_b) θ₍b₎``,

.. math:: \mathrm{mcse}^2 = \frac{1}{B} \sum_b \frac{s_b}{1 - s_b} (\tilde θ_b - θ_J)^2.

**Downwards.** Noise in the scores lowers their correlation with anything. Two halves of the chains
predict the same subsets; their correlation ``r`` over subsets, meaned over queries, gives the
reliability of all draws, ``2r/(1 + r)`` (Spearman 1910; Brown 1910), and its square root is the
factor by which noise that is independent of the truth lowers a correlation.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from bayesinf.evaluation._alignment import align
from bayesinf.evaluation._reliability import spearman_brown, spearman_to_pearson
from bayesinf.evaluation._statistics import Correlation, correlations

__all__ = ["jackknife_error", "monte_carlo"]


def monte_carlo(
    scores: xr.Dataset,
    bank: xr.Dataset,
    measurement: str,
    constant: str,
    kind: Correlation,
    value: float,
) -> dict[str, float]:
    """``mcse``, ``reliability`` and ``attenuation`` of an LDS; none without replicates.

    Parameters
    ----------
    scores
        With ``influence_replicate (batch, query, train)``, ``batch_share (batch)`` and
        ``influence_half (half, query, train)``, as from ``bif(traces, replicates=True)``.
    bank, measurement, constant
        As of :func:`bayesinf.lds`.
    kind
        Of the correlation.
    value
        The LDS.

    Returns
    -------
    dict
        Empty where the scores have no replicates.
    """
    if "influence_replicate" not in scores:
        return {}
    deleted = []
    for one in scores["influence_replicate"].transpose("batch", ...):
        pair = align(_scores_of(one, scores), bank, measurement, constant)
        deleted.append(float(correlations(pair.prediction, pair.truth, kind).mean()))
    first, second = [
        align(_scores_of(one, scores), bank, measurement, constant).prediction
        for one in scores["influence_half"].transpose("half", ...)
    ]
    agreement = float(correlations(first, second, kind).mean())
    if kind == "spearman":
        agreement = float(spearman_to_pearson(np.array(agreement)))
    reliability = float(spearman_brown(np.array(max(0.0, agreement)), 2))
    return {
        "mcse": jackknife_error(value, np.array(deleted), scores["batch_share"].values),
        "reliability": reliability,
        "attenuation": reliability**0.5,
    }


def jackknife_error(value: float, deleted: np.ndarray, share: np.ndarray) -> float:
    """Standard error of a statistic from its values without each batch; see the module."""
    pseudo = deleted + (value - deleted) / share
    center = len(share) * value - ((1 - share) * deleted).sum()
    return float(np.sqrt((share / (1 - share) * (pseudo - center) ** 2).mean()))


def _scores_of(influence: xr.DataArray, scores: xr.Dataset) -> xr.Dataset:
    return xr.Dataset({"influence": influence}, attrs=scores.attrs)
