r"""From the curvature at a checkpoint to a posterior, a kernel and a length of run.

1. ``λ_max``, the top eigenvalue of the Gauss–Newton matrix of the mean loss, and **one choice**,
   the condition number ``κ = λ_max/λ`` (or the damping ``λ`` itself), give the localisation. Where
   the Hessian has a negative eigenvalue, the localisation is twice as strong: no chain stays at a
   saddle.
2. An EK-FAC inverse at that damping, deflated by the directions it misses, is the kernel's
   preconditioner. Draws from it at several temperatures give the virial ratio
   (:mod:`bayesinf._local_range`); ``nβ`` is the hottest at which the loss is still local.
3. The step follows from the top eigenvalue of the preconditioned Hessian *at such draws*, where it
   is several times what it is at the checkpoint.
4. A short pilot run gives the autocorrelation time of the losses, and with it warm-up, thinning and
   the number of draws for the wanted error.

Nothing here has units: a rescaled loss or doubled data change ``λ``, ``nβ`` and the step as they
must, and nothing else.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any, NamedTuple, TypedDict

import torch
import xarray as xr
from torch import Tensor

from bayesinf._calibration_report import make_report
from bayesinf._diagnostics import ConvergenceWarning
from bayesinf._local_range import find_temperature, first_temperature, look_at
from bayesinf._pilot import Pilot, lengths, run_pilot
from bayesinf._posterior import LocalPosterior, Potential
from bayesinf._task import Task
from bayesinf.curvature import (
    Curvature,
    DeflatedInverse,
    GaussNewtonProduct,
    HessianProduct,
    deflate,
    fit_curvature,
    top_eigenpairs,
)
from bayesinf.curvature._lanczos import Spectrum, estimate_spectrum
from bayesinf.samplers import Preconditioner, Underdamped
from bayesinf.samplers._preconditioner import pull, push

__all__ = ["Calibration", "calibrate", "choose_kernel", "lowest_curvature", "potential_spectrum"]

_LAPLACE_DRAWS, _SPECTRA, _SPECTRUM_STEPS = 16, 2, 15
_STABLE = 1.5
"""``ε ã_max``: 4 is the limit on a quadratic potential, and the curvature varies."""
_HESSIAN_STEPS = 40
_MARGIN = 2.0
"""By how much the localisation outweighs negative curvature."""


class _How(TypedDict):
    """How gradients are computed."""

    vectorize: bool | None
    chunk_size: int


class Calibration(NamedTuple):
    """What :func:`calibrate` found; ``posterior, sampler, options, report = calibrate(task)``.

    Attributes
    ----------
    posterior
        The local posterior.
    sampler
        The kernel with its step size.
    options
        ``chains``, ``draws``, ``warmup``, ``thin`` and the rest for :func:`bayesinf.sample`.
    report
        What was measured; ``report.attrs["text"]`` says it in words, and
        :func:`bayesinf.plots.plot_calibration` draws it.
    """

    posterior: LocalPosterior
    sampler: Underdamped
    options: dict[str, Any]
    report: xr.Dataset


def calibrate(
    task: Task,
    *,
    condition: float = 100.0,
    damping: float | None = None,
    n_beta: float | None = None,
    weight_decay: float = 0.0,
    virial: float = 0.75,
    error: float = 0.01,
    chains: int = 16,
    curvature: Curvature | None = None,
    rank: int = 32,
    control: bool = False,
    vectorize: bool | None = None,
    chunk_size: int = 1000,
    seed: int = 0,
) -> Calibration:
    r"""Choose posterior, kernel and length of run for a checkpoint.

    Parameters
    ----------
    task
        Network, likelihood and examples.
    condition
        ``κ = λ_max/λ > 1``: how much stiffer the stiffest direction of the loss is than the
        localisation. Less where the Hessian has an eigenvalue below ``−λ/2``.
    damping
        ``λ = γ/(nβ) + weight_decay`` itself, where it is known, e.g. from
        :func:`bayesinf.source_damping`; then ``condition`` is not used.
    n_beta
        ``nβ``, where it is known; else the hottest at which the loss is still local.
    weight_decay
        Coefficient of ``½‖w‖²`` in the objective; the rest of ``λ`` is ``γ/(nβ)``.
    virial
        The virial ratio that counts as local: 1 for a quadratic loss, less where it outgrows one.
    error
        Wanted Monte-Carlo standard error of the correlation of two losses: ``1/error²`` effective
        draws, at least 20 a chain.
    chains
        Number of chains.
    curvature
        :func:`bayesinf.fit_curvature` of the task; default: enumerated where the likelihood allows,
        else empirical.
    rank
        Directions by which its inverse is deflated.
    control
        True: the negative control, ``n_beta = 0`` with the same localisation. What its traces show
        comes from the network, not from the data.
    vectorize, chunk_size
        As in :func:`bayesinf.sample`.
    seed
        Of everything random.

    Returns
    -------
    Calibration
        ``bi.sample(c.posterior, c.sampler, **c.options)`` runs it.

    Raises
    ------
    ValueError
        If a setting is out of range, or the damping does not exceed the weight decay and the
        Hessian's most negative eigenvalue.
    DivergenceError
        If no step size in reach holds the chains.
    RuntimeError
        If no temperature is local.

    Warns
    -----
    ConvergenceWarning
        If the pilot's chains do not settle around the checkpoint.

    Notes
    -----
    That the localisation should follow ``λ_max``, and the step size both, is the κ recipe that
    practitioners of local learning coefficients use; here the preconditioner takes its place for
    the step, and the temperature is measured.

    Examples
    --------
    >>> import torch, bayesinf as bi
    >>> x, y = torch.randn(40, 3), torch.randn(40, 1)
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> task = bi.Task(net, bi.Gaussian(), train=(x, y), query=(x[:5], y[:5]))
    >>> posterior, sampler, options, report = bi.calibrate(task, error=0.1)
    >>> traces = bi.sample(posterior, sampler, progress=False, **options)
    """
    _check(condition, error, chains, n_beta)
    how: _How = {"vectorize": vectorize, "chunk_size": chunk_size}
    product = GaussNewtonProduct(task, batch_size=chunk_size)
    curvature = _curvature(task, curvature)
    top = float(top_eigenpairs(product, 1, tolerance=1e-2, seed=seed).values[0])
    lowest = lowest_curvature(task, chunk_size, seed)
    lam = _damping(top, lowest, condition, damping, weight_decay)
    inverse = deflate(curvature, product, damping=lam, rank=min(rank, task.dimension), which="LA")
    noise = inverse.sample(_LAPLACE_DRAWS, torch.Generator(task.device).manual_seed(seed))
    unit = LocalPosterior(task, n_beta=1.0, gamma=0.0).bind(**how)
    local = (
        find_temperature(unit, noise, start=first_temperature(task, lam), ratio=virial)
        if n_beta is None
        else look_at(unit, noise, n_beta)
    )
    n_beta = local.n_beta
    posterior = LocalPosterior(task, n_beta, n_beta * (lam - weight_decay), weight_decay)
    ends, sampler = choose_kernel(posterior, inverse, noise, seed)
    if control:
        posterior, sampler = _without_loss(posterior)
    pilot = run_pilot(posterior, sampler, float(unit.value(unit.center[None])), chains, seed, how)
    if not (pilot.arrived or control):
        _warn(pilot, posterior)
    facts = {
        **_at_the_checkpoint(unit, curvature, lam),
        "lambda_max": top,
        "lambda_min": lowest,
        "preconditioned_low": min(e.low for e in ends),
        "preconditioned_top": max(e.high for e in ends),
    }
    options = {**lengths(pilot.time, chains, error), **how}
    report = make_report(posterior, pilot, options, local, curvature, facts)
    return Calibration(posterior, pilot.sampler, options, report)


def _check(condition: float, error: float, chains: int, n_beta: float | None) -> None:
    if not 1 < condition < math.inf:
        raise ValueError(
            f"condition is κ = λ_max/λ and must exceed 1; got {condition}. 100 is a good start; "
            f"larger means a weaker localisation."
        )
    if not 0 < error < 1:
        raise ValueError(
            f"error is the wanted standard error of a correlation, between 0 and 1; got {error}."
        )
    if chains < 1:
        raise ValueError(f"chains must be at least 1; got {chains}.")
    if n_beta is not None and not 0 < n_beta < math.inf:
        raise ValueError(
            f"n_beta must be positive and finite; got {n_beta}. The negative control, n_beta = 0 "
            f"with the localisation of a calibrated posterior, is control=True."
        )


def _curvature(task: Task, curvature: Curvature | None) -> Curvature:
    if curvature is not None:
        curvature.require_task(task)
        return curvature
    known = hasattr(task.likelihood, "fisher_factor")
    return fit_curvature(task, fisher="enumerated" if known else "empirical")


def lowest_curvature(task: Task, chunk_size: int, seed: int) -> float:
    """Smallest eigenvalue of the Hessian of the mean loss, where it is negative enough to see."""
    generator = torch.Generator(task.device).manual_seed(seed)
    start = torch.randn(1, task.dimension, generator=generator, device=task.device)
    hessian = HessianProduct(task, batch_size=chunk_size)
    return estimate_spectrum(hessian.apply, start.to(task.dtype), steps=_HESSIAN_STEPS).low


def _damping(
    top: float, lowest: float, condition: float, damping: float | None, weight_decay: float
) -> float:
    if not top > 0:
        raise ValueError(
            f"the top eigenvalue of the Gauss–Newton matrix is {top:.3g}: the loss does not depend "
            f"on the selected parameters. Check Task(..., parameters=…)."
        )
    lam = max(top / condition, -_MARGIN * lowest) if damping is None else damping
    if not weight_decay < lam < math.inf:
        raise ValueError(
            f"the damping λ must exceed the weight decay, a part of it: got λ={lam:.3g} and "
            f"weight_decay={weight_decay:.3g}. Lower condition, or raise damping."
        )
    if lam <= -lowest:
        raise ValueError(
            f"at damping={lam:.3g} the checkpoint is no minimum of any local posterior: the "
            f"Hessian has the eigenvalue {lowest:.3g}, and the chains would leave. Usual cause: a "
            f"checkpoint far from converged. Raise damping well above {-lowest:.3g} (the default "
            f"takes {_MARGIN:g} times that), or train on."
        )
    return lam


def choose_kernel(
    posterior: LocalPosterior, inverse: Curvature | DeflatedInverse, noise: Tensor, seed: int
) -> tuple[list[Spectrum], Underdamped]:
    """Step from the stiffest direction at Laplace draws, friction from the softest."""
    potential = posterior.bind()
    preconditioner = Preconditioner(inverse, posterior.n_beta)
    ends = [
        potential_spectrum(potential, preconditioner, potential.center + delta, seed=seed)
        for delta in noise[:_SPECTRA] / posterior.n_beta**0.5
    ]
    friction = (2 * max(0.0, min(e.low for e in ends))) ** 0.5
    step_size = _STABLE / max(e.high for e in ends)
    return ends, Underdamped(step_size, min(max(friction, 0.3), 2.0), preconditioner)


def potential_spectrum(
    potential: Potential, preconditioner: Preconditioner | None, position: Tensor, *, seed: int = 0
) -> Spectrum:
    """Ends of the spectrum of ``Sᵀ ∇²U S`` at a position ``(d,)``."""
    generator = torch.Generator(position.device).manual_seed(seed)
    start = torch.randn(1, len(position), generator=generator, device=position.device)

    def product(rows: Tensor) -> Tensor:
        return pull(preconditioner, potential.hvp(position[None], push(preconditioner, rows)))

    return estimate_spectrum(product, start.to(position.dtype), steps=_SPECTRUM_STEPS)


def _without_loss(posterior: LocalPosterior) -> tuple[LocalPosterior, Underdamped]:
    """``nβ = 0`` with the same localisation, and the kernel that draws it almost independently."""
    precision = posterior.prior_precision
    control = replace(posterior, n_beta=0.0, gamma=precision, weight_decay=0.0)
    return control, Underdamped(1.5 / precision, precision**0.5)


def _warn(pilot: Pilot, posterior: LocalPosterior) -> None:
    """Say that the pilot's chains have not settled around the checkpoint."""
    if not pilot.resolved:
        why = (
            f"they decorrelate in {pilot.time:.0f} steps or more, too slowly for the pilot to tell"
        )
    elif pilot.rise <= 0:
        why = f"the tilted loss fell by {-pilot.rise:.3g}: they left for a lower place"
    else:
        why = (
            f"they are wider than the localisation alone would have them (effective dimension "
            f"{pilot.dimension:.0f} of {pilot.parameters}): the step is too long for the kinks or "
            f"the rounding of the loss at so low a temperature"
        )
    warnings.warn(
        f"the pilot's chains have not settled around the checkpoint at n_beta="
        f"{posterior.n_beta:.3g}, damping={posterior.damping:.3g}: {why}. Usual cause: a "
        f"checkpoint far from converged, or a weak localisation. Lower condition (a larger "
        f"damping), raise n_beta, or train on; diagnose() of the whole run has the last word.",
        ConvergenceWarning,
        stacklevel=3,
    )


def _at_the_checkpoint(unit: Potential, curvature: Curvature, lam: float) -> dict[str, float]:
    """Loss, gradient, its noise, and the effective dimension at ``w0``."""
    gradient = unit.loss_grad(unit.center[None], None)
    value = unit.value(unit.center[None])
    second_moment = fit_curvature(unit.posterior.task, fisher="empirical", form="identity").trace()
    squared = float(gradient.double().square().sum())
    eigenvalues = torch.cat([block.eigenvalues.flatten() for block in curvature.blocks]).double()
    return {
        "loss": float(value),
        "gradient_norm": squared**0.5,
        "gradient_noise_scale": (second_moment - squared) / squared if squared else math.inf,
        "effective_dimension": float((eigenvalues / (eigenvalues + lam)).sum()),
    }
