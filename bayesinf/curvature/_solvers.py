r"""What all solvers of ``(C + λI) x = b`` share: the damped system, the solution, the complaints.

Right-hand sides are rows ``(k, d)``, solved together. The residual of a row is
``‖(C + λI) x − b‖ / ‖b‖`` on the full operator, computed from ``x`` and not by a recurrence. For a
symmetric positive definite system the relative error is at most ``(λ_max + λ)/(λ_min + λ)`` times
that, and mostly of the same size.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesinf.curvature._definite import NotPositiveDefiniteError
from bayesinf.curvature._mean_product import FiniteMean
from bayesinf.curvature._operator import SymmetricOperator

__all__ = ["DampedSystem", "Solution", "SolverDivergenceError", "SolverWarning"]


class SolverWarning(UserWarning):
    """A solver stopped before the residuals were as small as asked."""


class SolverDivergenceError(ArithmeticError):
    """The iterates of a solver grow without bound.

    Attributes
    ----------
    stable_step
        Below which step they would not, or None where the step was not the cause.
    """

    def __init__(self, message: str, stable_step: float | None) -> None:
        super().__init__(message)
        self.stable_step = stable_step


@dataclass(frozen=True)
class Solution:
    """Approximate solutions of ``(C + λI) x = b``.

    Attributes
    ----------
    x
        ``(k, d)``, in the dtype of the right-hand sides.
    residual
        ``‖(C + λI) x − b‖ / ‖b‖`` on the full operator, ``(k,)``; 0 where ``b = 0``.
    iterations
        How many there were.
    products
        Matrix–vector products in all, in passes over all examples: those of every right-hand side,
        of the final residual and of an estimate of the spectrum. A minibatch product counts as
        the share of the examples that it saw.
    converged
        Which rows have a residual within the tolerance, ``(k,)``.
    step
        The constant step that was used, where there was one.
    spectrum
        The estimate of the smallest and largest eigenvalue, preconditioned where there is a
        preconditioner, that the steps were chosen from, where they were.
    """

    x: Tensor
    residual: Tensor
    iterations: int
    products: float
    converged: Tensor
    step: float | None = None
    spectrum: tuple[float, float] | None = None

    @property
    def products_per_row(self) -> float:
        """``products / k``, what one right-hand side cost."""
        return self.products / max(1, len(self.x))


@dataclass
class DampedSystem:
    """``C + λI``, counting its products.

    Attributes
    ----------
    operator
        ``C``.
    damping
        λ ≥ 0.
    products
        Matrix–vector products so far, in passes over all examples.
    """

    operator: SymmetricOperator
    damping: float
    products: float = 0.0

    def __call__(self, rows: Tensor, index: Tensor | None = None) -> Tensor:
        """Product with rows ``(k, d)``, over the examples of ``index`` where there is one."""
        if index is None:
            part, share = self.operator, 1.0
        else:
            whole = require_examples(self.operator)
            part, share = whole.on(index), len(index) / whole.n
        self.products += share * len(rows)
        return part.apply(rows).add_(rows, alpha=self.damping)

    def residual(self, x: Tensor, rhs: Tensor) -> Tensor:
        """``b − (C + λI) x``, ``(k, d)``."""
        return rhs - self(x)


def require_system(
    operator: SymmetricOperator,
    rhs: Tensor,
    damping: float,
    preconditioner: SymmetricOperator | None,
) -> DampedSystem:
    """Check what every solver is given.

    Raises
    ------
    ValueError
        If shapes do not fit, a right-hand side is not finite, or the damping is not a number ≥ 0.
    """
    d = operator.shape[0]
    if rhs.ndim != 2 or rhs.shape[1] != d or not rhs.is_floating_point():
        raise ValueError(
            f"right-hand sides must be floating-point rows (k, {d}); got {rhs.dtype} of shape "
            f"{tuple(rhs.shape)}. One vector is rhs[None]; the columns of a matrix are matrix.T."
        )
    if preconditioner is not None and preconditioner.shape != operator.shape:
        raise ValueError(
            f"the preconditioner is {preconditioner.shape} and the operator {operator.shape}. "
            f"Usual cause: a curvature of another selection of parameters, or of some layers only."
        )
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be finite and ≥ 0; got {damping}.")
    bad = (~torch.isfinite(rhs).all(dim=1)).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(
            f"{len(bad)} right-hand side(s) are not finite, the first in row {bad[0]}. Usual "
            f"cause: a query whose loss overflows; look at its gradient."
        )
    return DampedSystem(operator, damping)


def require_examples(operator: SymmetricOperator) -> FiniteMean:
    """Return an operator whose products over a part of the examples can be had.

    Raises
    ------
    TypeError
        If it has no ``n`` and ``on``.
    """
    if not isinstance(operator, FiniteMean):
        raise TypeError(
            f"minibatches need an operator with `n` and `on(index)`, such as "
            f"GaussNewtonProduct(task); {type(operator).__name__} has none. Use batch_size=None."
        )
    return operator


def relative(residual: Tensor, rhs: Tensor) -> Tensor:
    """Norms of residuals over those of right-hand sides, ``(k,)``; 0 over 0 is 0."""
    norms = rhs.norm(dim=1)
    return residual.norm(dim=1) / torch.where(norms == 0, torch.ones_like(norms), norms)


def indefinite(value: float, damping: float, *, preconditioned: bool) -> NotPositiveDefiniteError:
    """Build the error for a direction of curvature ``value ≤ 0``."""
    what = "(P + λ)⁻¹(C + λI)" if preconditioned else "C + λI"
    least = "" if preconditioned else f" The damping must exceed {damping - value:.4g}."
    return NotPositiveDefiniteError(
        f"the operator plus damping is not positive definite: {what} has curvature {value:.4g} "
        f"along a direction that the solver met, at damping={damping:g}, and its smallest "
        f"eigenvalue is at most that. Usual cause: a Hessian away from a minimum.{least} Raise it, "
        f"or use Gauss–Newton products, which are positive definite at any damping > 0.",
        value,
    )


def finish(
    name: str,
    solution: Solution,
    tolerance: float,
    advice: str,
) -> Solution:
    """Warn about rows that missed the tolerance, and return the solution."""
    missed = int((~solution.converged).sum())
    if missed:
        warnings.warn(
            f"{name}: {missed} of {len(solution.x)} right-hand sides missed the tolerance "
            f"{tolerance:g}; the worst residual is {float(solution.residual.max()):.3g} after "
            f"{solution.iterations} iterations ({solution.products_per_row:.1f} products a "
            f"right-hand side). {advice}",
            SolverWarning,
            stacklevel=3,
        )
    return solution
