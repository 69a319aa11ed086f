"""EK-FAC influence."""

from __future__ import annotations

import xarray as xr

from bayesinf._task import Measurement, Task
from bayesinf.attribution._kronecker_scores import kronecker_scores
from bayesinf.attribution._scores import register

__all__ = ["ekfac"]


@register("influence", "eigenvalue-corrected Kronecker-factored curvature")
def ekfac(
    task: Task,
    *,
    fisher: str,
    damping: float | None = None,
    relative_damping: float | None = None,
    measurement: Measurement = "loss",
    seed: int = 0,
    batch_size: int = 256,
) -> xr.Dataset:
    r"""Influence with EK-FAC curvature, layer by layer.

    ``influence = −(1/n) Σ_ℓ ∇φ_qᵀ (C_ℓ + λI)⁻¹ ∇ℓ_t`` with
    ``C_ℓ = (Q_S ⊗ Q_A) diag(Λ) (Q_S ⊗ Q_A)ᵀ``, the curvature of the **mean** loss: Kronecker
    factors give the eigenvectors, second moments of the rotated per-example gradients the
    eigenvalues. Treated are ``nn.Linear`` and ``nn.Conv2d`` (``groups=1``) layers, biases included.

    Parameters
    ----------
    task
        Network, likelihood, training and query examples.
    fisher
        Labels of the curvature: ``"enumerated"`` (the model's distribution, exactly: the
        Gauss–Newton matrix; one backward pass a class or output), ``"sampled"`` (one label an
        example from it) or ``"empirical"`` (the data's labels: another, usually worse matrix).
    damping
        λ = γ/(nβ) + weight decay, in units of the mean loss, the same in every layer.
    relative_damping
        Instead: λ of a layer as a multiple of the mean of its Λ; Grosse et al. use 0.1.
    measurement
        φ of the queries: ``"loss"``, ``"margin"``, or ``f(task, params, batch) -> (B,)``.
    seed
        Of the sampled labels.
    batch_size
        Examples at a time. Scores do not depend on it.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)``; negative = helpful. Attributes: damping, fisher, measurement,
        seconds by stage, forward_examples, backward_examples, checkpoint.

    Raises
    ------
    ValueError
        If not exactly one damping is given, an argument is out of range, no layer can be treated,
        a layer's weight is used outside its forward, or a gradient is not finite.
    NotImplementedError
        If the likelihood lacks what ``fisher`` or ``measurement`` needs.

    Warns
    -----
    UntreatedParametersWarning
        If selected parameters are in other layers, which then count nothing.

    References
    ----------
    George et al. 2018, "Fast approximate natural gradient descent in a Kronecker-factored
    eigenbasis", Eq. 7; Grosse et al. 2023, "Studying large language model generalization with
    influence functions", Eqs. 16-20.
    """
    return kronecker_scores(
        task,
        "ekfac",
        damping=damping,
        relative_damping=relative_damping,
        fisher=fisher,
        corrected=True,
        measurement=measurement,
        seed=seed,
        batch_size=batch_size,
    )
