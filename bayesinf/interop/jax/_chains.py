"""Chains computed by JAX: one program that moves them and one that observes them.

Both are compiled once and take any number of steps: kernels run in a loop whose length is an
argument, so that warm-up, draws and what is left of either are the same program, and a run that is
cut anywhere goes on bit for bit. Random numbers are a function of seed, chain and step; minibatches
are those that torch's chains of the same seed have.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from bayesinf._gradient_noise import excess_temperature
from bayesinf._plan import Plan
from bayesinf._rng import BatchStream, chain_seeds, starting_points
from bayesinf.interop.jax._kernels import KERNELS, Settings, State
from bayesinf.interop.jax._potential import JaxPotential, Problem, Program, count, in_chunks
from bayesinf.interop.jax._pytree import Fixed
from bayesinf.interop.jax._task import JaxTask

__all__ = ["JaxChains"]

_BLOCK = 50
"""Steps of a call at most, or of a draw where that is longer."""

_START = np.uint32(2**32 - 1)
"""Stands for a step in the key of what is drawn before the first one."""


class _Keyed:
    """Normals of one step from the chains' keys."""

    def __init__(self, keys: jax.Array, step: Any) -> None:
        chains = jax.random.wrap_key_data(keys)
        self._keys = jax.vmap(jax.random.fold_in, (0, None))(chains, step)

    def keys(self) -> jax.Array:
        return self._keys

    def normal_like(self, position: jax.Array) -> jax.Array:
        shape, dtype = position.shape[1:], position.dtype
        return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(self._keys)


# ------------------------------------------------------------------------------ programs


