"""The Bayesian influence function: covariances of sampled losses."""

from __future__ import annotations

import time
import warnings
from typing import Literal

import xarray as xr

from bayesinf._accuracy import MonteCarloWarning, check_wanted, draws_needed, relative_mcse
from bayesinf._covariance import CrossCovariance
from bayesinf._diagnostics import ConvergenceWarning, diagnose
from bayesinf._scores import make_scores
from bayesinf._store import check_recorded, covariance_of
from bayesinf._streaming import StreamingCovariance
from bayesinf._traces import TraceStore

__all__ = ["bif", "checked_center", "damping_of"]

_DIAGNOSED_EXAMPLES = 100


def bif(
    traces: TraceStore | StreamingCovariance,
    *,
    measurement: str = "loss",
    normalize: Literal["correlation"] | None = None,
    center: Literal["auto", "grand", "chain"] = "auto",
    batches_per_chain: int | None = None,
    block_size: int = 4096,
    target_mcse: float | None = None,
    replicates: bool = False,
) -> xr.Dataset:
    r"""Influence of every train example on every query, with its Monte-Carlo standard error.

    .. math:: \frac{d E[\phi_q]}{d b_i} = -\frac{n_\beta}{n}\,\mathrm{Cov}(\ell_i, \phi_q)

    Negative = helpful: up-weighting the train example lowers the query's loss.

    Parameters
    ----------
    traces
        What :func:`bayesinf.sample` returned, traces or sums.
    measurement
        φ: what was recorded of the queries, ``"loss"`` by default.
    normalize
        ``"correlation"``: the normalised BIF, ``−Corr(ℓ_i, φ_q)``, a similarity.
    center
        ``"grand"``: on the mean over all chains; ``"chain"``: on each chain's own. ``"auto"``:
        grand where the diagnostics are good, else chain, with a warning.
    batches_per_chain
        For the standard errors, at least; default: as few as make 12 batches over all chains, so
        that they are as long as can be.
    block_size
        Train examples per matrix product, at most (bounds the memory).
    target_mcse
        Warn where the scores are less precise than this, and say how many draws it takes. Relative,
        as in :class:`bayesinf.Until`: the root mean square of ``mcse`` over the standard deviation
        of the query's scores, for the median query; between 0 and 1.
    replicates
        Also keep the scores without each batch and from each half of the chains, from which
        :func:`bayesinf.lds` tells its own Monte-Carlo error; for ``B`` batches this takes ``B + 2``
        times the memory of the scores.

    Returns
    -------
    xr.Dataset
        ``influence``, ``mcse`` and ``influence_within`` (centred per chain, a check), dims
        ``query`` and ``train``. An interval is ``influence ± t·mcse`` with ``attrs["mcse_df"]``
        degrees of freedom; ``attrs["relative_mcse"]`` is the precision of them all. With
        ``replicates``, ``influence_replicate (batch, query, train)``, ``batch_share (batch)`` and
        ``influence_half (half, query, train)``.

    Raises
    ------
    KeyError
        If the measurement was not recorded.
    StoreError
        If there is no draw or no healthy chain.
    ValueError
        If there are too few draws for a standard error, the posterior has ``n_beta = 0``, or
        ``target_mcse`` is not between 0 and 1.

    Warns
    -----
    ConvergenceWarning
        If :func:`bayesinf.diagnose` finds fault with the chains.
    FailedChainsWarning
        If chains diverged; they are left out.
    MonteCarloWarning
        If the scores are less precise than ``target_mcse``.

    Notes
    -----
    Kreer et al. 2025 (arXiv 2509.26544); with n_beta in the exponent the derivative carries nβ/n.
    """
    began = time.perf_counter()
    if target_mcse is not None:
        check_wanted("target_mcse", target_mcse)
    check_recorded(traces, measurement)
    posterior, n = traces.config["posterior"], traces.config["task"]["n"]
    how = checked_center(traces, center, stacklevel=2)
    result = covariance_of(
        traces,
        measurement,
        center=how,
        correlation=normalize == "correlation",
        batches_per_chain=batches_per_chain,
        block=block_size,
        replicates=replicates,
    )
    precision = relative_mcse(result.value, result.mcse)
    if target_mcse is not None and not precision <= target_mcse:
        warnings.warn(
            _imprecise(traces.draws, precision, target_mcse), MonteCarloWarning, stacklevel=2
        )
    scale = 1.0 if normalize == "correlation" else posterior["n_beta"] / n
    scores = make_scores(
        -scale * result.value,
        mcse=scale * result.mcse,
        influence_within=-scale * result.within,
        query=traces.ids("query"),
        train=traces.ids("train"),
        method="bif" if normalize is None else "bif_correlation",
        estimand="influence" if normalize is None else "similarity",
        attrs={
            **posterior,
            "damping": damping_of(posterior),
            "measurement": measurement,
            "center": how,
            "mcse_df": result.freedom,
            "relative_mcse": precision,
            "chains": len(traces.healthy),
            "draws": traces.draws,
            "sampler": traces.config["sampler"],
            "batch_size": traces.config["batch_size"],
            **traces.commit_facts.get("checks", {}),
            "checkpoint": traces.config["task"]["checkpoint"],
            **_passes(traces, result.value.shape[0] + result.value.shape[1]),
            "seconds": {
                "sampling": traces.commit_facts["seconds"],
                "covariance": time.perf_counter() - began,
            },
        },
    )
    return _with_replicates(scores, result, scale) if replicates else scores


