"""Gradient inner products."""

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

__all__ = ["grad_dot"]


@register("similarity", "inner product of gradients", needs=GRADIENTS)
def grad_dot(task: Task, **scoring: Unpack[Scoring]) -> xr.Dataset:
    r"""Negative inner products ``−∇φ_qᵀ ∇ℓ_t`` over all selected parameters.

    The limit of ``nλ · influence`` for large damping; only its ranks mean something.

    Parameters
    ----------
    task
        Network, likelihood, training and query examples; any network.
    **scoring
        What to pair, tokens, modules, batch sizes, top-k, a Zarr store and the like: see
        :class:`bayesinf.Scoring`.

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
    options, costs = resolve(scoring), Costs()
    method = Attribution("grad_dot", "similarity", lambda rows: rows, -1.0)
    with GradientSource(task, find_layers(task, costs), costs) as source:
        return score(task, source, method, options, costs)
