"""JAX's kernels as torch's are met: tensors in, tensors out, normals from whoever asks.

The potential is JAX's own too, of the same linear regression, in float64.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor

from bayesinf.interop.jax._kernels import KERNELS
from bayesinf.interop.jax._potential import JaxPotential, Program
from bayesinf.interop.jax._pytree import Fixed, lay_end_to_end
from tests.quadratic import Quadratic


def loss(params, batch):
    x, y = batch
    return 0.5 * (x @ params["w"] - y[:, 0]) ** 2


class Given:
    """The randomness of a step, drawn elsewhere."""

    def __init__(self, noise, keys):
        self.noise, self.given = noise, keys

    def normal_like(self, position):
        return self.noise

    def keys(self):
        return self.given


QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""To compile, not to run."""


@partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=QUICKLY)
def run(program, kernel, part, problem, settings, start, noise, keys):
    function = getattr(KERNELS[kernel], part)
    potential = JaxPotential(program, problem, None)
    return function(settings, start, potential, Given(noise, keys))


class JaxKernel:
    """Stands for the torch kernel whose settings it takes."""

    def __init__(self, kernel: Any, problem: Quadratic) -> None:
        self.kernel, self.calls = kernel, 0
        p = problem.posterior
        with jax.enable_x64(True):
            weights = lay_end_to_end({"w": problem.w0.numpy()})
            x, y = (jnp.asarray(part.numpy()) for part in problem.task.train.batch())
            tilted = p.potential == "tilted"
            self.program = Program(Fixed(loss), weights.layout, tilted, 10**6)
            self.problem = {
                "center": weights.flat, "tilt": jnp.zeros(4), "still": (), "train": (x, y),
                "n_beta": p.n_beta, "gamma": p.gamma, "weight_decay": p.weight_decay,
            }  # fmt: skip
            if tilted:
                potential = JaxPotential(self.program, self.problem, None)
                self.problem["tilt"] = potential.loss_grad(weights.flat[None])[0]
        self.settings = {k: v for k, v in vars(kernel).items() if k != "preconditioner"}

    def _run(self, part: str, start: Any, like: Tensor, rng: Any) -> Any:
        self.calls += 1
        noise = rng.normal_like(like)
        with jax.enable_x64(True):
            given = jax.tree.map(lambda leaf: jnp.asarray(leaf.contiguous().numpy()), start)
            keys = jax.random.split(jax.random.key(self.calls), len(like))
            found = run(
                self.program, type(self.kernel), part, self.problem, self.settings, given,
                jnp.asarray(noise.numpy()), keys,
            )  # fmt: skip
            return jax.tree.map(lambda leaf: torch.tensor(jax.device_get(leaf)), found)

    def init(self, position: Tensor, rng: Any) -> dict[str, Tensor]:
        return self._run("init", position, position, rng)

    def step(self, state: Any, potential: Any, batch: None, rng: Any) -> Any:
        found, acceptance = self._run("step", state, state["position"], rng)
        return found, {} if acceptance is None else {"acceptance": acceptance}
