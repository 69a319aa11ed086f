"""The Bayesian influence function: covariances of sampled losses."""

from __future__ import annotations

import time
import warnings
from typing import Literal

import xarray as xr

from bayesinf._covariance import cross_covariance
from bayesinf._diagnostics import ConvergenceWarning, diagnose
from bayesinf._scores import make_scores
from bayesinf._traces import TraceStore

__all__ = ["bif"]

_DIAGNOSED_EXAMPLES = 100


def bif(
    traces: TraceStore,
    *,
    measurement: str = "loss",
    normalize: Literal["correlation"] | None = None,
    center: Literal["auto", "grand", "chain"] = "auto",
    batches_per_chain: int | None = None,
    block_size: int = 4096,
) -> xr.Dataset:
    r"""Influence of every train example on every query, with its Monte-Carlo standard error.

    .. math:: \frac{d E[\phi_q]}{d b_i} = -\frac{n_\beta}{n}\,\mathrm{Cov}(\ell_i, \phi_q)

    Negative = helpful: up-weighting the train example lowers the query's loss.

    Parameters
    ----------
    traces
        What :func:`bayesinf.sample` returned.
    measurement
        φ: what was recorded of the queries, ``"loss"`` by default.
    normalize
        ``"correlation"``: the normalised BIF, ``−Corr(ℓ_i, φ_q)``, a similarity.
    center
        ``"grand"``: on the mean over all chains; ``"chain"``: on each chain's own. ``"auto"``:
        grand where the diagnostics are good, else chain, with a warning.
    batches_per_chain
        For the standard errors; default: as few as make 20 batches over all chains, so that they
        are as long as can be.
    block_size
        Train examples per matrix product (bounds the memory).

    Returns
    -------
    xr.Dataset
        ``influence``, ``mcse`` and ``influence_within`` (centred per chain, a check), dims
        ``query`` and ``train``. An interval is ``influence ± t·mcse`` with ``attrs["mcse_df"]``
        degrees of freedom.

    Raises
    ------
    KeyError
        If the measurement was not recorded.
    StoreError
        If there is no draw or no healthy chain.
    ValueError
        If there are too few draws for a standard error, or the posterior has ``n_beta = 0``.

    Warns
    -----
    ConvergenceWarning
        If :func:`bayesinf.diagnose` finds fault with the chains.
    FailedChainsWarning
        If chains diverged; they are left out.

    Notes
    -----
    Kreer et al. 2025 (arXiv 2509.26544); with n_beta in the exponent the derivative carries nβ/n.
    """
    began = time.perf_counter()
    posterior, n = traces.config["posterior"], traces.config["task"]["n"]
    train, query = traces.values("train"), _quiet_values(traces, measurement)
    ok = True
    if train.sizes["draw"] >= 4:
        report = _quiet_diagnose(traces)
        ok = bool(report.attrs["ok"])
        if not ok:
            warnings.warn(
                f"these scores come from chains in doubt: {report.attrs['verdict']}.",
                ConvergenceWarning,
                stacklevel=2,
            )
    how = ("grand" if ok else "chain") if center == "auto" else center
    result = cross_covariance(
        query.values,
        train.values,
        center=how,
        correlation=normalize == "correlation",
        batches_per_chain=batches_per_chain,
        block=block_size,
    )
    scale = 1.0 if normalize == "correlation" else posterior["n_beta"] / n
    return make_scores(
        -scale * result.value,
        mcse=scale * result.mcse,
        influence_within=-scale * result.within,
        query=query["query"].values,
        train=train["train"].values,
        method="bif" if normalize is None else "bif_correlation",
        estimand="influence" if normalize is None else "similarity",
        attrs={
            **posterior,
            "damping": _damping(posterior),
            "measurement": measurement,
            "center": how,
            "mcse_df": result.batches - 1,
            "chains": len(traces.healthy),
            "draws": traces.draws,
            "sampler": traces.config["sampler"],
            "batch_size": traces.config["batch_size"],
            **traces.commit_facts.get("checks", {}),
            "checkpoint": traces.config["task"]["checkpoint"],
            **_passes(traces, train.sizes["train"] + query.sizes["query"]),
            "seconds": {
                "sampling": traces.commit_facts["seconds"],
                "covariance": time.perf_counter() - began,
            },
        },
    )


def _damping(posterior: dict[str, float]) -> float:
    if posterior["n_beta"] == 0:
        raise ValueError(
            "n_beta = 0 samples the prior alone: the influence is 0 by definition. As a negative "
            "control look at normalize='correlation' of a posterior with a tiny n_beta, or at the "
            "traces' correlations themselves."
        )
    return posterior["gamma"] / posterior["n_beta"] + posterior["weight_decay"]


def _passes(traces: TraceStore, observed: int) -> dict[str, int]:
    """Examples that went forward and backward, over all chains."""
    config = traces.config
    steps = config["warmup"] + traces.draws * config["thin"]
    n, chosen = config["task"]["n"], config["batch_size"]
    more = chosen if isinstance(chosen, dict) else {"size": chosen or n}
    default = "checkpoint" if config["posterior"]["potential"] == "tilted" else "none"
    anchor = more.get("anchor", default) if chosen else "none"
    gradients = steps * more["size"] * (1 if anchor == "none" else 2)
    gradients += -(-steps // more["every"]) * n if "every" in more else 0
    gradients *= traces.chains
    forward = gradients + traces.chains * traces.draws * observed
    return {"forward_examples": forward, "backward_examples": gradients}


def _quiet_values(traces: TraceStore, measurement: str) -> xr.DataArray:
    """Query values; failed chains were named when the train values were read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return traces.values("query", measurement)


def _quiet_diagnose(traces: TraceStore) -> xr.Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return diagnose(traces, max_examples=_DIAGNOSED_EXAMPLES)
