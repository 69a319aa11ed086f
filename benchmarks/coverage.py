"""Whether intervals of influence hold what they promise: ``python -m benchmarks.coverage [CASE]``.

A nominal 95 % interval of BIF is ``influence ± t·mcse`` with ``attrs["mcse_df"]`` degrees of
freedom. On each case what :func:`bayesinf.calibrate` returns is sampled from many seeds, and for
each run the share of pairs is counted whose interval holds the truth:

* *gaussian*, a linear regression: the posterior is Gaussian, the truth in closed form;
* *logistic*, a logistic regression, and *digits*, a 64-16-10 ReLU network on 200 digits: the truth
  is a run of Hamiltonian Monte Carlo, whose law is exact, with 50 times as many effective draws.

Networks are in float64. Printed is the coverage, averaged over pairs and runs, with its standard
error over runs; and what it is made of: *bias/mcse*, the root mean square over pairs of the mean
over runs of ``(influence − truth)/mcse``, less what the runs' noise makes of it; *spread/mcse*, the
standard deviation of the influence over runs relative to ``mcse`` (root mean squares over pairs; 1
where standard errors are right); *truth's mcse*, that of the truth relative to a run's; *in doubt*,
the share of runs with a ``ConvergenceWarning``. The exit status is 1 when a coverage is outside
93–97 %.
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
from scipy import stats
from torch import Tensor, nn

import bayesinf as bi
from benchmarks._table import format_table, verdict
from benchmarks.tasks._digits import digits

__all__ = ["CASES", "Case", "Coverage", "Truth", "coverage", "main"]

LEVEL, LOW, HIGH = 0.95, 0.93, 0.97
ACCEPTED, HALVINGS = 0.6, 10
_HEADER = (
    "case", "runs", "draws", "coverage", "bias/mcse", "spread/mcse", "truth's mcse", "in doubt",
    "seconds", "bar", "",
)  # fmt: skip


@dataclass(frozen=True)
class Truth:
    """Influence ``(query, train)`` and its relative standard error, 0 in closed form."""

    influence: np.ndarray
    mcse: np.ndarray
    words: str


@dataclass(frozen=True)
class Case:
    """A task, the wanted error of its calibration, and what it is judged by.

    Attributes
    ----------
    make
        The task, in float64.
    error
        Of :func:`bayesinf.calibrate`.
    truth
        From the calibration, and how many times as long as a run a run for it must be.
    """

    make: Callable[[], bi.Task]
    error: float
    truth: Callable[[bi.Calibration, float], Truth]


# ------------------------------------------------------------------------------ the truth


def closed_form(found: bi.Calibration, longer: float) -> Truth:
    r"""Of a linear regression with Gaussian losses and the tilted potential.

    With ``w ~ N(w0, Σ)``, ``Σ = (nβ XᵀX/n + p I)⁻¹``, and gradients ``g`` at ``w0``,
    ``Cov(ℓ_i, ℓ_q) = g_qᵀΣg_i + ½(x_qᵀΣx_i)²``.
    """
    posterior = found.posterior
    task, w = posterior.task, posterior.task.flatten(posterior.task.params)

    def gradients(group: str) -> tuple[Tensor, Tensor]:
        x, y = task.examples(group).batch()
        return x * (x @ w - y[:, 0])[:, None], x

    (g, x), (gq, xq) = gradients("train"), gradients("query")
    eye = torch.eye(len(w), dtype=w.dtype)
    hessian = posterior.n_beta * x.T @ x / task.n + posterior.prior_precision * eye
    sigma = torch.linalg.inv(hessian)
    covariance = gq @ sigma @ g.T + 0.5 * (xq @ sigma @ x.T) ** 2
    influence = (-posterior.n_beta / task.n * covariance).numpy()
    return Truth(influence, np.zeros_like(influence), "closed form")


def long_run(found: bi.Calibration, longer: float) -> Truth:
    """Hamiltonian Monte Carlo, ``longer`` times as long in effective draws, which are counted.

    A trajectory is a quarter of a period of directions of curvature 1, at half the step of the
    calibrated kernel or less, until 60 % of the proposals are accepted.

    Raises
    ------
    RuntimeError
        If no step is accepted as often.
    """
    posterior, sampler, options, _ = found
    kernel = _accepted(found)
    one = _effective(bi.sample(posterior, sampler, progress=False, seed=10**6, **options))
    traces = _sample(posterior, kernel, options, draws=50, warmup=20, seed=10**6 + 1)
    while (size := _effective(traces)) < longer * one:
        more = math.ceil(traces.draws * min(longer * one / size * 1.05, 4.0))
        traces = _sample(posterior, kernel, options, more, 20, 10**6 + 1, traces)
    scores = bi.bif(traces, batches_per_chain=8)
    words = (
        f"HMC, ε = {kernel.step_size:.2g}, {kernel.steps} steps, {_acceptance(traces):.2f} "
        f"accepted, {traces.chains} × {traces.draws} draws"
    )
    return Truth(scores["influence"].values, scores["mcse"].values, words)


def _accepted(found: bi.Calibration) -> bi.HMC:
    """The kernel with the longest step, of those halved, that is accepted often enough."""
    posterior, sampler, options, _ = found
    step = sampler.step_size
    for _ in range(HALVINGS):
        step /= 2
        steps = math.ceil(math.pi / 2 / step**0.5)
        kernel = bi.HMC(step, steps, preconditioner=sampler.preconditioner)
        if _acceptance(_sample(posterior, kernel, options, 10, 10, 10**6)) >= ACCEPTED:
            return kernel
    raise RuntimeError(
        f"fewer than {ACCEPTED:.0%} of HMC's proposals are accepted even at the step {step:.3g}: "
        f"this posterior has no truth. Usual cause: energies in float32, or too many parameters."
    )


def _sample(
    posterior: bi.LocalPosterior,
    kernel: bi.HMC,
    options: dict[str, Any],
    draws: int,
    warmup: int,
    seed: int,
    store: bi.TraceStore | None = None,
) -> bi.TraceStore:
    rest = {"thin": 1, "draws": draws, "warmup": warmup, "seed": seed}
    return bi.sample(posterior, kernel, progress=False, store=store, **{**options, **rest})


def _acceptance(traces: bi.TraceStore) -> float:
    return float(traces.tree["sample_stats"].to_dataset()["acceptance_rate"].mean())


def _effective(traces: bi.TraceStore) -> float:
    """Effective draws of the median training loss."""
    from arviz_stats.base import array_stats

    x = np.moveaxis(traces.values("train").values.astype(np.float64), 2, 0)
    pick = np.unique(np.linspace(0, len(x) - 1, 50).round().astype(int))
    size = [array_stats.ess(x[k], chain_axis=0, draw_axis=1, method="mean") for k in pick]
    return float(np.median(size))


# ------------------------------------------------------------------------------ the cases


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def gaussian() -> bi.Task:
    """Make a linear regression of 6 parameters on 40 examples, somewhat off its optimum."""
    g = _generator()

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, xq = draw(40, 6) * torch.linspace(0.4, 1.6, 6, dtype=torch.float64), draw(20, 6)
    slope = draw(6, 1)
    y, yq = x @ slope + 0.5 * draw(40, 1), xq @ slope + 0.5 * draw(20, 1)
    model = nn.Linear(6, 1, bias=False, dtype=torch.float64)
    model.weight.data = (torch.linalg.lstsq(x, y).solution + 0.1 * draw(6, 1)).T
    return bi.Task(model, bi.Gaussian(), train=(x, y), query=(xq, yq))


def logistic() -> bi.Task:
    """Make a logistic regression of 6 parameters on 100 examples, trained."""
    g = _generator()
    x = torch.randn(120, 5, generator=g, dtype=torch.float64)
    slope = torch.randn(5, generator=g, dtype=torch.float64)
    y = (torch.rand(120, generator=g, dtype=torch.float64) < torch.sigmoid(x @ slope)).double()
    model = nn.Linear(5, 1, dtype=torch.float64)
    model.weight.data.zero_()
    model.bias.data.zero_()
    train, query = (x[:100], y[:100, None]), (x[100:], y[100:, None])
    return _trained(model, bi.Bernoulli(), train, query, 20)


def small_digits() -> bi.Task:
    """Make a 64-16-10 network on 200 digits, trained."""
    train_x, train_y, query_x, query_y = digits()
    g = _generator()
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).double()
    for p in model.parameters():  # biases as rows of one
        p.data = torch.randn(p.shape, generator=g).double() * p.shape[-1] ** -0.5
    train, query = (train_x[:200].double(), train_y[:200]), (query_x[:20].double(), query_y[:20])
    return _trained(model, bi.Categorical(), train, query, 40)


def _trained(
    model: nn.Module,
    likelihood: bi.Likelihood,
    train: tuple[Tensor, Tensor],
    query: tuple[Tensor, Tensor],
    iterations: int,
) -> bi.Task:
    """A task after L-BFGS on the mean loss with a little weight decay."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=iterations)
    x, y = train

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = likelihood.loss(model(x), y).mean()
        loss = loss + 0.5e-3 * torch.stack([p.square().sum() for p in model.parameters()]).sum()
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    return bi.Task(model, likelihood, train=train, query=query)


