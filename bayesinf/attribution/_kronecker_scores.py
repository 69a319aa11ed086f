"""EK-FAC and K-FAC scores from fitted factors: damping by layer, damped inverse, inner products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import xarray as xr
from torch import Tensor

from bayesinf._task import Measurement, Task
from bayesinf.attribution._pairwise import (
    pairwise,
    require_batch_size,
    require_damping,
    score_attrs,
)
from bayesinf.attribution._scores import make_scores
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._ekfac import LayerFactors, fit_factors
from bayesinf.curvature._layers import require_layers
from bayesinf.curvature._rows import Rows, gram
from bayesinf.curvature._sources import GradientSource

__all__ = ["kronecker_scores"]


def kronecker_scores(
    task: Task,
    method: str,
    *,
    damping: float | None,
    relative_damping: float | None,
    fisher: str,
    corrected: bool,
    measurement: Measurement,
    seed: int,
    batch_size: int,
) -> xr.Dataset:
    """Fit factors and score all pairs; :func:`ekfac` and :func:`kfac` document the arguments."""
    _require_one(damping, relative_damping)
    require_batch_size(batch_size)
    costs = Costs()
    layers, untreated = require_layers(task)
    factors = fit_factors(
        task,
        fisher=fisher,
        layers=layers,
        corrected=corrected,
        seed=seed,
        batch_size=batch_size,
        costs=costs,
    )
    dampings = _dampings(factors, damping, relative_damping)

    def bind(queries: Sequence[Rows]) -> Callable[[Sequence[Rows]], Tensor]:
        left = []
        for f, q, lam in zip(factors, queries, dampings, strict=True):
            rotated = q.rotate(f.q_a, f.q_s).matrices()
            left.append(Rows(None, rotated / (f.eigenvalues + lam)))

        def product(rows: Sequence[Rows]) -> Tensor:
            right = [r.rotate(f.q_a, f.q_s) for f, r in zip(factors, rows, strict=True)]
            return gram(left, right)

        return product

    with GradientSource(task, layers, costs) as source:
        inner = pairwise(
            task, source, bind, measurement=measurement, batch_size=batch_size, costs=costs
        )
    by_layer = {f.layer.name: lam for f, lam in zip(factors, dampings, strict=True)}
    attrs = score_attrs(
        task,
        costs,
        measurement,
        batch_size,
        damping=damping if damping is not None else by_layer,
        relative_damping=relative_damping,
        fisher=fisher,
        seed=seed if fisher == "sampled" else None,
        treated=sum(layer.size for layer in layers),
        untreated=list(untreated) or None,
    )
    return make_scores(
        inner / -task.n,
        query=task.query.ids,
        train=task.train.ids,
        method=method,
        estimand="influence",
        attrs=attrs,
    )


def _require_one(damping: Any, relative_damping: Any) -> None:
    if (damping is None) == (relative_damping is None):
        got = "neither" if damping is None else "both"
        raise ValueError(
            f"give exactly one of damping= and relative_damping=; got {got}. damping is λ itself, "
            f"the same for all layers (λ = γ/(nβ) + weight decay, what BIF tends to); "
            f"relative_damping multiplies each layer's mean eigenvalue (0.1 in Grosse et al. 2023)."
        )
    if damping is not None:
        require_damping(damping)
    elif not isinstance(relative_damping, (int, float)) or not 0 < relative_damping < math.inf:
        raise ValueError(
            f"relative_damping must be a positive number, a multiple of each layer's mean "
            f"eigenvalue such as 0.1; got {relative_damping!r}."
        )


def _dampings(
    factors: Sequence[LayerFactors], damping: float | None, relative: float | None
) -> list[float]:
    if damping is not None:
        return [float(damping)] * len(factors)
    assert relative is not None
    found = [relative * f.mean_eigenvalue() for f in factors]
    for f, lam in zip(factors, found, strict=True):
        if lam <= 0:
            raise ValueError(
                f"layer {f.layer.name!r} has zero curvature on the training set, so that "
                f"relative_damping gives λ = 0 there. Usual causes: a layer that is never used, "
                f"dead units, a saturated loss. Use damping= (absolute), or leave the layer out "
                f"with Task(..., parameters=…)."
            )
    return found
