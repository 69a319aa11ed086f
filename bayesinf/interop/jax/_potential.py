"""The potential of :class:`bayesinf.LocalPosterior` over a JAX loss; conventions are those there.

Positions are ``(C, d)``, one row per chain; a batch is None (all training examples) or positions of
examples ``(C, B)``. What is static decides which program is compiled; all numbers are arguments of
it, so that other step sizes, temperatures or data of the same shapes compile nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bayesinf.interop.jax._pytree import Fixed, Layout

__all__ = ["JaxPotential", "Problem", "Program", "count", "in_chunks"]

Problem = dict[str, Any]
"""Numbers of a run: ``center (d,)``; ``tilt (d,)``, the gradient of the mean loss there, or 0;
``still``, parameters that are no weights; ``train``; ``n_beta``, ``gamma``, ``weight_decay``."""


@dataclass(frozen=True)
class Program:
    """What is compiled.

    Attributes
    ----------
    loss
        ``(params, batch) -> (B,)``.
    layout
        Of the parameters.
    tilted
        Which of the two potentials.
    chunk
        Losses that are computed at once: examples, times chains where there is room for several.
    """

    loss: Fixed
    layout: Layout
    tilted: bool
    chunk: int

    def over_chains(self, function: Callable[..., Any], examples: int, *given: Any) -> Any:
        """``function(row, …)`` for every row of what is given, each of so many examples.

        As many chains at once as the chunk has room for: on a processor, chains whose activations
        do not stay near it together are up to a half slower than one after another.
        """
        chains = len(jax.tree.leaves(given)[0])
        at_once = max(1, self.chunk // min(examples, self.chunk))
        if at_once >= chains:
            return jax.vmap(function)(*given)
        size = at_once if at_once > 1 else None
        return jax.lax.map(lambda row: function(*row), given, batch_size=size)

    def values(self, function: Fixed, w: jax.Array, still: Any, batch: Any) -> jax.Array:
        """``function(params, batch)`` at weights ``(d,)``, in their precision."""
        return function.value(self.layout.rebuild(w, still), batch).astype(w.dtype)


class JaxPotential:
    """Potential and its gradient from a batch, with the checkpoint as anchor where it is tilted."""

    def __init__(self, program: Program, problem: Problem, batch: jax.Array | None) -> None:
        self.program, self.problem = program, problem
        take = partial(jax.tree.map, lambda leaf: leaf[batch])
        self._batch = None if batch is None else take(problem["train"])
        self._size = count(problem["train"]) if batch is None else batch.shape[1]

    def loss_grad(self, position: jax.Array) -> jax.Array:
        """Gradient ``(C, d)`` of the batch's mean loss."""
        if self._batch is None:
            return self.over_chains(self._full, position)
        return self.over_chains(jax.grad(self._mean), position, self._batch)

    def assemble(self, position: jax.Array, loss_grad: jax.Array) -> jax.Array:
        """Gradient of the potential from that of the mean loss at the same position."""
        p = self.problem
        away, precision = position - p["center"], _precision(p)
        if not self.program.tilted:
            return p["n_beta"] * loss_grad + precision * position - p["gamma"] * p["center"]
        shift = p["tilt"]
        if self._batch is not None:  # ∇ℓ_B(w) − ∇ℓ_B(w0): the tilt itself cancels
            shift = self._anchor()
        return p["n_beta"] * (loss_grad - shift) + precision * away

    def grad(self, position: jax.Array) -> jax.Array:
        """Gradient ``(C, d)`` of the potential."""
        return self.assemble(position, self.loss_grad(position))

    def over_chains(self, function: Callable[..., Any], *given: Any) -> Any:
        """``function(row, …)``, which looks at a batch, for every row of what is given."""
        return self.program.over_chains(function, self._size, *given)

    def density(self, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """:meth:`log_density` ``(C,)`` and its gradient ``(C, d)``."""
        found: tuple[jax.Array, jax.Array] = self.over_chains(
            jax.value_and_grad(self.log_density), position
        )
        return found

    def log_density(self, w: jax.Array) -> jax.Array:
        """``−U`` at weights ``(d,)`` of one chain, over all examples, up to a constant."""
        p, away = self.problem, w - self.problem["center"]
        value = p["n_beta"] * self._full_loss(w) + 0.5 * p["gamma"] * away @ away
        decay = 0.5 * p["n_beta"] * p["weight_decay"]
        if self.program.tilted:
            return -(value + decay * away @ away - p["n_beta"] * p["tilt"] @ away)
        return -(value + decay * w @ w)

    # ------------------------------------------------------------------ means over examples

    def _mean(self, w: jax.Array, batch: Any) -> jax.Array:
        program = self.program
        return program.values(program.loss, w, self.problem["still"], batch).mean()

    def _anchor(self) -> jax.Array:
        """Gradients ``(C, d)`` of the batches' losses at the checkpoint."""
        at_center = partial(jax.grad(self._mean), self.problem["center"])
        return self.over_chains(at_center, self._batch)

    def _full_loss(self, w: jax.Array) -> jax.Array:
        program, p = self.program, self.problem
        losses = in_chunks(
            lambda batch: program.values(program.loss, w, p["still"], batch),
            p["train"],
            program.chunk,
        )
        return losses.mean()

    def _full(self, w: jax.Array) -> jax.Array:
        """Gradient of the mean loss over all examples, a chunk at a time."""
        program, p = self.program, self.problem

        def total(w: jax.Array, batch: Any) -> jax.Array:
            return program.values(program.loss, w, p["still"], batch).sum()

        head, tail = _split(p["train"], program.chunk)
        out = jnp.zeros_like(w)
        if head is not None:
            add = jax.grad(total)
            out = jax.lax.scan(lambda sums, part: (sums + add(w, part), None), out, head)[0]
        if tail is not None:
            out = out + jax.grad(total)(w, tail)
        return out / self._size


def count(examples: Any) -> int:
    """Number of examples."""
    return int(jax.tree.leaves(examples)[0].shape[0])


def in_chunks(function: Callable[[Any], jax.Array], examples: Any, chunk: int) -> jax.Array:
    """``function`` of all examples, ``(N,)``, from ``chunk`` of them at a time."""
    head, tail = _split(examples, chunk)
    parts = [] if head is None else [jax.lax.map(function, head).reshape(-1)]
    return jnp.concatenate(parts if tail is None else [*parts, function(tail)])


def _split(examples: Any, chunk: int) -> tuple[Any, Any]:
    """Whole chunks ``(K, chunk, …)`` where there are several, and the rest; None where empty."""
    n = count(examples)
    whole = n // chunk if n > chunk else 0
    cut = whole * chunk
    head = tail = None
    if whole:
        head = jax.tree.map(lambda a: a[:cut].reshape(whole, chunk, *a.shape[1:]), examples)
    if cut < n:
        tail = jax.tree.map(lambda a: a[cut:], examples)
    return head, tail


def _precision(problem: Problem) -> jax.Array:
    """``γ + nβ·wd``."""
    return problem["gamma"] + problem["n_beta"] * problem["weight_decay"]
