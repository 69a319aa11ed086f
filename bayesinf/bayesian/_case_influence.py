"""Influence of every observation on posterior quantities, from draws that ArviZ reads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr

from bayesinf._covariance import cross_covariance
from bayesinf._scores import label_scores
from bayesinf.bayesian._convergence import chosen_center, rhat_and_ess
from bayesinf.bayesian._cumulants import third_cumulant
from bayesinf.bayesian._draws import Draws, Quantities, read_log_likelihood, read_quantities

__all__ = ["case_influence", "checked_pair"]


def case_influence(
    data: Any,
    var_names: str | Sequence[str] | None = None,
    *,
    group: str = "posterior",
    quantities: Quantities | None = None,
    sample_dims: str | Sequence[str] | None = None,
    log_likelihood_var_name: str | Sequence[str] | None = None,
    center: Literal["auto", "grand", "chain"] = "auto",
) -> xr.Dataset:
    r"""Signed influence of every observation on posterior means, with its Monte-Carlo error.

    .. math:: \frac{d E[\phi]}{d b_i} = \mathrm{Cov}(\phi, \log p_i), \qquad
              \frac{d^2 E[\phi]}{d b_i^2} = \kappa_3(\phi, \log p_i, \log p_i)

    for the posterior with the likelihood :math:`\prod_i p_i^{b_i}` at ``b = 1``: what the mean of φ
    gains by counting observation ``i`` a little more. No refits, no gradients: any draws with
    pointwise log-likelihoods will do, of NumPyro, PyMC, Stan or BlackJAX, or
    :meth:`bayesinf.TraceStore.to_arviz`. The sign is that of φ: positive = the observation pulls φ
    up. (It reads "negative = helpful" where φ is a loss, ``quantities={"loss": lambda p: …}``.)

    Parameters
    ----------
    data
        A ``DataTree`` with the group ``log_likelihood``, or what
        ``arviz_base.convert_to_datatree`` takes.
    var_names
        Variables of ``group`` that are φ, element by element; all, if neither these nor
        ``quantities`` are given.
    group
        ``"posterior"``, or another with the same draws: ``"log_likelihood"`` asks how observations
        move each other's log-likelihoods.
    quantities
        Functions of parameters by name, ``{"ratio": lambda p: p["a"] / p["b"]}``; they get the
        group as a ``Dataset``. Arrays with the dimensions of draws will do, too.
    sample_dims
        Chain and draw; default ``("chain", "draw")``. One name: draws of one chain.
    log_likelihood_var_name
        Which variables of the group ``log_likelihood``; all by default. Observations of several
        stand one after the other, labelled as ``y[3]``, with the coordinate ``likelihood (train)``.
    center
        ``"grand"``: on the mean over all chains; ``"chain"``: on each chain's own. ``"auto"``:
        grand unless R-hat says that chains have not met.

    Returns
    -------
    xr.Dataset
        ``influence (query, train)``, φ by observation, in units of φ; ``mcse``, with an interval
        ``influence ± t·mcse`` of ``attrs["mcse_df"]`` degrees of freedom; ``influence_within``,
        centred per chain, a check; ``second_order`` and ``second_order_mcse``, how fast the
        influence itself changes; ``power_scaling (query)``, the sum over all observations with the
        error of the sum: how the mean moves when the whole likelihood is raised to a power, the
        signed kin of ArviZ's ``psense(group="likelihood")``; per φ and per observation ``rhat_*``,
        ``ess_*``; ``posterior_mean (query)`` and ``posterior_sd (query)``.

    Raises
    ------
    TypeError
        If ArviZ does not read the data.
    KeyError
        If a group or variable is missing.
    ValueError
        If shapes do not fit, a value is not finite, or there are too few draws for an error.

    Warns
    -----
    ConvergenceWarning
        If R-hat of the quantities or log-likelihoods is above 1.05 or effective draws are below 100
        (95 % of them), or there is one chain.

    Notes
    -----
    Gustafson 1996; Millar and Stewart 2007; Giordano, Broderick and Jordan 2018. The estimand of
    :func:`bayesinf.bif` with the loss ``−log p_i`` at temperature one.
    """
    began = time.perf_counter()
    phi, cases = checked_pair(
        read_quantities(data, var_names, group, quantities, sample_dims),
        read_log_likelihood(data, log_likelihood_var_name, sample_dims),
    )
    rhat, ess = {}, {}
    for name, draws in (("quantities", phi), ("log-likelihoods", cases)):
        rhat[name], ess[name] = rhat_and_ess(draws.values)
    how = chosen_center(center, len(phi.values), rhat, ess, level=2)
    found = cross_covariance(phi.values, cases.values, center=how)
    second, second_error = third_cumulant(*(_level(d.values, how) for d in (phi, cases)))
    whole = cross_covariance(phi.values, cases.values.sum(axis=2, keepdims=True), center=how)
    pair = ("query", "train")
    scores = label_scores(
        {
            "influence": (pair, found.value),
            "mcse": (pair, found.mcse),
            "influence_within": (pair, found.within),
            "second_order": (pair, second),
            "second_order_mcse": (pair, second_error),
            "power_scaling": (("query",), whole.value[:, 0]),
            "power_scaling_mcse": (("query",), whole.mcse[:, 0]),
            "posterior_mean": (("query",), phi.values.mean(axis=(0, 1))),
            "posterior_sd": (("query",), phi.values.std(axis=(0, 1), ddof=1)),
        },
        {"query": phi.labels, **cases.coords("train")},
        "case_influence",
        "influence",
        {
            "center": how,
            "mcse_df": found.freedom,
            "chains": phi.values.shape[0],
            "draws": phi.values.shape[1],
            "group": group,
            "n": len(cases.labels),
            "seconds": {"covariance": time.perf_counter() - began},
        },
    )
    for dim, name in (("query", "quantities"), ("train", "log-likelihoods")):
        scores[f"rhat_{dim}"] = (dim, rhat[name])  # NaN where a column never varies
        scores[f"ess_{dim}"] = (dim, ess[name])
    return scores


def _level(values: np.ndarray, center: str) -> np.ndarray:
    """Values whose chains have one mean, where covariances are centred per chain."""
    return values - values.mean(axis=1, keepdims=True) if center == "chain" else values


def checked_pair(phi: Draws, cases: Draws) -> tuple[Draws, Draws]:
    """Quantities and log-likelihoods of the same draws.

    Raises
    ------
    ValueError
        If they are of different chains or draws.
    """
    shapes = phi.values.shape[:2], cases.values.shape[:2]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the quantities have (chains, draws) = {shapes[0]} and the log-likelihood has "
            f"{shapes[1]}. Both must come from the same draws: usual causes are thinning, or "
            f"warm-up kept, in one group alone."
        )
    if not np.ptp(cases.values, axis=(0, 1)).any():
        raise ValueError(
            "no log-likelihood varies over the draws. Usual cause: it was computed once, at one "
            "point, and repeated."
        )
    return phi, cases
