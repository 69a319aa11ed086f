"""The Bayesian influence function of a task in one call: calibrated, sampled, scored."""

from __future__ import annotations

import json
import os
import time
from typing import Any, Literal

import xarray as xr

from bayesinf._calibration import calibrate
from bayesinf._sampling import sample
from bayesinf._task import Measurement, Task, measurement_name
from bayesinf.attribution._bif import bif as bif_of_traces
from bayesinf.attribution._needs import GAUSS_NEWTON_PRODUCTS
from bayesinf.attribution._registry import register
from bayesinf.curvature import Curvature, fit_curvature
from bayesinf.curvature._fit import Fisher

__all__ = ["bif"]


@register(
    "influence",
    "covariances of losses, sampled around the checkpoint",
    needs=GAUSS_NEWTON_PRODUCTS,
)
def bif(
    task: Task,
    *,
    damping: float | None = None,
    condition: float = 100.0,
    n_beta: float | None = None,
    weight_decay: float = 0.0,
    error: float = 0.01,
    chains: int = 16,
    fisher: Fisher | None = None,
    curvature: Curvature | None = None,
    measurement: Measurement = "loss",
    tokens: Literal["train", "query", "both"] | None = None,
    normalize: Literal["correlation"] | None = None,
    replicates: bool = False,
    top_k: int | None = None,
    batch_size: int = 1000,
    seed: int = 0,
    traces: str | os.PathLike[str] | None = None,
    store: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> xr.Dataset:
    r"""Influence ``−(nβ/n) Cov(ℓ_t, φ_q)`` under the posterior that calibration finds.

    :func:`bayesinf.calibrate`, :func:`bayesinf.sample` and :func:`bayesinf.bif`, one after another,
    at their defaults. Whoever wants another posterior, kernel or length of run calls the three.

    Parameters
    ----------
    task
        Network, likelihood, training and query examples.
    damping, condition, n_beta, weight_decay, error, chains, curvature
        As of :func:`bayesinf.calibrate`; ``damping`` is λ = γ/(nβ) + weight decay.
    fisher
        Instead of ``curvature``: how it is fitted, as of :func:`bayesinf.fit_curvature`.
    measurement, tokens
        As of :func:`bayesinf.sample` and :func:`bayesinf.bif`; one measurement.
    normalize, replicates, top_k, store
        As of :func:`bayesinf.bif`.
    batch_size
        Examples of a forward pass; gradients are of all examples, and scores do not depend on it
        beyond rounding.
    seed
        Of everything random.
    traces
        Path of the Zarr store of the draws, from which the same call goes on; None for memory.
    progress
        Whether to show a progress bar.

    Returns
    -------
    xr.Dataset
        As :func:`bayesinf.bif`; ``seconds`` also of the calibration, passes of the run alone.

    Raises
    ------
    ValueError
        As :func:`bayesinf.calibrate`; if both ``fisher`` and ``curvature`` are given.
    DivergenceError
        If chains diverge.

    Warns
    -----
    ConvergenceWarning
        If the chains are in doubt.

    References
    ----------
    Kreer et al. 2025 (arXiv 2509.26544).
    """
    if fisher is not None and curvature is not None:
        raise ValueError(
            "give one of fisher= (to fit a curvature here) and curvature= (from "
            "bi.fit_curvature), or neither; got both."
        )
    began = time.perf_counter()
    if fisher is not None:
        curvature = fit_curvature(task, fisher=fisher)
    found = calibrate(
        task,
        condition=condition,
        damping=damping,
        n_beta=n_beta,
        weight_decay=weight_decay,
        error=error,
        chains=chains,
        curvature=curvature,
        chunk_size=batch_size,
        seed=seed,
    )
    spent = time.perf_counter() - began
    name = measurement_name(measurement)
    measured: Any = {name: measurement} if callable(measurement) else (name,)
    drawn = sample(
        found.posterior,
        found.sampler,
        measurements=measured,
        tokens=tokens,
        seed=seed,
        store=traces,
        progress=progress,
        **found.options,
    )
    scores = bif_of_traces(
        drawn,
        measurement=name,
        tokens=tokens,
        normalize=normalize,
        replicates=replicates,
        top_k=top_k,
        store=store,
    )
    seconds = {"calibration": round(spent, 6), **json.loads(scores.attrs["seconds"])}
    return scores.assign_attrs(seconds=json.dumps(seconds), n=task.n)
