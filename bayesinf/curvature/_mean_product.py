"""Second derivatives that are means over examples, by their products: what all of them share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bayesinf._data import Batch
from bayesinf._footprint import examples_at_once, numbers_left
from bayesinf._task import Task
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._operator import SymmetricOperator, multiply

__all__ = ["FiniteMean", "Linear", "MeanProduct"]

_CHUNK = 2**21
"""Numbers of a pass that are held for all vectors together: what stays near the processor."""

_COPIES = 3
"""Numbers that a linear map holds, for each that a forward pass leaves behind."""

Linear = Callable[[Sequence[Tensor], bool], list[Tensor]]
"""Parameter-shaped vectors, stacked (True) or single, to their products, summed over a batch."""


@runtime_checkable
class FiniteMean(SymmetricOperator, Protocol):
    """A symmetric operator that is the mean of one over each of ``n`` examples."""

    @property
    def n(self) -> int:
        """Number of examples."""
        ...

    def on(self, index: Tensor) -> SymmetricOperator:
        """Return the operator of the mean over the examples at these positions alone."""
        ...


@dataclass
class _State:
    """What an operator shares with its parts."""

    products: float = 0.0
    vectorize: bool = True
    checked: bool = False
    kept: dict[int, Linear] = field(default_factory=dict)
    room: float = 0.0


class MeanProduct(ABC):
    """The mean over examples of a second derivative, by its products."""

    _passes: int
    """Backward passes an example and vector."""

    def __init__(
        self,
        task: Task,
        *,
        batch_size: int = 256,
        vectorize: bool = True,
        memory_limit: float = 1.0,
        costs: Costs | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be ≥ 1; got {batch_size}.")
        if not memory_limit >= 0:
            raise ValueError(f"memory_limit, in GiB, must be ≥ 0; got {memory_limit}.")
        task.require_full_precision("a product with a curvature")
        task.require_whole_parameters("a product with a curvature")
        self.task, self.batch_size, self.costs = task, batch_size, costs
        self._index: Tensor | None = None
        room = memory_limit * 2**30 / task.dtype.itemsize
        self._state = _State(vectorize=vectorize, room=room)

    @property
    def shape(self) -> tuple[int, int]:
        """``(d, d)``."""
        return self.task.dimension, self.task.dimension

    @property
    def dtype(self) -> torch.dtype:
        """In which products are computed."""
        return self.task.dtype

    @property
    def device(self) -> torch.device:
        """Where products are computed."""
        return self.task.device

    @property
    def n(self) -> int:
        """Number of examples in the mean."""
        return self.task.n if self._index is None else len(self._index)

    @property
    def products(self) -> float:
        """Matrix–vector products so far, those of its parts included, in passes over all examples.

        A product with ``B`` of the ``n`` training examples counts ``B/n``.
        """
        return self._state.products

    def on(self, index: Tensor) -> Self:
        """Return the operator of the mean over the training examples at these positions alone.

        Parameters
        ----------
        index
            Positions ``(B,)``; one that occurs twice counts twice. Under uniform sampling the
            operator is an unbiased estimate of the mean over all.

        Raises
        ------
        ValueError
            If ``index`` is not a non-empty vector of positions of training examples.
        """
        index = torch.as_tensor(index)
        integers = not index.is_floating_point() and index.dtype is not torch.bool
        if index.ndim != 1 or not len(index) or not integers:
            raise ValueError(
                f"index must be a non-empty vector of positions of training examples; got "
                f"{index.dtype} of shape {tuple(index.shape)}. A mask becomes positions by "
                f"mask.nonzero()[:, 0]."
            )
        if int(index.min()) < 0 or int(index.max()) >= self.task.n:
            raise ValueError(
                f"index must hold positions from 0 to {self.task.n - 1}; got values from "
                f"{int(index.min())} to {int(index.max())}. Ids become positions by "
                f"task.train.positions(ids)."
            )
        part = copy.copy(self)
        part._index = index
        return part

    def apply(self, rows: Tensor) -> Tensor:
        """Product with every row of ``(..., d)``, computed in the task's dtype.

        Raises
        ------
        ValueError
            If the last dimension is not ``d``.
        RuntimeError
            If the network or the loss cannot be differentiated twice.
        """
        d = self.task.dimension
        if rows.ndim < 1 or rows.shape[-1] != d:
            raise ValueError(
                f"expected rows (..., {d}); got {tuple(rows.shape)}. Columns of a matrix ({d}, k) "
                f"go through `operator @ matrix`; named parameters become a vector by "
                f"task.flatten(named)."
            )
        vectors = rows.detach().reshape(-1, d).to(self.task.device, self.task.dtype)
        total = torch.zeros_like(vectors)
        for linear, size in self._maps():
            step = max(1, _CHUNK // (size * numbers_left(self.task)))
            for start in range(0, len(vectors), step):
                where = slice(start, start + step)
                total[where] += self._products_of(linear, vectors[where])
            self._count(size, len(vectors))
        return (total / self.n).to(rows.device, rows.dtype).reshape(rows.shape)

    def __matmul__(self, v: Tensor) -> Tensor:
        return multiply(self, v)

    # ------------------------------------------------------------------ one batch

    @abstractmethod
    def _linear(self, params: dict[str, Tensor], batch: Batch) -> Linear:
        """Differentiate once and return the rest as a linear map."""

    def _linearise(self, batch: Batch) -> Linear:
        params = {name: p.detach().requires_grad_() for name, p in self.task.params.items()}
        # Fused attention kernels have no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _second_derivatives(self.task):
            return self._linear(params, batch)

    def _require_graph(self, derivatives: Sequence[Tensor | None]) -> None:
        """Look for derivatives that refuse a second one.

        Autograd raises only on its way through them, and a gradient in chosen inputs, which they
        have cut off, goes around: they would count as constants.
        """
        if self._state.checked:
            return
        todo = [part.grad_fn for part in derivatives if part is not None]
        seen = set()
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            if node.name() == "torch::autograd::Error":
                raise RuntimeError("a backward is marked once_differentiable")
            seen.add(node)
            todo.extend(following for following, _ in node.next_functions)
        self._state.checked = True

    def _products_of(self, linear: Linear, vectors: Tensor) -> Tensor:
        """Products ``(k, d)``, all at once where autograd can, else one after another."""
        if self._state.vectorize and len(vectors) > 1:
            try:
                return self._flat(linear(self._named(vectors), True))
            except RuntimeError:
                self._state.vectorize = False
        with _second_derivatives(self.task):
            return torch.stack([self._flat(linear(self._named(v), False)) for v in vectors])

    def _named(self, vectors: Tensor) -> list[Tensor]:
        return list(self.task.unflatten(vectors).values())

    def _flat(self, parts: Sequence[Tensor]) -> Tensor:
        return self.task.flatten(dict(zip(self.task.params, parts, strict=True)))

    # ------------------------------------------------------------------ what it costs

    def _maps(self) -> Iterator[tuple[Linear, int]]:
        """Linear maps of all batches, as far as there is room kept from one product to the next."""
        size = examples_at_once(self.task, self.batch_size)
        if self._index is not None:
            for part in self._index.split(size):
                yield self._counted(self.task.train.batch(part), len(part)), len(part)
            return
        state, n = self._state, self.task.n
        for start in range(0, n, size):
            stop = min(start + size, n)
            linear = state.kept.get(start)
            if linear is None:
                linear = self._counted(self.task.train.batch(slice(start, stop)), stop - start)
                needed = _COPIES * (stop - start) * numbers_left(self.task)
                if needed <= state.room:
                    state.kept[start] = linear
                    state.room -= needed
            yield linear, stop - start

    def _counted(self, batch: Batch, size: int) -> Linear:
        if self.costs is not None:
            self.costs.forward_examples += size
            self.costs.backward_examples += size
        return self._linearise(batch)

    def _count(self, size: int, vectors: int) -> None:
        self._state.products += vectors * size / self.task.n
        if self.costs is not None:
            self.costs.backward_examples += size * self._passes * vectors


@contextmanager
def _second_derivatives(task: Task) -> Iterator[None]:
    """Say what usually lacks a second derivative."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        if "derivative" not in reason and "differentia" not in reason:
            raise
        raise RuntimeError(
            f"the loss of {type(task.module).__name__} cannot be differentiated twice: {reason}. "
            f"Usual causes: a torch.autograd.Function of someone's own (remove the mark if its "
            f"backward is made of differentiable operations), a fused kernel (cuDNN's RNNs: "
            f"torch.backends.cudnn.flags(enabled=False)). ekfac needs first derivatives only."
        ) from error
