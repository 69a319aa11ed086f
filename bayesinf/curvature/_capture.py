r"""Per-example gradients of layers from one ordinary backward pass.

For a layer the gradient of example ``b`` is ``G_b = Σ_t ds_bt a_btᵀ``: ``a`` ``(B, T, M)`` are its
inputs, ``ds`` ``(B, T, P)`` the derivatives of the example's scalar in its outputs. Positions ``t``
are the leading dimensions of an ``nn.Linear`` input beyond the batch, the output pixels of an
``nn.Conv2d`` (its input unfolded into patches), and all calls of all modules that hold the weight.

Hooks sit on the task's own copy of the network and only for the length of a ``with`` block.
Differentiation runs through a functional call, so ``requires_grad`` and ``.grad`` are not touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_flatten

from bayesinf._data import Batch
from bayesinf._task import Task
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._layers import Layer

__all__ = ["Capture", "Record", "require_finite"]

_CHECKED = 16
"""Examples on which captured gradients are compared with autograd's."""


@dataclass(frozen=True)
class _Call:
    module: nn.Module
    input: Tensor
    edge: GradientEdge
    output_shape: torch.Size


class Record:
    """One forward pass of a batch with what its layers saw.

    Attributes
    ----------
    outputs
        The network's outputs, still differentiable.
    size
        Number of examples, ``B``.
    """

    def __init__(
        self,
        outputs: Any,
        size: int,
        layers: tuple[Layer, ...],
        calls: dict[str, list[_Call]],
        costs: Costs,
    ) -> None:
        self.outputs, self.size = outputs, size
        self._layers, self._costs = layers, costs
        self._calls = [[c for site in layer.sites for c in calls[site]] for layer in layers]
        self._every = list({id(c): c for group in self._calls for c in group}.values())

    @cached_property
    def inputs(self) -> list[Tensor]:
        """Inputs ``a`` of each layer, ``(B, T, M)``, a 1 last where there is a bias."""
        return [
            self._join([_input_positions(layer, c, self.size) for c in calls], layer.shape[1])
            for layer, calls in zip(self._layers, self._calls, strict=True)
        ]

    def pull(
        self, value: Tensor, vector: Tensor | None = None, *, keep: bool = False
    ) -> list[Tensor]:
        """Derivatives ``ds`` in each layer's outputs, ``(B, T, P)``.

        Parameters
        ----------
        value
            A scalar, or a tensor together with ``vector``: something computed from ``outputs``.
        vector
            Derivative of the wanted scalar in ``value``.
        keep
            Keep the graph for another pull.
        """
        edges = [call.edge for call in self._every]
        found: tuple[Tensor | None, ...] = ()
        if edges:
            found = torch.autograd.grad(
                [value],
                edges,
                None if vector is None else [vector],
                retain_graph=keep,
                allow_unused=True,
            )
        self._costs.backward_examples += self.size
        by_call = {id(call): ds for call, ds in zip(self._every, found, strict=True)}
        return [
            self._join(
                [_output_positions(layer, c, by_call[id(c)], self.size) for c in calls],
                layer.shape[0],
            )
            for layer, calls in zip(self._layers, self._calls, strict=True)
        ]

    def _join(self, parts: list[Tensor], width: int) -> Tensor:
        if not parts:
            return self.outputs.new_zeros(self.size, 0, width)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class Capture:
    """Hooks that yield inputs and output derivatives of layers, for the length of a ``with`` block.

    On entry the captured gradients of the first training examples are compared with autograd's.

    Parameters
    ----------
    task
        Whose network copy to hook.
    layers
        From :func:`~bayesinf.curvature._layers.find_layers`.
    costs
        Account to which passes are added.

    Raises
    ------
    ValueError
        On entry, if captured and true gradients of a layer differ; on recording, if a layer's
        inputs do not have the examples first; if a gradient is not finite.
    """

    def __init__(self, task: Task, layers: tuple[Layer, ...], costs: Costs | None = None) -> None:
        self.task, self.layers = task, layers
        self.costs = costs if costs is not None else Costs()
        names = [name for layer in layers for name in layer.parameters]
        self._params = {name: task.params[name].detach().requires_grad_() for name in names}
        self._calls: dict[str, list[_Call]] = {}
        self._recording = False
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        sites = {site for layer in self.layers for site in layer.sites}
        for site, module in self.task.module.named_modules():
            if site in sites:
                hook = self._hook(site)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        try:
            self._verify()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._calls = {}

    def record(self, batch: Batch) -> Record:
        """Run a batch forward and return what the layers saw."""
        if not self._handles:
            raise RuntimeError(
                "Capture.record works inside its with block: `with Capture(…) as c`."
            )
        self._calls = {site: [] for layer in self.layers for site in layer.sites}
        self._recording = True
        try:
            with torch.enable_grad():
                outputs = self.task.outputs(self._params, batch)
        finally:
            self._recording = False
        size = len(tree_flatten(batch)[0][0])
        self.costs.forward_examples += size
        return Record(outputs, size, self.layers, self._calls, self.costs)

    def _hook(self, site: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            if self._recording and output.requires_grad:
                x = args[0] if args else kwargs["input"]
                call = _Call(module, x.detach(), get_gradient_edge(output), output.shape)
                self._calls[site].append(call)

        return hook

    def _verify(self) -> None:
        """Compare ``Σ_b r_b G_b`` with autograd's gradient of ``Σ_b r_b ℓ_b``, unequal ``r``.

        Unequal weights tell a missing use of a parameter as well as examples in the wrong order.
        """
        count = min(_CHECKED, self.task.n)
        batch = self.task.train.batch(slice(0, count))
        record = self.record(batch)
        with torch.enable_grad():
            losses = self.task.likelihood.loss(record.outputs, batch[1])
            weights = torch.linspace(0.5, 1.5, count, dtype=losses.dtype, device=losses.device)
            weighted, total = (weights * losses).sum(), losses.sum()
        if not weighted.requires_grad:
            raise ValueError(
                "the loss does not depend on any selected parameter through autograd. Usual "
                "causes: torch.no_grad() or .detach() inside the model's forward."
            )
        params = list(self._params.values())
        found = torch.autograd.grad(weighted, params, retain_graph=True, allow_unused=True)
        exact = {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(self._params.items(), found, strict=True)
        }
        ds = record.pull(total)
        ids = self.task.train.ids[:count]
        for layer, a, d in zip(self.layers, record.inputs, ds, strict=True):
            truth = layer.pack(exact)
            require_finite(truth, layer.name, a, d, ids, "train")
            scaled = d * weights[:, None, None]
            captured = scaled.flatten(0, 1).T @ a.flatten(0, 1)
            bound = (scaled.flatten(1).norm(dim=1) * a.flatten(1).norm(dim=1)).sum()
            tolerance = 1e-4 if losses.dtype == torch.float32 else 1e-9
            gap = (captured - truth).norm()
            if gap > tolerance * torch.maximum(bound, truth.norm()):
                raise ValueError(_mismatch(layer, float(gap), float(truth.norm())))


def _mismatch(layer: Layer, gap: float, norm: float) -> str:
    return (
        f"layer {layer.name!r}: gradients from its inputs and outputs differ from autograd's by "
        f"{gap:.3g} (norm {norm:.3g}). Usual causes: its weight is also used outside the layer's "
        f"own forward (a functional call, torch's MultiheadAttention, a penalty), an example's "
        f"loss depends on other examples of the batch, or the layer's input is not ordered by "
        f"example. Leave it out with Task(..., parameters=…), or use a method that takes any model "
        f"(grad_dot, gauss_newton, hessian)."
    )


def require_finite(
    summary: Tensor, name: str, a: Tensor | None, ds: Tensor, ids: np.ndarray, split: str
) -> None:
    """Raise if ``summary`` is not finite, and name the first example behind it.

    Parameters
    ----------
    summary
        Anything computed from ``a`` and ``ds``; only looked at for finiteness.
    name
        The layer, for the message.
    a, ds
        Tensors with the examples in the first dimension; ``a`` may be absent.
    ids
        Ids of the examples.
    split
        ``"train"`` or ``"query"``.

    Raises
    ------
    ValueError
        Naming example and layer.
    """
    if bool(torch.isfinite(summary).all()):
        return
    fine = torch.isfinite(ds).flatten(1).all(1)
    if a is not None:
        fine &= torch.isfinite(a).flatten(1).all(1)
    bad = (~fine).nonzero().flatten().tolist()
    names = ids.tolist()
    if not bad:
        raise ValueError(
            f"layer {name!r}: gradients of {split} examples {names[0]!r} … {names[-1]!r} are "
            f"finite, but their products overflow {ds.dtype}. Use a float64 model: model.double()."
        )
    raise ValueError(
        f"layer {name!r}: the gradient of {split} example {names[bad[0]]!r} is NaN or infinite "
        f"({len(bad)} of {len(names)} examples in this batch). Look at that example's input and "
        f"loss; usual causes: division by zero, sqrt or log at 0, overflow in the model."
    )


def _rows(layer: Layer, positions: Tensor, size: int, first: int) -> Tensor:
    """Split ``(first, *, width)`` into ``(B, T, width)``, the examples first."""
    if first % size:
        raise ValueError(
            f"layer {layer.name!r}: its input has {first} rows for {size} examples, so rows "
            f"cannot be told apart by example. Usual cause: the layer acts on something shared by "
            f"the whole batch (a position table, a prompt). Leave it out with "
            f"Task(..., parameters=…)."
        )
    return positions.reshape(size, -1, positions.shape[-1])


def _input_positions(layer: Layer, call: _Call, size: int) -> Tensor:
    x, module = call.input, call.module
    if layer.weight is None:
        count = call.output_shape.numel() // (layer.shape[0] * size)
        return x.new_ones(size, count, 1)
    if isinstance(module, nn.Conv2d):
        x = _patches(module, x if x.ndim == 4 else x.unsqueeze(0))
    first = 1 if x.ndim == 1 else x.shape[0]
    rows = _rows(layer, x, size, first)
    if layer.bias is None:
        return rows
    return torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=-1)


def _output_positions(layer: Layer, call: _Call, ds: Tensor | None, size: int) -> Tensor:
    if ds is None:
        ds = call.input.new_zeros(call.output_shape)
    if isinstance(call.module, nn.Conv2d):
        ds = ds if ds.ndim == 4 else ds.unsqueeze(0)
        ds = ds.flatten(2).transpose(1, 2)
    first = 1 if ds.ndim == 1 else ds.shape[0]
    return _rows(layer, ds, size, first)


def _patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Patches ``(B, T, C·kh·kw)`` that a convolution multiplies with its weight."""
    pads: list[int] = []
    for i in (1, 0):  # F.pad takes the last dimension first
        if conv.padding == "same":
            total = conv.dilation[i] * (conv.kernel_size[i] - 1)
            pads += [total // 2, total - total // 2]
        elif conv.padding == "valid":
            pads += [0, 0]
        else:
            pads += [int(conv.padding[i])] * 2
    if any(pads):
        x = F.pad(x, pads, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    columns = F.unfold(x, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)
    return columns.transpose(1, 2)
