"""Why BIF ranks below EK-FAC on a language model: ``python -m benchmarks.bif_gap [TASK]``.

Every row replaces one more part of EK-FAC's score by sampling, on the task ``pydoc-gpt``:

* **exact**: EK-FAC at λ = 0.1 × the mean eigenvalue of all parameters, or twice the Hessian's most
  negative eigenvalue, below which a chain would leave;
* **finite draws**: the covariance of *linear* losses, ``⟨g_i, δ⟩``, over draws of the Gaussian with
  EK-FAC's curvature. Its infinite limit is the exact score; drawn from the law itself,
  ``N(0, G(nβ(C + λ))⁻¹Gᵀ)``, so that any number of them costs nothing;
* **the loss itself, cold**: as many draws, losses evaluated, at ``100 nβ``;
* **temperature**: the same at ``nβ``, where calibration would sample;
* **curvature**: chains of the loss's own posterior, all examples at every step, by underdamped
  Langevin with EK-FAC, deflated, as its mass matrix;
* **minibatches**: the same chain with gradients of a quarter of the examples.

Beside the LDS stands the reliability of the scores (the share of the variance of predictions that
is no Monte-Carlo noise, from two halves of the chains), and ``LDS / √reliability``, what the LDS
would be if the draws were infinitely many: what a part costs beyond the number of draws.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr

import bayesinf as bi
from bayesinf._calibration import choose_kernel, lowest_curvature
from bayesinf._covariance import cross_covariance
from bayesinf._local_range import find_temperature, first_temperature
from bayesinf.curvature import GaussNewtonProduct, deflate
from benchmarks._table import format_table
from benchmarks.tasks import TASKS, BenchmarkTask, get_task

__all__ = ["Plan", "Row", "gradients", "linear_draws", "main", "run", "table_of"]

_COLDER, _CHUNK = 100.0, 128
_HEADER = ("scores", "draws", "LDS [95 %]", "reliability", "LDS / √reliability", "cpu seconds")


@dataclass(frozen=True)
class Plan:
    """How much is drawn; ``many`` are the draws of the simulated rows."""

    chains: int = 8
    draws: int = 40
    thin: int = 2
    warmup: int = 16
    rank: int = 32
    many: tuple[int, ...] = (320, 2560, 10240, 40960)


@dataclass(frozen=True)
class Row:
    """Scores, from how many draws (0: exact), and what they took."""

    name: str
    draws: int
    scores: xr.Dataset
    seconds: float


def gradients(task: bi.Task) -> torch.Tensor:
    """Gradients ``(Q + n, d)`` of the losses of queries, then of train examples."""
    params = {name: p.detach().requires_grad_() for name, p in task.params.items()}
    found = []
    for split in ("query", "train"):
        examples = task.examples(split)
        for k in range(len(examples)):
            loss = task.losses(params, examples.batch(slice(k, k + 1)))[0]
            own = torch.autograd.grad(loss, list(params.values()))
            found.append(task.flatten(dict(zip(params, own, strict=True))))
    return torch.stack(found)


def linear_draws(covariance: np.ndarray, draws: int, chains: int, seed: int) -> np.ndarray:
    """Draws ``(chain, draw, entry)`` of linear losses, whose law is ``N(0, covariance)``."""
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.clip(values, 0.0, None))
    noise = np.random.default_rng(seed).standard_normal((chains, draws // chains, len(root)))
    found: np.ndarray = noise @ root.T
    return found


def _scores(task: bi.Task, influence: np.ndarray, **more: Any) -> xr.Dataset:
    made = bi.make_scores(
        influence,
        query=task.query.ids,
        train=task.train.ids,
        method="bif",
        estimand="influence",
    )
    return made.assign(more)


def _of_draws(task: bi.Task, values: np.ndarray) -> xr.Dataset:
    """Scores with replicates of draws of the losses of queries and train examples."""
    count = len(task.query)
    found = cross_covariance(values[..., :count], values[..., count:], replicates=True)
    pair = ("query", "train")
    return _scores(
        task,
        -found.value,
        influence_replicate=(("batch", *pair), -found.deleted),
        influence_half=(("half", *pair), -found.halves),
        batch_share=("batch", found.share),
    )


def simulated(task: bi.Task, curvature: bi.Curvature, damping: float, plan: Plan) -> Iterator[Row]:
    """The exact scores, and those of finitely many draws of linear losses."""
    began = time.process_time()
    g = gradients(task)
    inverse = curvature.inverse(damping)
    covariance = (g @ torch.stack([inverse @ row for row in g]).T).double().cpu().numpy()
    covariance = (covariance + covariance.T) / 2
    count = len(task.query)
    exact = _scores(task, -covariance[:count, count:] / task.n)
    yield Row("exact", 0, exact, time.process_time() - began)
    for draws in plan.many:
        values = linear_draws(covariance, draws, 2 * plan.chains, draws)
        yield Row("finite draws, linear losses", draws, _of_draws(task, values), 0.0)


def sampled(task: bi.Task, curvature: bi.Curvature, damping: float, plan: Plan) -> Iterator[Row]:
    """Scores of draws of EK-FAC's Gaussian and of chains."""
    inverse = curvature.inverse(damping)
    noise = inverse.sample(4, torch.Generator(task.device).manual_seed(0))
    unit = bi.LocalPosterior(task, n_beta=1.0, gamma=0.0).bind()
    first = first_temperature(task, damping)
    n_beta = find_temperature(unit, noise, start=first, ratio=0.75).n_beta

    def at(temperature: float) -> bi.LocalPosterior:
        return bi.LocalPosterior(task, temperature, temperature * damping)

    product = GaussNewtonProduct(task, batch_size=_CHUNK)
    mass = deflate(curvature, product, damping=damping, rank=plan.rank, which="LA")
    pilot = mass.sample(4, torch.Generator(task.device).manual_seed(1))
    _, kernel = choose_kernel(at(n_beta), mass, pilot, 0)
    gaussian = bi.EKFACLaplace(curvature)
    plain: dict[str, Any] = {"warmup": 0, "thin": 1}
    chain: dict[str, Any] = {"warmup": plan.warmup, "thin": plan.thin}
    yield from (
        _row("the loss itself, cold", at(_COLDER * n_beta), gaussian, plan, plain),
        _row(f"temperature, n_beta {n_beta:.3g}", at(n_beta), gaussian, plan, plain),
        _row("curvature: a chain", at(n_beta), kernel, plan, chain),
        _row("minibatches", at(n_beta), kernel, plan, {**chain, "batch_size": task.n // 4}),
    )


def _row(
    name: str, posterior: bi.LocalPosterior, kernel: Any, plan: Plan, options: dict[str, Any]
) -> Row:
    began = time.process_time()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        traces = bi.sample(
            posterior, kernel, chains=plan.chains, draws=plan.draws, progress=False,
            on_divergence="drop", **options,
        )  # fmt: skip
        scores = bi.bif(traces, replicates=True)
    seconds = time.process_time() - began
    kinds = sorted({w.category.__name__ for w in heard if issubclass(w.category, UserWarning)})
    print(f"{name}: {seconds:.0f} s; warned of {kinds}", file=sys.stderr, flush=True)
    return Row(name, len(traces.healthy) * plan.draws, scores, seconds)


def table_of(found: Iterable[Row], bank: xr.Dataset) -> list[tuple[str, ...]]:
    """Rows as text, each said as it comes."""
    lines: list[tuple[str, ...]] = []
    for row in found:
        judged = bi.lds(row.scores, bank)
        value = float(judged["lds"])
        noise = ("", f"{value:.3f}")
        if "reliability" in judged:
            share = float(judged["reliability"])
            limit = f"{value / share**0.5:.3f}" if share > 0 else "unknown"
            noise = (f"{share:.3f}", limit)
        interval = f"{value:.3f} [{float(judged['lower']):.3f}, {float(judged['upper']):.3f}]"
        draws = f"{row.draws}" if row.draws else "∞"
        lines.append((row.name, draws, interval, *noise, f"{row.seconds:.0f}"))
        print(*lines[-1], sep=" | ", file=sys.stderr, flush=True)
    return lines


def run(
    benchmark: BenchmarkTask, bank: xr.Dataset, plan: Plan, device: str = "cpu"
) -> Iterator[Row]:
    """All rows of a task."""
    train, query = benchmark.data()
    task = bi.Task(
        benchmark.checkpoint(), benchmark.likelihood, train=train, query=query, device=device
    )
    task.train.ids, task.query.ids = bank["train"].values, bank["query"].values
    curvature = bi.fit_curvature(task, fisher=benchmark.fisher)
    lowest = lowest_curvature(task, _CHUNK, 0)
    damping = max(0.1 * curvature.trace() / task.dimension, -2 * lowest)
    print(f"damping {damping:.3g}, lowest curvature {lowest:.3g}", file=sys.stderr, flush=True)
    yield from simulated(task, curvature, damping, plan)
    yield from sampled(task, curvature, damping, plan)


def main(argv: list[str] | None = None, plan: Plan | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bif_gap",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", nargs="?", choices=sorted(TASKS), default="pydoc-gpt")
    parser.add_argument("--chains", type=int, default=Plan.chains, help="default: %(default)s")
    parser.add_argument("--draws", type=int, default=Plan.draws, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    benchmark = get_task(args.task)
    bank = benchmark.bank()
    plan = plan or Plan(chains=args.chains, draws=args.draws)
    print(format_table(_HEADER, table_of(run(benchmark, bank, plan, args.device), bank)))


if __name__ == "__main__":
    main()
