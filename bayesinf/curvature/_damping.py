r"""Where a damping comes from: the training recipe, or the localising prior of a posterior.

Every damping λ is in units of the mean loss, the same number for all methods: that of
``C + λI`` and of the local posterior with ``λ = γ/(nβ) + weight decay``. Multiples of a layer's
mean eigenvalue are :meth:`bayesinf.Curvature.relative_damping`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

__all__ = ["gamma_from_damping", "source_damping"]


def source_damping(learning_rates: Iterable[float], *, momentum: float = 0.0) -> float:
    r"""The damping that training by gradient descent itself implies, ``λ = (1 − μ) / Σ_t η_t``.

    Unrolled gradient descent with a constant curvature answers to a gradient in a direction of
    curvature σ by ``(1 − e^{−sσ})/σ`` with ``s = Σ_t η_t / (1 − μ)``; ``1/(σ + 1/s)`` has the same
    limits at σ → 0 and σ → ∞ and is at most a factor 1.3 away between. With a constant rate over
    ``K`` steps it is ``1/(ηK)``.

    Parameters
    ----------
    learning_rates
        ``η_t`` of every step of the run (of SGD; Adam's rates are in other units).
    momentum
        ``μ`` of heavy-ball or Nesterov momentum, which lengthens every step to ``η/(1 − μ)``.

    Raises
    ------
    ValueError
        If a rate is negative or not finite, none is positive, or the momentum is not in [0, 1).

    Examples
    --------
    >>> import bayesinf as bi
    >>> bi.source_damping([0.1] * 100)
    0.1

    References
    ----------
    Bae, Lin, Lorraine & Grosse 2024, "Training data attribution via approximate unrolled
    differentiation" (SOURCE).
    """
    rates = [float(rate) for rate in learning_rates]
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1); got {momentum!r}.")
    total = math.fsum(rates)
    if any(not 0 <= rate < math.inf for rate in rates) or total <= 0:
        shown = f"{rates[:4]}{' …' if len(rates) > 4 else ''}"
        raise ValueError(
            f"learning_rates must be the finite, non-negative rates of all steps, one at least "
            f"positive; got {len(rates)} of them, {shown}. Those of an "
            f"SGDRecipe: recipe.learning_rates(n)."
        )
    return (1 - momentum) / total


def gamma_from_damping(damping: float, n_beta: float, *, weight_decay: float = 0.0) -> float:
    r"""Localising precision of the posterior whose damping is λ: ``γ = nβ (λ − weight decay)``.

    ``bi.LocalPosterior(task, n_beta, gamma_from_damping(λ, n_beta))`` tends, at low temperature, to
    the influence function at damping λ.

    Parameters
    ----------
    damping
        λ.
    n_beta
        Inverse temperature times the number of examples.
    weight_decay
        Of the posterior, in units of the mean loss.

    Raises
    ------
    ValueError
        If a number is negative or not finite, or the weight decay exceeds the damping.
    """
    for name, value in (("damping", damping), ("n_beta", n_beta), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and ≥ 0; got {value!r}.")
    if weight_decay > damping:
        raise ValueError(
            f"the damping λ = γ/(nβ) + weight decay cannot be less than the weight decay; got "
            f"damping={damping:g}, weight_decay={weight_decay:g}, which would need γ < 0."
        )
    return n_beta * (damping - weight_decay)
