"""Pytrees of parameters as one vector, and back in the structure that they came in.

Leaves that are floating-point arrays are **weights**: they are laid end to end in the precision
that they are sampled in, which is theirs, or float32 where they are in half precision. All other
leaves (counters, functions, names: whatever Equinox and Flax keep beside weights) stay as they are.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

__all__ = ["Fixed", "Layout", "Weights", "lay_end_to_end", "name_of"]


class Fixed:
    """A part of what a computation is compiled for, known by its identity."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fixed) and self.value is other.value


@dataclass(frozen=True)
class Slot:
    """Where a leaf comes from: weights of a shape, an array that stands still, or a constant."""

    shape: tuple[int, ...] | None = None
    dtype: Any = None
    constant: Fixed | None = None


@dataclass(frozen=True)
class Layout:
    """How a vector of weights becomes parameters; hashable.

    Attributes
    ----------
    treedef
        Structure of the parameters.
    slots
        One for each leaf.
    dtype
        What weights are sampled in.
    """

    treedef: Any
    slots: tuple[Slot, ...]
    dtype: Any

    def rebuild(self, flat: jax.Array, still: tuple[jax.Array, ...]) -> Any:
        """Parameters from weights ``(d,)`` and the arrays that stand still."""
        leaves, start, others = [], 0, iter(still)
        for slot in self.slots:
            if slot.constant is not None:
                leaves.append(slot.constant.value)
            elif slot.shape is None:
                leaves.append(next(others))
            else:
                stop = start + math.prod(slot.shape)
                leaves.append(flat[start:stop].reshape(slot.shape).astype(slot.dtype))
                start = stop
        return self.treedef.unflatten(leaves)

    def lower(self) -> tuple[np.ndarray, str] | None:
        """Which weights ``(d,)`` are in half precision, and in which; None where none are."""
        sizes = [math.prod(s.shape) for s in self.slots if s.shape is not None]
        lower = [s.dtype for s in self.slots if s.shape is not None]
        where = np.repeat([jnp.finfo(t).bits < 32 for t in lower], sizes)
        return (where, str(min(lower, key=lambda t: jnp.finfo(t).bits))) if where.any() else None


@dataclass(frozen=True)
class Weights:
    """Parameters taken apart.

    Attributes
    ----------
    layout
        How they are put together.
    flat
        ``(d,)``.
    still
        Arrays that are no weights.
    digest
        Hash of every number in them.
    names
        Hash of where the weights stand in their tree.
    """

    layout: Layout
    flat: jax.Array
    still: tuple[jax.Array, ...]
    digest: str
    names: str


def lay_end_to_end(params: Any) -> Weights:
    """Take parameters apart.

    Parameters
    ----------
    params
        Any pytree.

    Raises
    ------
    TypeError
        If no leaf is a floating-point array, or one is complex.
    ValueError
        If a leaf is in float64 and JAX's 64-bit mode is off.
    """
    found, treedef = jax.tree_util.tree_flatten_with_path(params)
    slots, weights, still = [], [], []
    numbers, names = hashlib.sha256(), hashlib.sha256()
    for path, leaf in found:
        where = keystr(path)
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            slots.append(Slot(constant=Fixed(leaf)))
            numbers.update(f"{where} {name_of(leaf)}".encode())
            continue
        _check_precision(where, leaf)
        numbers.update(f"{where} {leaf.dtype} {leaf.shape}".encode())
        numbers.update(np.asarray(leaf).tobytes())
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            slots.append(Slot(leaf.shape, leaf.dtype))
            weights.append(leaf)
            names.update(f"{where}\n".encode())
        else:
            slots.append(Slot())
            still.append(jnp.asarray(leaf))
    if not weights:
        raise TypeError(
            f"params holds no floating-point array among its {len(found)} leaves: nothing to "
            f"sample. Give the pytree of weights, for example params = model.init(key, x) of Flax, "
            f"an Equinox module, or {{'w': jnp.zeros(3)}} (Python numbers are taken as constants)."
        )
    dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in weights))
    flat = jnp.concatenate([jnp.ravel(jnp.asarray(leaf)).astype(dtype) for leaf in weights])
    layout = Layout(treedef, tuple(slots), dtype)
    return Weights(layout, flat, tuple(still), numbers.hexdigest()[:16], names.hexdigest()[:16])


def name_of(thing: Any) -> str:
    """A name that is the same in every process."""
    named = getattr(thing, "__qualname__", None)
    if named is not None:
        return f"{getattr(thing, '__module__', '')}.{named}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(thing))


def _check_precision(where: str, leaf: Any) -> None:
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise TypeError(f"params{where} is {leaf.dtype}; weights are real. Sample its parts apart.")
    if leaf.dtype == np.float64 and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise ValueError(
            f"params{where} is float64 and JAX's 64-bit mode is off, where it would be rounded to "
            f"float32 without a word. Call jax.config.update('jax_enable_x64', True) first thing "
            f"in the program, or round it yourself: jax.tree.map(lambda leaf: "
            f"leaf.astype('float32'), params)."
        )
