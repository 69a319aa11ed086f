"""Examples with stable ids: tensors, dict batches and map-style datasets behind one interface.

A batch is always the pair ``(inputs, target)``. ``inputs`` is a tensor, a tuple of tensors
(positional arguments of the module) or a dict of tensors (keyword arguments).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.data import Dataset, default_collate

__all__ = ["Batch", "Examples", "resolve_ids", "trimmed"]

Batch = tuple[Any, Any]

_TARGET_NAMES = ("target", "targets", "label", "labels", "y")


def resolve_ids(ids: Sequence[Any] | np.ndarray | None, n: int, name: str) -> np.ndarray:
    """Return ``n`` unique integer or string ids, ``0 … n−1`` by default."""
    if ids is None:
        return np.arange(n)
    array = np.asarray(ids)
    if array.dtype.kind not in "iuUT" or array.shape != (n,):
        raise ValueError(
            f"{name}_ids must be {n} integers or strings, one per {name} example; got "
            f"{array.dtype} of shape {array.shape}."
        )
    unique, counts = np.unique(array, return_counts=True)
    if len(unique) < n:
        raise ValueError(
            f"{name}_ids must be unique: {unique[counts > 1].tolist()[0]!r} occurs "
            f"{counts[counts > 1][0]} times. "
            f"Scores and stores are labelled by these ids."
        )
    return array.astype(np.int64) if array.dtype.kind in "iu" else array


def trimmed(batch: Batch, length: int | None) -> Batch:
    """Cut what has a position for each in ``attention_mask (B, T)`` to ``length``; None: nothing.

    The target is cut where it has one, too.
    """
    if length is None:
        return batch
    inputs, target = batch
    positions = inputs["attention_mask"].shape[1]

    def cut(leaf: Tensor) -> Tensor:
        return leaf[:, :length] if leaf.ndim > 1 and leaf.shape[1] == positions else leaf

    return {name: cut(leaf) for name, leaf in inputs.items()}, cut(target)


class Examples:
    """``n`` examples, fetched by position and labelled by id.

    Parameters
    ----------
    data
        ``(x, y)`` or ``(x1, …, y)`` tensors, a dict of tensors (or of arrays), or a map-style
        ``torch.utils.data.Dataset`` whose items are ``(x, y)`` tuples or dicts. Dataset items are
        collated by ``torch.utils.data.default_collate`` whenever they are read.
    ids
        Unique integers or strings; ``0 … n−1`` by default.
    name
        ``"train"`` or ``"query"``, for messages.
    device, dtype
        Where batches go; floating-point inputs and targets are cast to ``dtype``.
    target
        For dicts: the key of the target, when it is none of target(s), label(s), y.
    """

    def __init__(
        self,
        data: Any,
        ids: Sequence[Any] | np.ndarray | None,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
        target: str | None = None,
    ) -> None:
        self.name, self.device, self.dtype = name, device, dtype
        self._target = target
        self.held = False  # in memory, so that looking at every target costs nothing
        self._fetch: Callable[[Tensor | slice], Batch]
        if isinstance(data, Mapping):
            tensors = {key: torch.as_tensor(value) for key, value in data.items()}
            self._hold(self._split(tensors))
        elif isinstance(data, (tuple, list)) and len(data) >= 2:
            self._hold(self._split(tuple(torch.as_tensor(part) for part in data)))
        elif isinstance(data, Dataset) and hasattr(data, "__len__"):
            self._hold_dataset(data)
        else:
            raise TypeError(
                f"{name}= must be tensors (x, y), a dict of tensors, or a map-style Dataset with "
                f"__len__; got {type(data).__name__}. A DataLoader's dataset is `loader.dataset`."
            )
        if len(self) == 0:
            raise ValueError(f"{name}= holds no examples.")
        self.ids = resolve_ids(ids, len(self), name)

    def _split(self, item: Any) -> Batch:
        """Split a tuple or dict of collated tensors into (inputs, target)."""
        if isinstance(item, Mapping):
            found = [self._target] if self._target else [k for k in _TARGET_NAMES if k in item]
            if len(found) != 1 or found[0] not in item:
                raise ValueError(
                    f"{self.name}= has keys {sorted(item)}, and exactly one must be the target "
                    f"({', '.join(_TARGET_NAMES)}). Name it: Task(..., target='key')."
                )
            named = {key: value for key, value in item.items() if key != found[0]}
            return named, item[found[0]]
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            raise ValueError(
                f"{self.name}= items must be (x, y) or dicts; got {type(item).__name__}."
            )
        *inputs, target = item
        return (inputs[0] if len(inputs) == 1 else tuple(inputs)), target

    def _to(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{self.name}= must collate to tensors; got a {type(leaf).__name__}. Drop columns "
                f"such as text before they reach the task."
            )
        dtype = self.dtype if leaf.is_floating_point() else leaf.dtype
        return leaf.to(self.device, dtype)

    def _hold(self, batch: Batch) -> None:
        batch = tree_map(self._to, batch)
        leaves, spec = tree_flatten(batch)
        lengths = {len(leaf) for leaf in leaves}
        if len(lengths) != 1:
            raise ValueError(
                f"{self.name}= tensors must agree in their first dimension; got lengths "
                f"{sorted(lengths)} from shapes {[tuple(leaf.shape) for leaf in leaves]}."
            )
        self._n = lengths.pop()
        self.held = True
        self._fetch = lambda index: tree_unflatten([_at(leaf, index) for leaf in leaves], spec)

    def _hold_dataset(self, data: Any) -> None:
        self._n = len(data)

        def fetch(index: Tensor | slice) -> Batch:
            if isinstance(index, slice):
                index = torch.arange(self._n)[index]
            items = default_collate([data[int(i)] for i in index.flatten()])
            batch = tree_map(self._to, self._split(items))
            return tree_map(lambda leaf: leaf.reshape(*index.shape, *leaf.shape[1:]), batch)

        self._fetch = fetch

    def __len__(self) -> int:
        return self._n

    def batch(self, index: Tensor | slice | None = None) -> Batch:
        """Fetch ``(inputs, target)`` at positions ``index``, which may have any shape.

        Of a slice, tensors that are held in memory give views.
        """
        return self._fetch(slice(None) if index is None else index)

    def batches(self, size: int) -> Iterator[tuple[slice, Batch]]:
        """Iterate over all examples in order, ``size`` at a time."""
        for start in range(0, self._n, size):
            where = slice(start, min(start + size, self._n))
            yield where, self.batch(where)

    def to(self, device: torch.device, dtype: torch.dtype) -> Examples:
        """Return the same examples with batches on another device or in another precision."""
        moved = copy.copy(self)
        fetch, moved.device, moved.dtype = self._fetch, device, dtype
        moved._fetch = lambda index: tree_map(moved._to, fetch(index))
        return moved

    def replaced(self, batch: Batch) -> Examples:
        """Return examples of the same ids with this content, held in memory."""
        other = copy.copy(self)
        other._hold(batch)
        return other

    def positions(self, ids: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Positions of the given ids, or ``KeyError`` naming those that are unknown."""
        known = self.ids.tolist()
        place = {key: i for i, key in enumerate(known)}
        wanted = np.asarray(ids).tolist()
        unknown = [key for key in wanted if key not in place]
        if unknown:
            raise KeyError(
                f"unknown {self.name} ids {unknown[:5]}; ids run from {known[0]!r} to "
                f"{known[-1]!r} ({len(self)} of them)."
            )
        return np.array([place[key] for key in wanted], dtype=np.int64)

    def fingerprint(self, limit: int = 4096) -> str:
        """Hash of the ids and of up to ``limit`` evenly spaced examples."""
        digest = hashlib.sha256("\x1f".join(map(str, self.ids.tolist())).encode())
        step = max(1, -(-self._n // limit))
        for start in range(0, self._n, 256 * step):
            index = torch.arange(start, min(start + 256 * step, self._n), step)
            inputs, target = self.batch(index)
            if isinstance(inputs, dict):  # by name, in whatever order they came
                digest.update("\x1f".join(sorted(inputs)).encode())
                inputs = [inputs[key] for key in sorted(inputs)]
            for leaf in tree_flatten((inputs, target))[0]:
                digest.update(leaf.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def _at(leaf: Tensor, index: Tensor | slice) -> Tensor:
    """``leaf[index]``; whole rows at positions of any shape are copied faster than that does."""
    if isinstance(index, slice) or index.dtype != torch.int64:
        return leaf[index]
    rows = leaf.index_select(0, index.flatten().to(leaf.device))
    return rows.view(*index.shape, *leaf.shape[1:])
