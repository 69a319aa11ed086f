"""Every kernel against NUTS on the same posterior: ``python -m benchmarks.reference_posterior``.

On each model the tilted local posterior that :func:`bayesinf.calibrate` finds is sampled by
NumPyro's NUTS (:func:`bayesinf.interop.numpyro.reference_posterior`), the truth, and by every
kernel with full-batch gradients, in float64:

* *logistic*: softmax regression, 650 parameters, 100 digits;
* *digits*: a 64-16-10 ReLU network, 1,210 parameters, 100 digits;
* *diabetes*: the 10-64-64-1 ReLU network of the benchmark task, 4,929 parameters, 100 patients;

with 20 queries each. Steps, frictions and warm-up are those of :mod:`benchmarks.kernels`, and
chains start at draws of the preconditioner's Gaussian. A kernel runs until its standard errors are
small enough, or its time is up.

Influence is compared pair by pair, in units of ``(nβ/n) σ_i σ_q`` with the standard deviations of
the losses under NUTS, so that 1 % is one of a hundredth of a correlation:

* *within 3*: share of pairs whose difference is within 3 combined Monte-Carlo standard errors (64
  batches or more, for which 0.4 % of the pairs are expected outside);
* *bias*: root mean square over pairs of the difference, less what the two standard errors make of
  it (a minus where that is more);
* *largest*: what 3 standard errors leave of the difference of the worst pair;
* *MCSE* and *of NUTS*: the two standard errors, root mean squares: the variance. That of the
  difference is to be at most 2 %;
* *ESS/s*: bulk effective draws of the slowest 5 % of the train losses per processor second of
  sampling; *R-hat*: the 95 % quantile over losses.

The row *NUTS, other seed* (``--control``) shows what chance alone does. Kernels that accept or
reject have an exact law and are held to *within 3* of 99 %; others to a bias of 5 %. The exit
status is 1 when a bar is missed or nothing was precise enough to judge it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import bayesinf as bi
from bayesinf._covariance import cross_covariance
from bayesinf.bayesian._convergence import rhat_and_ess
from benchmarks._started import Started
from benchmarks._table import format_table, verdict
from benchmarks.kernels import ENTRIES, HALF, HALVINGS, RELAXATIONS, Entry, Setting, relaxation
from benchmarks.tasks import diabetes_mlp, digits_mlp

__all__ = ["MODELS", "Estimate", "Judged", "compare", "main"]

SHARE, BIAS, PRECISE = 0.99, 0.05, 0.02
TRAIN, QUERIES, CHAINS, BATCHES = 100, 20, 16, 8
CONDITION, MOST = 30.0, 50_000
_HEADER = (
    "kernel", "step", "accepted", "R-hat", "draws", "within 3", "bias", "largest", "MCSE",
    "of NUTS", "ESS/s", "seconds", "bar", "",
)  # fmt: skip


# ------------------------------------------------------------------------------ the models


def _task(make: Callable[[], nn.Module], benchmark: Any) -> bi.Task:
    """Train on a part of a benchmark task's data, by its recipe; then all in float64."""
    (x, y), (xq, yq) = benchmark.data()
    train, query = (x[:TRAIN], y[:TRAIN]), (xq[:QUERIES], yq[:QUERIES])
    model = bi.train_one(make, benchmark.likelihood, benchmark.recipe, train=train, seed=0)
    return bi.Task(model, benchmark.likelihood, train=train, query=query).to(dtype=torch.float64)


def logistic() -> bi.Task:
    """Make a softmax regression on digits."""
    return _task(lambda: nn.Linear(64, 10), digits_mlp.TASK)


def digits() -> bi.Task:
    """Make a 64-16-10 network on digits."""
    layers = lambda: nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))  # noqa: E731
    return _task(layers, digits_mlp.TASK)


def diabetes() -> bi.Task:
    """Make the network of the benchmark task diabetes-mlp."""
    return _task(diabetes_mlp.make_model, diabetes_mlp.TASK)


MODELS = {"logistic": logistic, "digits": digits, "diabetes": diabetes}


# ------------------------------------------------------------------------------ estimates


