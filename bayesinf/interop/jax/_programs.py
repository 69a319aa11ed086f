"""What is compiled: chains that move or are observed, and single looks at the potential.

A program knows its chains' keys, numbers and data as arguments, so that one is compiled for each
loss, kernel and shapes of data, and none for other settings. The steps' loop has its length as an
argument, too: warm-up, draws and what is left of either are the same program, and a run that is cut
anywhere goes on bit for bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from bayesinf.interop.jax._kernels import KERNELS, Settings, State
from bayesinf.interop.jax._potential import JaxPotential, Problem, Program, count, in_chunks
from bayesinf.interop.jax._pytree import Fixed

__all__ = [
    "START",
    "Compiled",
    "ForTorch",
    "Keyed",
    "advance",
    "mean_loss_gradient",
    "observe",
    "to_tensor",
]

START = np.uint32(2**32 - 1)
"""Stands for a step in the key of what is drawn before the first one."""


class Keyed:
    """Normals of one step from the chains' keys."""

    def __init__(self, keys: jax.Array, step: Any) -> None:
        chains = jax.random.wrap_key_data(keys)
        self._keys = jax.vmap(jax.random.fold_in, (0, None))(chains, step)

    def keys(self) -> jax.Array:
        return self._keys

    def normal_like(self, position: jax.Array) -> jax.Array:
        shape, dtype = position.shape[1:], position.dtype
        return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(self._keys)


@partial(jax.jit, static_argnums=(0, 1))
def advance(
    program: Program,
    kernel: type,
    problem: Problem,
    settings: Settings,
    keys: jax.Array,
    state: State,
    first: jax.Array,
    steps: jax.Array,
    batches: jax.Array | None,
) -> tuple[State, jax.Array, jax.Array]:
    """So many steps from the state before step ``first``, with batches ``(block, C, B)``.

    Returns the state, whether its weights are finite and the acceptance summed over the steps.
    """
    step = KERNELS[kernel].step

    def one(k: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        potential = JaxPotential(program, problem, None if batches is None else batches[k])
        state, accepted = step(settings, carry[0], potential, Keyed(keys, first + k))
        return state, carry[1] if accepted is None else carry[1] + accepted

    none = jnp.zeros(len(keys), program.layout.dtype)
    state, accepted = jax.lax.fori_loop(0, steps, one, (state, none))
    return state, jnp.isfinite(state["position"]).all(axis=1), accepted


@partial(jax.jit, static_argnums=(0, 1))
def observe(
    program: Program,
    wanted: tuple[tuple[str, str, Fixed], ...],
    problem: Problem,
    groups: dict[str, Any],
    position: jax.Array,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Values ``(C, N)`` of every measurement, and ``(C,)`` what the log density is made of."""

    def values(w: jax.Array, group: str, function: Fixed) -> jax.Array:
        found = in_chunks(
            lambda batch: program.values(function, w, problem["still"], batch),
            groups[group],
            program.chunk,
        )
        return found.astype(jnp.float32)

    def one(w: jax.Array) -> dict[str, jax.Array]:
        return {f"{group}/{name}": values(w, group, function) for group, name, function in wanted}

    away = position - problem["center"]
    sums = {
        "distance": jnp.linalg.norm(away, axis=1),
        "along": away @ problem["tilt"],
        "norm": jnp.linalg.norm(position, axis=1),
    }
    return program.over_chains(one, max(map(count, groups.values())), position), sums


@partial(jax.jit, static_argnums=0)
def gradient(
    program: Program, problem: Problem, position: jax.Array, batch: jax.Array | None
) -> jax.Array:
    return JaxPotential(program, problem, batch).grad(position)


@partial(jax.jit, static_argnums=0)
def density(program: Program, problem: Problem, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    return JaxPotential(program, problem, None).density(position)


@partial(jax.jit, static_argnums=0)
def mean_loss_gradient(program: Program, problem: Problem, position: jax.Array) -> jax.Array:
    return JaxPotential(program, problem, None).loss_grad(position)


@partial(jax.jit, static_argnums=0)
def hessian_product(
    program: Program,
    problem: Problem,
    position: jax.Array,
    vector: jax.Array,
    batch: jax.Array | None,
) -> jax.Array:
    grad = JaxPotential(program, problem, batch).grad
    return jax.jvp(grad, (position,), (vector,))[1]


class Compiled:
    """What :class:`JaxPotential` has that is asked for outside of a program."""

    def __init__(self, program: Program, problem: Problem, batch: Any) -> None:
        self.program, self.problem, self.batch = program, problem, batch

    def grad(self, position: jax.Array) -> jax.Array:
        return gradient(self.program, self.problem, position, self.batch)

    def density(self, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        return density(self.program, self.problem, position)


class ForTorch:
    """The potential as :mod:`bayesinf._gradient_noise` asks for it, in tensors."""

    def __init__(self, program: Program, problem: Problem, posterior: Any) -> None:
        self.program, self.problem, self.posterior = program, problem, posterior

    def grad(self, position: torch.Tensor, batch: torch.Tensor | None = None) -> torch.Tensor:
        return to_tensor(gradient(self.program, self.problem, *map(to_array, (position, batch))))

    def hvp(
        self, position: torch.Tensor, vector: torch.Tensor, batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        given = map(to_array, (position, vector, batch))
        return to_tensor(hessian_product(self.program, self.problem, *given))


def to_array(tensor: torch.Tensor | None) -> jax.Array | None:
    return None if tensor is None else jnp.asarray(tensor.numpy())


def to_tensor(array: jax.Array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))
