"""A JAX loss at a checkpoint with its examples: what :class:`bayesinf.Task` is for torch.

Data are pytrees whose leaves have one row per example; a batch is the same pytree with some of the
rows. ``loss_fn(params, batch)`` gives one loss per row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from bayesinf._data import resolve_ids
from bayesinf.interop.jax._pytree import lay_end_to_end, name_of

__all__ = ["JaxExamples", "JaxTask", "LossFunction"]

LossFunction = Callable[[Any, Any], jax.Array]
"""``(params, batch) -> (B,)``."""

_HASHED = 4096


class JaxExamples:
    """Examples on the device, labelled by id.

    Parameters
    ----------
    data
        Pytree of arrays that agree in their first dimension. Floating-point arrays become
        ``dtype``, in which weights are sampled.
    ids
        Unique integers or strings; ``0 … n−1`` by default.
    name
        ``"train"`` or ``"query"``, for messages.
    """

    def __init__(self, data: Any, ids: Sequence[Any] | np.ndarray | None, name: str, dtype: Any):
        self.name = name
        found, treedef = jax.tree_util.tree_flatten_with_path(data)
        names = [f"{name}{keystr(path)}" for path, _ in found]
        arrays = [_array(where, leaf) for where, (_, leaf) in zip(names, found, strict=True)]
        shapes = dict(zip(names, [a.shape for a in arrays], strict=True))
        if len({a.shape[0] for a in arrays}) != 1:
            raise ValueError(
                f"{name}= must be a pytree of arrays with one row per example; their first "
                f"dimensions differ, or there is no array: {shapes}."
            )
        if not len(arrays[0]):
            raise ValueError(f"{name}= holds no examples.")
        self.ids = resolve_ids(ids, len(arrays[0]), name)
        self._arrays = arrays
        floats = [jnp.issubdtype(a.dtype, jnp.floating) for a in arrays]
        cast = [a.astype(dtype) if f else a for a, f in zip(arrays, floats, strict=True)]
        self.data = jax.tree.unflatten(treedef, [jnp.asarray(a) for a in cast])

    def __len__(self) -> int:
        return len(self._arrays[0])

    def positions(self, ids: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Positions of ids; ``KeyError`` names one that is unknown."""
        place = {key: i for i, key in enumerate(self.ids.tolist())}
        wanted = np.asarray(ids).tolist()
        unknown = [key for key in wanted if key not in place]
        if unknown:
            known = self.ids.tolist()
            raise KeyError(
                f"unknown {self.name} ids {unknown[:5]}; ids run from {known[0]!r} to "
                f"{known[-1]!r} ({len(self)} of them)."
            )
        return np.array([place[key] for key in wanted], dtype=np.int64)

    def fingerprint(self) -> str:
        """Hash of the ids and of up to 4,096 evenly spaced examples, as they were given."""
        digest = hashlib.sha256("\x1f".join(map(str, self.ids.tolist())).encode())
        step = max(1, -(-len(self) // _HASHED))
        for leaf in self._arrays:
            digest.update(f"{leaf.dtype} {leaf.shape[1:]}".encode())
            digest.update(np.ascontiguousarray(leaf[::step]).tobytes())
        return digest.hexdigest()[:16]


class JaxTask:
    """A loss, the weights where it is looked at, and the examples.

    Parameters
    ----------
    loss_fn
        ``(params, batch) -> (B,)``, pure.
    params
        The checkpoint.
    train, query
        Pytrees of arrays.
    train_ids, query_ids
        Labels of the examples.

    Raises
    ------
    TypeError
        If there are no weights, data are no arrays, or losses are no real numbers.
    ValueError
        If the loss does not give one number per example, or data do not agree in their rows.
    """

    def __init__(
        self,
        loss_fn: LossFunction,
        params: Any,
        train: Any,
        query: Any,
        train_ids: Sequence[Any] | np.ndarray | None = None,
        query_ids: Sequence[Any] | np.ndarray | None = None,
    ) -> None:
        self.loss_fn, self.weights = loss_fn, lay_end_to_end(params)
        dtype = self.weights.layout.dtype
        self.train = JaxExamples(train, train_ids, "train", dtype)
        self.query = JaxExamples(query, query_ids, "query", dtype)
        lower = self.weights.layout.lower()
        self.module_dtype = str(dtype) if lower is None else lower[1]
        for name in ("train", "query"):
            self.check_values(loss_fn, name, "loss_fn")

    @property
    def n(self) -> int:
        """Number of training examples."""
        return len(self.train)

    @property
    def dimension(self) -> int:
        """Number of weights."""
        return len(self.weights.flat)

    def examples(self, split: str) -> JaxExamples:
        """Return the ``"train"`` or the ``"query"`` examples."""
        return self.train if split == "train" else self.query

    def check_values(self, function: LossFunction, split: str, what: str) -> None:
        """Raise unless a function gives one real number per example, without computing it."""
        size = 3 if len(self.examples(split)) >= 3 else 1

        def at(flat: jax.Array, still: Any, data: Any) -> Any:
            params = self.weights.layout.rebuild(flat, still)
            return function(params, jax.tree.map(lambda leaf: leaf[:size], data))

        given = self.weights.flat, self.weights.still, self.examples(split).data
        found: Any = jax.eval_shape(at, *given)
        shape = getattr(found, "shape", None)
        if shape != (size,):
            got = f"shape {shape}" if shape is not None else f"a {type(found).__name__}"
            raise ValueError(
                f"{what} must give one number per example, shape ({size},) for a batch of {size} "
                f"{split} examples; got {got}. {_advice(shape, size)}"
            )
        if not jnp.issubdtype(found.dtype, jnp.floating):
            raise TypeError(f"{what} must give floating-point numbers; got {found.dtype}.")

    def fingerprint(self) -> dict[str, Any]:
        """Hashes of the checkpoint and data, for stores and scores."""
        return {
            "checkpoint": self.weights.digest,
            "parameters": self.weights.names,
            "likelihood": f"jax, {name_of(self.loss_fn)}",
            "train": self.train.fingerprint(),
            "query": self.query.fingerprint(),
            "n": self.n,
            "dtype": self.module_dtype,
        }


def _advice(shape: tuple[int, ...] | None, size: int) -> str:
    if shape == ():
        return (
            "Usual cause: a mean or a sum over the batch. Leave it out: return losses, not "
            "losses.mean(); the potential takes the mean itself."
        )
    if shape is not None and shape[:1] == (size,):
        return "Sum over the outputs or tokens of each example: losses.sum(axis=1)."
    return "Write it for batches: jax.vmap(loss_of_one, (None, 0))(params, batch)."


def _array(where: str, leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    if array.dtype.kind in "OUSMm" or not array.ndim:
        raise TypeError(
            f"{where} must be an array of numbers with one row per example; got "
            f"{type(leaf).__name__} of dtype {array.dtype}, shape {array.shape}. Text is tokenised "
            f"before it gets here, and constants belong into the loss."
        )
    return array
