"""K-FAC influence."""

from __future__ import annotations

import xarray as xr

from bayesinf._task import Measurement, Task
from bayesinf.attribution._kronecker_scores import kronecker_scores
from bayesinf.attribution._scores import register

__all__ = ["kfac"]


@register("influence", "Kronecker-factored curvature, damped exactly")
def kfac(
    task: Task,
    *,
    fisher: str,
    damping: float | None = None,
    relative_damping: float | None = None,
    measurement: Measurement = "loss",
    seed: int = 0,
    batch_size: int = 256,
) -> xr.Dataset:
    r"""Influence with K-FAC curvature ``C_ℓ = S ⊗ A``, layer by layer.

    ``influence = −(1/n) Σ_ℓ ∇φ_qᵀ (S ⊗ A + λI)⁻¹ ∇ℓ_t``. The damping is exact, through the
    eigenvalues ``λ_S λ_A + λ``; it is not split between the factors. ``A`` sums an example's
    positions, ``S`` averages over them (Grosse & Martens 2016, for convolutions).

    Parameters
    ----------
    task
        Network, likelihood, training and query examples.
    fisher
        ``"enumerated"``, ``"sampled"`` or ``"empirical"``, as for :func:`~bayesinf.ekfac`.
    damping
        λ = γ/(nβ) + weight decay, in units of the mean loss, the same in every layer.
    relative_damping
        Instead: λ of a layer as a multiple of its mean eigenvalue.
    measurement
        φ of the queries: ``"loss"``, ``"margin"``, or ``f(task, params, batch) -> (B,)``.
    seed
        Of the sampled labels.
    batch_size
        Examples at a time. Scores do not depend on it.

    Returns
    -------
    xr.Dataset
        As :func:`~bayesinf.ekfac`.

    Raises
    ------
    ValueError, NotImplementedError
        As :func:`~bayesinf.ekfac`.

    References
    ----------
    Martens & Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate
    curvature".
    """
    return kronecker_scores(
        task,
        "kfac",
        damping=damping,
        relative_damping=relative_damping,
        fisher=fisher,
        corrected=False,
        measurement=measurement,
        seed=seed,
        batch_size=batch_size,
    )
