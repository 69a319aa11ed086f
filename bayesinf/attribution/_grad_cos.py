"""Cosines between gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import xarray as xr
from torch import Tensor

from bayesinf._task import Measurement, Task
from bayesinf.attribution._pairwise import all_layers, pairwise, require_batch_size, score_attrs
from bayesinf.attribution._scores import make_scores, register
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._rows import Rows, gram, squared_norms
from bayesinf.curvature._sources import GradientSource

__all__ = ["grad_cos"]


@register("similarity", "cosine between gradients")
def grad_cos(task: Task, *, measurement: Measurement = "loss", batch_size: int = 256) -> xr.Dataset:
    r"""Negative cosines ``−∇φ_qᵀ∇ℓ_t / (‖∇φ_q‖ ‖∇ℓ_t‖)`` over all selected parameters.

    A gradient that is zero has cosine 0 with everything.

    Parameters
    ----------
    task
        Network, likelihood, training and query examples; any network.
    measurement
        φ of the queries: ``"loss"``, ``"margin"``, or ``f(task, params, batch) -> (B,)``.
    batch_size
        Examples at a time. Scores do not depend on it.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)`` in [−1, 1], negative = helpful; attribute
        ``estimand = "similarity"``.

    Raises
    ------
    ValueError
        If a gradient is not finite.
    NotImplementedError
        If the likelihood lacks the measurement.

    References
    ----------
    Charpiat et al. 2019, "Input similarity from the neural network perspective", §2.
    """
    require_batch_size(batch_size)
    costs = Costs()
    with GradientSource(task, all_layers(task), costs) as source:
        cosines = pairwise(
            task, source, _bind, measurement=measurement, batch_size=batch_size, costs=costs
        )
    return make_scores(
        -cosines,
        query=task.query.ids,
        train=task.train.ids,
        method="grad_cos",
        estimand="similarity",
        attrs=score_attrs(task, costs, measurement, batch_size),
    )


def _bind(queries: Sequence[Rows]) -> Callable[[Sequence[Rows]], Tensor]:
    left = _inverse_norms(queries)
    return lambda rows: gram(queries, rows) * left[:, None] * _inverse_norms(rows)


def _inverse_norms(rows: Sequence[Rows]) -> Tensor:
    norms = squared_norms(rows).sqrt()
    return torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
