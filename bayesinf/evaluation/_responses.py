"""What the proximal Bregman responses share: checked settings and warnings."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from bayesinf._diagnostics import ConvergenceWarning

__all__ = ["require_settings", "warn_unconverged"]


def require_settings(damping: Any, tolerance: Any, max_iterations: Any, rank: Any) -> None:
    """Check what all minimisations share.

    Raises
    ------
    ValueError
        If one of them is out of range.
    """
    number = isinstance(damping, (int, float)) and not isinstance(damping, bool)
    if not number or not math.isfinite(damping) or damping < 0:
        raise ValueError(
            f"damping must be a number ≥ 0; got {damping!r}. It is λ = γ/(nβ) + weight decay in "
            f"units of the mean loss, the same as of the scores that are compared with this; there "
            f"is no default, since it sets the answer."
        )
    if not isinstance(tolerance, float) or not 0 < tolerance < 1:
        raise ValueError(
            f"tolerance must lie between 0 and 1; got {tolerance!r}. It is relative to the norm of "
            f"the gradient that drives the response; 1e-4 is usual."
        )
    for name, value in (("max_iterations", max_iterations), ("rank", rank)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer; got {value!r}.")


def warn_unconverged(
    names: np.ndarray, residual: np.ndarray, tolerance: float, max_iterations: int
) -> None:
    """Name what has not converged, in a :class:`~bayesinf.ConvergenceWarning`."""
    worst = np.argsort(-residual)[: int((residual > tolerance).sum())]
    if len(worst):
        named = ", ".join(f"{names[k]} ({residual[k]:.1e})" for k in worst[:8])
        more = "" if len(worst) <= 8 else f" and {len(worst) - 8} more"
        warnings.warn(
            f"{len(worst)} of {len(names)} responses have not reached the tolerance {tolerance:g}: "
            f"{named}{more}; in brackets the norm of the gradient relative to the one that drives "
            f"the response. Raise max_iterations={max_iterations} or the damping; the result's "
            f"`residual` says which they are.",
            ConvergenceWarning,
            stacklevel=3,
        )
