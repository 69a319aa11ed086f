"""Which observations are perhaps mislabelled: the posterior variance of each log-likelihood."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, Literal

import xarray as xr

from bayesinf._scores import versions
from bayesinf.attribution._self_variance import variances
from bayesinf.bayesian._convergence import chosen_center, rhat_and_ess
from bayesinf.bayesian._draws import read_log_likelihood

__all__ = ["functional_variance"]


def functional_variance(
    data: Any,
    *,
    sample_dims: str | Sequence[str] | None = None,
    log_likelihood_var_name: str | Sequence[str] | None = None,
    center: Literal["auto", "grand", "chain"] = "auto",
) -> xr.Dataset:
    r"""Values of observations, for the search of wrong labels.

    .. math:: \mathrm{value}_i = \mathrm{Var}(\log p_i) = \frac{d E[\log p_i]}{d b_i}

    how much leaving observation ``i`` out would lower its own log-likelihood: **high = remembered,
    hard, perhaps mislabelled**. :func:`bayesinf.self_variance` of ArviZ's draws, in the same form,
    so that ``bi.mislabel_detection({"variance": functional_variance(data)}, flipped)`` judges it.

    Parameters
    ----------
    data, sample_dims, log_likelihood_var_name, center
        As of :func:`case_influence`.

    Returns
    -------
    xr.Dataset
        ``value`` and ``mcse (train)``, ``value ± t·mcse`` with ``attrs["mcse_df"]`` degrees of
        freedom. The sum of the values is ``p_waic``, WAIC's effective number of parameters.

    Raises
    ------
    KeyError
        If a group or variable is missing.
    TypeError
        If ArviZ does not read the data.
    ValueError
        If shapes do not fit, a value is not finite, or there are too few draws for an error.

    Warns
    -----
    ConvergenceWarning
        As of :func:`case_influence`.

    Notes
    -----
    Watanabe 2010. :func:`case_summary` has the same numbers as ``p_waic``, beside others.
    """
    began = time.perf_counter()
    cases = read_log_likelihood(data, log_likelihood_var_name, sample_dims)
    rhat, ess = rhat_and_ess(cases.values)
    name = "log-likelihoods"
    how = chosen_center(center, len(cases.values), {name: rhat}, {name: ess}, level=2)
    value, error, freedom = variances(cases.values, how)
    return xr.Dataset(
        {"value": ("train", value), "mcse": ("train", error)},
        coords=cases.coords("train"),
        attrs={
            "method": "functional_variance",
            "high": "hard or suspicious",
            "center": how,
            "mcse_df": freedom,
            "chains": cases.values.shape[0],
            "draws": cases.values.shape[1],
            "n": len(cases.labels),
            "seconds": json.dumps({"variance": time.perf_counter() - began}),
            **versions(),
        },
    )
