"""K-FAC influence."""

from __future__ import annotations

from typing import Unpack

import xarray as xr

from bayesinf._task import Task
from bayesinf.attribution._kronecker_scores import kronecker_scores
from bayesinf.attribution._needs import GRADIENTS
from bayesinf.attribution._registry import register
from bayesinf.attribution._scoring import Scoring
from bayesinf.curvature._curvature import Curvature, Damping
from bayesinf.curvature._fit import Fisher

__all__ = ["kfac"]


@register(
    "influence",
    "Kronecker-factored curvature, damped exactly",
    needs=GRADIENTS,
    one_of=(("fisher", "curvature"), ("damping", "relative_damping")),
)
def kfac(
    task: Task,
    *,
    fisher: Fisher | None = None,
    damping: Damping | None = None,
    relative_damping: float | None = None,
    curvature: Curvature | None = None,
    seed: int = 0,
    **scoring: Unpack[Scoring],
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
    curvature
        Instead of ``fisher``: what :func:`bayesinf.fit_curvature` or
        :func:`bayesinf.load_curvature` returned, with any form by layer; several dampings then
        cost one fit.
    seed
        Of the sampled labels.
    **scoring
        What to pair, tokens, modules, batch sizes, top-k, a Zarr store and the like: see
        :class:`bayesinf.Scoring`.

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
        fisher=fisher,
        damping=damping,
        relative_damping=relative_damping,
        curvature=curvature,
        seed=seed,
        scoring=scoring,
    )
