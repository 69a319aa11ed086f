"""Chains computed by JAX: one program moves them and one observes them.

Random numbers are a function of seed, chain and step, and need no state; starting points and
minibatches are those that torch's chains of the same seed have.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bayesinf._gradient_noise import excess_temperature
from bayesinf._plan import Plan
from bayesinf._rng import BatchStream, chain_seeds, starting_points
from bayesinf.interop.jax._kernels import KERNELS, State
from bayesinf.interop.jax._potential import Problem, Program, count
from bayesinf.interop.jax._programs import (
    START,
    Compiled,
    ForTorch,
    Keyed,
    advance,
    mean_loss_gradient,
    observe,
    to_tensor,
)
from bayesinf.interop.jax._pytree import Fixed
from bayesinf.interop.jax._task import JaxTask

__all__ = ["JaxChains"]

_BLOCK = 50
"""Steps of a call at most, or of a draw where that is longer."""


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
        self._first = Keyed(self.keys, START)
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
            problem["tilt"] = mean_loss_gradient(self.program, problem, flat[None])[0]
        return problem

    # ------------------------------------------------------------------ moving

    def start(self) -> None:
        """Put every chain where it starts, the same as torch's of the same seed."""
        plan, center = self.plan, to_tensor(self.weights.flat)
        start = starting_points(center, plan.chains, plan.superchains, plan.spread, plan.seed)
        batches = self._batches(1)
        potential = Compiled(self.program, self.problem, None if batches is None else batches[0])
        init = KERNELS[self.kernel].init
        self.state = init(self.settings, jnp.asarray(start.numpy()), potential, self._first)

    def freeze(self) -> None:
        """Stop whatever adapts, as the kernel's own class does."""
        frozen = self.plan.sampler.freeze({k: to_tensor(v) for k, v in self.state.items()})
        self.state = {name: jnp.asarray(value.numpy()) for name, value in frozen.items()}

    def advance(self, steps: int) -> None:
        """Move every chain by so many steps."""
        accepted, left = [], steps
        while left:
            now = min(left, self._block)
            self.state, self._finite, taken = advance(
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
        found, self._sums = observe(self.program, self.wanted, self.problem, self.groups, position)
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
        potential = ForTorch(self.program, self.problem, self.plan.posterior)
        batching: Any = SimpleNamespace(stream=self.stream, potential=potential)
        state = {k: to_tensor(v) for k, v in self.state.items() if k in ("position", "scale")}
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
        return {"state": {name: to_tensor(value) for name, value in self.state.items()}}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a commit."""
        self.step = int(saved["step"])
        self.state = {name: jnp.asarray(v.numpy()) for name, v in saved["state"].items()}


def _rows(data: Any, where: np.ndarray) -> Any:
    """Some examples; all of them in their order without a copy."""
    if np.array_equal(where, np.arange(count(data))):
        return data
    return jax.tree.map(lambda leaf: leaf[where], data)
