"""Gradient inner products."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import xarray as xr
from torch import Tensor

from bayesinf._task import Measurement, Task
from bayesinf.attribution._pairwise import all_layers, pairwise, require_batch_size, score_attrs
from bayesinf.attribution._scores import make_scores, register
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._rows import Rows, gram
from bayesinf.curvature._sources import GradientSource

__all__ = ["grad_dot"]


@register("similarity", "inner product of gradients")
def grad_dot(task: Task, *, measurement: Measurement = "loss", batch_size: int = 256) -> xr.Dataset:
    r"""Negative inner products ``−∇φ_qᵀ ∇ℓ_t`` over all selected parameters.

    The limit of ``nλ · influence`` for large damping; only its ranks mean something.

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
        ``influence(query, train)``, negative = similar gradients = helpful; attribute
        ``estimand = "similarity"``.

    Raises
    ------
    ValueError
        If a gradient is not finite.
    NotImplementedError
        If the likelihood lacks the measurement.

    References
    ----------
    Charpiat et al. 2019, "Input similarity from the neural network perspective"; Pruthi et al.
    2020 (TracIn at one checkpoint).
    """
    require_batch_size(batch_size)
    costs = Costs()
    with GradientSource(task, all_layers(task), costs) as source:
        inner = pairwise(
            task, source, _bind, measurement=measurement, batch_size=batch_size, costs=costs
        )
    return make_scores(
        -inner,
        query=task.query.ids,
        train=task.train.ids,
        method="grad_dot",
        estimand="similarity",
        attrs=score_attrs(task, costs, measurement, batch_size),
    )


def _bind(queries: Sequence[Rows]) -> Callable[[Sequence[Rows]], Tensor]:
    return lambda rows: gram(queries, rows)
