r"""Per-example gradients of layers from one ordinary backward pass.

A layer's gradient is made from what its modules saw in the forward pass and the derivatives in
their outputs (:mod:`bayesinf.curvature._sites`); that of a *free* parameter by differentiating the
network example by example. Hooks sit on the task's own copy of the network and only for the length
of a ``with`` block. Differentiation runs through a functional call, so ``requires_grad`` and
``.grad`` are not touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import vjp, vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from bayesinf._data import Batch
from bayesinf._task import Task
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._layers import Layer
from bayesinf.curvature._rows import Explicit, Factored, Grouped, Indexed, Mixed, Rows, mixed
from bayesinf.curvature._sites import Call, contribution, expand_shared_index

__all__ = ["Capture", "Record", "each_example", "quiet_fallbacks", "require_finite"]


Derivatives = tuple[dict[int, Tensor | None], dict[str, Rows]]
"""Derivatives in the outputs of calls by their id, and rows of free layers by name."""


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
        self, capture: Capture, batch: Batch, outputs: Any, calls: dict[str, list[Call]]
    ) -> None:
        self.outputs, self.size = outputs, _length(batch)
        self._task, self._layers, self._costs = capture.task, capture.layers, capture.costs
        self._batch = batch
        self._calls = [[c for s in layer.sites for c in calls[s]] for layer in self._layers]
        self._every = list({id(c): c for group in self._calls for c in group}.values())

    @cached_property
    def mask(self) -> Tensor | None:
        """Positions ``(B, T)`` that count, where the inputs hold an ``attention_mask``."""
        inputs = self._batch[0]
        mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
        return mask.bool() if mask is not None and mask.ndim == 2 else None

    def pull(
        self, value: Tensor, vector: Tensor | None = None, *, keep: bool = False
    ) -> list[Rows]:
        """Gradients of every example in every layer, rows ``(B, 1)``.

        Parameters
        ----------
        value
            A sum over examples, or a tensor together with ``vector``: something computed from
            ``outputs``.
        vector
            Derivative of the wanted sum in ``value``.
        keep
            Keep the graph for another pull.
        """
        derivatives = self.differentiate(value, vector, keep=keep)
        return [self.rows(i, derivatives) for i in range(len(self._layers))]

    def differentiate(
        self, value: Tensor, vector: Tensor | None = None, *, keep: bool = False
    ) -> Derivatives:
        """One backward pass: derivatives in the outputs of all calls, and in free parameters."""
        free = [layer for layer in self._layers if layer.kind == "free"]
        targets: list[Any] = [call.edge for call in self._every]
        targets += [self.outputs] if free else []
        found: tuple[Tensor | None, ...] = ()
        if targets:
            found = torch.autograd.grad(
                [value],
                targets,
                None if vector is None else [vector],
                retain_graph=keep,
                allow_unused=True,
            )
        self._costs.backward_examples += self.size
        by_call = {id(c): ds for c, ds in zip(self._every, found, strict=False)}
        return by_call, self._free(free, found[-1]) if free else {}

    def rows(self, i: int, derivatives: Derivatives) -> Rows:
        """Rows ``(B, 1)`` of the layer at position ``i``."""
        layer, (by_call, alone) = self._layers[i], derivatives
        if layer.kind == "free":
            return alone[layer.name]
        parts = [contribution(layer, c, by_call[id(c)], self.size) for c in self._calls[i]]
        if not parts:
            weights = next(iter(self._task.params.values()))
            return Explicit(weights.new_zeros(self.size, 1, *layer.shape))
        kinds = dict.fromkeys(type(part) for part in parts)
        joined = [_join([part for part in parts if type(part) is kind]) for kind in kinds]
        return joined[0] if len(joined) == 1 else mixed(joined)

    def _free(self, layers: list[Layer], cotangent: Tensor | None) -> dict[str, Rows]:
        """Gradients of free parameters, the network differentiated example by example."""
        task = self._task
        params = {str(layer.weight): task.params[str(layer.weight)] for layer in layers}
        if cotangent is None:
            cotangent = torch.zeros_like(self.outputs)

        def one(example: Any) -> dict[str, Tensor]:
            inputs, outer = tree_map(lambda leaf: leaf.unsqueeze(0), example)
            pull = vjp(lambda p: task.outputs({**task.params, **p}, (inputs, None)), params)[1]
            return pull(outer)[0]

        found = each_example(one, (self._batch[0], cotangent))
        self._costs.forward_examples += self.size
        self._costs.backward_examples += self.size
        return {layer.name: Explicit(layer.pack(found).unsqueeze(1)) for layer in layers}


class Capture:
    """Hooks that yield gradients of layers, for the length of a ``with`` block.

    Parameters
    ----------
    task
        Whose network copy to hook.
    layers
        From :func:`bayesinf.curvature.find_layers`.
    costs
        Account to which passes are added.

    Attributes
    ----------
    expanded
        Embeddings whose index the whole batch shared in the last recording (positions, say), and
        was repeated for every example.
    """

    def __init__(self, task: Task, layers: tuple[Layer, ...], costs: Costs | None = None) -> None:
        self.task, self.layers = task, layers
        self.costs = costs if costs is not None else Costs()
        names = [name for layer in layers for name in layer.parameters]
        self.params = {name: task.params[name].detach().requires_grad_() for name in names}
        self._calls: dict[str, list[Call]] = {}
        self._size = 0
        self.expanded: set[str] = set()
        self._lengths: dict[str, list[int]] = {}
        self._shared: set[str] | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        sites = {site for layer in self.layers for site in layer.sites}
        for site, module in self.task.module.named_modules():
            if site not in sites:
                continue
            if isinstance(module, nn.Embedding):
                self._handles.append(module.register_forward_pre_hook(self._expand(site)))
            hook = self._hook(site)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._calls = {}

    def record(self, batch: Batch) -> Record:
        """Run a batch forward and return what the layers saw."""
        outputs = self._forward(batch)
        if self._lengths and self._shared is None:
            calls, expanded = self._calls, self.expanded
            self._shared = self._find_shared()
            self._calls, self.expanded = calls, expanded
            outputs = self._forward(batch) if self._shared else outputs
        calls, self._calls = self._calls, {}  # they live as long as the record
        return Record(self, batch, outputs, calls)

    def _forward(self, batch: Batch) -> Any:
        self._calls = {site: [] for layer in self.layers for site in layer.sites}
        self._size, self.expanded, self._lengths = _length(batch), set(), {}
        try:
            with torch.enable_grad():
                outputs = self.task.outputs(self.params, batch)
        finally:
            self._size = 0
        self.costs.forward_examples += _length(batch)
        return outputs

    def _find_shared(self) -> set[str]:
        """Sites of vectors of ids that are as long for one example as for two of it."""
        lengths = []
        for copies in (1, 2):
            self._forward(self.task.train.batch(torch.zeros(copies, dtype=torch.long)))
            lengths.append(self._lengths)
        one, two = lengths
        return {site for site in one if one[site] == two.get(site)}

    def _hook(self, site: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._size and isinstance(output, Tensor) and output.requires_grad:
                x = args[0] if args else next(iter(kwargs.values()))
                call = Call(
                    module, x.detach(), get_gradient_edge(output), output.shape, output.dtype
                )
                self._calls[site].append(call)

        return hook

    def _expand(self, site: str) -> Any:
        def hook(module: nn.Module, args: Any) -> Any:
            if not self._size or not args:
                return None
            index = args[0]
            if index.ndim == 1:
                self._lengths.setdefault(site, []).append(len(index))
                shared = site in (self._shared or ())
            else:
                shared = index.ndim > 1 and len(index) == 1 < self._size
            if not shared:
                return None
            self.expanded.add(site)
            return (expand_shared_index(index, self._size), *args[1:])

        return hook


@contextmanager
def quiet_fallbacks() -> Iterator[None]:
    """Without the warnings of ``vmap`` about operations that it runs one by one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        yield