@partial(jax.jit, static_argnums=(0, 1))
def _advance(
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
        state, accepted = step(settings, carry[0], potential, _Keyed(keys, first + k))
        return state, carry[1] if accepted is None else carry[1] + accepted

    none = jnp.zeros(len(keys), program.layout.dtype)
    state, accepted = jax.lax.fori_loop(0, steps, one, (state, none))
    return state, jnp.isfinite(state["position"]).all(axis=1), accepted


@partial(jax.jit, static_argnums=(0, 1))
def _observe(
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
def _gradient(
    program: Program, problem: Problem, position: jax.Array, batch: jax.Array | None
) -> jax.Array:
    return JaxPotential(program, problem, batch).grad(position)


@partial(jax.jit, static_argnums=0)
def _density(
    program: Program, problem: Problem, position: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return JaxPotential(program, problem, None).density(position)


@partial(jax.jit, static_argnums=0)
def _mean_loss_gradient(program: Program, problem: Problem, position: jax.Array) -> jax.Array:
    return JaxPotential(program, problem, None).loss_grad(position)


@partial(jax.jit, static_argnums=0)
def _hessian_product(
    program: Program,
    problem: Problem,
    position: jax.Array,
    vector: jax.Array,
    batch: jax.Array | None,
) -> jax.Array:
    grad = JaxPotential(program, problem, batch).grad
    return jax.jvp(grad, (position,), (vector,))[1]


class _Compiled:
    """What :class:`JaxPotential` has that is asked for outside of a program."""

    def __init__(self, program: Program, problem: Problem, batch: Any) -> None:
        self.program, self.problem, self.batch = program, problem, batch

    def grad(self, position: jax.Array) -> jax.Array:
        return _gradient(self.program, self.problem, position, self.batch)

    def density(self, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _density(self.program, self.problem, position)


class _ForTorch:
    """The potential as :mod:`bayesinf._gradient_noise` asks for it, in tensors."""

    def __init__(self, program: Program, problem: Problem, posterior: Any) -> None:
        self.program, self.problem, self.posterior = program, problem, posterior

    def grad(self, position: torch.Tensor, batch: torch.Tensor | None = None) -> torch.Tensor:
        return _tensor(_gradient(self.program, self.problem, *map(_array, (position, batch))))

    def hvp(
        self, position: torch.Tensor, vector: torch.Tensor, batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        given = map(_array, (position, vector, batch))
        return _tensor(_hessian_product(self.program, self.problem, *given))


def _array(tensor: torch.Tensor | None) -> jax.Array | None:
    return None if tensor is None else jnp.asarray(tensor.numpy())


def _tensor(array: jax.Array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


# ------------------------------------------------------------------------------ chains


class JaxChains:
    """State of the chains of a plan; meets :class:`bayesinf._run.Chains`.

    Parameters
    ----------
    plan
        Of a posterior whose task is a :class:`JaxTask`.
    chunk
        Losses that are computed at once.
    """

    def __init__(self, plan: Plan, chunk: int) -> None:
        posterior = plan.posterior
        task: Any = posterior.task
        assert isinstance(task, JaxTask)
        self.plan, self.task, self.weights = plan, task, task.weights
        self.kernel = type(plan.sampler)
        tilted = posterior.potential == "tilted"
        self.program = Program(Fixed(task.loss_fn), self.weights.layout, tilted, chunk)
        self.settings = {
            name: value for name, value in vars(plan.sampler).items() if name != "preconditioner"
        }
        size = None if plan.batches is None else plan.batches.size
        self.stream = BatchStream(plan.seed, plan.chains, task.n, size)
        seeds = [chain_seeds(plan.seed, c) for c in range(plan.chains)]
        self.keys = jnp.asarray(np.stack(seeds))
        self._first = _Keyed(self.keys, _START)
        self.problem = self._problem()
        self.groups = {
            group: _rows(task.examples(group).data, where) for group, where in plan.observed.items()
        }
        self.wanted = tuple(
            (group, name, Fixed(task.loss_fn if name == "loss" else function))
            for group, measurements in plan.measurements.items()
            for name, function in measurements.items()
        )
        self.step = 0
        self.state: State = {}
        self._block = max(_BLOCK, plan.thin)
        self._finite: Any = np.ones(plan.chains, dtype=bool)
        self._acceptance = np.full(plan.chains, np.nan)
        self._sums: dict[str, jax.Array] = {}

    def _problem(self) -> Problem:
        p, flat = self.plan.posterior, self.weights.flat
        numbers = {name: getattr(p, name) for name in ("n_beta", "gamma", "weight_decay")}
        problem: Problem = {
            **{name: jnp.asarray(value, flat.dtype) for name, value in numbers.items()},
            "center": flat,
            "tilt": jnp.zeros_like(flat),
            "still": self.weights.still,
            "train": self.task.train.data,
        }
        if self.program.tilted:
            problem["tilt"] = _mean_loss_gradient(self.program, problem, flat[None])[0]
        return problem

    # ------------------------------------------------------------------ moving

    def start(self) -> None:
        """Put every chain where it starts, the same as torch's of the same seed."""
        plan, center = self.plan, _tensor(self.weights.flat)
        start = starting_points(center, plan.chains, plan.superchains, plan.spread, plan.seed)
        batches = self._batches(1)
        potential = _Compiled(self.program, self.problem, None if batches is None else batches[0])
        init = KERNELS[self.kernel].init
        self.state = init(self.settings, jnp.asarray(start.numpy()), potential, self._first)

    def freeze(self) -> None:
        """Stop whatever adapts, as the kernel's own class does."""
        frozen = self.plan.sampler.freeze({k: _tensor(v) for k, v in self.state.items()})
        self.state = {name: jnp.asarray(value.numpy()) for name, value in frozen.items()}

    def advance(self, steps: int) -> None:
        """Move every chain by so many steps."""
        accepted, left = [], steps
        while left:
            now = min(left, self._block)
            self.state, self._finite, taken = _advance(
                self.program, self.kernel, self.problem, self.settings, self.keys, self.state,
                np.uint32(self.step), np.int32(now), self._batches(now),
            )  # fmt: skip
            accepted.append(taken)
            self.step, left = self.step + now, left - now
        if KERNELS[self.kernel].decides:
            self._acceptance = np.stack(accepted).sum(0, dtype=np.float64) / steps

    def _batches(self, steps: int) -> np.ndarray | None:
        """Batches ``(block, C, B)`` of the next steps; those after them are not looked at."""
        if not self.stream.parts:
            return None
        size = self.stream.parts[0].count
        out = np.zeros((self._block, self.plan.chains, size), dtype=np.int32)
        for k in range(steps):
            batch = self.stream.at(self.step + k)
            assert batch is not None
            out[k] = batch.numpy()
        return out

    def finite(self) -> np.ndarray:
        """``(C,)``: whether the weights are finite."""
        return np.asarray(self._finite)

    def hold(self, chain: int) -> None:
        """Put a failed chain back to the checkpoint."""
        position = self.state["position"].at[chain].set(self.weights.flat)
        self.state = {**self.state, "position": position}

    # ------------------------------------------------------------------ observing

    def observe(self) -> dict[str, np.ndarray]:
        """Values ``(C, N)`` of what is recorded, by their names in a store."""
        return self._values(self.state["position"])

    def observe_checkpoint(self) -> dict[str, np.ndarray]:
        """The same ``(1, N)`` at the checkpoint, by the same program."""
        center = jnp.broadcast_to(self.weights.flat, (self.plan.chains, self.task.dimension))
        return {name: values[:1] for name, values in self._values(center).items()}

    def _values(self, position: jax.Array) -> dict[str, np.ndarray]:
        found, self._sums = _observe(self.program, self.wanted, self.problem, self.groups, position)
        return {name: np.array(values) for name, values in found.items()}

    def statistics(self, loss: np.ndarray | None) -> dict[str, np.ndarray]:
        """``lp``, ``distance`` and ``acceptance_rate`` ``(C,)`` of what was observed last."""
        sums = {name: np.array(value, dtype=np.float64) for name, value in self._sums.items()}
        unknown = np.full(self.plan.chains, np.nan)
        lp = unknown if loss is None else self._log_density(loss, **sums)
        rate = self._acceptance.copy()
        return {"lp": lp, "distance": sums["distance"], "acceptance_rate": rate}

    def _log_density(
        self, loss: np.ndarray, distance: np.ndarray, along: np.ndarray, norm: np.ndarray
    ) -> np.ndarray:
        p = self.plan.posterior
        if self.program.tilted:
            return -(p.n_beta * (loss - along) + 0.5 * p.prior_precision * distance**2)
        decay = 0.5 * p.n_beta * p.weight_decay * norm**2
        return -(p.n_beta * loss + decay + 0.5 * p.gamma * distance**2)

    def checks(self, alive: list[int]) -> dict[str, Any]:
        """Heat of the gradient noise, and how much of the perturbations rounding takes."""
        potential = _ForTorch(self.program, self.problem, self.plan.posterior)
        batching: Any = SimpleNamespace(stream=self.stream, potential=potential)
        state = {k: _tensor(v) for k, v in self.state.items() if k in ("position", "scale")}
        return {
            "excess_temperature": excess_temperature(self.plan.sampler, batching, state, alive),
            "swallowed_perturbations": self._swallowed(alive),
        }

    def _swallowed(self, alive: list[int]) -> float | None:
        """Share of the weights in half precision that round to the checkpoint's own value."""
        lower = self.weights.layout.lower()
        if lower is None:
            return None
        where, dtype = np.flatnonzero(lower[0]), lower[1]
        here = self.state["position"][np.array(alive)][:, where].astype(dtype)
        return float((here == self.weights.flat[where].astype(dtype)).mean())

    # ------------------------------------------------------------------ commit and resume

    def saved(self) -> dict[str, Any]:
        """What a commit must hold: random numbers need no state."""
        return {"state": {name: _tensor(value) for name, value in self.state.items()}}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a commit."""
        self.step = int(saved["step"])
        self.state = {name: jnp.asarray(v.numpy()) for name, v in saved["state"].items()}


def _rows(data: Any, where: np.ndarray) -> Any:
    """Some examples; all of them in their order without a copy."""
    if np.array_equal(where, np.arange(count(data))):
        return data
    return jax.tree.map(lambda leaf: leaf[where], data)
