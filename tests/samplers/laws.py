"""Exact stationary laws of kernels, from the kernels themselves.

On a quadratic potential most kernels are linear: one step takes state ``x`` and normals ``ξ`` to
``T x + N ξ + c``. ``T``, ``N`` and ``c`` are read off one step, and the stationary covariance
solves ``Σ = T Σ Tᵀ + N Nᵀ``, whatever a kernel's documentation says.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor

from bayesinf.samplers import Sampler, State
from tests.quadratic import Quadratic

MOVING = ("position", "momentum", "force")
"""Parts of a state that a step changes; what else there is holds still."""

Prepare = Callable[[State], State]


class Generator:
    """Stands for ``ChainGenerators``: one generator for all chains, which is much faster."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal_like(self, like: Tensor) -> Tensor:
        return torch.empty_like(like).normal_(generator=self.generator)


class Script:
    """Gives out the columns of a prepared array instead of random numbers; zeros beyond it."""

    def __init__(self, noise: Tensor) -> None:
        self.noise, self.used = noise, 0

    def normal_like(self, like: Tensor) -> Tensor:
        width = like.shape[1]
        part = self.noise[:, self.used : self.used + width]
        self.used += width
        return part.clone().to(like) if part.shape == like.shape else torch.zeros_like(like)


def discrete_law(
    kernel: Sampler, problem: Quadratic, prepare: Prepare = lambda state: state
) -> tuple[Tensor, Tensor]:
    """Mean ``(d,)`` and covariance ``(d, d)`` of the positions of a linear kernel."""
    potential = problem.posterior.bind(vectorize=False)
    silent = Script(torch.zeros(1, 0))
    state = prepare(kernel.init(problem.w0[None].clone(), silent))
    state, _ = kernel.step(state, potential, None, silent)
    begun = silent.used
    kernel.step(state, potential, None, silent)
    names, d, m = [n for n in MOVING if n in state], len(problem.w0), silent.used - begun
    base = torch.cat([problem.w0, torch.zeros((len(names) - 1) * d, dtype=torch.float64)])

    def step(rows: Tensor, noise: Tensor) -> Tensor:
        parts = dict(zip(names, rows.split(d, dim=1), strict=True))
        still = {n: v.expand(len(rows), *v.shape[1:]) for n, v in state.items() if n not in parts}
        after, _ = kernel.step({**parts, **still}, potential, None, Script(noise))
        return torch.cat([after[n] for n in names], dim=1)

    size = len(base)
    units = torch.eye(1 + size + m, dtype=torch.float64)
    out = step(base + units[:, 1 : 1 + size], units[:, 1 + size :])
    columns = (out[1:] - out[0]).T
    mix = torch.linspace(-1, 2, size + m, dtype=torch.float64)  # a kernel that is not linear shows
    mixed = step((base + mix[:size])[None], mix[None, size:])[0]
    torch.testing.assert_close(mixed, out[0] + columns @ mix, rtol=1e-7, atol=1e-7)
    transition, noise = columns[:, :size], columns[:, size:]
    eye = torch.eye(size, dtype=torch.float64)
    mean = base + torch.linalg.solve(eye - transition, out[0] - base)
    covariance = solve_discrete_lyapunov(transition.numpy(), (noise @ noise.T).numpy())
    return mean[:d], torch.from_numpy(np.asarray(covariance))[:d, :d]


class Moments:
    """Per-chain means of positions and of their products about a point, over a run.

    Attributes
    ----------
    first, second
        ``(C, d)`` and ``(C, d, d)``.
    acceptance
        Mean probability of acceptance; NaN where nothing is ever refused.
    """

    def __init__(
        self,
        kernel: Sampler,
        problem: Quadratic,
        *,
        prepare: Prepare = lambda state: state,
        chains: int = 512,
        steps: int = 400,
        burn_in: int = 150,
        noise: float = 0.0,
        seed: int = 5,
    ) -> None:
        potential, rng = problem.posterior.bind(vectorize=True), Generator(seed)
        if noise:
            potential = Noisy(potential, noise, Generator(seed + 1))
        state = prepare(kernel.init(problem.w0.expand(chains, -1).clone(), rng))
        first, second, rates = 0.0, 0.0, []
        with torch.no_grad():
            for step in range(steps):
                state, info = kernel.step(state, potential, None, rng)
                rates.append(float(info["acceptance"].mean()) if "acceptance" in info else np.nan)
                if step >= burn_in:
                    delta = state["position"] - problem.center
                    first = first + delta
                    second = second + delta[:, :, None] * delta[:, None, :]
        self.first, self.second = first / (steps - burn_in), second / (steps - burn_in)
        self.acceptance, self.state = float(np.mean(rates)), state

    def off(self, covariance: Tensor) -> float:
        """Largest z-score of the second moments against a covariance."""
        rows, columns = torch.triu_indices(*covariance.shape)
        return float(_z(self.second[:, rows, columns], covariance[rows, columns]).abs().max())

    def shifted(self) -> float:
        """Largest z-score of the means against the centre."""
        return float(_z(self.first, torch.zeros_like(self.first[0])).abs().max())


class Noisy:
    """A potential whose gradients have independent normal errors of the same size."""

    def __init__(self, potential: object, size: float, rng: Generator) -> None:
        self.potential, self.size, self.rng = potential, size, rng

    def grad(self, position: Tensor, batch: Tensor | None = None) -> Tensor:
        exact = self.potential.grad(position, batch)
        return exact + self.size * self.rng.normal_like(exact)


def _z(values: Tensor, expected: Tensor) -> Tensor:
    return (values.mean(0) - expected) / (values.std(0) / len(values) ** 0.5)