def each_example(function: Callable[[Any], Any], examples: Any) -> Any:
    """Apply a function of one example to all: vectorised, or in a loop where that fails.

    ``vmap`` refuses networks with data-dependent control flow or in-place updates; what is truly
    wrong with the function raises again in the loop.
    """
    try:
        with quiet_fallbacks():
            return vmap(function)(examples)
    except (RuntimeError, NotImplementedError):
        count = len(tree_flatten(examples)[0][0])
        results = [function(tree_map(lambda leaf, i=i: leaf[i], examples)) for i in range(count)]
        leaves = [tree_flatten(result)[0] for result in results]
        spec = tree_flatten(results[0])[1]
        return tree_unflatten([torch.stack(parts) for parts in zip(*leaves, strict=True)], spec)


def require_finite(rows: Rows, name: str, ids: np.ndarray, split: str) -> None:
    """Raise if a layer's rows are not finite, and name the first example behind it.

    Parameters
    ----------
    rows
        Rows of one layer.
    name
        The layer, for the message.
    ids
        Ids of the examples.
    split
        ``"train"`` or ``"query"``.

    Raises
    ------
    ValueError
        Naming example and layer.
    """
    parts = rows.parts if isinstance(rows, Mixed) else (rows,)
    tensors = [part.values for part in parts]
    tensors += [part.a for part in parts if isinstance(part, (Factored, Grouped))]
    # a sum is finite unless an entry is not (or the entries are near overflow)
    if bool(torch.isfinite(torch.stack([tensor.sum() for tensor in tensors])).all()):
        return
    fine = torch.stack([torch.isfinite(t).flatten(1).all(1) for t in tensors]).all(0)
    bad = (~fine).nonzero().flatten().tolist()
    names = ids.tolist()
    if bad:
        raise ValueError(
            f"layer {name!r}: the gradient of {split} example {names[bad[0]]!r} is NaN or infinite "
            f"({len(bad)} of {len(names)} examples in this batch). Look at that example's input "
            f"and loss; usual causes: division by zero, sqrt or log at 0, overflow in the model."
        )


def _join(parts: list[Any]) -> Factored | Grouped | Indexed:
    """Positions of several calls of the same examples, one after another."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    values = torch.cat([part.values for part in parts], dim=2)
    if isinstance(first, Indexed):
        return Indexed(values, torch.cat([part.index for part in parts], dim=1), first.size)
    return type(first)(values, torch.cat([part.a for part in parts], dim=1))


def _length(batch: Batch) -> int:
    return len(tree_flatten(batch)[0][0])
