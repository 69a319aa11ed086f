"""Layers of a task, with their structure checked against autograd on its first examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from bayesinf._data import Batch
from bayesinf._task import Task
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._capture import Capture, Record, require_finite
from bayesinf.curvature._layers import Layer, free_layer, group_parameters
from bayesinf.curvature._rows import Factored, Grouped, Rows

__all__ = ["find_layers"]

_CHECKED = 16
"""Examples on which captured gradients are compared with autograd's."""

_ROUNDING = 0.1
"""Relative differences that rounding in float32 can make of a gradient that nearly cancels."""

_MISFITS = (ValueError, RuntimeError, TypeError, IndexError)
"""What shapes or arguments that do not fit a layer's structure end in."""


def find_layers(task: Task, costs: Costs | None = None) -> tuple[Layer, ...]:
    """Group the selected parameters into layers; none is left out.

    Parameters are grouped by the modules that hold them. On the first training examples, the
    gradient that a layer's structure implies is compared with autograd's; where the two differ (a
    weight used outside its module's forward, as in ``nn.MultiheadAttention``, a layer that sees a
    choice of positions) the parameters become *free*: their gradients come from differentiating
    the network example by example, which is exact for any network and slower.

    Parameters
    ----------
    task
        The network and its selected parameters.
    costs
        Account to which passes are added.

    Returns
    -------
    tuple[Layer, ...]
        In the order of the parameters.

    Raises
    ------
    ValueError
        If an example's loss depends on other examples of the batch, the loss does not depend on
        the parameters, or a gradient is not finite.
    """
    layers = group_parameters(task)
    wrong = _mismatched(task, layers, costs)
    if all(gap < _ROUNDING for _, gap in wrong):
        wrong = _confirmed(task, layers, wrong, costs)
    if not wrong:
        return layers
    names = {name for layer, _ in wrong for name in layer.parameters}
    places = {name: i for i, name in enumerate(task.params)}
    kept = [layer for layer in layers if names.isdisjoint(layer.parameters)]
    kept += [free_layer(task, name) for name in names]
    found = tuple(sorted(kept, key=lambda layer: places[layer.parameters[0]]))
    wrong = _confirmed(task, found, _mismatched(task, found, costs), costs)
    if wrong:
        layer, gap = wrong[0]
        raise ValueError(
            f"layer {layer.name!r}: gradients of single examples do not sum to the gradient of the "
            f"batch (relative difference {gap:.2g}). {_DEPENDS}"
        )
    return found


_DEPENDS = (
    "The loss of an example depends on the other examples of its batch. Usual causes: batch "
    "statistics, attention or a softmax across the batch, a loss divided by the batch size. Make "
    "outputs and loss a function of the example alone (batch norm in eval mode is)."
)


def _require_own(task: Task, outputs: object, batch: Batch) -> None:
    """Compare half of a batch alone with the same half within the batch."""
    few = len(tree_flatten(batch)[0][0]) // 2
    if not few:
        return

    def half(tree: Any) -> Any:
        return tree_map(lambda leaf: leaf.detach()[:few], tree)

    with torch.no_grad():
        within = half(outputs)
        if not _agree(within, task.outputs(task.params, half(batch))):
            raise ValueError(f"outputs of {few} examples change with the batch. {_DEPENDS}")
        loss = task.likelihood.loss
        if not _agree(half(loss(outputs, batch[1])), loss(within, half(batch[1]))):
            raise ValueError(f"losses of {few} examples change with the batch. {_DEPENDS}")


def _agree(one: Any, other: Any) -> bool:
    """Whether outputs are equal up to rounding; NaNs are somebody else's business."""
    for x, y in zip(tree_flatten(one)[0], tree_flatten(other)[0], strict=True):
        tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(x.dtype, 0.1)
        if x.shape != y.shape:
            return False
        x, y = x.detach().double(), y.detach().double()
        if float((x - y).norm()) > tolerance * float(x.norm()):
            return False
    return True


