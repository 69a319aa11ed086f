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

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import xarray as xr

import bayesinf as bi
from bayesinf._local_range import find_temperature, first_temperature
from bayesinf._measuring import measured
from bayesinf.attribution._entry_points import find_method
from benchmarks.tasks import BenchmarkTask

__all__ = [
    "METHODS", "BenchmarkMethod", "add_bif_arguments", "bif_options", "task_options",
    "top_curvature",
]  # fmt: skip

ERROR = 0.02
DAMPING, STEP, CHAINS, DRAWS, WARMUP, THIN = 0.1, 0.3, 16, 400, 400, 10
_USUAL = {"relative_damping": 0.1}
_SOLVED = {"damping": DAMPING}

Scores = Callable[[bi.Task, BenchmarkTask], xr.Dataset]


@dataclass(frozen=True)
class BenchmarkMethod:
    """A row of the table.

    Attributes
    ----------
    name
        As printed.
    method
        Name in the registry of :func:`bayesinf.attribute`, or a function.
    options
        Of a method by name, with :func:`task_options`.
    family
        ``"bayesian"`` or ``"classical"``.
    core
        Whether it is among those that run by default.
    text
        Whether it belongs to tasks of language alone.
    """

    name: str
    method: str | Scores
    options: Mapping[str, Any] = field(default_factory=dict)
    family: str = "classical"
    core: bool = False
    text: bool = False

    def fits(self, benchmark: BenchmarkTask) -> bool:
        """Whether it says anything about a task."""
        return not self.text or isinstance(benchmark.likelihood, bi.CausalLM)

    def scores(self, task: bi.Task, benchmark: BenchmarkTask) -> xr.Dataset:
        """Score a task; what it cost is in ``attrs``, as :func:`bayesinf.attribute` has it."""
        if isinstance(self.method, str):
            options = {**task_options(self.method, benchmark), **self.options}
            return bi.attribute(task, self.method, **options)
        with measured() as cost:
            scores = self.method(task, benchmark)
        stages = json.loads(scores.attrs["seconds"])
        stages = {"preparation": cost.wall - sum(stages.values()), **stages}
        return scores.assign_attrs(
            seconds=json.dumps(stages),
            processor_seconds=cost.cpu,
            peak_memory=int(2**20 * cost.memory),
            disk=0,
        )


def task_options(method: str, benchmark: BenchmarkTask) -> dict[str, Any]:
    """Options of a method by name that follow from the task: its Fisher matrix and weight decay."""
    known = {"fisher": benchmark.fisher, "weight_decay": benchmark.weight_decay}
    return {name: known[name] for name in known if name in find_method(method).takes}


def top_curvature(task: bi.Task, iterations: int = 30) -> float:
    """Top Hessian eigenvalue (in modulus) of the mean training loss, by power iteration."""
    loss = bi.LocalPosterior(task, n_beta=1.0, gamma=0.0).bind()
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(1, task.dimension, generator=generator).to(loss.center)
    for _ in range(iterations):
        vector = vector / vector.norm()
        vector = loss.hvp(loss.center[None], vector)
    return float(vector.norm())


def _bif(kernel: str, potential: Any, **options: Any) -> Scores:
    def scores(task: bi.Task, benchmark: BenchmarkTask) -> xr.Dataset:
        decay, n = benchmark.weight_decay, task.n
        posterior = bi.LocalPosterior(
            task, n_beta=n, gamma=n * (DAMPING - decay), weight_decay=decay, potential=potential
        )
        step = STEP / (n * (top_curvature(task) + DAMPING))
        sampler: Any = bi.SGLD(step)
        if kernel == "rmsprop":
            sampler = bi.RMSpropSGLD(step * 0.1, eps=0.1)
        traces = bi.sample(
            posterior, sampler, batch_size=n // 10, progress=False,
            chains=CHAINS, draws=DRAWS, warmup=WARMUP, thin=THIN,
        )  # fmt: skip
        return bi.bif(traces, **options)

    return scores


