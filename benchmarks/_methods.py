"""The methods that the LDS benchmark compares, with their settings: one rule for all tasks.

Nothing here was chosen on the evaluation subsets. Classical methods: EK-FAC's and K-FAC's usual
relative damping (0.1 × the mean eigenvalue of a layer; Grosse et al. 2023); the dense references
and the solvers have λ = 0.1. The BIF is what :func:`bayesinf.calibrate` finds at its defaults, for
2,500 effective draws. BIF from Laplace draws has as many, at 0.1 × the mean eigenvalue of them all
and the temperature that calibration would find. The variants with plain SGLD show what calibration
is worth; they follow a rule in units of the problem, too:

* ``n_beta = n``, total damping ``λ = γ/(nβ) + weight decay = 0.1``;
* step size ``0.3 / (nβ (λ_max + λ))``, with ``λ_max`` the top Hessian eigenvalue of the mean loss
  at the checkpoint, by power iteration (RMSprop: times its ``eps``, as its steps are up to 1/eps
  longer);
* batches of n/10, 16 chains, 400 warm-up steps, 400 draws, 10 steps apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr

import bayesinf as bi
from bayesinf._local_range import find_temperature, first_temperature
from bayesinf.attribution._representation_similarity import representation_similarity
from bayesinf.attribution._text_similarity import bm25, tf_idf
from benchmarks.tasks import BenchmarkTask

__all__ = ["METHODS", "BenchmarkMethod", "top_curvature"]

ERROR = 0.02
DAMPING, STEP, CHAINS, DRAWS, WARMUP, THIN = 0.1, 0.3, 16, 400, 400, 10


@dataclass(frozen=True)
class BenchmarkMethod:
    """A row of the table; one with ``text`` belongs to tasks of language alone."""

    name: str
    core: bool
    family: str
    scores: Callable[[bi.Task, BenchmarkTask, dict[str, Any]], xr.Dataset]
    text: bool = False

    def fits(self, benchmark: BenchmarkTask) -> bool:
        """Whether it says anything about a task."""
        return not self.text or isinstance(benchmark.likelihood, bi.CausalLM)


def top_curvature(task: bi.Task, iterations: int = 30) -> float:
    """Top Hessian eigenvalue (in modulus) of the mean training loss, by power iteration."""
    loss = bi.LocalPosterior(task, n_beta=1.0, gamma=0.0).bind()
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(1, task.dimension, generator=generator).to(loss.center)
    for _ in range(iterations):
        vector = vector / vector.norm()
        vector = loss.hvp(loss.center[None], vector)
    return float(vector.norm())


def _bif(kernel: str, potential: Any, **options: Any) -> Callable[..., xr.Dataset]:
    def scores(task: bi.Task, benchmark: BenchmarkTask, quick: dict[str, Any]) -> xr.Dataset:
        decay, n = benchmark.weight_decay, task.n
        posterior = bi.LocalPosterior(
            task, n_beta=n, gamma=n * (DAMPING - decay), weight_decay=decay, potential=potential
        )
        step = STEP / (n * (top_curvature(task) + DAMPING))
        sampler: Any = bi.SGLD(step)
        if kernel == "rmsprop":
            sampler = bi.RMSpropSGLD(step * 0.1, eps=0.1)
        settings = {"chains": CHAINS, "draws": DRAWS, "warmup": WARMUP, "thin": THIN, **quick}
        traces = bi.sample(posterior, sampler, batch_size=n // 10, progress=False, **settings)
        return bi.bif(traces, **options)

    return scores


def _classical(function: Callable[..., xr.Dataset], **options: Any) -> Callable[..., xr.Dataset]:
    def scores(task: bi.Task, benchmark: BenchmarkTask, quick: dict[str, Any]) -> xr.Dataset:
        return function(task, **options)

    return scores


def _curved(function: Callable[..., xr.Dataset], **options: Any) -> Callable[..., xr.Dataset]:
    def scores(task: bi.Task, benchmark: BenchmarkTask, quick: dict[str, Any]) -> xr.Dataset:
        return function(task, fisher=benchmark.fisher, **options)

    return scores


def _form(form: Any) -> Callable[..., xr.Dataset]:
    def scores(task: bi.Task, benchmark: BenchmarkTask, quick: dict[str, Any]) -> xr.Dataset:
        curvature = bi.fit_curvature(task, fisher=benchmark.fisher, form=form)
        return bi.ekfac(task, curvature=curvature, relative_damping=0.1)

    return scores


_USUAL = {"relative_damping": 0.1}
_SOLVED = {"damping": DAMPING}


def _calibrated(task: bi.Task, benchmark: BenchmarkTask, quick: dict[str, Any]) -> xr.Dataset:
    curvature = bi.fit_curvature(task, fisher=benchmark.fisher)
    found = bi.calibrate(
        task, weight_decay=benchmark.weight_decay, error=ERROR, curvature=curvature
    )
    options = {**found.options, **quick}
    return bi.bif(bi.sample(found.posterior, found.sampler, progress=False, **options))


def _laplace(task: bi.Task, benchmark: BenchmarkTask, quick: dict[str, Any]) -> xr.Dataset:
    """As many independent draws of EK-FAC's Gaussian, as hot as :func:`bayesinf.calibrate` goes."""
    curvature = bi.fit_curvature(task, fisher=benchmark.fisher)
    damping = 0.1 * curvature.trace() / task.dimension
    noise = curvature.inverse(damping).sample(4, torch.Generator(task.device).manual_seed(0))
    unit = bi.LocalPosterior(task, n_beta=1.0, gamma=0.0).bind()
    first = first_temperature(task, damping)
    n_beta = find_temperature(unit, noise, start=first, ratio=0.75).n_beta
    posterior = bi.LocalPosterior(task, n_beta=n_beta, gamma=n_beta * damping)
    settings = {"chains": CHAINS, "draws": round(ERROR**-2 / CHAINS), **quick}
    settings |= {"warmup": 0, "thin": 1}
    traces = bi.sample(posterior, bi.EKFACLaplace(curvature), progress=False, **settings)
    return bi.bif(traces)


