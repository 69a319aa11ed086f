"""How close solvers come to what they approximate: ``python -m benchmarks.pbrf [TASK]``.

The truth is the proximal Bregman response of random training examples of a benchmark task, between
an example left out and one counted twice (``ε = ±1/n``), measured on all queries. Printed for each
method at the same damping λ is the Pearson correlation over training examples, averaged over
queries, with its 95 % interval (a jackknife over training examples, and the spread of the queries);
the pooled correlation over all pairs; and the slope of the truth on the method.

Exact damped Gauss–Newton influence is the limit ``ε → 0`` of the truth; what it lacks is the
linearisation error. The exit status is 1 when the lower end of its interval is below 0.99.

The default damping 0.1 is that of the other benchmarks. The response of digits-mlp to a whole
example is linear there within a few percent. It is not at 0.003, where minimisations also cost many
times as much, nor on diabetes-mlp; ``--weight 0.1`` then takes a tenth of an example.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr

import bayesinf as bi
from bayesinf.evaluation import pbrf, pbrf_correlation
from benchmarks._table import format_table, verdict
from benchmarks.tasks import TASKS, get_task

__all__ = ["SOLVERS", "Solver", "main"]

BAR = 0.99
_HEADER = ("method", "correlation [95 %]", "pooled", "slope", "seconds", "bar", "")


@dataclass(frozen=True)
class Solver:
    """A row of the table.

    Attributes
    ----------
    name
        As printed.
    scores
        Scores of a task at a damping.
    exact
        Whether the bar is for it.
    """

    name: str
    scores: Callable[[bi.Task, float], xr.Dataset]
    exact: bool = False


def _fisher(function: Callable[..., xr.Dataset]) -> Callable[[bi.Task, float], xr.Dataset]:
    return lambda task, damping: function(task, fisher="enumerated", damping=damping)


SOLVERS = (
    Solver(
        "Gauss–Newton, exact", lambda task, damping: bi.gauss_newton(task, damping=damping), True
    ),
    Solver("conjugate gradients", _fisher(bi.conjugate_gradient)),
    Solver("ASTRA", _fisher(bi.astra)),
    Solver("EK-FAC, deflated", _fisher(bi.deflated_ekfac)),
    Solver("LiSSA, 50 iterations", lambda t, d: bi.lissa(t, damping=d, iterations=50)),
    Solver("EK-FAC", _fisher(bi.ekfac)),
    Solver("K-FAC", _fisher(bi.kfac)),
    Solver("GradDot", lambda task, damping: bi.grad_dot(task)),
    Solver("GradCos", lambda task, damping: bi.grad_cos(task)),
)


def _row(solver: Solver, a: xr.Dataset) -> tuple[str, ...]:
    mean, lower, upper = (float(a[name]) for name in ("correlation", "lower", "upper"))
    return (
        solver.name,
        f"{mean:.4f} [{lower:.4f}, {upper:.4f}]",
        f"{float(a['pooled']):.4f}",
        "" if np.isnan(a["slope"]) else f"{float(a['slope']):.3f}",
        f"{float(a['seconds']):.1f}",
        f"lower end ≥ {BAR}" if solver.exact else "",
        verdict(lower >= BAR if solver.exact else None),
    )


def _seconds(scores: xr.Dataset) -> float:
    return float(sum(json.loads(scores.attrs["seconds"]).values()))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pbrf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("task", nargs="?", choices=sorted(TASKS), default="digits-mlp")
    add("--damping", type=float, default=0.1, help="λ (default: %(default)s)")
    add("--examples", type=int, default=100, help="training examples (default: %(default)s)")
    add("--queries", type=int, default=200, help="at most (default: %(default)s)")
    add("--weight", type=float, default=1.0, help="nε, of an example (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the choice of examples")
    add("--threads", type=int, default=1, help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    benchmark = get_task(args.task)
    train, (x, y) = benchmark.data()
    query = x[: args.queries], y[: args.queries]
    task = bi.Task(benchmark.checkpoint(), benchmark.likelihood, train=train, query=query)
    if not 4 <= args.examples <= task.n:
        parser.error(f"--examples must lie between 4 and {task.n}")
    chosen = np.random.default_rng(args.seed).permutation(task.n)[: args.examples]
    truth = pbrf(
        task, damping=args.damping, epsilon=args.weight / task.n, train_ids=task.train.ids[chosen]
    )
    rows, held = [], []
    for solver in SOLVERS:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scores = solver.scores(task, args.damping)
        found = pbrf_correlation(scores, truth).isel(scorer=0)
        rows.append(_row(solver, found))
        held.extend([float(found["lower"]) >= BAR] * solver.exact)
        for warning in caught:
            if issubclass(warning.category, UserWarning):
                print(f"{solver.name}: {warning.category.__name__}: {warning.message}")
    bend = truth["nonlinearity"].values
    print(
        f"{args.task}: {task.dimension} parameters, {len(chosen)} of {task.n} training examples × "
        f"{len(task.query)} queries, λ = {args.damping:g}, ε = ±{args.weight:g}/n\n"
        f"truth: {_seconds(truth):.0f} s, {truth.attrs['passes']:.0f} passes, largest residual "
        f"{truth.attrs['residual']:.1e}, {int(truth['converged'].sum())} converged; change of the "
        f"influence when ε is halved: median {np.median(bend):.1e}, largest {bend.max():.1e}\n"
    )
    print(format_table(_HEADER, rows))
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
