"""Effective draws per processor second, kernel by kernel: ``python -m benchmarks.kernels [TASK]``.

Every kernel samples the same tilted local posterior of a benchmark task with full-batch gradients,
8 chains that start at draws of a Gaussian approximation. Its step follows from the stiffest
direction ``a`` that Lanczos iterations find at such draws, in the kernel's own coordinates:

* first-order kernels ``ε a = 0.15``, so that no direction's variance is off by more than
  ``εa/4 ≈ 4 %``, and SGHMC, whose bias is of that order, too;
* splittings with momentum ``ε a = 1.5``: they are exact where the loss is quadratic, up to 4;
* MALA and HMC from ``ε a = 0.15`` down by halves until half of the proposals are accepted.

A step at which chains diverge is halved. The friction is 0.7 of the frequency of directions that
the loss leaves flat, the warm-up three of their relaxation times, or as long as the sampling where
that is shorter. After it every kernel has the same processor time.

Printed is the bulk effective sample size of the slowest 5 % of the training losses (their 5 %
quantile) per processor second of sampling, and the ratio of the variances of losses (means over
losses, each in units of its own) to the reference's: underdamped dynamics at the step above and at
a quarter of it, extrapolated to none. That its errors are of second order in ``h = √ε`` is what the
extrapolation takes; MALA and HMC, whose law is exact at any step, are the check. The ratio has a
standard error by a jackknife over chains, which also takes out the bias of a ratio. Where R-hat is
above 1.1 chains have not met and the number of effective draws is an upper bound. Independent draws
of Laplace approximations have another law.

The exit status is 1 when no kernel reaches 20 times the rate of plain SGLD, or the variances of
one of the two are not known to be within 5 %.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import bayesinf as bi
from bayesinf._calibration import potential_spectrum
from bayesinf.curvature import DeflatedInverse, GaussNewtonProduct, deflate
from bayesinf.samplers import Preconditioner, Sampler
from benchmarks._started import Started
from benchmarks._table import format_table, verdict
from benchmarks.tasks import TASKS, get_task

__all__ = ["ENTRIES", "Coordinates", "Entry", "Found", "Setting", "main", "measure", "ratio"]

BAR, CLOSE, MIXED = 20.0, 0.05, 1.1
FIRST, SECOND, FRICTION, HALF = 0.15, 1.5, 0.7, 0.5
CHAINS, RELAXATIONS, HALVINGS, RMSPROP_EPS = 8, 3, 12, 0.1
PLAIN = "SGLD"
_HEADER = (
    "kernel", "step", "accepted", "warm-up", "draws", "R-hat 95 %", "variance ratio", "within 5 %",
    "ESS/s", "× SGLD",
)  # fmt: skip


@dataclass(frozen=True)
class Coordinates:
    """What a kernel moves in, and the curvature of the potential there.

    Attributes
    ----------
    preconditioner
        None: the weights themselves.
    top
        Largest curvature.
    flat
        Curvature of directions that the loss leaves flat.
    """

    preconditioner: Preconditioner | None
    top: float
    flat: float

    @property
    def friction(self) -> float:
        """Γ of kernels with momentum."""
        return FRICTION * self.flat**0.5


@dataclass(frozen=True)
class Setting:
    """The posterior and the coordinates that there are."""

    posterior: bi.LocalPosterior
    inverse: DeflatedInverse
    weights: Coordinates
    whitened: Coordinates

    @property
    def start(self) -> Preconditioner:
        """Of the Gaussian that chains start from."""
        assert self.whitened.preconditioner is not None
        return self.whitened.preconditioner

    @classmethod
    def of(cls, posterior: bi.LocalPosterior) -> Setting:
        """Measure the curvature of a posterior."""
        task, n_beta, damping = posterior.task, posterior.n_beta, posterior.damping
        curvature = bi.fit_curvature(task, fisher="enumerated")
        rank = min(32, task.dimension)
        product = GaussNewtonProduct(task)
        inverse = deflate(curvature, product, damping=damping, rank=rank, which="LA")
        white = Preconditioner(inverse, n_beta)
        draws = inverse.sample(2, torch.Generator(task.device).manual_seed(0)) / n_beta**0.5
        potential = posterior.bind()
        top = [
            max(potential_spectrum(potential, p, potential.center + d).high for d in draws)
            for p in (None, white)
        ]
        weights = Coordinates(None, top[0], posterior.prior_precision)
        return cls(posterior, inverse, weights, Coordinates(white, top[1], 1.0))


@dataclass(frozen=True)
class Entry:
    """A row: a kernel in some coordinates with a step, as in ``make(coordinates, ε)``.

    Attributes
    ----------
    name
        As printed.
    make
        The kernel.
    whitened
        Whether it has the preconditioner.
    stiffness
        ``ε a`` of the stiffest direction; NaN for independent draws.
    adjusted
        Whether the step is halved until half of the proposals are accepted.
    thin
        Steps per draw.
    """

    name: str
    make: Callable[[Setting, Coordinates, float], Sampler]
    whitened: bool = True
    stiffness: float = math.nan
    adjusted: bool = False
    thin: int = 2

    @property
    def independent(self) -> bool:
        """Whether its draws are independent, of an approximate law."""
        return math.isnan(self.stiffness)

    def coordinates(self, setting: Setting) -> Coordinates:
        """Those it moves in."""
        return setting.whitened if self.whitened else setting.weights


def _hmc(setting: Setting, c: Coordinates, step: float) -> Sampler:
    """A quarter of a period of the flat directions, the slowest."""
    return bi.HMC(step, math.ceil(math.pi / 2 / (step * c.flat) ** 0.5), 0.2, c.preconditioner)


def _underdamped(setting: Setting, c: Coordinates, step: float) -> Sampler:
    return bi.Underdamped(step, c.friction, c.preconditioner)


ENTRIES = (
    Entry(PLAIN, lambda s, c, e: bi.SGLD(e), False, FIRST),
    Entry(
        "RMSprop-SGLD",
        lambda s, c, e: bi.RMSpropSGLD(RMSPROP_EPS * e, eps=RMSPROP_EPS),  # G ≤ 1/eps
        False, FIRST,
    ),
    Entry("Underdamped", _underdamped, False, SECOND),
    Entry("SGLD, preconditioned", lambda s, c, e: bi.SGLD(e, c.preconditioner), True, FIRST),
    Entry("Underdamped, preconditioned", _underdamped, True, SECOND),
    Entry(
        "SGHMC, preconditioned",
        lambda s, c, e: bi.SGHMC(e, c.friction, preconditioner=c.preconditioner), True, FIRST,
    ),
    Entry(
        "SGNHT, preconditioned",
        lambda s, c, e: bi.SGNHT(e, c.friction, preconditioner=c.preconditioner), True, SECOND,
    ),
    Entry("MALA, preconditioned", lambda s, c, e: bi.MALA(e, c.preconditioner), True, FIRST, True),
    Entry("HMC, preconditioned", _hmc, True, FIRST, True, 1),
    Entry("EK-FAC Laplace (approximation)", lambda s, c, e: bi.EKFACLaplace(s.inverse), thin=1),
    Entry(
        "Gauss–Newton Laplace (approximation)",
        lambda s, c, e: bi.GaussNewtonLaplace(s.start), thin=1,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Losses ``(chain, draw, loss)`` and what they cost."""

    losses: np.ndarray
    kernel: Sampler
    warmup: int
    thin: int
    acceptance: float
    seconds: float


