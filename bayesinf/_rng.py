"""Randomness as an argument: one owned generator per chain, and batches that need no state.

Every number is derived from ``(seed, purpose, chain, …)`` through ``numpy.random.SeedSequence``, so
a chain's randomness does not depend on how many chains run beside it or on how they are run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["BatchStream", "ChainGenerators", "starting_points"]

_NOISE, _BATCHES, _STARTS = 0, 1, 2


def _sequence(seed: int, *key: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=key)


def _torch_seed(seed: int, *key: int) -> int:
    return int(_sequence(seed, *key).generate_state(1, np.uint64)[0] >> np.uint64(1))


class ChainGenerators:
    """One ``torch.Generator`` per chain."""

    def __init__(self, seed: int, chains: int, device: torch.device) -> None:
        self.generators = [
            torch.Generator(device).manual_seed(_torch_seed(seed, _NOISE, c)) for c in range(chains)
        ]

    def normal_like(self, position: Tensor) -> Tensor:
        """Fill ``(C, d)`` with standard normals, row ``c`` from chain ``c``'s generator."""
        noise = torch.empty_like(position)
        for row, generator in zip(noise, self.generators, strict=True):
            row.normal_(generator=generator)
        return noise

    def get_state(self) -> list[Tensor]:
        """States of all generators, for a commit."""
        return [generator.get_state() for generator in self.generators]

    def set_state(self, states: Sequence[Tensor]) -> None:
        """Restore what :meth:`get_state` returned."""
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state.cpu())


class BatchStream:
    """Minibatches without replacement, reshuffled every epoch, a function of the step alone.

    An epoch has ``n // batch_size`` batches; the remainder of its permutation is left out, so that
    every example is as likely in every batch. ``batch_size=None`` means the full batch.
    """

    def __init__(self, seed: int, chains: int, n: int, batch_size: int | None) -> None:
        if batch_size is not None and not 1 <= batch_size <= n:
            raise ValueError(
                f"batch_size must lie between 1 and the {n} training examples, or be None for "
                f"full-batch gradients; got {batch_size}."
            )
        self.seed, self.chains, self.n, self.batch_size = seed, chains, n, batch_size
        self._epoch = -1
        self._order = np.empty((0, 0), dtype=np.int64)

    def at(self, step: int) -> Tensor | None:
        """Positions ``(C, batch_size)`` of the batch of each chain at a step, or None."""
        if self.batch_size is None:
            return None
        epoch, k = divmod(step, self.n // self.batch_size)
        if epoch != self._epoch:
            self._order = np.stack(
                [
                    np.random.default_rng(_sequence(self.seed, _BATCHES, c, epoch)).permutation(
                        self.n
                    )
                    for c in range(self.chains)
                ]
            )
            self._epoch = epoch
        where = slice(k * self.batch_size, (k + 1) * self.batch_size)
        return torch.from_numpy(self._order[:, where])


def starting_points(
    center: Tensor, chains: int, superchains: int, scale: float, seed: int
) -> Tensor:
    """Chain starts ``(C, d)``: ``center + scale · z_k``, one ``z_k ~ N(0, I)`` per superchain."""
    draws = []
    for k in range(superchains):
        generator = torch.Generator().manual_seed(_torch_seed(seed, _STARTS, k))
        z = torch.empty(center.shape, dtype=center.dtype).normal_(generator=generator)
        draws.append(center + scale * z.to(center.device))
    return torch.stack(draws).repeat_interleave(chains // superchains, dim=0)
