r"""The posterior variance of each training loss: self-influence from traces.

Shapes: losses ``(C, T, n)`` of ``C`` chains and ``T`` draws; results ``(n,)``.
"""

from __future__ import annotations

import json
import time
from typing import Any, Literal

import numpy as np
import xarray as xr

from bayesinf._axes import Selection
from bayesinf._batch_sums import degrees_of_freedom
from bayesinf._covariance import batch_slices, batches_of_a_chain
from bayesinf._scores import text_labels, versions
from bayesinf._traces import TraceStore
from bayesinf.attribution._bif import checked_center, damping_of, passes

__all__ = ["self_variance"]

_COLUMNS = 4096


def self_variance(
    traces: TraceStore, *, center: Literal["auto", "grand", "chain"] = "auto"
) -> xr.Dataset:
    r"""Self-influence of the training examples as the BIF sees it, with its standard error.

    .. math:: \mathrm{value}_i = \frac{n_\beta}{n}\,\mathrm{Var}(\ell_i)
              = -\frac{d E[\ell_i]}{d b_i}

    how much leaving example ``i`` out would raise its own loss: **high = memorised, suspicious**.
    It is the diagonal of the train × train covariance, with the sign turned round.

    Parameters
    ----------
    traces
        What :func:`bayesinf.sample` returned.
    center
        As of :func:`bayesinf.bif`.

    Returns
    -------
    xr.Dataset
        ``value`` and ``mcse (train)``, ``value ± t·mcse`` with ``attrs["mcse_df"]`` degrees of
        freedom.

    Raises
    ------
    TypeError
        If these are sums over draws, which hold no variances of training losses.
    KeyError
        If no losses of training examples were recorded.
    StoreError
        If there is no draw or no healthy chain.
    ValueError
        If there are too few draws for a standard error, or ``n_beta`` is 0.

    Warns
    -----
    ConvergenceWarning
        If :func:`bayesinf.diagnose` finds fault with the chains.
    FailedChainsWarning
        If chains diverged; they are left out.
    """
    began = time.perf_counter()
    if not isinstance(traces, TraceStore):
        raise TypeError(
            f"self_variance needs traces; got a {type(traces).__name__}, and sums over draws hold "
            f"covariances of training with query losses alone. Sample with store=None or a path, "
            f"or observe the training examples as queries, too."
        )
    traces.warn_of_failures(stacklevel=2)
    how = checked_center(traces, center, stacklevel=2)
    posterior, n = traces.config["posterior"], traces.config["task"]["n"]
    damping = damping_of(posterior)
    ids, scale = traces.ids("train"), posterior["n_beta"] / n
    per_chain = batches_of_a_chain(traces.chains) if len(traces.healthy) > 1 else None
    variance, error, freedom = np.empty(len(ids)), np.empty(len(ids)), 0.0
    for start in range(0, len(ids), _COLUMNS):
        own = np.arange(start, min(start + _COLUMNS, len(ids)))
        losses = traces.read("train", "loss", Selection(pick=own))
        variance[own], error[own], freedom = variances(losses, how, per_chain)
    seconds = {
        "sampling": traces.commit_facts["seconds"],
        "variance": time.perf_counter() - began,
    }
    attrs: dict[str, Any] = {
        "method": "self_variance",
        "high": "hard or suspicious",
        **posterior,
        "damping": damping,
        "center": how,
        "mcse_df": freedom,
        "chains": len(traces.healthy),
        "draws": traces.draws,
        "checkpoints": 1,
        "checkpoint": traces.config["task"]["checkpoint"],
        "n": n,
        **passes(traces, len(ids)),
        "seconds": json.dumps(seconds),
        **versions(),
    }
    return xr.Dataset(
        {"value": ("train", scale * variance), "mcse": ("train", scale * error)},
        coords={"train": text_labels(ids)},
        attrs=attrs,
    )


def variances(
    losses: np.ndarray, center: str, per_chain: int | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Variances ``(n,)`` of columns, their batch-means standard errors, degrees of freedom.

    Of each column the numbers that :func:`~bayesinf._covariance.cross_covariance` gives of it with
    itself.
    """
    chains, draws = losses.shape[:2]
    slices = batch_slices(chains, draws, per_chain)
    length = np.array([s.stop - s.start for s in slices] * chains, dtype=np.float64)
    mean = losses.mean(axis=1 if center == "chain" else (0, 1), dtype=np.float64, keepdims=True)
    squares = (losses - mean) ** 2
    sums = np.add.reduceat(squares, [s.start for s in slices], axis=1).reshape(len(length), -1)
    total = length.sum()
    value = sums.sum(axis=0) / total
    spread = total - (length**2).sum() / total
    deviation = ((sums - length[:, None] * value) ** 2).sum(axis=0)
    factor = total / (total - 1)
    error = factor * np.sqrt(deviation / (spread * total))
    return factor * value, error, degrees_of_freedom(length)
