r"""Exact derivatives of a recorded run in the weights of its training examples, in forward mode.

With ``b`` the weights, step ``t`` follows the gradient of
``c/B_t Σ_{j ∈ batch t} b_j ℓ_j(θ)``, ``c`` the scale of the loss. The response of the state
(weights and moments) to ``b_i`` is carried along with the state, by
``∂g_t/∂b_i = H_t ∂θ_t/∂b_i + [i ∈ batch t] ∇ℓ_i · c/B_t`` and the derivative of the optimiser's
update, for all ``n`` examples together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.func import grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from bayesinf._data import Batch, Examples
from bayesinf._scores import make_scores
from bayesinf._task import Measurement, Task, measurement_name
from bayesinf.training._rules import MOMENTS, Rule, updated
from bayesinf.training._runs import Checkpoints, placed

__all__ = ["responses", "unrolled_response"]

_ELEMENTS = 2**24
"""Most elements of directions that are differentiated at a time."""
_FAITHFUL = {torch.float32: 1e-3, torch.float64: 1e-8}
"""Relative distance of the end of a replay that rounding explains."""

State = tuple[Tensor, ...]


def unrolled_response(
    task: Task, checkpoints: Checkpoints, *, measurement: Measurement = "loss"
) -> xr.Dataset:
    r"""Derivative of the recorded run itself in the weights of its training examples: exact.

    ``influence[query, train] = dφ(θ_T)/db_i = ∇φ(θ_T)ᵀ ∂θ_T/∂b_i`` for the run's own initial
    weights, batches and learning rates: what retraining with ``b_i = 1 ± ε``, all else equal, gives
    for small ε. The run is replayed with dropout off, and every response carried along; a step
    costs a Hessian-vector product of its batch for each training example, and memory is ``n``
    copies of the optimiser's state. For small networks, as ground truth: :func:`bayesinf.source`
    approximates its mean over the order of batches.

    Parameters
    ----------
    task
        At the end of the run; it selects all parameters that were trained.
    checkpoints
        Recorded with ids; float64 is advisable.
    measurement
        φ of the queries: ``"loss"``, ``"margin"``, or ``f(task, params, batch) -> (B,)``.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)``, negative = helpful; examples that were in no batch have 0.

    Raises
    ------
    ValueError
        If the run has no ids, parameters that were trained are not selected, or the replay does not
        end at the task's weights.

    References
    ----------
    Hara, Nitanda & Maehara 2019, "Data cleansing for models trained with SGD", differentiate the
    same map backward; Bae et al. 2024, §2.
    """
    checkpoints.require_task(task)
    _require_all(task, checkpoints.rule)
    end, response = responses(task, checkpoints)
    here = task.flatten(task.params)
    gap = float((end - here).norm() / here.norm())
    if not gap <= _FAITHFUL[task.dtype]:
        raise ValueError(
            f"the run, replayed, does not end at the task's weights: they differ by {gap:.2g} of "
            f"their norm. Usual causes: dropout or batch statistics in training, clipped "
            f"gradients, a loss that is no mean over the batch (loss_scale=), a start with moments."
        )
    queries = _example_gradients(task, task.query, here, measurement)
    return make_scores(
        (queries @ response.T).cpu().numpy(),
        query=task.query.ids,
        train=task.train.ids,
        method="unrolled_response",
        estimand="influence",
        attrs={
            "checkpoint": task.fingerprint()["checkpoint"],
            "n": task.n,
            "parameters": task.dimension,
            "measurement": measurement_name(measurement),
            "optimizer": checkpoints.rule.kind,
            "steps": checkpoints.total,
            "replay_error": gap,
        },
    )


def responses(task: Task, checkpoints: Checkpoints) -> tuple[Tensor, Tensor]:
    """``θ_T`` ``(d,)`` of the replayed run and ``∂θ_T/∂b`` ``(n, d)``."""
    rule = checkpoints.rule
    state, first = _start(task, checkpoints)
    tangents = tuple(part.new_zeros(task.n, len(part)) for part in state)
    decay = _spread(task, rule, np.array(rule.weight_decay))
    rates = checkpoints.group_rates
    batches = placed(checkpoints.batches, task)
    with sdpa_kernel(SDPBackend.MATH):
        for step, (members, rate) in enumerate(zip(batches, rates, strict=True)):
            if (members < 0).any():
                raise ValueError(
                    f"the batch of step {step} holds examples that the task does not have. Give "
                    f"the task all that the run was trained on."
                )
            where = torch.from_numpy(members)
            gradient, pushed = _pushed(task, where, state[0], tangents[0], checkpoints.loss_scale)
            move = partial(
                _moved, rule, rate=_spread(task, rule, rate), decay=decay, step=first + step
            )
            state, tangents = _carried(move, (*state, gradient), (*tangents, pushed))
    return state[0], tangents[0]


def _moved(
    rule: Rule, *state_and_gradient: Tensor, rate: Tensor, decay: Tensor, step: int
) -> State:
    *state, gradient = state_and_gradient
    return updated(rule, tuple(state), gradient, rate, decay, step)


def _carried(move: Callable[..., State], inputs: State, tangents: State) -> tuple[State, State]:
    """A step and its derivatives ``(n, d)``; each entry moves by itself."""
    pair = vjp(move, *inputs)
    outputs, pull = pair[0], pair[1]
    found = []
    for k in range(len(outputs)):
        ones = (torch.full_like(x, float(k == j)) for j, x in enumerate(outputs))
        terms = (slope * own for slope, own in zip(pull(tuple(ones)), tangents, strict=True))
        found.append(reduce(torch.add, terms))
    return tuple(x.detach() for x in outputs), tuple(found)


def _pushed(
    task: Task, where: Tensor, position: Tensor, tangent: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradient ``(d,)`` of a batch's loss, and its derivative ``(n, d)`` in all weights ``b``."""
    batch = task.train.batch(where)

    def total(flat: Tensor) -> Tensor:
        return scale * task.losses(task.unflatten(flat), batch).mean()

    pair = vjp(grad(total), position)
    gradient, pull = pair[0], pair[1]
    size = max(1, _ELEMENTS // len(position))
    pushed = torch.cat([vmap(lambda v: pull(v)[0])(rows) for rows in tangent.split(size)])
    own = _gradients(task, batch, position, "loss") * (scale / len(where))
    return gradient.detach(), pushed.detach().index_add(0, where.to(own.device), own)


def _gradients(task: Task, batch: Batch, position: Tensor, measurement: Measurement) -> Tensor:
    """Gradients ``(B, d)`` of a measurement, example by example."""

    def one(flat: Tensor, example: Batch) -> Tensor:
        single = tree_map(lambda leaf: leaf.unsqueeze(0), example)
        return task.measure(measurement, task.unflatten(flat), single).sum()

    found: Tensor = vmap(grad(one), in_dims=(None, 0))(position, batch)
    return found.detach()


def _example_gradients(
    task: Task, examples: Examples, position: Tensor, measurement: Measurement
) -> Tensor:
    size = max(1, _ELEMENTS // len(position))
    with sdpa_kernel(SDPBackend.MATH):
        return torch.cat(
            [_gradients(task, batch, position, measurement) for _, batch in examples.batches(size)]
        )


def _start(task: Task, checkpoints: Checkpoints) -> tuple[State, int]:
    """State before the first step, and how many steps the optimiser had taken by then."""
    weights = {
        k: v.to(task.params[k]) for k, v in checkpoints.weights(0).items() if k in task.params
    }
    kept = checkpoints.optimizer_state(0)
    state = [task.flatten(weights)]
    for key in MOMENTS[checkpoints.rule.kind]:
        held = {n: v.to(weights[n]) for n, v in kept.get(key, {}).items() if n in weights}
        none = {n: torch.zeros_like(v) for n, v in weights.items()}
        state.append(task.flatten({**none, **held}))
    if checkpoints.rule.kind == "sgd":
        return tuple(state), int(bool(kept.get("momentum_buffer")))
    return tuple(state), int(max([0.0, *(float(v) for v in kept.get("step", {}).values())]))


def _spread(task: Task, rule: Rule, by_group: np.ndarray) -> Tensor:
    """Numbers of groups at every entry, ``(d,)``."""
    values = {n: float(v) for group, v in zip(rule.groups, by_group, strict=True) for n in group}
    return task.flatten({n: torch.full_like(p, values[n]) for n, p in task.params.items()})


def _require_all(task: Task, rule: Rule) -> None:
    missing = [name for name in rule.names if name not in task.params]
    if missing or task.dimension != sum(p.numel() for p in task.params.values()):
        raise ValueError(
            f"the response goes through all trained parameters, and the task leaves out "
            f"{missing[:4] or 'entries that masks do not mark'}. Select them all: "
            f"task.restrict({list(rule.names)[:4]} …)."
        )