def _with_replicates(scores: xr.Dataset, result: CrossCovariance, scale: float) -> xr.Dataset:
    return scores.assign(
        influence_replicate=(("batch", "query", "train"), -scale * result.deleted),
        influence_half=(("half", "query", "train"), -scale * result.halves),
        batch_share=("batch", result.share),
    )


def _imprecise(draws: int, precision: float, wanted: float) -> str:
    needed = draws_needed(draws, precision, wanted)
    advice = (
        f"About {needed - draws} more draws per chain are needed, {needed} in all: call sample() "
        f"again with draws={needed} and the same store"
        if needed is not None
        else "Noise covers the scores, so that the draws needed cannot be foretold: draw ten times "
        "as many and ask again"
    )
    return (
        f"the Monte-Carlo standard error is {precision:.2f} of the spread of the median query's "
        f"scores, and {wanted:g} was wanted. {advice}, or with until=Until(mcse={wanted:g})."
    )


def checked_center(
    traces: TraceStore | StreamingCovariance, center: str, stacklevel: int
) -> Literal["grand", "chain"]:
    """How to centre, and a warning where the chains are in doubt."""
    if center not in ("auto", "grand", "chain"):
        raise ValueError(f"center must be 'auto', 'grand' or 'chain'; got {center!r}.")
    ok = True
    if traces.draws >= 4:
        report = _quiet_diagnose(traces)
        ok = bool(report.attrs["ok"])
        if not ok:
            warnings.warn(
                f"these scores come from chains in doubt: {report.attrs['verdict']}.",
                ConvergenceWarning,
                stacklevel=stacklevel + 1,
            )
    if center == "auto":
        return "grand" if ok else "chain"
    return "grand" if center == "grand" else "chain"


def damping_of(posterior: dict[str, float]) -> float:
    """``λ``, in units of the mean loss; refuses ``n_beta = 0``."""
    if posterior["n_beta"] == 0:
        raise ValueError(
            "n_beta = 0 samples the prior alone: the influence is 0 by definition. As a negative "
            "control look at normalize='correlation' of a posterior with a tiny n_beta, or at the "
            "traces' correlations themselves."
        )
    return posterior["gamma"] / posterior["n_beta"] + posterior["weight_decay"]


def _passes(traces: TraceStore | StreamingCovariance, observed: int) -> dict[str, int]:
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


def _quiet_diagnose(traces: TraceStore | StreamingCovariance) -> xr.Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return diagnose(traces, max_examples=_DIAGNOSED_EXAMPLES)
