"""Frequentist standard errors of posterior means, from one run: no bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from bayesinf._scores import versions
from bayesinf.bayesian._case_influence import case_influence
from bayesinf.bayesian._draws import Quantities

__all__ = ["infinitesimal_jackknife"]


def infinitesimal_jackknife(
    data: Any,
    var_names: str | Sequence[str] | None = None,
    *,
    quantities: Quantities | None = None,
    sample_dims: str | Sequence[str] | None = None,
    log_likelihood_var_name: str | Sequence[str] | None = None,
) -> xr.Dataset:
    r"""How far posterior means would scatter over new data sets, by the Bayesian jackknife.

    .. math:: \mathrm{se}^2 = \sum_i (I_i - \bar I)^2, \qquad I_i = \mathrm{Cov}(\phi, \log p_i)

    Where the model is right and the data are many it equals the posterior standard deviation; where
    the model is wrong it is the honest one (the sandwich), so that ``ratio`` far from 1 is a sign
    of misfit. Observations must be independent given the parameters.

    Parameters
    ----------
    data, var_names, quantities, sample_dims, log_likelihood_var_name
        As of :func:`case_influence`.

    Returns
    -------
    xr.Dataset
        Dim ``query``: ``standard_error``; ``posterior_mean`` and ``posterior_sd``; ``ratio``, the
        first over the last; ``monte_carlo_share``, the part of the sum of squares that Monte-Carlo
        noise makes (``Σ mcse_i²`` over it). It is **not** taken off: above 0.1 or so the standard
        error is too large by half of that share, and more draws are needed.

    Raises
    ------
    KeyError
        If a group or variable is missing.
    TypeError
        If ArviZ does not read the data.
    ValueError
        If shapes do not fit or a value is not finite.

    Warns
    -----
    ConvergenceWarning
        As of :func:`case_influence`.

    Notes
    -----
    Giordano and Broderick 2023 (arXiv 2305.06466), with ψ_i = n I_i there.
    """
    found = case_influence(
        data,
        var_names,
        quantities=quantities,
        sample_dims=sample_dims,
        log_likelihood_var_name=log_likelihood_var_name,
    )
    influence = found["influence"].values
    squares = ((influence - influence.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    noise = (found["mcse"].values ** 2).sum(axis=1)
    error, spread = np.sqrt(squares), found["posterior_sd"].values
    columns = {
        "standard_error": error,
        "posterior_mean": found["posterior_mean"].values,
        "posterior_sd": spread,
        "ratio": np.divide(error, spread, out=np.full_like(error, np.nan), where=spread > 0),
        "monte_carlo_share": np.divide(noise, squares, out=np.zeros_like(noise), where=squares > 0),
    }
    return xr.Dataset(
        {name: ("query", column) for name, column in columns.items()},
        coords={"query": found["query"].values},
        attrs={
            "method": "infinitesimal_jackknife",
            **{key: found.attrs[key] for key in ("center", "chains", "draws", "n")},
            **versions(),
        },
    )
