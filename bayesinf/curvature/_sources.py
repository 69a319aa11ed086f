r"""Per-example gradients and Gauss–Newton rows of a task, by capture or by ``torch.func``.

Captured where layers cover what is asked for (one backward pass a batch), else vectorised over
examples by ``torch.func.vmap``, else one example after another.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_map

from bayesinf._data import Batch
from bayesinf._likelihoods import require
from bayesinf._task import Measurement, Task
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._capture import Capture, Record, require_finite
from bayesinf.curvature._layers import Layer
from bayesinf.curvature._rows import Rows

__all__ = ["GradientSource", "per_example_gradients"]


class GradientSource:
    """Gradients of examples, for the length of a ``with`` block.

    Parameters
    ----------
    task
        Whose gradients.
    layers
        Layers to differentiate in; ``None`` means all selected parameters as one flat row, in the
        order of :meth:`Task.flatten`.
    costs
        Account to which passes are added.
    """

    def __init__(self, task: Task, layers: tuple[Layer, ...] | None, costs: Costs) -> None:
        self.task, self.layers, self.costs = task, layers, costs
        self._capture = Capture(task, layers, costs) if layers is not None else None

    def __enter__(self) -> Self:
        if self._capture is not None:
            self._capture.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._capture is not None:
            self._capture.__exit__(kind, error, trace)

    @property
    def width(self) -> int:
        """Number of parameters of a row."""
        if self.layers is None:
            return self.task.dimension
        return sum(layer.size for layer in self.layers)

    def gradients(
        self, split: str, where: slice, batch: Batch, measurement: Measurement = "loss"
    ) -> list[Rows]:
        """Gradients of a per-example measurement, ``K = 1``, one entry a layer.

        Parameters
        ----------
        split
            ``"train"`` or ``"query"``, for messages.
        where, batch
            Positions of the examples, and the examples.
        measurement
            As for :meth:`Task.measure`. A function is differentiated by ``torch.func``, since it
            may use the parameters in any way.

        Raises
        ------
        ValueError
            If a gradient is not finite, naming example and layer.
        """
        if self._capture is None or callable(measurement):
            found = per_example_gradients(self.task, measurement, batch, self._names())
            self._count(batch)
            rows = self._explicit(found)
        else:
            record = self._capture.record(batch)
            part = require(self.task.likelihood, measurement, f"the measurement {measurement!r}")
            with torch.enable_grad():
                value = part(record.outputs, batch[1]).sum()
            rows = self._factored(record, [record.pull(value)])
        self._check(rows, self.task.examples(split).ids[where], split)
        return rows

    def curvature_rows(self, where: slice, batch: Batch) -> list[Rows]:
        """Rows ``f_kᵀ J`` of train examples with ``Σ_k f_k f_kᵀ = ∇²_f ℓ``, one entry a layer."""
        factor = require(self.task.likelihood, "fisher_factor", "the Gauss–Newton matrix")
        if self._capture is None:
            rows = [self._jacobian_rows(batch, factor)]
        else:
            record = self._capture.record(batch)
            vectors = factor(record.outputs.detach(), batch[1])
            last = len(vectors) - 1
            pulls = [
                record.pull(record.outputs, vector, keep=k < last)
                for k, vector in enumerate(vectors)
            ]
            rows = self._factored(record, pulls)
        self._check(rows, self.task.train.ids[where], "train")
        return rows

    def _names(self) -> list[str]:
        if self.layers is None:
            return list(self.task.params)
        return [name for layer in self.layers for name in layer.parameters]

    def _count(self, batch: Batch, backward: int = 1) -> None:
        size = len(tree_flatten(batch)[0][0])
        self.costs.forward_examples += size
        self.costs.backward_examples += size * backward

    def _factored(self, record: Record, pulls: list[list[Tensor]]) -> list[Rows]:
        return [
            Rows(a, torch.stack([ds[i] for ds in pulls], dim=1)).compact()
            for i, a in enumerate(record.inputs)
        ]

    def _explicit(self, found: dict[str, Tensor]) -> list[Rows]:
        if self.layers is None:
            return [Rows(None, self.task.flatten(found)[:, None, None, :])]
        return [Rows(None, layer.pack(found).unsqueeze(1)) for layer in self.layers]

    def _jacobian_rows(self, batch: Batch, factor: Any) -> Rows:
        task = self.task

        def one(leaf_batch: Batch) -> Tensor:
            single = tree_map(lambda leaf: leaf.unsqueeze(0), leaf_batch)
            outputs, pull = vjp(lambda params: task.outputs(params, single), task.params)[:2]
            vectors = factor(outputs.detach(), single[1])
            (rows,) = vmap(pull)(vectors)
            return task.flatten(rows)

        rows = _each(one, batch)
        self._count(batch, rows.shape[1])
        return Rows(None, rows.unsqueeze(2))

    def _check(self, rows: list[Rows], ids: np.ndarray, split: str) -> None:
        names = [layer.name for layer in self.layers] if self.layers else ["(all parameters)"]
        for name, layer in zip(names, rows, strict=True):
            # a sum is finite unless an entry is not (or the entries are near overflow)
            summary = layer.values.sum() + (0 if layer.a is None else layer.a.sum())
            if not bool(torch.isfinite(summary)):
                require_finite(summary, name, layer.a, layer.values, ids, split)


def per_example_gradients(
    task: Task, measurement: Measurement, batch: Batch, names: list[str]
) -> dict[str, Tensor]:
    """Gradients ``(B, *shape)`` of a measurement in the named parameters, for any network.

    Parameters
    ----------
    task, measurement, batch
        As for :meth:`Task.measure`.
    names
        Which of the selected parameters.
    """
    params = {name: task.params[name] for name in names}

    def one(example: Batch) -> dict[str, Tensor]:
        single = tree_map(lambda leaf: leaf.unsqueeze(0), example)
        return grad(lambda p: task.measure(measurement, {**task.params, **p}, single).sum())(params)

    return _each(one, batch)


def _each(function: Any, batch: Batch) -> Any:
    """Apply a function of one example to all: vectorised, or in a loop where that fails.

    ``vmap`` refuses networks with data-dependent control flow or in-place updates; what is truly
    wrong with the function raises again in the loop.
    """
    try:
        return vmap(function)(batch)
    except (RuntimeError, NotImplementedError):
        count = len(tree_flatten(batch)[0][0])
        results = [function(tree_map(lambda leaf, i=i: leaf[i], batch)) for i in range(count)]
        leaves = [tree_flatten(result)[0] for result in results]
        spec = tree_flatten(results[0])[1]
        stacked = [torch.stack(parts) for parts in zip(*leaves, strict=True)]
        return torch.utils._pytree.tree_unflatten(stacked, spec)
