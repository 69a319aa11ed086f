r"""ASTRA: EK-FAC-preconditioned (stochastic) iterations for ``(C + λI)⁻¹ b``.

    x ← x + α M (b − (C̃ + λI) x) + β (x − x_previous),   M = (P + λ̃I)⁻¹,   x = M b at first

The iteration is that of :mod:`bayesinf.curvature._fixed_point`. Where EK-FAC is wrong by large
factors, ``M`` deflated by the directions it misses narrows the spectrum of ``M (C + λI)``.

Source: Wang et al. 2025, arXiv 2507.14740.
"""

from __future__ import annotations

from torch import Tensor

from bayesinf.curvature._fixed_point import FixedPoint
from bayesinf.curvature._lanczos import Spectrum
from bayesinf.curvature._operator import SymmetricOperator
from bayesinf.curvature._solvers import Solution, finish, require_system

__all__ = ["astra"]


def astra(
    operator: SymmetricOperator,
    rhs: Tensor,
    *,
    damping: float,
    preconditioner: SymmetricOperator,
    step: float | None = None,
    momentum: float | None = None,
    spectrum: tuple[float, float] | None = None,
    batch_size: int | None = None,
    tolerance: float = 1e-4,
    iterations: int = 100,
    check_every: int | None = None,
    start: Tensor | None = None,
    seed: int = 0,
) -> Solution:
    r"""Solve ``(C + λI) x = b`` for every row by EK-FAC-preconditioned iterations.

    The published steps (``α = 0.1 λ``) barely move directions that the preconditioner has right;
    the steps here follow from the spectrum of ``M (C + λI)``, and the iteration stops on the
    residual.

    Parameters
    ----------
    operator
        ``C``, positive semi-definite; for minibatches one with ``n`` and ``on(index)``.
    rhs
        Right-hand sides ``(k, d)``.
    damping
        λ.
    preconditioner
        ``M ≈ (C + λI)⁻¹``: ``curvature.inverse(λ̃)``, or the deflated inverse, whose spectrum is
        much narrower.
    step
        α, constant. None: chosen from the spectrum, for momentum β ``(1 + β)/μ_max``, half of what
        is stable, and with minibatches ``(1 − β)/μ_max`` with the largest ``μ_max`` of five.
    momentum
        β of the heavy ball, constant. None: Chebyshev's α and β over all examples where ``step``
        is None too, otherwise 0.
    spectrum
        ``(μ_min, μ_max)`` of ``M (C + λI)``, where it is known (``Solution.spectrum`` of a solution
        before); None estimates it by 20 Lanczos steps with one vector.
    batch_size
        Examples a minibatch; None for all.
    tolerance
        On the residual of every row.
    iterations
        At most so many.
    check_every
        Iterations between residuals on all examples, where there are minibatches; five passes over
        the examples if None.
    start
        ``(k, d)``; ``M b``, the EK-FAC solution, if None.
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
    system = require_system(operator, rhs, damping, preconditioner)
    run = FixedPoint(
        system, rhs, preconditioner, batch_size, tolerance, iterations, check_every, seed
    )
    known = None if spectrum is None else _require_spectrum(spectrum)
    if step is None and momentum is None and batch_size is None:
        schedule = run.chebyshev(known)
    else:
        schedule = run.constant(step, 0.0 if momentum is None else momentum, known)
    solution = run.solve(preconditioner.apply(rhs) if start is None else start.clone(), schedule)
    advice = (
        "Allow more iterations, a better preconditioner (deflate), or a larger damping; "
        "conjugate_gradient needs fewer products where all examples fit in one."
        if batch_size is None
        else "Minibatch noise sets a floor that falls with the number of iterations and with the "
        "step: allow more iterations, a smaller step or a larger batch_size."
    )
    return finish("astra", solution, tolerance, advice)


def _require_spectrum(spectrum: tuple[float, float]) -> Spectrum:
    low, high = spectrum
    if not 0 < low <= high < float("inf"):
        raise ValueError(f"spectrum must be (μ_min, μ_max) with 0 < μ_min ≤ μ_max; got {spectrum}.")
    return Spectrum(low, high)
