"""Chains of NumPyro's NUTS that the driver of :func:`bayesinf.sample` moves.

The state of the ``C`` chains is NumPyro's, every leaf with a leading axis of chains; positions
``ξ (C, d)`` are whitened (:mod:`bayesinf.interop.numpyro._whitening`). All of it is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from numpyro.infer.hmc import hmc

from bayesinf._disk import StoreError
from bayesinf._plan import Plan
from bayesinf._rng import starting_points
from bayesinf.interop.numpyro._posterior import JaxTask, potential_of
from bayesinf.interop.numpyro._whitening import Whitening

__all__ = ["NUTS", "NUTSChains"]


@dataclass(frozen=True)
class NUTS:
    """Settings of the kernel that decide a draw; every chain adapts a step of its own."""

    target_accept_prob: float
    max_tree_depth: int
    full_batch: ClassVar[bool] = True
    step_size: ClassVar[float] = float("nan")

    def __post_init__(self) -> None:
        if not 0 < self.target_accept_prob < 1:
            raise ValueError(
                f"target_accept_prob must lie between 0 and 1; got {self.target_accept_prob}."
            )
        if self.max_tree_depth < 1:
            raise ValueError(f"max_tree_depth must be at least 1; got {self.max_tree_depth}.")


class NUTSChains:
    """State of the chains of a plan; meets :class:`bayesinf._run.Chains`."""

    def __init__(self, plan: Plan, kernel: NUTS) -> None:
        self.plan, self.step = plan, 0
        self.state: Any = None  # NumPyro's HMCState once started
        task = JaxTask.of(plan.posterior.task)
        whitening = Whitening.of(plan.posterior, task)
        potential = potential_of(plan.posterior, task)
        start, transition = hmc(lambda xi: potential(whitening(xi)), algo="NUTS")
        where = {group: jnp.asarray(index) for group, index in plan.observed.items()}

        def init(xi: Array, key: Array) -> Any:
            return start(
                xi,
                plan.warmup,
                target_accept_prob=kernel.target_accept_prob,
                max_tree_depth=kernel.max_tree_depth,
                rng_key=key,
            )

        def look(xi: Array) -> tuple[dict[str, Array], Array]:
            w = whitening(xi)
            losses = {group: task.losses(w, group)[index] for group, index in where.items()}
            return losses, jnp.linalg.norm(w - whitening.center)

        self._init, self._move, self._look = (
            jax.jit(jax.vmap(function)) for function in (init, transition, look)
        )
        self._diverging: list[Array] = []
        self._accepted: list[Array] = []

    # ------------------------------------------------------------------ moving

    def start(self) -> None:
        """Put every chain where it starts."""
        plan = self.plan
        center = torch.zeros(plan.posterior.task.dimension, dtype=torch.float64)
        xi = starting_points(
            center, plan.chains, plan.superchains, lambda z: plan.jitter * z, plan.seed
        )
        keys = jax.random.split(jax.random.PRNGKey(plan.seed), plan.chains)
        self.state = self._init(jnp.asarray(xi.numpy()), keys)
        bad = np.flatnonzero(~np.isfinite(self.state.potential_energy)).tolist()
        if bad:
            raise ValueError(
                f"the potential is not finite where chains {bad} start. Start closer to the "
                f"checkpoint: jitter={plan.jitter / 2:g}."
            )

    def freeze(self) -> None:
        """NumPyro counts transitions, and stops adapting by itself."""

    def advance(self, steps: int) -> None:
        """Move every chain by so many transitions."""
        self._diverging, self._accepted = [], []
        for _ in range(steps):
            self.state = self._move(self.state, (), {})
            self._diverging.append(self.state.diverging)
            self._accepted.append(self.state.accept_prob)
            self.step += 1

    def finite(self) -> np.ndarray:
        """``(C,)``: whether the weights are finite."""
        found: np.ndarray = np.isfinite(self.state.z).all(axis=1)
        return found

    def hold(self, chain: int) -> None:
        """Nothing: a chain that fails ends the run."""

    # ------------------------------------------------------------------ observing

    def observe(self) -> dict[str, np.ndarray]:
        """Losses ``(C, N)``, by their names in a store."""
        return self._losses(self.state.z)

    def observe_checkpoint(self) -> dict[str, np.ndarray]:
        """The same ``(1, N)`` at the checkpoint."""
        return self._losses(jnp.zeros((1, self.plan.posterior.task.dimension)))

    def _losses(self, xi: Array) -> dict[str, np.ndarray]:
        losses, _ = self._look(xi)
        return {f"{g}/loss": np.array(values, dtype=np.float32) for g, values in losses.items()}

    def statistics(self, loss: np.ndarray | None) -> dict[str, np.ndarray]:
        """What ArviZ calls these, ``(C,)``, of the transitions since the last draw."""
        return {
            "lp": -np.array(self.state.potential_energy),
            "step_size": np.array(self.state.adapt_state.step_size),
            "distance": np.array(self._look(self.state.z)[1]),
            "acceptance_rate": np.mean(np.asarray(self._accepted), axis=0),
            "diverging": np.any(np.asarray(self._diverging), axis=0),
        }

    def checks(self, alive: list[int]) -> dict[str, Any]:
        """Full-batch gradients in float64 heat nothing and round nothing away."""
        return {"excess_temperature": None, "swallowed_perturbations": None}

    # ------------------------------------------------------------------ commit and resume

    def saved(self) -> dict[str, Any]:
        """What a commit must hold."""
        leaves = [np.array(leaf) for leaf in jax.tree.leaves(self.state)]
        return {"leaves": [torch.from_numpy(leaf) for leaf in leaves]}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a commit."""
        self.start()  # for the structure of the state
        leaves, structure = jax.tree.flatten(self.state)
        held = [leaf.numpy() for leaf in saved["leaves"]]
        if [(h.shape, h.dtype) for h in held] != [(x.shape, x.dtype) for x in leaves]:
            raise StoreError(
                "the store's chains were saved by another version of NumPyro, and cannot go on. "
                "Make a new store."
            )
        self.state = jax.tree.unflatten(structure, [jnp.asarray(h) for h in held])
        self.step = int(saved["step"])