@dataclass(frozen=True)
class Found:
    """What a row says.

    Attributes
    ----------
    run
        Where it comes from.
    rhat
        95 % quantile over losses.
    ratio, error
        Mean ratio of the variances to the reference's, and its standard error.
    rate
        Effective draws of the slowest 5 % of the losses per processor second.
    """

    run: Run
    rhat: float
    ratio: float
    error: float
    rate: float

    @property
    def close(self) -> bool | None:
        """Whether variances are within 5 %; None where the error is too large to tell."""
        off = abs(self.ratio - 1)
        if off - 2 * self.error > CLOSE:
            return False
        return True if off <= CLOSE and self.error <= CLOSE else None


# ------------------------------------------------------------------------------ running


def relaxation(kernel: Sampler, c: Coordinates) -> float:
    """Steps in which directions that the loss leaves flat relax."""
    if isinstance(kernel, bi.EKFACLaplace | bi.GaussNewtonLaplace):
        return 0.0
    if isinstance(kernel, bi.HMC):
        return 2.0  # proposals: half of them move a quarter of a period
    step, h = kernel.step_size, kernel.step_size**0.5
    if isinstance(kernel, bi.Underdamped | bi.SGHMC | bi.SGNHT):
        return max(2 / kernel.friction, kernel.friction / c.flat) / h
    if isinstance(kernel, bi.RMSpropSGLD):
        step /= kernel.eps
    return 2 / (step * c.flat)


