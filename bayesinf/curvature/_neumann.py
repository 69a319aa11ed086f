r"""The Neumann series for ``(C + λI)⁻¹ b``, deterministic or over minibatches (LiSSA).

    x ← x + α (b − (C̃ + λI) x)

The iteration is that of :mod:`bayesinf.curvature._fixed_point` without preconditioner or momentum.

Source: Agarwal, Bullins & Hazan 2017; Koh & Liang 2017, arXiv 1703.04730.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesinf.curvature._fixed_point import FixedPoint
from bayesinf.curvature._operator import SymmetricOperator
from bayesinf.curvature._solvers import Solution, finish, require_system

__all__ = ["neumann"]


def neumann(
    operator: SymmetricOperator,
    rhs: Tensor,
    *,
    damping: float,
    step: float | None = None,
    batch_size: int | None = None,
    tolerance: float = 1e-3,
    iterations: int = 500,
    check_every: int | None = None,
    seed: int = 0,
) -> Solution:
    r"""Solve ``(C + λI) x = b`` for every row by the Neumann series ``x ← x + α (b − (C̃+λ) x)``.

    From ``x = 0``, ``J`` iterations give ``α Σ_{j<J} (I − α(C+λ))^j b``. Stopped early, directions
    of curvature below ``1/(αJ)`` are as if damped by about that much.

    Parameters
    ----------
    operator
        ``C``, positive semi-definite; for minibatches one with ``n`` and ``on(index)``.
    rhs
        Right-hand sides ``(k, d)``.
    damping
        λ.
    step
        α. None: ``1/μ_max``, with the largest eigenvalue of ``C + λI`` estimated by Lanczos steps,
        over minibatches the largest of five.
    batch_size
        Examples a minibatch; None for all (the deterministic series).
    tolerance
        On the residual of every row.
    iterations
        At most so many.
    check_every
        Iterations between residuals on all examples, where there are minibatches; five passes over
        the examples if None.
    seed
        Of the minibatches and the start vectors of the estimates.

    Returns
    -------
    Solution

    Raises
    ------
    ValueError
        If arguments do not fit.
    TypeError
        If minibatches are wanted of an operator that has none.
    NotPositiveDefiniteError
        If the estimated spectrum reaches 0 or below.
    SolverDivergenceError
        If the iterates grow, with the step below which they would not.

    Warns
    -----
    SolverWarning
        If rows miss the tolerance.
    """
    system = require_system(operator, rhs, damping, None)
    run = FixedPoint(system, rhs, None, batch_size, tolerance, iterations, check_every, seed)
    schedule = run.constant(step, 0.0)
    solution = run.solve(torch.zeros_like(rhs), schedule)
    advice = (
        "Its rate is the condition number of C + λI: use astra or conjugate_gradient with an "
        "EK-FAC preconditioner, more iterations, or a larger damping."
    )
    return finish("neumann", solution, tolerance, advice)