CASES = {
    "gaussian": Case(gaussian, 0.05, closed_form),
    "logistic": Case(logistic, 0.05, long_run),
    "digits": Case(small_digits, 0.05, long_run),
}


# ------------------------------------------------------------------------------ coverage


@dataclass(frozen=True)
class Coverage:
    """What runs say of their intervals.

    Attributes
    ----------
    mean, error
        Share of pairs whose interval holds the truth, and its standard error over runs.
    bias
        Root mean square over pairs of the mean of ``z = (influence − truth)/mcse`` over runs, less
        the runs' noise; NaN for one run.
    spread
        Root mean square of the standard deviation of ``influence`` over runs divided by the root
        mean square of ``mcse``; NaN for one run.
    doubt
        Share of the runs that warned of their chains.
    draws
        Of a run, as words.
    mcse
        Root mean square over pairs and runs.
    """

    mean: float
    error: float
    bias: float
    spread: float
    doubt: float
    draws: str
    mcse: float

    @property
    def holds(self) -> bool:
        """Whether the mean is within the bar."""
        return LOW <= self.mean <= HIGH


def coverage(found: bi.Calibration, truth: np.ndarray, runs: int) -> Coverage:
    """Sample ``runs`` times and compare intervals with the truth."""
    share, z, values, mcse, doubts = [], [], [], [], 0
    for seed in range(1, runs + 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            traces = bi.sample(
                found.posterior, found.sampler, seed=seed, progress=False, **found.options
            )
            scores = bi.bif(traces)
        doubts += any(issubclass(w.category, bi.ConvergenceWarning) for w in caught)
        off, error = scores["influence"].values - truth, scores["mcse"].values
        t = stats.t.ppf(0.5 + LEVEL / 2, scores.attrs["mcse_df"])
        share.append(float((np.abs(off) <= t * error).mean()))
        z.append(off / error)
        values.append(scores["influence"].values)
        mcse.append(error)
    many = runs > 1
    noise = np.var(z, axis=0, ddof=1) / runs if many else math.nan
    excess = float(np.mean(np.mean(z, axis=0) ** 2 - noise))
    size = float(np.sqrt(np.mean(np.square(mcse))))
    return Coverage(
        float(np.mean(share)),
        float(np.std(share, ddof=1)) / runs**0.5 if many else math.nan,
        math.nan if math.isnan(excess) else max(0.0, excess) ** 0.5,
        float(np.sqrt(np.var(values, axis=0, ddof=1).mean())) / size if many else math.nan,
        doubts / runs,
        f"{found.options['chains']} × {found.options['draws']}, thin {found.options['thin']}",
        size,
    )


def _row(name: str, c: Coverage, truth: Truth, runs: int, seconds: float) -> tuple[str, ...]:
    return (
        name,
        f"{runs}",
        c.draws,
        f"{c.mean:.1%} ± {c.error:.1%}",
        f"{c.bias:.2f}",
        f"{c.spread:.2f}",
        f"{float(np.sqrt(np.mean(truth.mcse**2))) / c.mcse:.2f}",
        f"{c.doubt:.0%}",
        f"{seconds:.0f}",
        f"{LOW:.0%}–{HIGH:.0%}",
        verdict(c.holds),
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coverage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    add("--runs", type=int, default=50, help="default: %(default)s")
    add("--longer", type=float, default=50, help="than a run, the truth's (default: %(default)s)")
    add("--error", type=float, help="of the calibration, in place of the case's own")
    add("--threads", type=int, default=1, help="default: %(default)s")
    args = parser.parse_args(argv)
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"there is no case {sorted(unknown)}; there are {', '.join(CASES)}")
    torch.set_num_threads(args.threads)
    rows, held = [], []
    for name in args.cases or CASES:
        case, began = CASES[name], time.process_time()
        found = bi.calibrate(case.make(), error=args.error or case.error)
        truth = case.truth(found, args.longer)
        result = coverage(found, truth.influence, args.runs)
        spent = time.process_time() - began
        p, s = found.posterior, found.sampler
        print(
            f"{name}: nβ = {p.n_beta:.3g}, λ = {p.damping:.3g}, Underdamped ε = {s.step_size:.2g}, "
            f"Γ = {s.friction:.2g}; truth: {truth.words}",
            flush=True,
        )
        rows.append(_row(name, result, truth, args.runs, spent))
        held.append(result.holds)
    print(format_table(_HEADER, rows))
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