@dataclass(frozen=True)
class Estimate:
    """Influence of a run with what it cost.

    Attributes
    ----------
    influence, mcse
        ``(query, train)``.
    unit
        ``(nβ/n) σ_i σ_q``, ``(query, train)``.
    rhat
        95 % quantile over losses.
    ess
        Effective draws of the slowest 5 % of the train losses.
    accepted
        Mean acceptance; NaN for kernels that accept everything.
    draws
        In words.
    seconds
        Of the processor, sampling alone.
    """

    influence: np.ndarray
    mcse: np.ndarray
    unit: np.ndarray
    rhat: float
    ess: float
    accepted: float
    draws: str
    seconds: float

    @classmethod
    def of(cls, traces: bi.TraceStore, seconds: float) -> Estimate:
        """Of traces."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bi.ConvergenceWarning)  # R-hat stands in the table
            scores = bi.bif(traces, center="grand", batches_per_chain=BATCHES)
        losses = {g: traces.values(g).values.astype(np.float64) for g in ("train", "query")}
        sd = {group: values.std(axis=(0, 1), ddof=1) for group, values in losses.items()}
        scale = traces.config["posterior"]["n_beta"] / traces.config["task"]["n"]
        rhat, ess = rhat_and_ess(losses["train"])
        stats = traces.tree["sample_stats"].to_dataset()
        return cls(
            scores["influence"].values,
            scores["mcse"].values,
            scale * np.outer(sd["query"], sd["train"]),
            float(np.nanquantile(rhat, 0.95)),
            float(np.nanquantile(ess, 0.05)),
            float(stats["acceptance_rate"].mean()),
            f"{traces.chains} × {traces.draws}",
            seconds,
        )


@dataclass(frozen=True)
class Judged:
    """What a comparison says, in units of ``(nβ/n) σ_i σ_q``; see the module."""

    within: float
    bias: float
    largest: float
    mcse: float
    reference: float

    @property
    def precise(self) -> bool:
        """Whether standard errors of differences are small enough to judge."""
        return math.hypot(self.mcse, self.reference) <= PRECISE

    def holds(self, exact: bool) -> bool | None:
        """Whether the bar is met; None where a bias cannot be judged."""
        if exact:
            return self.within >= SHARE
        return self.bias <= BIAS if self.precise else None


def compare(found: Estimate, truth: Estimate) -> Judged:
    """Judge a run by the reference."""
    off = (found.influence - truth.influence) / truth.unit
    own, other = found.mcse / truth.unit, truth.mcse / truth.unit
    error = np.hypot(own, other)
    square = float((off**2 - error**2).mean())
    return Judged(
        float((np.abs(off) <= 3 * error).mean()),
        math.copysign(abs(square) ** 0.5, square),
        max(0.0, float((np.abs(off) - 3 * error).max())),
        float((own**2).mean()) ** 0.5,
        float((other**2).mean()) ** 0.5,
    )


def _precision(traces: bi.TraceStore) -> float:
    """Root mean square of the standard errors of covariances, in units of ``σ_i σ_q``."""
    query, train = traces.read("query"), traces.read("train")
    found = cross_covariance(query, train, batches_per_chain=BATCHES)
    sd = [x.std(axis=(0, 1), dtype=np.float64) for x in (query, train)]
    return float(((found.mcse / np.outer(*sd)) ** 2).mean()) ** 0.5


@dataclass
class _Clock:
    """Stops a run once it is precise, or its time is up."""

    wanted: float
    seconds: float
    began: float = 0.0

    def __call__(self, traces: Any) -> bool:
        late = time.process_time() - self.began > self.seconds
        enough = traces.draws >= 4 * BATCHES
        return enough and (late or _precision(traces) <= self.wanted)


# ------------------------------------------------------------------------------ running


def nuts(posterior: bi.LocalPosterior, wanted: float, seconds: float, seed: int) -> Estimate:
    """Sample the reference."""
    from bayesinf.interop.numpyro import reference_posterior

    def run(draws: int, store: bi.TraceStore | None = None, until: Any = None) -> bi.TraceStore:
        return reference_posterior(
            posterior, draws=draws, warmup=300, chains=8, seed=seed, store=store, until=until,
            progress=False,
        )  # fmt: skip

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bi.ConvergenceWarning)
        clock = _Clock(wanted, seconds, time.process_time())
        traces = run(MOST, until=clock)
    if divergences := traces.commit_facts["checks"]["divergences"]:
        print(f"NUTS: {divergences} draws after transitions that diverged", flush=True)
    return Estimate.of(traces, time.process_time() - clock.began)


def kernel_run(
    setting: Setting, entry: Entry, wanted: float, seconds: float, seed: int
) -> tuple[Estimate, float]:
    """Sample by a kernel; returns its step, too."""
    c = entry.coordinates(setting)
    step = entry.stiffness / c.top
    for _ in range(HALVINGS):
        kernel = entry.make(setting, c, step)
        try:
            warmup = max(20, math.ceil(RELAXATIONS * relaxation(kernel, c)))
            traces = _sample(setting, entry, kernel, seed, warmup, 10)
        except bi.DivergenceError:
            step /= 2
            continue
        accepted = traces.tree["sample_stats"].to_dataset()["acceptance_rate"].mean()
        if entry.adjusted and accepted < HALF:
            step /= 2
            continue
        clock = _Clock(wanted, seconds, time.process_time())
        _sample(setting, entry, kernel, seed, warmup, MOST, traces, clock)
        return Estimate.of(traces, time.process_time() - clock.began), step
    raise RuntimeError(f"{entry.name} holds its chains at no step down to {step:.3g}.")


def _sample(
    setting: Setting,
    entry: Entry,
    kernel: Any,
    seed: int,
    warmup: int,
    draws: int,
    store: bi.TraceStore | None = None,
    until: Any = None,
) -> bi.TraceStore:
    return bi.sample(
        setting.posterior, Started.at_draws(kernel, setting.start), draws=draws, warmup=warmup,
        thin=entry.thin, chains=CHAINS, superchains=CHAINS, jitter=0.0, seed=seed, store=store,
        until=until, progress=False,
    )  # fmt: skip


# ------------------------------------------------------------------------------ the table


def _row(name: str, step: float, e: Estimate, j: Judged | None, exact: bool) -> tuple[str, ...]:
    size = float(((e.mcse / e.unit) ** 2).mean()) ** 0.5
    judged = ("", "", "", f"{size:.2%}", "") if j is None else (
        f"{j.within:.2%}", f"{j.bias:.2%}", f"{j.largest:.2%}", f"{j.mcse:.2%}",
        f"{j.reference:.2%}",
    )  # fmt: skip
    bar = "" if j is None else f"within ≥ {SHARE:.0%}" if exact else f"bias ≤ {BIAS:.0%}"
    holds = None if j is None else j.holds(exact)
    return (
        name,
        "" if math.isnan(step) else f"{step:.2g}",
        "" if math.isnan(e.accepted) else f"{e.accepted:.2f}",
        f"{e.rhat:.3f}",
        e.draws,
        *judged,
        f"{e.ess / e.seconds:.3g}",
        f"{e.seconds:.0f}",
        bar,
        "" if j is None else "imprecise" if holds is None else verdict(holds),
    )


def _model(name: str, args: argparse.Namespace) -> tuple[list[tuple[str, ...]], bool]:
    """Rows of a model, printed as they come."""
    found = bi.calibrate(MODELS[name](), condition=args.condition, error=0.1)
    p = found.posterior
    setting = Setting.of(p)
    print(
        f"{name}: {p.task.dimension} parameters, n = {p.task.n}, nβ = {p.n_beta:.3g}, λ = "
        f"{p.damping:.3g}, stiffest direction {setting.weights.top:.3g}, preconditioned "
        f"{setting.whitened.top:.3g}",
        flush=True,
    )
    rows, held = [], []

    def add(label: str, step: float, e: Estimate, exact: bool, judged: Judged | None) -> None:
        rows.append(_row(f"{name}: {label}", step, e, judged, exact))
        held.append(judged is None or judged.holds(exact) is True)
        print(format_table(_HEADER, rows[-1:]), flush=True)

    truth = nuts(p, args.reference, args.nuts_seconds, seed=0)
    add("NUTS", math.nan, truth, True, None)
    if args.control:
        other = nuts(p, args.reference, args.nuts_seconds, seed=1)
        add("NUTS, other seed", math.nan, other, True, compare(other, truth))
    for k, entry in enumerate(ENTRIES):
        if entry.independent or not any(part in entry.name for part in args.kernels.split(",")):
            continue
        try:
            estimate, step = kernel_run(setting, entry, args.mcse, args.seconds, seed=10 + k)
        except (bi.DivergenceError, RuntimeError) as error:
            print(f"{name}: {entry.name}: {error}", flush=True)
            held.append(False)
            continue
        add(entry.name, step, estimate, entry.adjusted, compare(estimate, truth))
    return rows, all(held)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reference_posterior",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; default: all")
    add("--kernels", default="", help="those whose name contains one of these, by commas")
    add("--mcse", type=float, default=0.017, help="wanted of a kernel (default: %(default)s)")
    add("--reference", type=float, default=0.01, help="wanted of NUTS (default: %(default)s)")
    add("--seconds", type=float, default=120.0, help="of a kernel, at most (default: %(default)s)")
    add("--nuts-seconds", type=float, default=300.0, help="of NUTS (default: %(default)s)")
    add("--condition", type=float, default=CONDITION, help="λ_max/λ (default: %(default)s)")
    add("--control", action="store_true", help="a second run of NUTS, which only chance parts")
    add("--threads", type=int, default=1, help="default: %(default)s")
    args = parser.parse_args(argv)
    if unknown := set(args.models) - set(MODELS):
        parser.error(f"there is no model {sorted(unknown)}; there are {', '.join(MODELS)}")
    torch.set_num_threads(args.threads)
    rows, held = [], []
    for name in args.models or MODELS:
        more, holds = _model(name, args)
        rows += more
        held.append(holds)
    print(f"\n{format_table(_HEADER, rows)}")
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
