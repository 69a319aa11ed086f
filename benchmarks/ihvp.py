"""How close solvers come to ``(C + λI)⁻¹ ∇φ`` at equal products: ``python -m benchmarks.ihvp``.

The Gauss–Newton matrix of a benchmark task at a small damping, where EK-FAC alone is far off; the
exact solution is dense, in float64. Printed is ``‖x − x*‖_F / ‖x*‖_F`` over the queries after 10,
20 and 50 iterations, each of which is one product a query; what a solver spends once, whatever the
number of queries (estimates of a spectrum, directions of a deflation), stands beside it. The exit
status is 1 when preconditioned conjugate gradients or ASTRA are above 1e-3 after 50 products a
query, those included, or EK-FAC alone is within 10 %.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import bayesinf as bi
from bayesinf.curvature import (
    GaussNewtonProduct,
    Solution,
    SymmetricOperator,
    astra,
    conjugate_gradient,
    deflate,
    neumann,
)
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._find import find_layers
from bayesinf.curvature._gauss_newton import fit_gauss_newton
from bayesinf.curvature._sources import GradientSource
from benchmarks._table import format_table, verdict
from benchmarks.tasks import get_task

__all__ = ["exact_solutions", "main", "passes", "solve_all"]

BUDGET, BAR, EKFAC_BAR = 50, 1e-3, 0.1
ITERATIONS = (10, 20, 50)
BARRED = ("CG, preconditioned", "CG, each query alone", "ASTRA, deflated")

Errors = dict[str, dict[int, tuple[float, float]]]
"""By solver and iterations: relative error, and products a query in all."""


def exact_solutions(task: bi.Task, damping: float) -> tuple[Tensor, Tensor]:
    """Query gradients and ``(C + λI)⁻¹`` times them, ``(Q, d)``, for a task in float64."""
    with GradientSource(task, find_layers(task), Costs()) as source:
        inverse = fit_gauss_newton(task, source, damping, memory_limit=16)
        rows = source.gradients("query", slice(0, len(task.query)), task.query.batch())
        return source.flat(rows), source.flat(inverse(rows))


def solve_all(task: bi.Task, rhs: Tensor, exact: Tensor, damping: float, deflated: int) -> Errors:
    """Relative errors of every solver.

    Parameters
    ----------
    task
        In float64.
    rhs, exact
        From :func:`exact_solutions`.
    damping
        λ.
    deflated
        Directions of the deflation.
    """
    operator = GaussNewtonProduct(task, batch_size=500)
    curvature = bi.fit_curvature(task, fisher="enumerated")
    inverse = curvature.inverse(damping)

    def error(x: Tensor) -> float:
        return float((x - exact).norm() / exact.norm())

    found: Errors = {"EK-FAC alone": dict.fromkeys(ITERATIONS, (error(inverse.apply(rhs)), 0.0))}
    better = deflate(curvature, operator, damping=damping, rank=deflated)
    share = better.products / len(rhs)
    found[f"EK-FAC, {deflated} directions deflated"] = dict.fromkeys(
        ITERATIONS, (error(better.apply(rhs)), share)
    )

    def run(name: str, once: float, solver: Callable[[int], Solution]) -> None:
        found[name] = {}
        for count in ITERATIONS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", bi.SolverWarning)
                solution = solver(count)
            found[name][count] = error(solution.x), solution.products_per_row + once

    def cg(block: bool, preconditioner: SymmetricOperator | None) -> Callable[[int], Solution]:
        return lambda count: conjugate_gradient(
            operator, rhs, damping=damping, preconditioner=preconditioner, block=block,
            tolerance=1e-6, iterations=count,
        )  # fmt: skip

    def richardson(preconditioner: SymmetricOperator) -> Callable[[int], Solution]:
        return lambda count: astra(
            operator, rhs, damping=damping, preconditioner=preconditioner, tolerance=1e-6,
            iterations=count,
        )  # fmt: skip

    run("LiSSA", 0, lambda k: neumann(operator, rhs, damping=damping, tolerance=1e-6, iterations=k))
    run("CG, no preconditioner", 0, cg(True, None))
    run("CG, preconditioned", 0, cg(True, inverse))
    run("CG, each query alone", share, cg(False, better))
    run("ASTRA, EK-FAC", 0, richardson(inverse))
    run("ASTRA, deflated", share, richardson(better))
    return found


def passes(errors: Mapping[str, Mapping[int, tuple[float, float]]]) -> dict[str, bool]:
    """Which of the barred solvers are within the bar and the budget, and EK-FAC beyond its own."""
    held = {
        name: any(error <= BAR and spent <= BUDGET for error, spent in errors[name].values())
        for name in BARRED
    }
    held["EK-FAC alone"] = min(e for e, _ in errors["EK-FAC alone"].values()) >= EKFAC_BAR
    return held


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ihvp",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", nargs="?", default="digits-mlp")
    parser.add_argument("--damping", type=float, default=0.003)
    parser.add_argument("--deflate", type=int, default=100, help="directions")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    benchmark = get_task(args.task)
    train, (x, y) = benchmark.data()
    query = x[: args.queries], y[: args.queries]
    model = benchmark.checkpoint()
    task = bi.Task(model, benchmark.likelihood, train=train, query=query).to(dtype=torch.float64)
    rhs, exact = exact_solutions(task, args.damping)
    errors = solve_all(task, rhs, exact, args.damping, args.deflate)
    held = passes(errors)
    rows = [
        (
            name,
            *(f"{by[k][0]:.1e} ({by[k][1]:.0f})" for k in ITERATIONS),
            verdict(held[name]) if name in held else "",
        )
        for name, by in errors.items()
    ]
    print(
        f"{args.task}, {len(rhs)} queries, λ = {args.damping:g}: relative error (products a query)"
    )
    print(format_table(("solver", *(f"{k} iterations" for k in ITERATIONS), ""), rows))
    return int(not all(held.values()))


if __name__ == "__main__":
    sys.exit(main())