def run(
    setting: Setting, entry: Entry, seconds: float, *, step: float | None = None, seed: int
) -> Run:
    """Warm a kernel up and sample for ``seconds`` of processor time.

    Parameters
    ----------
    setting, entry
        What is run.
    seconds
        Of sampling, without warm-up.
    step
        In place of the one that follows from the stiffest direction.
    seed
        Of the chains.
    """
    c = entry.coordinates(setting)
    step = entry.stiffness / c.top if step is None else step
    kernel, cost, traces = _warm(setting, entry, c, step, seconds, seed)
    warmup = traces.config["warmup"]
    spent, done, more = 0.0, traces.draws, max(4, round(0.9 * seconds / cost))
    while spent < 0.95 * seconds:
        began = time.process_time()
        _sample(setting, entry, kernel, seed, warmup, traces.draws + more, traces)
        spent += time.process_time() - began
        more = max(4, round((traces.draws - done) * (seconds / spent - 1)))
    losses = traces.values("train").values[:, done:]
    return Run(losses, kernel, warmup, entry.thin, _acceptance(traces), spent)


def _warm(
    setting: Setting, entry: Entry, c: Coordinates, step: float, seconds: float, seed: int
) -> tuple[Sampler, float, bi.TraceStore]:
    """The kernel with the longest step, of those halved, that holds; seconds a draw; a store."""
    for _ in range(HALVINGS):
        kernel = entry.make(setting, c, step)
        step /= 2
        try:
            pilot = _sample(setting, entry, kernel, seed, 2, 4)
            began = time.process_time()
            _sample(setting, entry, kernel, seed, 2, 12, pilot)
            cost = (time.process_time() - began) / 8
            if entry.adjusted and _acceptance(pilot) < HALF:
                continue
            wanted = min(RELAXATIONS * relaxation(kernel, c), entry.thin * seconds / cost)
            warmup = max(1, math.ceil(wanted))
            return kernel, cost, _sample(setting, entry, kernel, seed, warmup, 4)
        except bi.DivergenceError:
            if entry.independent:
                raise
    raise RuntimeError(
        f"{entry.name} does not hold its chains even at the step {2 * step:.3g}. Usual cause: a "
        f"posterior that is not local: raise --n-beta or --damping."
    )


def _acceptance(traces: bi.TraceStore) -> float:
    return float(traces.tree["sample_stats"].to_dataset()["acceptance_rate"].mean())


def _sample(
    setting: Setting,
    entry: Entry,
    kernel: Sampler,
    seed: int,
    warmup: int,
    draws: int,
    store: bi.TraceStore | None = None,
) -> bi.TraceStore:
    return bi.sample(
        setting.posterior, Started.at_draws(kernel, setting.start), draws=draws, warmup=warmup,
        thin=entry.thin, chains=CHAINS, superchains=CHAINS, jitter=0.0, seed=seed, store=store,
        observe={"query": setting.posterior.task.query.ids[:1].tolist()}, progress=False,
    )  # fmt: skip


