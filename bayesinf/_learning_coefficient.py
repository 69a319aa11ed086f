r"""How many directions the loss really constrains: the local learning coefficient, and WBIC.

Both are means over draws of one number, the mean train loss ``L``, so that they come from the
traces of any run that observed all train examples.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import xarray as xr

from bayesinf._batch_sums import degrees_of_freedom
from bayesinf._chains import FailedChainsWarning
from bayesinf._covariance import batch_slices, batches_of_a_chain
from bayesinf._diagnostics import ConvergenceWarning, diagnose, rhat_of_means, trend_share
from bayesinf._disk import StoreError
from bayesinf._scores import versions
from bayesinf._traces import TraceStore

__all__ = ["Mean", "llc", "mean_with_error", "wbic"]

_DIAGNOSED = 100
_CLOSE = 0.01


@dataclass(frozen=True)
class Mean:
    """A mean over draws with its Monte-Carlo standard error and its degrees of freedom."""

    value: float
    mcse: float
    freedom: float


def mean_with_error(values: np.ndarray, batches_per_chain: int | None = None) -> Mean:
    r"""Mean of ``(C, T)`` with its error by batch means, the batches those of covariances.

    ``mcse² = Σ_b (S_b − L_b m)²/(T²C²(1 − Σ_b s_b²))``, ``S_b`` the sum over a batch of ``L_b``
    draws, ``s_b`` its share of the draws, ``m`` the mean over all.

    Raises
    ------
    ValueError
        If the draws do not suffice for two batches.
    """
    slices = batch_slices(len(values), values.shape[1], batches_per_chain)
    length = np.array([s.stop - s.start for s in slices] * len(values), dtype=np.float64)
    mean = float(values.mean(dtype=np.float64))
    sums = np.concatenate([[(chain[s] - mean).sum() for s in slices] for chain in values])
    total = length.sum()
    spread = total**2 - (length**2).sum()
    return Mean(mean, float(np.sqrt(np.square(sums).sum() / spread)), degrees_of_freedom(length))


def llc(traces: TraceStore, *, batches_per_chain: int | None = None) -> xr.Dataset:
    r"""Local learning coefficient of the checkpoint, with its Monte-Carlo standard error.

    .. math:: \hat\lambda = n\beta\,\big(E[L(w)] - L(w_0)\big)

    ``L`` is the mean train loss. Of a tilted posterior it is the loss that its potential has in
    place of it, ``L(w) − ⟨∇L(w0), w − w0⟩``, whose slope at the checkpoint is zero, so that a
    checkpoint in training has an estimate that is not negative for want of convergence. At a
    minimum the two agree.

    In a regular model with Hessian eigenvalues ``h_i`` it is ``½ Σ h_i/(h_i + γ/(nβ) + wd)``, half
    the effective dimension: ``d/2`` for weak localisation. In a singular one it is smaller.

    Parameters
    ----------
    traces
        What :func:`bayesinf.sample` returned, with all train examples observed. Sums of a
        :class:`bayesinf.StreamingCovariance` do not hold the loss of a draw.
    batches_per_chain
        For the standard error, at least; default: as few as make 12 batches over all chains.

    Returns
    -------
    xr.Dataset
        ``llc``, ``mcse`` and ``llc_chain (chain)``, each chain's own estimate. An interval is
        ``llc ± t·mcse`` with ``attrs["mcse_df"]`` degrees of freedom. ``attrs["loss"]`` is
        ``"plain"`` or ``"tilted"``: which loss.

    Raises
    ------
    TypeError
        If this is no store of traces.
    StoreError
        If there is no draw or no healthy chain, or the store does not know ``L(w0)``.
    ValueError
        If not all train examples were observed, ``n_beta = 0``, or the draws are too few.

    Warns
    -----
    ConvergenceWarning
        If :func:`bayesinf.diagnose` finds fault with the chains, or their mean loss drifts or
        differs between them.
    FailedChainsWarning
        If chains diverged; they are left out.

    Notes
    -----
    Lau et al. 2023 (arXiv 2308.12108). At finite ``nβ`` and ``γ`` it is an estimate of the
    learning coefficient with a bias that is not in ``mcse``: look at several ``γ`` and ``nβ``.
    """
    loss = _loss_of_potential(traces)
    n_beta = traces.config["posterior"]["n_beta"]
    start = traces.commit_facts.get("checks", {}).get("loss_at_checkpoint")
    if start is None:
        raise StoreError(
            "this store does not know the loss at the checkpoint, L(w0): it was written by an "
            "earlier version. Sample again into a new store."
        )
    excess = loss - start
    _warn_of_doubt(traces, loss)
    return _labelled("llc", n_beta, excess, traces, batches_per_chain, start)


def wbic(traces: TraceStore, *, batches_per_chain: int | None = None) -> xr.Dataset:
    r"""Widely applicable Bayesian information criterion, with its Monte-Carlo standard error.

    .. math:: \mathrm{WBIC} = n\,E[L(w)] \quad\text{at}\quad n\beta = n/\log n

    An estimate of the free energy of the local posterior at temperature 1; smaller is better.
    ``L`` is as in :func:`bayesinf.llc`.

    Parameters
    ----------
    traces, batches_per_chain
        As of :func:`bayesinf.llc`.

    Returns
    -------
    xr.Dataset
        ``wbic``, ``mcse`` and ``wbic_chain (chain)``, in nats; attributes as of
        :func:`bayesinf.llc`.

    Raises
    ------
    TypeError
        If this is no store of traces.
    StoreError
        If there is no draw or no healthy chain.
    ValueError
        If ``n_beta`` differs from ``n / log n`` by more than 1 %, not all train examples were
        observed, or the draws are too few.

    Warns
    -----
    ConvergenceWarning
        As :func:`bayesinf.llc`.
    FailedChainsWarning
        If chains diverged; they are left out.

    Notes
    -----
    Watanabe 2013, "A widely applicable Bayesian information criterion".
    """
    loss = _loss_of_potential(traces)
    n, n_beta = traces.config["task"]["n"], traces.config["posterior"]["n_beta"]
    wanted = n / math.log(n) if n > 1 else math.inf
    if abs(n_beta - wanted) > _CLOSE * wanted:
        raise ValueError(
            f"WBIC is a mean at n_beta = n/log(n) = {wanted:.4g} for n = {n}; these chains ran at "
            f"n_beta={n_beta:g}. Sample LocalPosterior(task, n_beta={wanted:.6g}, …), or use "
            f"llc(traces), which any n_beta estimates."
        )
    _warn_of_doubt(traces, loss)
    return _labelled("wbic", n, loss, traces, batches_per_chain, None)


def _labelled(
    name: str,
    scale: float,
    values: np.ndarray,
    traces: TraceStore,
    batches_per_chain: int | None,
    start: float | None,
) -> xr.Dataset:
    per_chain = batches_per_chain
    if per_chain is None and len(traces.healthy) > 1:
        per_chain = batches_of_a_chain(traces.chains)
    mean = mean_with_error(values, per_chain)
    posterior, task = traces.config["posterior"], traces.config["task"]
    known = {} if start is None else {"loss_at_checkpoint": start}
    return xr.Dataset(
        {
            name: scale * mean.value,
            "mcse": scale * mean.mcse,
            f"{name}_chain": ("chain", scale * values.mean(axis=1)),
        },
        coords={"chain": traces.healthy},
        attrs={
            **versions(),
            **posterior,
            **known,
            "loss": posterior["potential"],
            "mcse_df": mean.freedom,
            "n": task["n"],
            "chains": len(traces.healthy),
            "draws": traces.draws,
            "checkpoint": task["checkpoint"],
            "parameters": task["parameters"],
        },
    )


def _loss_of_potential(traces: TraceStore) -> np.ndarray:
    """``L``, less the tilt where there is one, at every draw of the healthy chains, ``(C, T)``."""
    if not isinstance(traces, TraceStore):
        raise TypeError(
            f"expected traces, a TraceStore; got {type(traces).__name__}. Sums over draws do not "
            f"hold the loss of a draw: sample(..., store=None or a path) keeps traces."
        )
    posterior, n = traces.config["posterior"], traces.config["task"]["n"]
    seen = len(traces.ids("train"))
    if seen != n:
        raise ValueError(
            f"{seen} of the {n} train examples were observed, and the mean train loss is over all "
            f"of them. Leave 'train' out of sample(..., observe=…)."
        )
    if posterior["n_beta"] == 0:
        raise ValueError("n_beta = 0 samples the prior alone: no loss constrains it.")
    if posterior["potential"] == "plain":
        mean: np.ndarray = traces.values("train").values.mean(axis=2, dtype=np.float64)
        return mean
    _ = traces.values("query")  # names failed chains, and refuses an empty store
    stats = traces.tree["sample_stats"].to_dataset().isel(chain=traces.healthy)
    lp, distance = (stats[name].values.astype(np.float64) for name in ("lp", "distance"))
    precision = posterior["gamma"] + posterior["n_beta"] * posterior["weight_decay"]
    loss: np.ndarray = (-lp - 0.5 * precision * distance**2) / posterior["n_beta"]
    return loss


def _warn_of_doubt(traces: TraceStore, loss: np.ndarray) -> None:
    if traces.draws < 4:
        return
    problems = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FailedChainsWarning)
        report = diagnose(traces, max_examples=_DIAGNOSED)
    if not report.attrs["ok"]:
        problems.append(report.attrs["verdict"])
    rhat, drift = rhat_of_means(loss), float(trend_share(loss[:, :, None])[0])
    if rhat > 1.05:
        problems.append(f"R-hat of the mean train loss is {rhat:.2f} (at most 1.05 is fine)")
    if drift > 0.1:
        problems.append(f"{drift:.0%} of the variance of the mean train loss is linear drift")
    if problems:
        warnings.warn(
            f"this estimate comes from chains in doubt: {'; '.join(problems)}.",
            ConvergenceWarning,
            stacklevel=3,
        )