def _laplace(task: bi.Task, benchmark: BenchmarkTask) -> xr.Dataset:
    """As many independent draws of EK-FAC's Gaussian, as hot as :func:`bayesinf.calibrate` goes."""
    curvature = bi.fit_curvature(task, fisher=benchmark.fisher)
    damping = 0.1 * curvature.trace() / task.dimension
    noise = curvature.inverse(damping).sample(4, torch.Generator(task.device).manual_seed(0))
    unit = bi.LocalPosterior(task, n_beta=1.0, gamma=0.0).bind()
    first = first_temperature(task, damping)
    n_beta = find_temperature(unit, noise, start=first, ratio=0.75).n_beta
    posterior = bi.LocalPosterior(task, n_beta=n_beta, gamma=n_beta * damping)
    traces = bi.sample(
        posterior, bi.EKFACLaplace(curvature), progress=False,
        chains=CHAINS, draws=round(ERROR**-2 / CHAINS), warmup=0, thin=1,
    )  # fmt: skip
    return bi.bif(traces)


def _diagonal(task: bi.Task, benchmark: BenchmarkTask) -> xr.Dataset:
    curvature = bi.fit_curvature(task, fisher=benchmark.fisher, form="diagonal")
    return bi.ekfac(task, curvature=curvature, **_USUAL)


METHODS = (
    BenchmarkMethod("BIF", "bif", {"error": ERROR, "chains": CHAINS}, "bayesian", core=True),
    BenchmarkMethod("EK-FAC", "ekfac", _USUAL, core=True),
    BenchmarkMethod("K-FAC", "kfac", _USUAL, core=True),
    BenchmarkMethod("GradDot", "grad_dot", core=True),
    BenchmarkMethod("BM25", "bm25", core=True, text=True),
    BenchmarkMethod("TF-IDF", "tf_idf", core=True, text=True),
    BenchmarkMethod("representation similarity", "representation_similarity", core=True, text=True),
    BenchmarkMethod("BIF, Laplace draws", _laplace, family="bayesian"),
    BenchmarkMethod("BIF, tilted SGLD", _bif("sgld", "tilted"), family="bayesian"),
    BenchmarkMethod("BIF, plain SGLD", _bif("sgld", "plain"), family="bayesian"),
    BenchmarkMethod("BIF, tilted RMSprop-SGLD", _bif("rmsprop", "tilted"), family="bayesian"),
    BenchmarkMethod("BIF, plain RMSprop-SGLD", _bif("rmsprop", "plain"), family="bayesian"),
    BenchmarkMethod(
        "normalised BIF, tilted SGLD",
        _bif("sgld", "tilted", normalize="correlation"),
        family="bayesian",
    ),
    BenchmarkMethod("GradCos", "grad_cos"),
    BenchmarkMethod("diagonal Fisher", _diagonal),
    BenchmarkMethod("EK-FAC, λ of the solvers", "ekfac", _SOLVED),
    BenchmarkMethod("EK-FAC, deflated", "deflated_ekfac", _SOLVED),
    BenchmarkMethod("conjugate gradients", "conjugate_gradient", _SOLVED),
    BenchmarkMethod("ASTRA", "astra", _SOLVED),
    BenchmarkMethod("LiSSA", "lissa", {**_SOLVED, "iterations": 50}),
    BenchmarkMethod("Gauss–Newton, dense", "gauss_newton", _SOLVED),
    BenchmarkMethod("Hessian, dense", "hessian", _SOLVED),
)


def add_bif_arguments(parser: argparse.ArgumentParser) -> None:
    """How long the BIF's chains run, which is what it costs."""
    parser.add_argument(
        "--error",
        type=float,
        default=ERROR,
        help="standard error of a correlation that the BIF samples for (default: %(default)s)",
    )
    parser.add_argument(
        "--chains",
        type=int,
        default=CHAINS,
        help="chains of the BIF, each with 20 effective draws at least (default: %(default)s)",
    )


def bif_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the BIF by :func:`add_bif_arguments`."""
    return {"error": args.error, "chains": args.chains}
