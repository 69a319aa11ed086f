"""TRAK: ridge regression on projected gradients of the margin."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Unpack

import xarray as xr

from bayesinf._checkpoint import Checkpoint
from bayesinf._task import Task
from bayesinf.attribution._kronecker_scores import require_one_damping, resolve_damping
from bayesinf.attribution._needs import GAUSS_NEWTON_PRODUCTS, likelihood_part
from bayesinf.attribution._pairwise import Attribution, require_damping, score
from bayesinf.attribution._projected import refuse
from bayesinf.attribution._registry import register
from bayesinf.attribution._scoring import Options, Scoring, resolve
from bayesinf.attribution._trak_features import TrakFeatures, TrakGradients, trak_features
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._projections import ProjectionKind

__all__ = ["trak"]


@register(
    "similarity",
    "ridge regression on projected margin gradients",
    needs=(*GAUSS_NEWTON_PRODUCTS, likelihood_part("margin")),
    one_of=(("damping", "relative_damping"),),
)
def trak(
    task: Task,
    *,
    damping: float | None = None,
    relative_damping: float | None = None,
    dimension: int = 512,
    projection: ProjectionKind = "rademacher",
    checkpoints: Sequence[Checkpoint] | None = None,
    gradients: str | os.PathLike[str] | None = None,
    features: TrakFeatures | None = None,
    memory_limit: float = 8.0,
    seed: int = 0,
    **scoring: Unpack[Scoring],
) -> xr.Dataset:
    r"""Negative TRAK scores, averaged over checkpoints as in the paper.

    ``−τ(q, t) = (1/M Σ_m φ_m(q)ᵀ (Φ_mᵀΦ_m + nλ)⁻¹ φ_m(t)) · (1/M Σ_m Q_m(t))`` with features
    ``φ_m(z) = P_m ∇f_m(z)`` of the margin ``f = log p/(1−p)`` and ``Q = ∂ℓ/∂f = −(1−p)``: the
    kernel and the slopes are averaged apart. A Newton step of the linearised model's logistic
    regression without its weights ``p(1−p)``, which is why its values are on no scale: ranks mean
    something, hence the estimand ``"similarity"``.

    Parameters
    ----------
    task
        Network, likelihood, training and query examples.
    damping
        λ ≥ 0, the ridge divided by n: ``Φᵀ Φ / n + λ``, in units of the mean of squared features.
        0 in the paper; scores can hinge on it, so that it must be given, and a sweep by
        ``features`` costs no further pass over the training set.
    relative_damping
        Instead: λ at a checkpoint as a multiple of the mean eigenvalue of ``Φᵀ Φ / n`` there.
    dimension, projection, checkpoints, gradients, memory_limit, seed
        As of :func:`trak_features`.
    features
        Instead of these: what :func:`trak_features` returned.
    **scoring
        As of :class:`bayesinf.Scoring`, without ``modules`` and tokens. ``measurement="margin"``
        changes the sign alone.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)``, of the loss: negative = helpful. Attributes: estimand
        (``"similarity"``), damping (by checkpoint, where relative), ridge (nλ), dimension,
        projection, checkpoints, seconds by stage, forward_examples, backward_examples, checkpoint.

    Raises
    ------
    ValueError
        If not exactly one damping is given, an argument is out of range, memory would not suffice,
        ``features`` or ``gradients`` belong to another task, or a gradient is not finite.
    NotPositiveDefiniteError
        If λ is 0 and ``Φᵀ Φ`` is singular, as it is for ``dimension > n`` (a ``ValueError``).
    TypeError
        If the network's outputs are not one tensor.
    NotImplementedError
        If the likelihood has no ``margin``.

    References
    ----------
    Park et al. 2023, "TRAK: Attributing model behavior at scale", Eqs. 13-17.
    """
    (options, sign), costs = _options(scoring), Costs()
    if damping is not None and relative_damping is None:
        require_damping(damping, positive=False)
    else:
        require_one_damping(damping, relative_damping)
    if features is None:
        features = trak_features(
            task,
            dimension=dimension,
            projection=projection,
            checkpoints=checkpoints,
            gradients=gradients,
            memory_limit=memory_limit,
            seed=seed,
            batch_size=options.batch_size,
            costs=costs,
        )
    else:
        features.require_task(task)
    lam = resolve_damping(features.curvature, damping, relative_damping)
    ridge = {name: task.n * value for name, value in features.curvature.dampings(lam).items()}
    count = len(features.tasks)
    alone = options.pairs == "self"
    method = Attribution(
        "trak",
        "similarity",
        features.curvature.inverse(lam).precondition,
        sign / (task.n * count),
        attrs={
            "damping": lam,
            "relative_damping": relative_damping,
            "ridge": next(iter(ridge.values())) if relative_damping is None else ridge,
            **features.info,
        },
    )
    source = TrakGradients(task, features, not alone, costs)
    scores = score(task, source, method, options, costs)
    if alone:
        scores["influence"] = scores["influence"] * features.slopes.cpu().numpy()
    return scores


def _options(scoring: Scoring) -> tuple[Options, int]:
    """Options, and the sign of the scores."""
    options = resolve(scoring)
    if options.measurement not in ("loss", "margin"):
        raise ValueError(
            f"trak's measurement must be 'loss' or 'margin', whose scores differ in sign alone; "
            f"got {options.measurement!r}. For a measurement of your own take an influence "
            f"function: bi.logra, bi.ekfac."
        )
    reason = "features are of whole examples and whole networks"
    refuse("trak", options, dict.fromkeys(("modules", "train_tokens", "query_tokens"), reason))
    return options, 1 if options.measurement == "loss" else -1
