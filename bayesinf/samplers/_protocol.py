"""What a sampler is.

A kernel advances ``C`` chains at once: positions ``(C, d)``, one row per chain. Step size
convention: drift ``ε/2``, noise ``√ε``; kernels with momentum take steps of time ``h = √ε``.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from bayesinf._posterior import Potential
from bayesinf._rng import ChainGenerators

__all__ = ["Sampler", "State"]

State = dict[str, Tensor]
"""Named tensors, each with a leading chain dimension; ``"position"`` is always there."""


class Sampler(Protocol):
    """A kernel; concrete ones are frozen dataclasses whose fields are their settings."""

    @property
    def step_size(self) -> float:
        """ε; NaN for independent draws."""
        ...

    @property
    def full_batch(self) -> bool:
        """Whether the kernel is wrong, or the batch without effect, at a gradient of a batch."""
        ...

    def init(self, position: Tensor, rng: ChainGenerators) -> State:
        """State of ``C`` chains that start at ``position (C, d)``."""
        ...

    def step(
        self, state: State, potential: Potential, batch: Tensor | None, rng: ChainGenerators
    ) -> tuple[State, dict[str, Any]]:
        """One step of every chain; the second item is per-step information.

        ``"acceptance" (C,)``, where it is given, is the probability with which each chain's
        proposal was accepted.
        """
        ...

    def freeze(self, state: State) -> State:
        """Called once, between warm-up and sampling: whatever adapted stops adapting."""
        ...
