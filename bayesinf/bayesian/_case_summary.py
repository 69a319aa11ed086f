"""One row per observation: fit, functional variance, Pareto's k, and what it moves most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from scipy.special import logsumexp

from bayesinf._scores import versions
from bayesinf.attribution._self_variance import variances
from bayesinf.bayesian._case_influence import case_influence
from bayesinf.bayesian._case_removal import pareto_threshold, smoothed_weights
from bayesinf.bayesian._convergence import effective_share
from bayesinf.bayesian._draws import Quantities, read_log_likelihood

__all__ = ["case_summary"]

_UNRELIABLE = 0.4


def case_summary(
    data: Any,
    var_names: str | Sequence[str] | None = None,
    *,
    quantities: Quantities | None = None,
    sample_dims: str | Sequence[str] | None = None,
    log_likelihood_var_name: str | Sequence[str] | None = None,
) -> xr.Dataset:
    r"""What is known of every observation; ``.to_dataframe()`` makes the table.

    Parameters
    ----------
    data, var_names, quantities, sample_dims, log_likelihood_var_name
        As of :func:`case_influence`.

    Returns
    -------
    xr.Dataset
        Dim ``train``:

        * ``log_likelihood``: posterior mean of log p_i; ``lppd``: log of the posterior mean of p_i;
        * ``p_waic``: functional variance Var(log p_i) and ``p_waic_mcse``. It is the case's
          influence on its own log-likelihood: **high = hard, remembered, perhaps mislabelled**;
        * ``elpd_waic = lppd − p_waic``, and ``unreliable``: p_waic above 0.4, where WAIC fails;
        * ``pareto_k`` of leaving it out;
        * ``largest_shift``: over φ, the influence of greatest size in posterior standard
          deviations, with its sign, its ``largest_shift_mcse`` and its φ, ``moves``.

        Attributes ``elpd_waic``, its standard error ``se``, ``p_waic`` (the effective number of
        parameters), ``pareto_threshold``, ``mcse_df``.

    Raises
    ------
    KeyError
        If a group or variable is missing.
    TypeError
        If ArviZ does not read the data.
    ValueError
        If shapes do not fit or a value is not finite, or no quantity varies.

    Warns
    -----
    ConvergenceWarning
        As of :func:`case_influence`.

    Notes
    -----
    WAIC: Watanabe 2010; its 0.4 rule: Vehtari, Gelman and Gabry 2017.
    """
    influence = case_influence(
        data,
        var_names,
        quantities=quantities,
        sample_dims=sample_dims,
        log_likelihood_var_name=log_likelihood_var_name,
    )
    cases = read_log_likelihood(data, log_likelihood_var_name, sample_dims)
    log_p = cases.values
    draws = log_p.shape[0] * log_p.shape[1]
    variance, error, freedom = variances(log_p, influence.attrs["center"])
    lppd = logsumexp(log_p, axis=(0, 1)) - np.log(draws)
    k = smoothed_weights(log_p, effective_share(influence["ess_train"].values, draws))[1]
    shift, shift_error, moves = _largest(influence)
    elpd = lppd - variance
    columns = {
        "log_likelihood": log_p.mean(axis=(0, 1)),
        "lppd": lppd,
        "p_waic": variance,
        "p_waic_mcse": error,
        "elpd_waic": elpd,
        "unreliable": variance > _UNRELIABLE,
        "pareto_k": k,
        "largest_shift": shift,
        "largest_shift_mcse": shift_error,
        "moves": moves,
    }
    return xr.Dataset(
        {name: ("train", column) for name, column in columns.items()},
        coords=cases.coords("train"),
        attrs={
            "method": "case_summary",
            "elpd_waic": float(elpd.sum()),
            "se": float(np.sqrt(len(elpd) * elpd.var(ddof=1))) if len(elpd) > 1 else 0.0,
            "p_waic": float(variance.sum()),
            "pareto_threshold": pareto_threshold(draws),
            "mcse_df": freedom,
            "chains": log_p.shape[0],
            "draws": log_p.shape[1],
            **versions(),
        },
    )


def _largest(influence: xr.Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each observation the influence of greatest size, in posterior standard deviations."""
    spread = influence["posterior_sd"].values
    moving = np.flatnonzero(spread > 0)
    if not len(moving):
        raise ValueError(
            "no quantity varies over the draws, so that nothing can move. Usual cause: var_names= "
            "of constants."
        )
    relative = influence["influence"].values[moving] / spread[moving, None]
    errors = influence["mcse"].values[moving] / spread[moving, None]
    which, every = abs(relative).argmax(axis=0), np.arange(relative.shape[1])
    return relative[which, every], errors[which, every], influence["query"].values[moving][which]
