"""What a calibration found, as a dataset and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr

from bayesinf._local_range import LocalRange
from bayesinf._pilot import GRADIENT_COST, Pilot
from bayesinf._posterior import LocalPosterior
from bayesinf._traces import TraceStore
from bayesinf.curvature import Curvature

__all__ = ["make_report"]

_EIGENVALUES = 200


def make_report(
    posterior: LocalPosterior,
    pilot: Pilot,
    options: Mapping[str, Any],
    local: LocalRange,
    curvature: Curvature,
    facts: Mapping[str, float],
) -> xr.Dataset:
    """Put together what was measured.

    Returns
    -------
    xr.Dataset
        ``virial`` and ``rise`` by ``n_beta``, the temperatures looked at; ``eigenvalue`` by
        ``rank``, some of EK-FAC's, descending; scalars in the attributes, with ``text``, the same
        in words.
    """
    tried = np.array(local.tried).reshape(-1, 3)
    values = torch.cat([block.eigenvalues.flatten() for block in curvature.blocks]).double()
    values = values.sort(descending=True).values
    ranks = np.unique(np.geomspace(1, len(values), _EIGENVALUES).round().astype(int))
    traces = pilot.traces
    seconds = float(traces.commit_facts["seconds"])
    per_pass = seconds / _passes({**traces.config, "draws": traces.draws}, traces)
    numbers = {
        **facts,
        **posterior.config(),
        "damping": posterior.damping,
        "step_size": pilot.sampler.step_size,
        "friction": pilot.sampler.friction,
        "rise": pilot.rise,
        "chain_dimension": pilot.dimension,
        "autocorrelation": pilot.time,
        "pilot_seconds": seconds,
        "seconds": per_pass * _passes(options, traces),
        **{k: v for k, v in options.items() if v is not None},
    }
    data = xr.Dataset(
        {
            "virial": ("n_beta", tried[:, 1]),
            "rise": ("n_beta", tried[:, 2]),
            "eigenvalue": ("rank", values[torch.from_numpy(ranks - 1)].cpu().numpy()),
        },
        coords={"n_beta": tried[:, 0], "rank": ranks},
        attrs=numbers,
    )
    data.attrs["text"] = _words(numbers, data, posterior)
    return data


def _passes(options: Mapping[str, Any], traces: TraceStore) -> float:
    """Forward passes of an example, a gradient counted as what it costs."""
    n = traces.config["task"]["n"]
    steps = options["warmup"] + options["draws"] * options["thin"]
    return float(options["chains"]) * n * (GRADIENT_COST * steps + options["draws"])


def _words(a: Mapping[str, Any], data: xr.Dataset, posterior: LocalPosterior) -> str:
    chosen = data.sel(n_beta=posterior.n_beta) if posterior.n_beta in data.n_beta else None
    lines = [
        f"checkpoint: mean loss {a['loss']:.4g}, gradient norm {a['gradient_norm']:.3g}, gradient "
        f"noise scale {a['gradient_noise_scale']:.3g} examples",
        f"curvature: λ_max = {a['lambda_max']:.4g}, Hessian from {a['lambda_min']:.2g}; damping "
        f"λ = {a['damping']:.4g} (κ = {a['lambda_max'] / a['damping']:.3g}); effective dimension "
        f"{a['effective_dimension']:.0f} of {posterior.task.dimension}",
        f"posterior: n_beta = {a['n_beta']:.4g}, gamma = {a['gamma']:.4g}, weight_decay = "
        f"{a['weight_decay']:.3g}, {a['potential']}",
    ]
    if chosen is not None:
        lines.append(
            f"temperature: Laplace draws raise the loss by {float(chosen.rise):.3g} with virial "
            f"ratio {float(chosen.virial):.2f} (1: quadratic; below: the loss outgrows it)"
        )
    lines += [
        f"kernel: step size {a['step_size']:.3g}, friction {a['friction']:.3g}; preconditioned "
        f"curvature at Laplace draws from {a['preconditioned_low']:.2g} to "
        f"{a['preconditioned_top']:.3g}",
        f"pilot: chains raise the tilted loss by {a['rise']:.3g} in {a['chain_dimension']:.0f} "
        f"effective dimensions; the slowest losses decorrelate in {a['autocorrelation']:.1f} steps",
        f"run: {a['chains']} chains × {a['draws']} draws, thin {a['thin']}, warmup {a['warmup']}: "
        f"about {a['seconds']:.0f} s",
    ]
    return "\n".join(lines)
