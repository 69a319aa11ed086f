"""Products of gradients along a training run."""

from __future__ import annotations

from typing import Literal, Unpack, get_args

import numpy as np
import xarray as xr

from bayesinf._task import Task
from bayesinf.attribution._needs import GRADIENTS
from bayesinf.attribution._pairwise import Attribution, score
from bayesinf.attribution._registry import register
from bayesinf.attribution._run_gradients import RunGradients, bounded, run_attrs, tasks_of
from bayesinf.attribution._scoring import Scoring, resolve
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._find import find_layers
from bayesinf.training._intervals import nearest_nodes
from bayesinf.training._runs import Checkpoints, placed

__all__ = ["tracin"]

Order = Literal["expected", "recorded"]


@register("similarity", "inner products of gradients along the training run", needs=GRADIENTS)
def tracin(
    task: Task,
    *,
    checkpoints: Checkpoints,
    order: Order = "expected",
    **scoring: Unpack[Scoring],
) -> xr.Dataset:
    r"""Inner products of gradients at the checkpoints of a run, weighted by learning rates.

    ``influence = −(1/n) Σ_c s_c ∇φ(θ_c)ᵀ ∇ℓ_t(θ_c)`` with ``s_c = Σ_s η_s`` over the steps that a
    checkpoint stands for (``/(1 − μ)`` with momentum): TracInCP, with the share ``1/n`` that an
    example has in an expected step. With the recorded order of batches ``s_c/n`` becomes
    ``Σ_s η_s [t ∈ batch s]/B_s``, which tends to the idealised TracIn as checkpoints become dense.

    For SGD the unit is that of an influence: what the steps that an example had a share in changed
    φ by, to first order, so that the sum over training examples is about ``φ(θ_T) − φ(θ_0)``. It is
    no derivative of the final ``φ(θ_T)``, as later training is taken to leave a step's effect as
    it is: the two agree only for a short run (``Σ η · curvature ≪ 1``). With Adam only ranks mean
    something: gradients are as they are, not as its moments scale them.

    Parameters
    ----------
    task
        At the end of the run.
    checkpoints
        The run: :func:`bayesinf.open_checkpoints` of what
        :class:`bayesinf.CheckpointRecorder` wrote. All checkpoints are held in memory at once.
    order
        ``"expected"``: every step has its share of every example. ``"recorded"``: batches as they
        were; an example that was in none near a checkpoint counts nothing there.
    **scoring
        What to pair, tokens, modules, batch sizes, top-k, a Zarr store and the like: see
        :class:`bayesinf.Scoring`. Modules are those of each checkpoint, ``"0 @ 291"``.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)``, negative = helpful; ``estimand = "similarity"``. Attributes:
        checkpoint_steps, rate_sums, order, optimizer, costs.

    Raises
    ------
    ValueError
        If the task is not at the end of the run, there is no checkpoint, groups of parameters had
        different learning rates, the order is unknown or was not recorded, or a gradient is not
        finite.
    NotImplementedError
        If the likelihood lacks the measurement.

    References
    ----------
    Pruthi et al. 2020, "Estimating training data influence by tracing gradient descent", Eqs. 1
    and 2 and §3.2.
    """
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {get_args(Order)}; got {order!r}.")
    options, costs = resolve(scoring), Costs()
    checkpoints.require_task(task)
    sums = checkpoints.rate_sums()[0]
    used = np.flatnonzero(sums)
    steps = checkpoints.steps[used]
    if order == "recorded":
        weights = task.n * recorded_weights(checkpoints, task)[used]
    else:
        weights = np.repeat(sums[used, None], task.n, axis=1)
    if options.pairs == "self":  # one gradient on both sides
        weights = np.sqrt(weights)
    layers = find_layers(task, costs)
    tasks = tasks_of(task, checkpoints, steps)
    method = Attribution(
        "tracin",
        "similarity",
        lambda rows: rows,
        -1 / task.n,
        attrs={
            **run_attrs(checkpoints, tasks, steps),
            "order": order,
            "rate_sums": sums[used].tolist(),
        },
    )
    everywhere = {"query": ("checkpoints",), "train": ("checkpoints",)}
    source = RunGradients(task, tasks, steps.tolist(), layers, costs, **everywhere, weights=weights)
    with source:
        return score(task, source, method, bounded(options, task, len(steps)), costs)


def recorded_weights(checkpoints: Checkpoints, task: Task) -> np.ndarray:
    """``Σ_s η_s [t ∈ batch s]/B_s`` over the steps of each checkpoint, ``(C, n)``."""
    rates = checkpoints.learning_rates
    unit = checkpoints.rate_sums().sum() / rates.sum()
    batches = placed(checkpoints.batches, task)
    nearest = nearest_nodes(np.arange(len(rates)) + 0.5, checkpoints.steps)
    weights = np.zeros((len(checkpoints), task.n))
    for c, rate, batch in zip(nearest, rates, batches, strict=True):
        np.add.at(weights[c], batch[batch >= 0], unit * rate / len(batch))
    return weights
