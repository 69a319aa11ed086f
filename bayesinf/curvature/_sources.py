r"""Per-example (or per-token) gradients and Gauss–Newton rows of a task, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.func import grad
from torch.utils._pytree import tree_map

from bayesinf._data import Batch
from bayesinf._likelihoods import require
from bayesinf._task import Measurement, Task
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._capture import Capture, Record, each_example, require_finite
from bayesinf.curvature._layers import Layer
from bayesinf.curvature._passes import Fisher, Passes
from bayesinf.curvature._rows import Explicit, Rows, flat_rows, stack
from bayesinf.curvature._spool import Spool

__all__ = ["GradientSource", "Gradients", "Tokens", "token_grid"]

Tokens = Literal["position", "loss"]
"""What a token's part of an example's gradient is; see :meth:`GradientSource.gradients`."""


class Gradients(Protocol):
    """Where gradients of examples, or numbers made of them, come from.

    Attributes
    ----------
    task
        Whose.
    layers
        Of the rows.
    """

    @property
    def task(self) -> Task:
        """Whose."""
        ...

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Of the rows."""
        ...

    def gradients(
        self,
        split: str,
        where: slice,
        batch: Batch,
        measurement: Measurement = "loss",
        tokens: Tokens | None = None,
    ) -> list[Rows]:
        """As of :meth:`GradientSource.gradients`."""
        ...


class GradientSource:
    """Gradients of examples, for the length of a ``with`` block.

    Parameters
    ----------
    task
        Whose gradients.
    layers
        From :func:`bayesinf.curvature.find_layers`.
    costs
        Account to which passes are added.
    """

    def __init__(self, task: Task, layers: tuple[Layer, ...], costs: Costs) -> None:
        self.task: Task = task
        self.layers: tuple[Layer, ...] = layers
        self.costs = costs
        self._capture = Capture(task, layers, costs)
        d = torch.arange(task.dimension, device=task.device)
        named = task.unflatten(d)
        self._order = torch.cat([layer.pack(named).flatten() for layer in layers])

    def __enter__(self) -> Self:
        self._capture.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._capture.__exit__(kind, error, trace)

    def gradients(
        self,
        split: str,
        where: slice | np.ndarray,
        batch: Batch,
        measurement: Measurement = "loss",
        tokens: Tokens | None = None,
    ) -> list[Rows]:
        """Gradients of a measurement, one entry a layer.

        Parameters
        ----------
        split
            ``"train"`` or ``"query"``.
        where, batch
            A slice or positions of the examples, and what they hold.
        measurement
            As for :meth:`Task.measure`.
        tokens
            ``None``: rows ``(B, 1)``. ``"position"``: rows ``(B·T, 1)``, the terms of the gradient
            from what layers saw at each position. ``"loss"``: rows ``(B, T)``, the gradients of
            the losses of single tokens. Either way they sum to the gradient of the example.

        Raises
        ------
        ValueError
            If a gradient is not finite, naming example and layer, or the layers do not act on
            tokens.
        NotImplementedError
            If the likelihood lacks the measurement or token losses.
        """
        ids = self.task.examples(split).ids[where]
        if callable(measurement):
            rows = self._by_example(measurement, batch)
        else:
            record = self._capture.record(batch)
            if tokens == "loss":
                rows = self._token_losses(record, batch)
            else:
                part = require(
                    self.task.likelihood, measurement, f"the measurement {measurement!r}"
                )
                with torch.enable_grad():
                    value = part(record.outputs, batch[1]).sum()
                rows = record.pull(value)
        for layer, entry in zip(self.layers, rows, strict=True):
            require_finite(entry, layer.name, ids, split)
        if tokens == "position":
            count = token_grid(batch)[0].shape[1]
            rows = [_split(la, entry, count) for la, entry in zip(self.layers, rows, strict=True)]
        return [entry.compact() for entry in rows]

    def curvature_rows(self, where: slice, batch: Batch) -> list[Rows]:
        """Rows ``f_kᵀ J`` of train examples with ``Σ_k f_k f_kᵀ = ∇²_f ℓ``, one entry a layer."""
        factor = require(self.task.likelihood, "fisher_factor", "the Gauss–Newton matrix")
        record = self._capture.record(batch)
        vectors = factor(record.outputs.detach(), batch[1])
        last = len(vectors) - 1
        pulls = [record.pull(record.outputs, v, keep=k < last) for k, v in enumerate(vectors)]
        rows = [stack(layer).compact() for layer in zip(*pulls, strict=True)]
        for layer, entry in zip(self.layers, rows, strict=True):
            require_finite(entry, layer.name, self.task.train.ids[where], "train")
        return rows

    def fisher_rows(self, fisher: Fisher, *, seed: int, batch_size: int) -> Iterator[list[Rows]]:
        """Rows ``(B, 1)`` of train gradients whose squares sum to ``n`` times a Fisher matrix.

        Batch after batch, and within a batch one backward pass after another: one for each output
        direction, or one at drawn or given labels.

        Parameters
        ----------
        fisher
            Whose labels, as for :func:`bayesinf.fit_curvature`.
        seed
            Of drawn labels, one generator an example.
        batch_size
            Examples at a time.
        """
        with Spool(0) as unused:
            for _, pulls in Passes(self._capture, fisher, 1, seed, batch_size, unused):
                for _, pull in pulls:
                    yield pull

    def flat(self, rows: list[Rows]) -> Tensor:
        """Whole rows ``(B·K, d)`` in the order of :meth:`Task.flatten`."""
        found = flat_rows(rows)
        out = torch.empty_like(found)
        out[:, self._order] = found
        return out

    def unflat(self, flat: Tensor) -> list[Rows]:
        """Inverse of :meth:`flat`, for ``(B, d)``."""
        named = self.task.unflatten(flat)
        return [Explicit(layer.pack(named).unsqueeze(1)) for layer in self.layers]

    def _token_losses(self, record: Record, batch: Batch) -> list[Rows]:
        part = require(self.task.likelihood, "token_losses", "tokens='loss'")
        with torch.enable_grad():
            losses = part(record.outputs, batch[1]).flatten(1)
        count = losses.shape[1]
        pulls = [record.pull(losses[:, t].sum(), keep=t < count - 1) for t in range(count)]
        return [stack(layer) for layer in zip(*pulls, strict=True)]

    def _by_example(self, measurement: Measurement, batch: Batch) -> list[Rows]:
        task = self.task

        def one(example: Batch) -> dict[str, Tensor]:
            single = tree_map(lambda leaf: leaf.unsqueeze(0), example)
            return grad(lambda p: task.measure(measurement, p, single).sum())(task.params)

        found = each_example(one, batch)
        size = len(next(iter(found.values())))
        self.costs.forward_examples += size
        self.costs.backward_examples += size
        return [Explicit(layer.pack(found).unsqueeze(1)) for layer in self.layers]


