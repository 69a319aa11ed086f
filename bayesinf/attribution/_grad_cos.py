"""Cosines between gradients."""

from __future__ import annotations

from typing import Unpack

import xarray as xr

from bayesinf._task import Task
from bayesinf.attribution._needs import GRADIENTS
from bayesinf.attribution._pairwise import Attribution, score
from bayesinf.attribution._registry import register
from bayesinf.attribution._scoring import Scoring, resolve
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._find import find_layers
from bayesinf.curvature._sources import GradientSource

__all__ = ["grad_cos"]


@register("similarity", "cosine between gradients", needs=GRADIENTS)
def grad_cos(task: Task, *, per_layer: bool = False, **scoring: Unpack[Scoring]) -> xr.Dataset:
    r"""Negative cosines ``−∇φ_qᵀ∇ℓ_t / (‖∇φ_q‖ ‖∇ℓ_t‖)`` over all selected parameters.

    A gradient that is zero has cosine 0 with everything.

    Parameters
    ----------
    task
        Network, likelihood, training and query examples; any network.
    per_layer
        The mean of the cosines of the gradients of each layer: then every layer counts the same,
        however large its gradients. A zero gradient of a layer has cosine 0 in it.
    **scoring
        What to pair, tokens, modules, batch sizes, top-k, a Zarr store and the like: see
        :class:`bayesinf.Scoring`.

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
    options, costs = resolve(scoring), Costs()
    if options.relative is not None:
        raise ValueError(
            f"a cosine is relative to both gradients already; drop relative={options.relative!r}."
        )
    layers = find_layers(task, costs)
    method = Attribution(
        "grad_cos",
        "similarity",
        lambda rows: rows,
        -1.0 / len(layers) if per_layer else -1.0,
        cosine="layer" if per_layer else True,
        attrs={"per_layer": per_layer},
    )
    with GradientSource(task, layers, costs) as source:
        return score(task, source, method, options, costs)
