"""Influence by solving linear systems: one for every query, preconditioned by EK-FAC."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import xarray as xr
from torch import Tensor

from bayesinf._task import Task
from bayesinf.attribution._kronecker_scores import curvature_attrs, fitted
from bayesinf.attribution._pairwise import Attribution, require_damping, score
from bayesinf.attribution._scoring import Scoring, resolve
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._curvature import Curvature
from bayesinf.curvature._deflation import deflate
from bayesinf.curvature._find import find_layers
from bayesinf.curvature._fit import Fisher
from bayesinf.curvature._lanczos import Eigenpairs
from bayesinf.curvature._nystrom import NystromApproximation
from bayesinf.curvature._operator import SymmetricOperator
from bayesinf.curvature._products import GaussNewtonProduct, HessianProduct
from bayesinf.curvature._rows import Rows
from bayesinf.curvature._solvers import Solution
from bayesinf.curvature._sources import GradientSource

__all__ = ["Of", "Preconditioner", "Solve", "product", "require_one_sketch", "solved_scores"]

_SKETCHES = {"eigenpairs": "arnoldi_eigenpairs", "approximation": "nystrom_approximation"}
"""Options for a curvature of low rank, and what makes it."""

Of = Literal["gauss_newton", "hessian"]
"""Which curvature of the mean loss a system is solved in."""

Solve = Callable[[SymmetricOperator, Tensor], Solution]
"""An operator and right-hand sides ``(k, d)`` to a solution."""


class Preconditioner:
    """EK-FAC's damped inverse, deflated by ``rank`` directions that it misses.

    Attributes
    ----------
    inverse
        The operator.
    attrs
        What scores record of it.
    """

    def __init__(
        self,
        task: Task,
        operator: SymmetricOperator,
        damping: float,
        rank: int,
        fisher: Fisher | None,
        curvature: Curvature | None,
        seed: int,
        scoring: Scoring,
        costs: Costs,
    ) -> None:
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            raise ValueError(f"deflate must be a number of directions ≥ 0; got {rank!r}.")
        held = fitted(task, "ekfac", fisher, curvature, seed, resolve(scoring), costs)
        self.inverse: SymmetricOperator = held.inverse(damping)
        self.attrs = {**curvature_attrs(held), "deflate": rank, "seed": seed}
        if rank:
            with costs.stage("deflation"):
                found = deflate(held, operator, damping=damping, rank=rank, seed=seed)
            self.inverse, self.attrs["deflated"] = found, len(found.values)


def product(
    task: Task, of: Of, batch_size: int, costs: Costs
) -> GaussNewtonProduct | HessianProduct:
    """Return the operator of a curvature.

    Raises
    ------
    ValueError
        If the curvature is unknown.
    """
    if of not in get_args(Of):
        raise ValueError(f"of must be one of {get_args(Of)}; got {of!r}.")
    kind = GaussNewtonProduct if of == "gauss_newton" else HessianProduct
    return kind(task, batch_size=batch_size, costs=costs)


def require_one_sketch(
    method: str,
    name: str,
    rank: int | None,
    given: Eigenpairs | NystromApproximation | None,
    task: Task,
) -> None:
    """Raise ``ValueError`` unless one of a rank and a low-rank curvature of the task is given.

    Parameters
    ----------
    method, task
        What it is for.
    name
        Of the option for a curvature that was found before.
    rank, given
        Both options.
    """
    if (rank is None) == (given is None):
        got = "neither" if rank is None else "both"
        raise ValueError(
            f"{method} needs exactly one of rank= and {name}= (from "
            f"bi.curvature.{_SKETCHES[name]}); got {got}."
        )
    if given is not None and given.vectors.shape[1] != task.dimension:
        raise ValueError(
            f"{name} is of {given.vectors.shape[1]:,} parameters and the task selects "
            f"{task.dimension:,}. Make it for this task: "
            f"bi.curvature.{_SKETCHES[name]}(bi.curvature.GaussNewtonProduct(task), …)."
        )


def solved_scores(
    task: Task,
    name: str,
    *,
    of: Of,
    damping: float,
    solve: Solve,
    operator: GaussNewtonProduct | HessianProduct,
    attrs: dict[str, Any],
    scoring: Scoring,
    costs: Costs,
) -> xr.Dataset:
    """Score all pairs by solutions ``(C + λI)⁻¹ ∇φ_q``.

    Parameters
    ----------
    task, scoring, costs
        As for every classical method.
    name
        Of the method.
    of, damping, operator
        ``C`` and λ.
    solve
        The solver.
    attrs
        Its settings.
    """
    options = resolve(scoring)
    damping = require_damping(damping)
    report: dict[str, Any] = {"worst_residual": 0.0, "products": 0.0}
    with GradientSource(task, find_layers(task, costs), costs) as source:

        def precondition(rows: list[Rows]) -> list[Rows]:
            with costs.stage("solves"):
                found = solve(operator, source.flat(rows))
            report["worst_residual"] = max(report["worst_residual"], float(found.residual.max()))
            report["products"] = operator.products
            if found.step is not None:
                report["chosen_step"] = found.step
            report["unconverged"] = report.get("unconverged", 0) + int((~found.converged).sum())
            return source.unflat(found.x)

        method = Attribution(
            name,
            "influence",
            precondition,
            -1 / task.n,
            attrs={"damping": damping, "of": of, **attrs},
            report=report,
        )
        return score(task, source, method, options, costs)
