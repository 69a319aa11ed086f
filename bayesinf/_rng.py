"""Randomness as an argument: one owned generator per chain, and batches that need no state.

Every number is derived from ``(seed, purpose, chain, …)`` through ``numpy.random.SeedSequence``, so
a chain's randomness does not depend on how many chains run beside it or on how they are run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["BatchStream", "ChainGenerators", "chain_seeds", "starting_points", "systematic"]

_NOISE, _BATCHES, _STARTS = 0, 1, 2

_UNREACHED = 2**31
"""Epochs from here on are never sampled with."""


def _sequence(seed: int, *key: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=key)


def _torch_seed(seed: int, *key: int) -> int:
    return int(_sequence(seed, *key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def chain_seeds(seed: int, chain: int) -> np.ndarray:
    """Two 32-bit words of a chain's noise, for generators other than torch's."""
    return _sequence(seed, _NOISE, chain).generate_state(2, np.uint32)


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
    """Positions of minibatches, a function of seed, chain and step alone.

    Uniform batches are drawn without replacement and reshuffled every epoch of ``n // batch_size``
    batches; the remainder of a permutation is left out, so that every example is as likely in
    every batch. With strata each of them is shuffled by itself, and gives every batch its share.
    With probabilities an epoch is a systematic sample: example ``i`` occurs ``M p_i`` times among
    its ``M`` places, rounded up or down at random to the right mean, in random order; any one
    place holds ``i`` with probability ``p_i`` exactly.

    Parameters
    ----------
    seed, chains, n
        What is drawn for whom, from how many.
    batch_size
        Examples of a batch; None means the full batch.
    strata
        Positions of each stratum and how many of them a batch takes.
    probabilities
        ``p (n,)``, summing to 1; not together with strata.

    Raises
    ------
    ValueError
        If the batch size is not between 1 and ``n``.
    """

    def __init__(
        self,
        seed: int,
        chains: int,
        n: int,
        batch_size: int | None,
        strata: Sequence[tuple[np.ndarray, int]] | None = None,
        probabilities: np.ndarray | None = None,
    ) -> None:
        if batch_size is not None and not 1 <= batch_size <= n:
            raise ValueError(
                f"batch_size must lie between 1 and the {n} training examples, or be None for "
                f"full-batch gradients; got {batch_size}."
            )
        whole = [] if batch_size is None else [(np.arange(n), batch_size)]
        self.parts = [
            _Part(seed, chains, members, count, () if strata is None else (h,), probabilities)
            for h, (members, count) in enumerate(whole if strata is None else strata)
        ]

    def at(self, step: int) -> Tensor | None:
        """Positions ``(C, batch_size)`` of the batch of each chain at a step, or None."""
        if not self.parts:
            return None
        rows = [part.at(*divmod(step, part.length)) for part in self.parts]
        return torch.from_numpy(rows[0] if len(rows) == 1 else np.concatenate(rows, axis=1))

    def probe(self, k: int) -> Tensor | None:
        """Batches that no run reaches, no two of which share an epoch: independent draws."""
        rows = [part.at(_UNREACHED + k, k % part.length) for part in self.parts]
        return torch.from_numpy(np.concatenate(rows, axis=1)) if rows else None


class _Part:
    """Members from which every batch takes ``count``, epoch by epoch of ``length`` batches."""

    def __init__(
        self,
        seed: int,
        chains: int,
        members: np.ndarray,
        count: int,
        key: tuple[int, ...],
        probabilities: np.ndarray | None,
    ) -> None:
        self.seed, self.chains, self.members, self.count = seed, chains, members, count
        self.key, self.length = key, len(members) // count
        self.cumulated = None if probabilities is None else np.cumsum(probabilities)
        self._epoch = -1
        self._order = np.empty((0, 0), dtype=np.int64)

    def at(self, epoch: int, k: int) -> np.ndarray:
        """Positions ``(C, count)`` in the ``k``-th batch of an epoch."""
        if epoch != self._epoch:
            self._order = np.stack([self._shuffled(c, epoch) for c in range(self.chains)])
            self._epoch = epoch
        return self._order[:, k * self.count : (k + 1) * self.count]

    def _shuffled(self, chain: int, epoch: int) -> np.ndarray:
        rng = np.random.default_rng(_sequence(self.seed, _BATCHES, chain, epoch, *self.key))
        if self.cumulated is None:
            return rng.permutation(self.members)
        return rng.permutation(systematic(self.cumulated, self.length * self.count, rng.random()))


def systematic(cumulated: np.ndarray, size: int, offset: float) -> np.ndarray:
    """Positions of ``size`` evenly spaced points in cells of a cumulated probability ``(n,)``.

    ``offset`` in [0, 1) moves the points by that share of their spacing; drawn uniformly, it makes
    the expected count of a cell ``size`` times its probability.
    """
    points = (np.arange(size) + offset) * (cumulated[-1] / size)
    return np.minimum(np.searchsorted(cumulated, points, side="right"), len(cumulated) - 1)


def starting_points(
    center: Tensor,
    chains: int,
    superchains: int,
    spread: Callable[[Tensor], Tensor],
    seed: int,
) -> Tensor:
    """Chain starts ``(C, d)``: ``center + spread(z_k)``, one ``z_k ~ N(0, I)`` per superchain."""
    noise = []
    for k in range(superchains):
        generator = torch.Generator().manual_seed(_torch_seed(seed, _STARTS, k))
        z = torch.empty(center.shape, dtype=center.dtype).normal_(generator=generator)
        noise.append(z.to(center.device))
    starts = center + spread(torch.stack(noise))
    return starts.repeat_interleave(chains // superchains, dim=0)
