"""Losses and mean-loss gradients at many positions at once: vectorised and traced, or looped.

Shapes: positions ``(C, d)``, one row per chain; a shared batch has leaves ``(B, …)`` and is seen
by all chains, a batch of its own per chain has leaves ``(C, B, …)``.

Vectorised, the computation over all chains is recorded once per shape and replayed from then on
(:mod:`bayesinf._tracing`). The first replay is compared with the looped computation; a network that
cannot be traced, or whose trace disagrees, is looped, with a warning that says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from bayesinf._data import Batch
from bayesinf._footprint import numbers_left
from bayesinf._linear import FusedLinear
from bayesinf._task import Measurement, Task
from bayesinf._tracing import record

__all__ = ["MAX_VECTORIZED_PARAMETERS", "ChainFunctions", "VectorizationWarning"]

MAX_VECTORIZED_PARAMETERS = 1_000_000
_LARGE = 2**16
"""Numbers that one example leaves behind; with more, a processor has its work cut out already."""
_LEAST, _NEAR = 8, 2**22
"""Examples of one backward pass on a processor at least, and numbers that they leave behind."""

_TOLERANCE = {
    torch.float64: 1e-8,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 0.15,
}
"""How far a trace may differ from the plain computation, relative to the largest number."""
_APART = 0.01
"""How far from the checkpoint the two are compared, in root mean squares of its weights."""


class VectorizationWarning(UserWarning):
    """Chains run one after another because the network cannot be vectorised."""


class ChainFunctions:
    """``C`` positions in, losses and gradients out; knows nothing of posteriors or samplers.

    Parameters
    ----------
    task
        The task.
    vectorize
        True or False to force. None vectorises networks of up to 10⁶ selected parameters, where a
        step costs mostly what launching its operations costs (on a processor if an example leaves
        no more than 2¹⁶ numbers behind: transformers do); of networks with convolutions only
        the chains' own minibatches (vectorised ones are grouped convolutions, two to four times
        slower on the large batches that all chains share).
    """

    def __init__(self, task: Task, vectorize: bool | None = None) -> None:
        self.task = task
        self.vectorize = _small(task) if vectorize is None else vectorize
        convolutional = any(isinstance(m, _ConvNd) for m in task.module.modules())
        self._vectorize_shared = vectorize is True or not convolutional
        self._forced = vectorize is True
        self._traces: dict[Any, Callable[..., list[Tensor]]] = {}

    def loss_grad(
        self, position: Tensor, batch: Batch, *, shared: bool, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradient ``(C, d)`` of the batch's mean loss at each position, and losses ``(C, B)``.

        With weights, ``(B,)`` or ``(C, B)`` as the batch, the gradient is that of the mean of
        ``weight · loss``; the losses are what they are.
        """

        def one(w: Tensor, batch: Batch, *weights: Tensor) -> list[Tensor]:
            def mean_loss(w: Tensor) -> tuple[Tensor, Tensor]:
                losses = self.task.losses(self.task.unflatten(w), batch)
                return (losses * weights[0] if weights else losses).mean(), losses

            gradient, (_, losses) = grad_and_value(mean_loss, has_aux=True)(w)
            return [gradient, losses]

        given = (batch,) if weights is None else (batch, weights)
        gradient, losses = self._run(
            "loss_grad", one, position, given, shared, partial(_loss_grad, self.task)
        )
        return gradient, losses

    def observe(
        self, position: Tensor, batch: Batch, measurements: Sequence[Measurement]
    ) -> list[Tensor]:
        """Per-example values ``(C, B)`` of each measurement on a shared batch."""

        def one(w: Tensor, batch: Batch) -> list[Tensor]:
            params = self.task.unflatten(w)
            return [self.task.measure(m, params, batch) for m in measurements]

        def alone(w: Tensor, batch: Batch) -> list[Tensor]:
            with FusedLinear() if w.device.type == "cpu" else nullcontext():
                return one(w, batch)

        return self._run(("observe", *measurements), one, position, (batch,), True, alone)

    # ------------------------------------------------------------------ how it runs

    def _run(
        self,
        key: Any,
        one: Callable[..., list[Tensor]],
        position: Tensor,
        given: tuple[Any, ...],
        shared: bool,
        alone: Callable[..., list[Tensor]] | None = None,
    ) -> list[Tensor]:
        """``one(row, *given)`` for every row of ``position``; ``alone``: the same, to be looped."""
        if not self.vectorize or (shared and not self._vectorize_shared):
            return _loop(alone or one, position, given, shared)
        leaves, spec = tree_flatten(given)
        key = (key, shared, position.shape, *((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self._traces:
            try:
                dims = (0, *([None if shared else 0] * len(leaves)))

                def flat(w: Tensor, *leaves: Tensor) -> list[Tensor]:
                    return one(w, *tree_unflatten(list(leaves), spec))

                self._traces[key] = record(flat, dims, position, *leaves)
                self._compare(key, one, position, leaves, spec, shared)
            except Exception as error:
                if self._forced:
                    raise
                self._fall_back(error)
                return _loop(alone or one, position, given, shared)
        with torch.no_grad():
            return self._traces[key](position, *leaves)

    def _compare(
        self,
        key: Any,
        one: Callable[..., list[Tensor]],
        position: Tensor,
        leaves: list[Tensor],
        spec: TreeSpec,
        shared: bool,
    ) -> None:
        """Check a fresh trace against the plain computation for the last chain.

        Close to the checkpoint: far from it, rounding alone may turn a gradient around, and at it
        the gradient may vanish, so that rounding is all there is to compare.
        """
        mine = tree_unflatten(leaves if shared else [leaf[-1] for leaf in leaves], spec)
        start = self.task.flatten(self.task.params).to(position)
        noise = torch.randn(len(start), generator=torch.Generator().manual_seed(0)).to(start)
        start = start + _APART * start.square().mean().sqrt() * noise
        with torch.no_grad():
            traced = [out[-1] for out in self._traces[key](start.expand_as(position), *leaves)]
        tolerance = _TOLERANCE[self.task.module_dtype]
        for got, expected in zip(traced, one(start, *mine), strict=True):
            scale = expected.detach().abs().max()
            error = float((got - expected.detach()).abs().max())
            if not error <= tolerance * float(scale + 1e-6):  # a NaN is no agreement
                raise RuntimeError("its recorded operations do not reproduce its outputs")

    def _fall_back(self, error: Exception) -> None:
        self.vectorize = False
        self._traces.clear()
        reason = str(error).strip().split("\n")[0][:300]
        warnings.warn(
            f"chains run one after another, because {type(self.task.module).__name__} cannot be "
            f"vectorised: {type(error).__name__}: {reason}. Results are the same, only slower; "
            f"vectorize=False silences this.",
            VectorizationWarning,
            stacklevel=2,
        )


def _small(task: Task) -> bool:
    """Whether launching operations is most of what a step costs."""
    if task.dimension > MAX_VECTORIZED_PARAMETERS:
        return False
    return task.device.type != "cpu" or numbers_left(task) <= _LARGE


def _loss_grad(task: Task, w: Tensor, batch: Batch, weights: Tensor | None = None) -> list[Tensor]:
    """Gradient and losses of one chain by autograd alone.

    ``torch.func.grad`` would keep what a second derivative needs. Of a large network, activations
    of all examples take more memory than a processor has near it: there, a few at a time.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in task.unflatten(w).items()}
    given = (batch,) if weights is None else (batch, weights)
    size = len(tree_leaves(batch)[0])
    step = max(_LEAST, _NEAR // numbers_left(task)) if w.device.type == "cpu" else max(1, size)
    found = []
    for start in range(0, size, step):
        part = tree_map(lambda leaf, start=start: leaf[start : start + step], given)
        with torch.enable_grad():
            losses = task.losses(leaves, part[0])
            total = (losses if weights is None else losses * part[1]).sum()
            torch.autograd.backward(total, inputs=list(leaves.values()))
        found.append(losses.detach())
    sums = {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in leaves.items()
    }
    return [task.flatten(sums).div_(size), torch.cat(found)]


def _loop(
    one: Callable[..., list[Tensor]], position: Tensor, given: tuple[Any, ...], shared: bool
) -> list[Tensor]:
    leaves, spec = tree_flatten(given)
    outs: list[Tensor] = []
    with torch.no_grad():
        for c, w in enumerate(position):
            mine = given if shared else tree_unflatten([leaf[c] for leaf in leaves], spec)
            row = one(w, *mine)
            outs = outs or [value.new_empty(len(position), *value.shape) for value in row]
            for out, value in zip(outs, row, strict=True):
                out[c] = value
    return outs
