"""The Bayesian influence function: covariances of sampled losses."""

from __future__ import annotations

import os
import time
import warnings
from typing import Any, Literal
from weakref import WeakKeyDictionary

import xarray as xr

from bayesinf._accuracy import MonteCarloWarning, check_wanted, draws_needed
from bayesinf._diagnostics import ConvergenceWarning, diagnose
from bayesinf._layout import identity
from bayesinf._store import batch_shares, check_recorded, freedom_of
from bayesinf._streaming import StreamingCovariance
from bayesinf._traces import TraceStore
from bayesinf.attribution._covariance_scores import make_sink, score_pairs, sides

__all__ = ["bif", "checked_center", "damping_of", "passes"]

_DIAGNOSED_EXAMPLES = 100


def bif(
    traces: TraceStore | StreamingCovariance,
    *,
    measurement: str = "loss",
    tokens: Literal["train", "query", "both"] | None = None,
    query: Any = None,
    train: Any = None,
    normalize: Literal["correlation"] | None = None,
    center: Literal["auto", "grand", "chain"] = "auto",
    batches_per_chain: int | None = None,
    block_size: int = 4096,
    target_mcse: float | None = None,
    replicates: bool = False,
    errors: bool = True,
    top_k: int | None = None,
    store: str | os.PathLike[str] | None = None,
) -> xr.Dataset:
    r"""Influence of every train example on every query, with its Monte-Carlo standard error.

    .. math:: \frac{d E[\phi_q]}{d b_i} = -\frac{n_\beta}{n}\,\mathrm{Cov}(\ell_i, \phi_q)

    Negative = helpful: up-weighting the train example lowers the query's loss. Of tokens likewise,
    with the losses of tokens in place of those of examples: scores of tokens add up to those of
    their examples.

    Parameters
    ----------
    traces
        What :func:`bayesinf.sample` returned, traces or sums.
    measurement
        φ: what was recorded of the queries, ``"loss"`` by default.
    tokens
        Whose examples are split into their tokens: ``"train"``, ``"query"`` or ``"both"``. The run
        must have recorded them: ``sample(..., tokens=…)``.
    query, train
        Ids of the examples to score (one, or several), in this order; all by default. Only their
        losses are read: one pair of sequences, token by token, costs next to nothing.
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
    errors
        False: ``influence`` alone, a few times faster where pairs are very many: for a first look
        at all tokens, say. How sure one can be of it is then not known.
    top_k
        Keep only the ``k`` most helpful and the ``k`` most harmful for each query (or query token),
        dims ``(query, side, rank)``, with their errors; the whole matrix never exists.
    store
        Path of a Zarr store that scores stream to, block by block, in float32; as that of the
        classical methods. A call that was killed goes on there, and the result is read lazily.

    Returns
    -------
    xr.Dataset
        ``influence``, ``mcse`` and ``influence_within`` (centred per chain, a check), dims
        ``query`` and ``train``; or ``query_token`` and ``train_token``, flat, with coordinates
        ``train``, ``train_position`` and ``train_token_id`` (``query``, …). An interval is
        ``influence ± t·mcse`` with ``attrs["mcse_df"]`` degrees of freedom;
        ``attrs["relative_mcse"]`` is the precision of them all. With ``replicates``,
        ``influence_replicate (batch, query, train)``, ``batch_share (batch)`` and
        ``influence_half (half, query, train)``.

    Raises
    ------
    KeyError
        If the measurement, or its tokens, were not recorded, or ids are unknown.
    StoreError
        If there is no draw or no healthy chain.
    ValueError
        If there are too few draws for a standard error, the posterior has ``n_beta = 0``,
        ``target_mcse`` is not between 0 and 1, two of ``top_k``, ``store`` and ``replicates`` are
        given, or ``target_mcse`` or ``replicates`` with ``errors=False``.

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
    if not errors and (replicates or target_mcse is not None):
        raise ValueError(
            "errors=False leaves the standard errors out, and target_mcse= and replicates= are "
            "about them. Give one or the other."
        )
    check_recorded(traces, measurement)
    traces.warn_of_failures(stacklevel=2)
    rows, columns = sides(traces, tokens, query, train)
    how = checked_center(traces, center, stacklevel=2)
    settings = {
        "measurement": measurement, "tokens": tokens, "normalize": normalize, "center": how,
        "batches_per_chain": batches_per_chain, "errors": errors,
    }  # fmt: skip
    sink = make_sink(store, top_k, replicates, errors, rows, columns, _run_of(traces, settings))
    posterior, n = traces.config["posterior"], traces.config["task"]["n"]
    damping = damping_of(posterior)
    precision = score_pairs(
        traces,
        measurement,
        rows,
        columns,
        sink,
        1.0 if normalize == "correlation" else posterior["n_beta"] / n,
        errors,
        center=how,
        correlation=normalize == "correlation",
        batches_per_chain=batches_per_chain,
        block=block_size,
        replicates=replicates,
    )
    if target_mcse is not None and not precision <= target_mcse:
        warnings.warn(
            _imprecise(traces.draws, precision, target_mcse), MonteCarloWarning, stacklevel=2
        )
    scores = sink.finish(
        "bif" if normalize is None else "bif_correlation",
        "influence" if normalize is None else "similarity",
        {
            **posterior,
            "damping": damping,
            "measurement": measurement,
            "tokens": tokens,
            "center": how,
            "mcse_df": freedom_of(traces, batches_per_chain) if errors else None,
            "relative_mcse": precision if errors else None,
            "chains": len(traces.healthy),
            "draws": traces.draws,
            "sampler": traces.config["sampler"],
            "batch_size": traces.config["batch_size"],
            **traces.commit_facts.get("checks", {}),
            "checkpoint": traces.config["task"]["checkpoint"],
            **passes(traces, len(traces.ids("query")) + len(traces.ids("train"))),
            "seconds": {
                "sampling": traces.commit_facts["seconds"],
                "covariance": time.perf_counter() - began,
            },
        },
    )
    if replicates:
        scores["batch_share"] = ("batch", batch_shares(traces, batches_per_chain))
    return scores


def _run_of(traces: TraceStore | StreamingCovariance, settings: dict[str, Any]) -> dict[str, Any]:
    """What scores on disk are of."""
    return {
        "method": "bif",
        "run": identity(traces.config),
        "draws": traces.draws,
        "failed": sorted(traces.failed),
        **settings,
    }


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


def passes(traces: TraceStore | StreamingCovariance, observed: int) -> dict[str, int]:
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


_diagnoses: WeakKeyDictionary[Any, tuple[Any, xr.Dataset]] = WeakKeyDictionary()
"""Of each store the last, with the draws that it is of: pairs may be asked for one by one."""


def _quiet_diagnose(traces: TraceStore | StreamingCovariance) -> xr.Dataset:
    state = (traces.draws, traces.healthy)
    held = _diagnoses.get(traces)
    if held is None or held[0] != state:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            held = (state, diagnose(traces, max_examples=_DIAGNOSED_EXAMPLES))
        _diagnoses[traces] = held
    return held[1]