# ------------------------------------------------------------------------------ what was found


def _variances(losses: np.ndarray) -> np.ndarray:
    """Of each loss, and without each chain, ``(1 + C, losses)``; centred on all chains' mean."""
    x = losses.astype(np.float64) - losses.mean(axis=(0, 1), dtype=np.float64)
    draws, first, second = x.shape[1], x.mean(axis=1), (x**2).mean(axis=1)
    keeps = [np.ones(len(x), dtype=bool), *~np.eye(len(x), dtype=bool)]
    count = np.array([keep.sum() * draws for keep in keeps])[:, None]
    rows = np.stack([second[keep].mean(0) - first[keep].mean(0) ** 2 for keep in keeps])
    out: np.ndarray = rows * count / (count - 1)
    return out


def ratio(
    losses: np.ndarray, coarse: np.ndarray, fine: np.ndarray, step_ratio: float
) -> tuple[float, float]:
    """Mean over losses of their variances, over the reference's, without bias, and its error.

    Parameters
    ----------
    losses
        ``(chain, draw, loss)``.
    coarse, fine
        Of the reference at a step ``ε`` and at ``ε/step_ratio``; ``v`` is extrapolated as
        ``v₀ + cε``.
    step_ratio
        Above 1.
    """
    own, more, less = (_variances(x) for x in (losses, coarse, fine))
    varies = (own[0] > 0) & (more[0] > 0) & (less[0] > 0)
    own, more, less = own[:, varies], more[:, varies], less[:, varies]
    r = step_ratio

    def mean(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
        unit = a + b + c
        exact = (r * c - b) / (r - 1)
        return float((a / unit).mean() / (exact / unit).mean())

    value = mean(own[0], more[0], less[0])
    deleted = (
        [mean(a, more[0], less[0]) for a in own[1:]],
        [mean(own[0], b, less[0]) for b in more[1:]],
        [mean(own[0], more[0], c) for c in less[1:]],
    )
    bias = sum((len(d) - 1) * (float(np.mean(d)) - value) for d in deleted)
    square = sum((len(d) - 1) * float(np.var(d)) for d in deleted)
    return value - bias, square**0.5


def measure(found: Run, coarse: Run, fine: Run, step_ratio: float) -> Found:
    """Judge a run by the reference's two."""
    from arviz_stats.base import array_stats

    varying = [x for x in np.moveaxis(found.losses.astype(np.float64), 2, 0) if np.ptp(x) > 0]
    size = [array_stats.ess(x, chain_axis=0, draw_axis=1, method="bulk") for x in varying]
    rhat = [array_stats.rhat(x, chain_axis=0, draw_axis=1) for x in varying]
    value, error = ratio(found.losses, coarse.losses, fine.losses, step_ratio)
    rate = float(np.quantile(size, 0.05)) / found.seconds
    return Found(found, float(np.quantile(rhat, 0.95)), value, error, rate)


def _row(name: str, f: Found, plain: float) -> tuple[str, ...]:
    bound = "≤ " if f.rhat > MIXED else ""
    accepted = "" if math.isnan(f.run.acceptance) else f"{f.run.acceptance:.2f}"
    step = f.run.kernel.step_size
    return (
        name,
        "" if math.isnan(step) else f"{step:.2g}",
        accepted,
        f"{f.run.warmup}",
        f"{f.run.losses.shape[0]} × {f.run.losses.shape[1]}",
        f"{f.rhat:.2f}",
        f"{f.ratio:.3f} ± {f.error:.3f}",
        {True: "yes", False: "no", None: "unresolved"}[f.close],
        f"{bound}{f.rate:.3g}",
        f"{f.rate / plain:.3g}",
    )


def conclude(table: dict[str, Found]) -> tuple[str, bool]:
    """Words on the bar, and whether it is met."""
    exact = {entry.name for entry in ENTRIES if not entry.independent}
    within = {name: f for name, f in table.items() if name in exact and f.close}
    if not within:
        return f"no kernel is known to be within {CLOSE:.0%}: {verdict(False)}", False
    best = max(within, key=lambda name: within[name].rate)
    times = within[best].rate / table[PLAIN].rate
    holds = times >= BAR and table[PLAIN].close is True
    return f"best: {best}, {times:.3g} × {PLAIN} (bar {BAR:g}): {verdict(holds)}", holds


def _memory(setting: Setting, f: Found) -> str:
    """What plain SGLD's slowest direction says of its effective draws."""
    c = setting.weights
    slow = relaxation(f.run.kernel, c)
    steps = f.run.losses.shape[1] * f.run.thin
    linear = CHAINS * steps / (2 * slow) / f.run.seconds
    return (
        f"{PLAIN}: directions that the loss leaves flat (a = {c.flat:.3g} of {c.top:.3g}) relax in "
        f"2/(εa) = {slow:.0f} steps, and each chain has {steps}; of a linear function of theirs it "
        f"makes {linear:.2g} effective draws a second"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("task", nargs="?", choices=sorted(TASKS), default="digits-mlp")
    add("--seconds", type=float, default=120.0, help="of sampling a kernel (default: %(default)s)")
    add("--damping", type=float, default=0.01, help="λ (default: %(default)s)")
    add("--n-beta", type=float, default=1e5, help="nβ (default: %(default)s)")
    add("--calibrate", action="store_true", help="λ and nβ that bayesinf.calibrate finds instead")
    add("--only", default="", help="kernels whose name contains this, and plain SGLD")
    add("--threads", type=int, default=1, help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    benchmark = get_task(args.task)
    train, query = benchmark.data()
    task = bi.Task(benchmark.checkpoint(), benchmark.likelihood, train=train, query=query)
    decay = benchmark.weight_decay
    posterior = (
        bi.calibrate(task, weight_decay=decay).posterior
        if args.calibrate
        else bi.LocalPosterior(task, args.n_beta, args.n_beta * (args.damping - decay), decay)
    )
    setting = Setting.of(posterior)
    print(
        f"{args.task}: {task.dimension} parameters, λ = {posterior.damping:.3g}, nβ = "
        f"{posterior.n_beta:.3g}, "
        f"{CHAINS} chains, {args.seconds:g} s a kernel; stiffest direction "
        f"{setting.weights.top:.3g}, preconditioned {setting.whitened.top:.3g}",
        flush=True,
    )
    entry = next(e for e in ENTRIES if e.whitened and e.make is _underdamped)
    coarse = run(setting, entry, args.seconds, seed=100)
    fine = run(setting, entry, 2 * args.seconds, step=coarse.kernel.step_size / 4, seed=101)
    table = {}
    for k, entry in enumerate(ENTRIES):
        if args.only not in entry.name and entry.name != PLAIN:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", bi.ConvergenceWarning)  # R-hat stands in the table
                table[entry.name] = measure(
                    run(setting, entry, args.seconds, seed=k), coarse, fine, 4.0
                )
        except (bi.DivergenceError, NotImplementedError, RuntimeError) as error:
            print(f"{entry.name}: {error}", flush=True)
            continue
        print(format_table(_HEADER, [_row(entry.name, table[entry.name], math.nan)]), flush=True)
    rows = [_row(name, found, table[PLAIN].rate) for name, found in table.items()]
    words, holds = conclude(table)
    print(f"\n{format_table(_HEADER, rows)}\n{_memory(setting, table[PLAIN])}\n{words}")
    return int(not holds)


if __name__ == "__main__":
    sys.exit(main())
