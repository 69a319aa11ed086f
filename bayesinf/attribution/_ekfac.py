"""EK-FAC influence."""

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

__all__ = ["ekfac"]


@register(
    "influence",
    "eigenvalue-corrected Kronecker-factored curvature",
    needs=GRADIENTS,
    one_of=(("fisher", "curvature"), ("damping", "relative_damping")),
)
def ekfac(
    task: Task,
    *,
    fisher: Fisher | None = None,
    damping: Damping | None = None,
    relative_damping: float | None = None,
    curvature: Curvature | None = None,
    seed: int = 0,
    **scoring: Unpack[Scoring],
) -> xr.Dataset:
    r"""Influence with EK-FAC curvature, layer by layer.

    ``influence = −(1/n) Σ_ℓ ∇φ_qᵀ (C_ℓ + λI)⁻¹ ∇ℓ_t`` with
    ``C_ℓ = (Q_S ⊗ Q_A) diag(Λ) (Q_S ⊗ Q_A)ᵀ``, the curvature of the **mean** loss: Kronecker
    factors give the eigenvectors, second moments of the rotated per-example gradients the
    eigenvalues. Every selected parameter counts, whatever layer it is in: see
    :func:`bayesinf.fit_curvature`.

    Parameters
    ----------
    task
        Network, likelihood, training and query examples.
    fisher
        Labels of the curvature: ``"enumerated"`` (the model's distribution, exactly: the
        Gauss–Newton matrix; one backward pass a class or output), ``"sampled"`` (one label an
        example from it) or ``"empirical"`` (the data's labels: another, usually worse matrix).
    damping
        λ = γ/(nβ) + weight decay, in units of the mean loss, the same in every layer or a dict by
        layer.
    relative_damping
        Instead: λ of a layer as a multiple of the mean of its Λ; Grosse et al. use 0.1.
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
        ``influence(query, train)``; negative = helpful. Attributes: damping, fisher, measurement,
        seconds by stage, forward_examples, backward_examples, checkpoint.

    Raises
    ------
    ValueError
        If not exactly one damping, and one of ``fisher`` and ``curvature``, is given, an argument
        is out of range, an example's loss depends on others, or a gradient is not finite.
    NotImplementedError
        If the likelihood lacks what ``fisher`` or ``measurement`` needs.

    References
    ----------
    George et al. 2018, "Fast approximate natural gradient descent in a Kronecker-factored
    eigenbasis", Eq. 7; Grosse et al. 2023, "Studying large language model generalization with
    influence functions", Eqs. 16-20.
    """
    return kronecker_scores(
        task,
        "ekfac",
        fisher=fisher,
        damping=damping,
        relative_damping=relative_damping,
        curvature=curvature,
        seed=seed,
        scoring=scoring,
    )