def token_grid(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Positions ``(B, T)`` that count, and the token ids there if the inputs are ids.

    Raises
    ------
    ValueError
        If the inputs have no token dimension.
    """
    inputs = batch[0]
    first = inputs.get("input_ids") if isinstance(inputs, dict) else inputs
    first = first[0] if isinstance(first, tuple) else first
    if not isinstance(first, Tensor) or first.ndim < 2:
        shape = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise ValueError(
            f"token scores need inputs (B, T, …) or a dict with 'input_ids' (B, T); got {shape}."
        )
    mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
    if mask is None:
        mask = torch.ones(first.shape[:2], device=first.device)
    integer = first.ndim == 2 and not first.is_floating_point()
    return mask.bool(), first if integer else None


def _split(layer: Layer, rows: Rows, tokens: int) -> Rows:
    if isinstance(rows, Explicit):
        names = ", ".join(layer.parameters)
        raise ValueError(
            f"{names}: this gradient has no positions (a parameter used outside its module's "
            f"forward, or one that the whole batch shares), so that token scores by position do "
            f"not exist. Leave it out with Task(..., parameters=…), or use tokens by 'loss'."
        )
    try:
        if layer.kind == "conv" and rows.values.shape[2] != tokens:  # channels are no tokens
            raise ValueError(f"{rows.values.shape[2]} positions for {tokens} tokens")
        return rows.split(tokens)
    except ValueError as reason:
        raise ValueError(
            f"layer {layer.name!r} has {reason}, so that token scores by position do not exist. "
            f"Usual causes: a layer after pooling, or with a stride. Leave it out with "
            f"Task(..., parameters=…), or use tokens by 'loss'."
        ) from None
