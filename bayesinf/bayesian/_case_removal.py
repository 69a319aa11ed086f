"""What leaving observations out does to posterior means: importance weights or derivatives."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from bayesinf._covariance import cross_covariance
from bayesinf._scores import text_labels, versions
from bayesinf.bayesian._case_influence import checked_pair
from bayesinf.bayesian._convergence import chosen_center, effective_share, rhat_and_ess
from bayesinf.bayesian._cumulants import reweighted_shift, third_cumulant
from bayesinf.bayesian._draws import Quantities, read_log_likelihood, read_quantities

__all__ = ["ParetoWarning", "case_removal", "pareto_threshold", "smoothed_weights"]


_EQUAL = 1e-6
_ALIKE = 0.1
"""Range of log-weights below which they are as good as equal."""


class ParetoWarning(UserWarning):
    """Importance weights of some removals have too heavy a tail to be believed."""


def case_removal(
    data: Any,
    groups: Mapping[Any, Sequence[Any]] | None = None,
    var_names: str | Sequence[str] | None = None,
    *,
    group: str = "posterior",
    quantities: Quantities | None = None,
    sample_dims: str | Sequence[str] | None = None,
    log_likelihood_var_name: str | Sequence[str] | None = None,
) -> xr.Dataset:
    r"""Change of posterior means when observations, or groups of them, are left out.

    With ``ℓ = Σ_{i∈S} log p_i`` of the set left out,

    .. math:: \text{first} = -\mathrm{Cov}(\phi, \ell), \qquad
              \text{second} = -\mathrm{Cov}(\phi, \ell) + \tfrac12 \kappa_3(\phi, \ell, \ell),
              \qquad \text{psis} = \textstyle\sum_t w_t \phi_t - \bar\phi,\;
              w_t \propto 1/p_S(\theta_t)

    the weights Pareto-smoothed. ``change`` is **psis where** :math:`\hat k <
    \min(1 - 1/\log_{10} S, 0.7)` of ``S`` draws, **else first**, as weights with a tail that heavy
    are ruled by a few draws. Their differences say how far to believe: where first and second order
    disagree, the removal is no small change.

    Parameters
    ----------
    data
        As of :func:`case_influence`.
    groups
        ``{name: labels of observations}``; each observation on its own by default.
    var_names, group, quantities, sample_dims, log_likelihood_var_name
        As of :func:`case_influence`.

    Returns
    -------
    xr.Dataset
        Dims ``query`` and ``removed``: ``change`` and ``change_mcse``; ``first_order``,
        ``second_order``, ``psis``, each with ``…_mcse``. Per removal ``pareto_k`` and ``uses``
        (``"psis"`` or ``"first_order"``). ``attrs["pareto_threshold"]``.

    Raises
    ------
    KeyError
        If a group or variable is missing, or an observation is unknown.
    TypeError
        If ArviZ does not read the data.
    ValueError
        If shapes do not fit, a value is not finite, a group is empty or has a label twice.

    Warns
    -----
    ParetoWarning
        Naming the removals for which ``change`` is of first order, those that do most first. For
        observations that hardly matter it means little (k tells a tail's shape, not its weight);
        one of high leverage pulls the fit to itself, and both predictions are then too small.
    ConvergenceWarning
        As of :func:`case_influence`.

    Notes
    -----
    PSIS: Vehtari et al. 2024, by ArviZ's ``psislw``. In a Gaussian linear model with known noise
    k of one observation is its leverage.
    """
    began = time.perf_counter()
    phi, cases = checked_pair(
        read_quantities(data, var_names, group, quantities, sample_dims),
        read_log_likelihood(data, log_likelihood_var_name, sample_dims),
    )
    names, removed = _removed(cases.values, cases.labels, groups)
    rhat, ess = {}, {}
    for name, values in (("quantities", phi.values), ("removed log-likelihoods", removed)):
        rhat[name], ess[name] = rhat_and_ess(values)
    chosen_center("grand", len(removed), rhat, ess, level=2)
    total = removed.shape[0] * removed.shape[1]
    weights, k = smoothed_weights(removed, effective_share(ess["removed log-likelihoods"], total))
    limit = pareto_threshold(total)
    good = k < limit
    arrays, freedom = _changes(phi.values, removed, weights, good)
    if not good.all():
        spread = _spread(phi.values)
        moving = spread > 0
        told = np.maximum(abs(arrays["first_order"]), abs(arrays["psis"]))
        size = (told[moving] / spread[moving, None]).max(axis=0, initial=0)
        worst = sorted(np.flatnonzero(~good), key=lambda j: -size[j])
        warnings.warn(_heavy(names[worst], k[worst], len(k), limit), ParetoWarning, stacklevel=2)
    return xr.Dataset(
        {
            **{name: (("query", "removed"), array) for name, array in arrays.items()},
            "pareto_k": ("removed", k),
            "uses": ("removed", text_labels(np.where(good, "psis", "first_order"))),
            "posterior_mean": ("query", phi.values.mean(axis=(0, 1))),
            "posterior_sd": ("query", _spread(phi.values)),
        },
        coords={"query": phi.labels, "removed": names},
        attrs={
            "method": "case_removal",
            "pareto_threshold": limit,
            "mcse_df": freedom,
            "chains": removed.shape[0],
            "draws": removed.shape[1],
            "n": len(cases.labels),
            "seconds": time.perf_counter() - began,
            **versions(),
        },
    )


def _changes(
    phi: np.ndarray, removed: np.ndarray, weights: np.ndarray, good: np.ndarray
) -> tuple[dict[str, np.ndarray], float]:
    """Predictions ``(Q, N)`` of all three kinds with their errors, and degrees of freedom."""
    first = cross_covariance(phi, removed)
    pairs = {
        "first_order": (-first.value, first.mcse),
        "second_order": third_cumulant(phi, removed, scale=0.5, plus=-1.0),
        "psis": reweighted_shift(phi, weights),
    }
    psis, linear = pairs["psis"], pairs["first_order"]
    chosen = tuple(np.where(good, a, b) for a, b in zip(psis, linear, strict=True))
    arrays: dict[str, np.ndarray] = {}
    for name, (value, error) in {"change": chosen, **pairs}.items():
        arrays |= {name: value, f"{name}_mcse": error}
    return arrays, first.freedom


def _spread(values: np.ndarray) -> np.ndarray:
    spread: np.ndarray = values.std(axis=(0, 1), ddof=1)
    return spread


def _heavy(names: np.ndarray, k: np.ndarray, of: int, limit: float) -> str:
    shown = ", ".join(f"{a} ({b:.2f})" for a, b in zip(names[:8], k[:8], strict=True))
    return (
        f"Pareto's k is {limit:.2f} or more for {len(k)} of {of} removals, by falling effect: "
        f"{shown}{' …' if len(k) > 8 else ''}. Their change is of first order; refit without "
        f"them to be sure."
    )


def pareto_threshold(draws: int) -> float:
    """``min(1 − 1/log₁₀ S, 0.7)``: above it, smoothed weights are not to be believed."""
    return float(min(1 - 1 / np.log10(draws), 0.7)) if draws > 1 else 0.0


def smoothed_weights(log_p: np.ndarray, fraction: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Weights ``∝ 1/p`` of every column, Pareto-smoothed.

    Parameters
    ----------
    log_p
        ``(C, T, N)``.
    fraction
        Effective draws as a share of all.

    Returns
    -------
    tuple of np.ndarray
        Weights ``(C, T, N)`` with the sum 1, and Pareto's k ``(N,)``. Where log p varies by less
        than 1e-6, or all of the largest weights are equal, there is no tail to fit (ArviZ 0.8
        returns NaN or refuses): the weights are the raw ones and k is 0. Nor is there one where a
        quarter of it ties with its threshold, as log p rounded to float32 does: k is 0 where all
        weights are within a tenth of each other, and infinite where they are not.

    Raises
    ------
    ValueError
        If there are fewer than 25 draws.
    """
    from arviz_stats.base import array_stats  # late: it takes a second

    flat = log_p.reshape(-1, log_p.shape[2])
    if len(flat) < 25:
        raise ValueError(
            f"a Pareto tail needs 25 draws or more over all chains; there are {len(flat)}. Draw "
            f"more: hundreds are wanted for every standard error."
        )
    log_weights, k = -flat, np.zeros(flat.shape[1])
    for j in np.flatnonzero(np.ptp(flat, axis=0) > _EQUAL):
        try:
            with np.errstate(divide="raise", invalid="raise"):
                log_weights[:, j], k[j] = array_stats.psislw(flat[:, j], r_eff=fraction)
        except ValueError:  # all values of the tail are the same
            continue
        except FloatingPointError:  # a quarter of them is the same
            k[j] = 0.0 if np.ptp(flat[:, j]) < _ALIKE else np.inf
    raw = np.exp(log_weights - log_weights.max(axis=0))
    return (raw / raw.sum(axis=0)).reshape(log_p.shape), k


def _removed(
    values: np.ndarray, labels: np.ndarray, groups: Mapping[Any, Sequence[Any]] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Names of what is removed, and its log-likelihood ``(C, T, groups)``."""
    if groups is None:
        return labels, values
    place = {label: i for i, label in enumerate(labels.tolist())}
    sums = []
    for name, members in groups.items():
        keys = [x.item() if isinstance(x, np.generic) else x for x in members]
        unknown = [x for x in keys if x not in place]
        if unknown:
            raise KeyError(
                f"group {name!r} has observations that are not in log_likelihood: {unknown[:5]}. "
                f"Labels are the coordinate of the observations, such as {labels.tolist()[:3]}."
            )
        if not keys or len(set(keys)) < len(keys):
            raise ValueError(
                f"group {name!r} is empty or names an observation twice. Give each once."
            )
        sums.append(values[:, :, [place[x] for x in keys]].sum(axis=2))
    return text_labels(np.array(list(groups), dtype=object)), np.stack(sums, axis=2)
