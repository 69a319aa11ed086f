"""A short run that tells how long the real one must be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bayesinf._posterior import LocalPosterior
from bayesinf._run import DivergenceError
from bayesinf._sampling import sample
from bayesinf._traces import TraceStore
from bayesinf.samplers import Underdamped

__all__ = ["GRADIENT_COST", "Pilot", "autocorrelation", "lengths", "run_pilot"]

_DRAWS, _LONGEST, _THIN, _CHAINS, _WARMUP = 100, 800, 2, 8, 15.0
_RESOLVED = 20.0
"""Autocorrelation times that a chain must span for its estimate to mean something."""
_WIDER = 0.02
_HALVINGS = 4
_LOSSES = 100
GRADIENT_COST = 3.0
"""Of a gradient, in forward passes; only their ratio matters, and only to the thinning."""
_LEAST_EFFECTIVE, _WARMUP_TIMES = 20, 5
"""Effective draws of a chain, fewer of which R-hat would find fault with by chance."""


@dataclass(frozen=True)
class Pilot:
    """What a pilot run found.

    Attributes
    ----------
    sampler
        The kernel, with the step size that held.
    traces
        Its draws.
    time
        Integrated autocorrelation time in steps, of the slowest 5 % of the losses.
    resolved
        Whether the run was long enough to know it.
    rise
        Mean rise of the tilted loss, negative where the chains left for a lower place.
    dimension
        Effective dimension ``d − p E‖δ‖²`` at this temperature.
    parameters
        ``d``.
    """

    sampler: Underdamped
    traces: TraceStore
    time: float
    resolved: bool
    rise: float
    dimension: float
    parameters: int

    @property
    def arrived(self) -> bool:
        """Whether the chains stayed around the checkpoint and forgot where they started."""
        return self.resolved and self.rise > 0 and self.held

    @property
    def held(self) -> bool:
        """Whether the chains are no wider than the localisation alone would let them be.

        Equipartition makes the effective dimension positive; a share of the whole is left to the
        noise of a short run.
        """
        return self.dimension > -_WIDER * self.parameters


def run_pilot(
    posterior: LocalPosterior,
    sampler: Underdamped,
    start: float,
    chains: int,
    seed: int,
    how: Mapping[str, Any],
) -> Pilot:
    """Run short chains, longer until they resolve their memory, with half the step where they fail.

    Parameters
    ----------
    posterior, sampler
        What is run.
    start
        Mean loss at the checkpoint.
    chains
        At most so many; a pilot has up to 8.
    seed
        Of the chains.
    how
        ``vectorize`` and ``chunk_size`` of :func:`bayesinf.sample`.

    Raises
    ------
    DivergenceError
        If the chains diverge at every step size tried.
    """
    options = {"chains": min(chains, _CHAINS), "seed": seed, **how}
    for _ in range(_HALVINGS):
        try:
            return _run(posterior, sampler, start, options)
        except DivergenceError:
            sampler = replace(sampler, step_size=sampler.step_size / 2)
    return _run(posterior, sampler, start, options)


def _run(
    posterior: LocalPosterior, sampler: Underdamped, start: float, options: Mapping[str, Any]
) -> Pilot:
    warmup = round(_WARMUP / sampler.step_size**0.5)
    draws, traces = _DRAWS, None
    while True:
        traces = sample(
            posterior, sampler, draws=draws, warmup=warmup, thin=_THIN, store=traces,
            progress=False, **options,
        )  # fmt: skip
        time = autocorrelation(traces)
        resolved = draws * _THIN >= _RESOLVED * time
        if resolved or draws >= _LONGEST:
            rise, dimension = _around(posterior, traces, start)
            d = posterior.task.dimension
            return Pilot(sampler, traces, time, resolved, rise, dimension, d)
        draws *= 2


def _around(posterior: LocalPosterior, traces: TraceStore, start: float) -> tuple[float, float]:
    """Rise of the tilted loss and effective dimension, from the potential and the distance."""
    stats = traces.tree["sample_stats"].to_dataset()
    spread = posterior.prior_precision * float((stats["distance"] ** 2).mean())
    above = -float(stats["lp"].mean()) - 0.5 * spread
    rise = above / posterior.n_beta - start if posterior.n_beta else 0.0
    return rise, posterior.task.dimension - spread


def autocorrelation(traces: TraceStore) -> float:
    """Integrated autocorrelation time, in steps, of the losses that mix slowest (95 % quantile)."""
    from arviz_stats.base import array_stats

    values = traces.values("train").values
    pick = np.unique(np.linspace(0, values.shape[2] - 1, _LOSSES).round().astype(int))
    draws = values.shape[0] * values.shape[1]
    times = [
        draws / array_stats.ess(x, chain_axis=0, draw_axis=1, method="mean")
        for x in np.moveaxis(values[:, :, pick].astype(np.float64), 2, 0)
        if np.ptp(x) > 0
    ]
    return max(1.0, float(np.quantile(times, 0.95)) * traces.config["thin"]) if times else 1.0


def lengths(time: float, chains: int, error: float) -> dict[str, Any]:
    """Warm-up, thinning and draws, for an autocorrelation that decays geometrically.

    With ``ρ`` per step and a draw every ``k`` steps, a draw is worth ``(1−ρᵏ)/(1+ρᵏ)`` independent
    ones and costs ``k`` gradients and an observation; the cheapest ``k`` is taken.

    Parameters
    ----------
    time
        Integrated autocorrelation time in steps, ``(1+ρ)/(1−ρ)``.
    chains
        Number of chains.
    error
        Wanted standard error of a correlation: ``1/error²`` effective draws, 20 a chain at least.
    """
    rho = (time - 1) / (time + 1)

    def draws_per_effective(k: int) -> float:
        return (1 + rho**k) / (1 - rho**k)

    thin = min(
        range(1, math.ceil(time) + 1),
        key=lambda k: (k * GRADIENT_COST + 1) * draws_per_effective(k),
    )
    effective = max(1 / error**2 / chains, _LEAST_EFFECTIVE)
    return {
        "chains": chains,
        "draws": math.ceil(draws_per_effective(thin) * effective),
        "warmup": math.ceil(_WARMUP_TIMES * time),
        "thin": thin,
        "batch_size": None,
    }
