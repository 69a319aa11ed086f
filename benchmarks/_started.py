"""Kernels whose chains start at draws of a Gaussian approximation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bayesinf._posterior import Potential
from bayesinf._rng import ChainGenerators
from bayesinf.samplers import Preconditioner, Sampler, State
from bayesinf.samplers._preconditioner import push

__all__ = ["Started"]


@dataclass(frozen=True)
class _Parts:
    """A kernel and the Gaussian its chains start from."""

    kernel: Sampler
    start: Preconditioner

    def config(self) -> dict[str, Any]:
        """What identifies them."""
        kernel = {"kernel": type(self.kernel).__name__, "step_size": self.kernel.step_size}
        return {**kernel, **self.start.config()}


@dataclass(frozen=True)
class Started:
    """A kernel, each chain of which starts at its own draw ``w0 + S ξ``, ``ξ ~ N(0, I)``.

    Close to the law of a local posterior in every direction, so that a kernel with a long memory
    has no long way to go; run it with ``jitter=0``.
    """

    parts: _Parts

    @classmethod
    def at_draws(cls, kernel: Sampler, start: Preconditioner) -> Started:
        """Start ``kernel`` at draws from ``N(w0, S Sᵀ)``."""
        return cls(_Parts(kernel, start))

    @property
    def full_batch(self) -> bool:
        """That of the kernel."""
        return self.parts.kernel.full_batch

    @property
    def step_size(self) -> float:
        """That of the kernel."""
        return self.parts.kernel.step_size

    def init(self, position: Tensor, rng: ChainGenerators) -> State:
        """Start away from ``position``."""
        moved = position + push(self.parts.start, rng.normal_like(position))
        return self.parts.kernel.init(moved, rng)

    def step(
        self, state: State, potential: Potential, batch: Tensor | None, rng: ChainGenerators
    ) -> tuple[State, dict[str, Any]]:
        """One step of the kernel."""
        return self.parts.kernel.step(state, potential, batch, rng)

    def freeze(self, state: State) -> State:
        """As the kernel does."""
        return self.parts.kernel.freeze(state)