METHODS = (
    BenchmarkMethod("BIF", True, "bayesian", _calibrated),
    BenchmarkMethod("EK-FAC", True, "classical", _curved(bi.ekfac, **_USUAL)),
    BenchmarkMethod("K-FAC", True, "classical", _curved(bi.kfac, **_USUAL)),
    BenchmarkMethod("GradDot", True, "classical", _classical(bi.grad_dot)),
    BenchmarkMethod("BM25", True, "classical", _classical(bm25), text=True),
    BenchmarkMethod("TF-IDF", True, "classical", _classical(tf_idf), text=True),
    BenchmarkMethod(
        "representation similarity",
        True,
        "classical",
        _classical(representation_similarity),
        text=True,
    ),
    BenchmarkMethod("BIF, Laplace draws", False, "bayesian", _laplace),
    BenchmarkMethod("BIF, tilted SGLD", False, "bayesian", _bif("sgld", "tilted")),
    BenchmarkMethod("BIF, plain SGLD", False, "bayesian", _bif("sgld", "plain")),
    BenchmarkMethod("BIF, tilted RMSprop-SGLD", False, "bayesian", _bif("rmsprop", "tilted")),
    BenchmarkMethod("BIF, plain RMSprop-SGLD", False, "bayesian", _bif("rmsprop", "plain")),
    BenchmarkMethod(
        "normalised BIF, tilted SGLD",
        False,
        "bayesian",
        _bif("sgld", "tilted", normalize="correlation"),
    ),
    BenchmarkMethod("GradCos", False, "classical", _classical(bi.grad_cos)),
    BenchmarkMethod("diagonal Fisher", False, "classical", _form("diagonal")),
    BenchmarkMethod("EK-FAC, λ of the solvers", False, "classical", _curved(bi.ekfac, **_SOLVED)),
    BenchmarkMethod("EK-FAC, deflated", False, "classical", _curved(bi.deflated_ekfac, **_SOLVED)),
    BenchmarkMethod(
        "conjugate gradients", False, "classical", _curved(bi.conjugate_gradient, **_SOLVED)
    ),
    BenchmarkMethod("ASTRA", False, "classical", _curved(bi.astra, **_SOLVED)),
    BenchmarkMethod(
        "LiSSA", False, "classical", _classical(bi.lissa, damping=DAMPING, iterations=50)
    ),
    BenchmarkMethod(
        "Gauss–Newton, dense", False, "classical", _classical(bi.gauss_newton, damping=DAMPING)
    ),
    BenchmarkMethod("Hessian, dense", False, "classical", _classical(bi.hessian, damping=DAMPING)),
)
