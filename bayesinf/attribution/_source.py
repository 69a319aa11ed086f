"""Approximate unrolled differentiation of a training run (SOURCE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Unpack, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from bayesinf._task import Task
from bayesinf.attribution._needs import GRADIENTS
from bayesinf.attribution._pairwise import Attribution, score
from bayesinf.attribution._registry import register
from bayesinf.attribution._run_gradients import (
    RunGradients,
    bounded,
    run_attrs,
    scaled,
    tasks_of,
    total,
)
from bayesinf.attribution._scoring import Scoring, resolve
from bayesinf.attribution._segments import Segment
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._find import find_layers
from bayesinf.curvature._fit import Fisher, choose_forms
from bayesinf.curvature._layers import Layer
from bayesinf.curvature._mean_fit import mean_blocks
from bayesinf.curvature._rows import Rows
from bayesinf.training._runs import Checkpoints

__all__ = ["source"]

SourceForm = Literal["ekfac", "diagonal", "dense"]
Average = Literal["gradients", "parameters"]


@register("influence", "approximate unrolled differentiation of the training run", needs=GRADIENTS)
def source(
    task: Task,
    *,
    checkpoints: Checkpoints,
    fisher: Fisher,
    segments: int | Sequence[int] = 3,
    form: SourceForm = "ekfac",
    average: Average = "gradients",
    seed: int = 0,
    **scoring: Unpack[Scoring],
) -> xr.Dataset:
    r"""Derivative of a training run in the weights of its examples, by segments (SOURCE).

    ``influence = −(1/n) ∇φ(θ_T)ᵀ Σ_ℓ S_L ⋯ S_{ℓ+1} R_ℓ ḡ_ℓ``: a segment of the run with the time
    ``s = Σ_t η_t`` (``/(1 − μ)`` with momentum) and the mean curvature ``H`` of its checkpoints
    turns the mean gradient ``ḡ`` of a training example into a displacement, by
    ``R = (1 − e^{−sH})/H``, which later segments carry on, by ``S = e^{−sH}``. No damping is to be
    chosen: where training did not move, ``R → s``; where it converged, ``R → 1/H``. Weight decay
    adds to ``H``.

    Of Adam and AdamW, ``P = 1/(√v̂ + eps)`` from the second moments of the segment's checkpoints
    takes part: ``S = e^{−s(PH + wI)}`` and ``R = (I − S)(PH + wI)⁻¹ P`` with decoupled decay ``w``.
    Both are functions of ``P^½ H P^½``, whose EK-FAC is fitted to gradients that are scaled by
    ``P^½``; the scaling is no approximation.

    Parameters
    ----------
    task
        At the end of the run.
    checkpoints
        The run: :func:`bayesinf.open_checkpoints` of what
        :class:`bayesinf.CheckpointRecorder` wrote. All networks are held in memory at once: one a
        checkpoint, or one a segment.
    fisher
        Labels of the curvature: ``"enumerated"``, ``"sampled"`` or ``"empirical"``, as for
        :func:`bayesinf.ekfac`.
    segments
        How many, ``L``, of equal numbers of steps (3 in the paper, with 2 checkpoints in each); or
        the steps at which a new one begins, such as the stages of a schedule.
    form
        Of the curvature: ``"ekfac"``, ``"diagonal"`` or ``"dense"`` by layer.
    average
        Over the checkpoints of a segment: ``"gradients"`` and curvatures; or ``"parameters"``, so
        that both are computed once a segment, at the mean weights (FAST-SOURCE); the same scores
        where the loss is quadratic.
    seed
        Of sampled labels.
    **scoring
        What to pair, tokens, modules, batch sizes, top-k, a Zarr store and the like: see
        :class:`bayesinf.Scoring`. Modules are those of each checkpoint, ``"0 @ 291"``, or of each
        segment, ``"0 @ segment 1"``.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)``, negative = helpful: the mean over the order of batches of
        :func:`bayesinf.unrolled_response`. Attributes:
        checkpoint_steps, segments, times (``s`` of each), fisher, form, average, optimizer, costs.

    Raises
    ------
    ValueError
        If the task is not at the end of the run, there is no checkpoint, groups of parameters had
        different learning rates, segments or an argument are out of range, or a gradient is not
        finite.
    NotImplementedError
        If the likelihood lacks what ``fisher`` or ``measurement`` needs, or Adam had weight decay
        in its gradients.

    Notes
    -----
    Means over a segment are over its steps, each of which counts by its learning rate and takes the
    nearest checkpoint; with checkpoints in the middle of equal numbers of steps and a constant rate
    that is the mean over checkpoints. Where a layer's weight and bias decay differently, its ``w``
    is their mean over entries.

    References
    ----------
    Bae, Lin, Lorraine & Grosse 2024, "Training data attribution via approximate unrolled
    differentiation".
    """
    for name, value, known in (("form", form, SourceForm), ("average", average, Average)):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {get_args(known)}; got {value!r}.")
    options, costs = resolve(scoring), Costs()
    checkpoints.require_task(task)
    sums = checkpoints.rate_sums(segments)
    times, used = _times(sums), np.flatnonzero(sums.sum(0))
    steps, shares = checkpoints.steps[used], sums[:, used] / times[:, None]
    layers = find_layers(task, costs)
    roots = _roots(checkpoints, task, steps, shares, layers)
    if average == "parameters":
        tasks = [task.at(_mean_weights(checkpoints, steps, own)) for own in shares]
        places: list[object] = [f"segment {k}" for k in range(len(tasks))]
        shares = np.eye(len(tasks))
    else:
        tasks, places = tasks_of(task, checkpoints, steps), steps.tolist()
    blocks = mean_blocks(
        tasks, shares, layers, choose_forms(layers, form),
        fisher=fisher, scales=roots, seed=seed, batch_size=options.batch_size, costs=costs,
    )  # fmt: skip
    decays = _decays(checkpoints, task, layers)
    every = [
        Segment(own, decays, None if roots is None else roots[k], float(times[k]), shares[k])
        for k, own in enumerate(blocks)
    ]
    own = options.pairs == "self"
    method = Attribution(
        "source",
        "influence",
        lambda rows: propagated(every, rows[: len(layers)], zeros=own),
        -1 / task.n,
        attrs={
            **run_attrs(checkpoints, tasks, steps),
            "segments": len(every),
            "times": [segment.time for segment in every],
            "fisher": fisher,
            "form": form,
            "average": average,
            "seed": seed if fisher == "sampled" else None,
        },
    )
    train = ("end", "checkpoints") if own else ("checkpoints",)
    source = RunGradients(task, tasks, places, layers, costs, query=("end",), train=train)
    with source:
        return score(task, source, method, bounded(options, task, len(tasks)), costs)


def propagated(segments: Sequence[Segment], rows: list[Rows], *, zeros: bool = False) -> list[Rows]:
    """What gradients at the end of a run weigh train gradients by, checkpoint after checkpoint.

    Parameters
    ----------
    segments
        In the order of training.
    rows
        One entry a layer.
    zeros
        Put zeros for the end of the run before them.
    """
    count, now = len(segments[0].shares), list(rows)
    sums: list[list[Rows | None]] = [[None] * len(rows) for _ in range(count)]
    for segment in reversed(segments):
        response = segment.response(now)
        for c, share in enumerate(segment.shares.tolist()):
            if share:
                for i, own in enumerate(response):
                    sums[c][i] = total(sums[c][i], scaled(own, share))
        if segment is not segments[0]:
            now = segment.back(now)
    found = [scaled(own, 0.0) for own in rows] if zeros else []
    return found + [own for checkpoint in sums for own in checkpoint if own is not None]


def _times(sums: np.ndarray) -> np.ndarray:
    """``s`` of each segment, from sums of learning rates ``(L, C)``."""
    times: np.ndarray = sums.sum(1)
    if not (times > 0).all():
        raise ValueError(
            f"the learning rate is 0 throughout segment {int(times.argmin())}, so that it does "
            f"nothing. Choose segments by their first steps: segments=[…]."
        )
    return times


def _mean_weights(
    checkpoints: Checkpoints, steps: np.ndarray, shares: np.ndarray
) -> dict[str, Tensor]:
    """Mean over checkpoints, summed in float64; what has no mean is that of the last."""
    mean, last = dict[str, Tensor](), dict[str, Tensor]()
    for step, share in zip(steps.tolist(), shares.tolist(), strict=True):
        if share:
            last = checkpoints.weights(step)
            for name, value in last.items():
                if value.is_floating_point():
                    mean[name] = mean.get(name, 0) + share * value.double()
    return {name: mean[name].to(value) if name in mean else value for name, value in last.items()}


def _roots(
    checkpoints: Checkpoints,
    task: Task,
    steps: np.ndarray,
    shares: np.ndarray,
    layers: tuple[Layer, ...],
) -> list[tuple[Tensor, ...]] | None:
    """``P^½`` by segment and layer, from second moments that are means over checkpoints."""
    rule = checkpoints.rule
    if rule.kind == "sgd":
        return None
    if rule.kind == "adam" and any(rule.weight_decay):
        raise NotImplementedError(
            "weight decay in the gradients of Adam has no formula here, as its own moments scale "
            "it. Use torch.optim.AdamW, whose decay is decoupled, or Adam without."
        )
    moments = [checkpoints.second_moments(int(step)) for step in steps]
    found = []
    for row in shares.tolist():
        mean = {
            name: sum(share * own[name].to(p) for share, own in zip(row, moments, strict=True))
            for name, p in task.params.items()
        }
        scale = {
            name: (checkpoints.loss_scale / (torch.as_tensor(v).sqrt() + rule.eps)).sqrt()
            for name, v in mean.items()
        }
        found.append(tuple(layer.pack(scale) for layer in layers))
    return found


def _decays(checkpoints: Checkpoints, task: Task, layers: tuple[Layer, ...]) -> tuple[float, ...]:
    """``w`` by layer: of SGD in units of the mean loss."""
    unit = checkpoints.loss_scale if checkpoints.rule.kind == "sgd" else 1.0
    by_name = checkpoints.rule.decays
    found = []
    for layer in layers:
        parts = [(by_name[name], task.params[name].numel()) for name in layer.parameters]
        found.append(sum(w * size for w, size in parts) / sum(size for _, size in parts) / unit)
    return tuple(found)