def _at(layers: tuple[Layer, ...], sites: set[str]) -> list[tuple[Layer, float]]:
    return [(layer, float("inf")) for layer in layers if not sites.isdisjoint(layer.sites)]


def _confirmed(
    task: Task,
    layers: tuple[Layer, ...],
    wrong: list[tuple[Layer, float]],
    costs: Costs | None,
) -> list[tuple[Layer, float]]:
    """What is wrong in float64 too: gradients that all but cancel are rounding in float32."""
    if not wrong or task.dtype == torch.float64:
        return wrong
    try:
        return _mismatched(task.to(dtype=torch.float64), layers, costs)
    except _MISFITS:  # a model that insists on its precision
        return wrong


def _mismatched(
    task: Task, layers: tuple[Layer, ...], costs: Costs | None
) -> list[tuple[Layer, float]]:
    """Layers where ``Σ_b r_b G_b`` is not autograd's gradient of ``Σ_b r_b ℓ_b``, unequal ``r``.

    Unequal weights tell a missing use of a parameter as well as examples in the wrong order.
    """
    count = min(_CHECKED, task.n)
    batch = task.train.batch(slice(0, count))
    with Capture(task, layers, costs) as capture:
        try:
            record = capture.record(batch)
        except _MISFITS:
            if not capture.expanded:
                raise
            return _at(layers, capture.expanded)
        if capture.expanded:
            capture.costs.forward_examples += count
            if not _agree(record.outputs, task.outputs(task.params, batch)):
                return _at(layers, capture.expanded)
        _require_own(task, record.outputs, batch)
        capture.costs.forward_examples += count // 2
        with torch.enable_grad():
            losses = task.likelihood.loss(record.outputs, batch[1])
            weights = torch.linspace(0.5, 1.5, count, dtype=losses.dtype, device=losses.device)
            weighted, total = (weights * losses).sum(), losses.sum()
        if not weighted.requires_grad:
            raise ValueError(
                "the loss does not depend on any selected parameter through autograd. Usual "
                "causes: torch.no_grad() or .detach() inside the model's forward."
            )
        params = list(capture.params.values())
        found = torch.autograd.grad(weighted, params, retain_graph=True, allow_unused=True)
        exact = {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(capture.params.items(), found, strict=True)
        }
        derivatives = record.differentiate(total)
        tolerance = 1e-4 if losses.dtype == torch.float32 else 1e-6  # a float32 softmax inside
        gaps = [
            (layer, _gap(task, record, i, layer, derivatives, layer.pack(exact), weights))
            for i, layer in enumerate(layers)
        ]
        return [(layer, gap) for layer, gap in gaps if gap > tolerance]


def _gap(
    task: Task,
    record: Record,
    i: int,
    layer: Layer,
    derivatives: object,
    exact: Tensor,
    weights: Tensor,
) -> float:
    """Difference of captured and exact gradient, relative to the size of what is summed."""
    try:
        rows = record.rows(i, derivatives)  # type: ignore[arg-type]
        captured = torch.zeros_like(exact)
        for where, part in rows.chunks():
            captured += torch.einsum("b,bpm->pm", weights[where], part.matrices()[:, 0])
    except _MISFITS:
        return float("inf")
    require_finite(rows, layer.name, task.train.ids[: record.size], "train")
    if not bool(torch.isfinite(exact).all()):
        return float("inf")
    scale = torch.maximum(_size(rows, weights), exact.norm())
    return float((captured - exact).norm() / scale) if float(scale) else 0.0


def _size(rows: Rows, weights: Tensor) -> Tensor:
    if isinstance(rows, (Factored, Grouped)):
        norms = rows.values.flatten(1).norm(dim=1) * rows.a.flatten(1).norm(dim=1)
    else:
        norms = rows.values.flatten(1).norm(dim=1)
    return (weights * norms).sum()
