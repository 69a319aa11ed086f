"""The backward passes over the training examples whose second moments sum to a Fisher matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from bayesinf._data import Batch
from bayesinf._likelihoods import require
from bayesinf.curvature._capture import Capture, Record, require_finite
from bayesinf.curvature._rows import Rows
from bayesinf.curvature._spool import Spool

__all__ = ["Fisher", "Passes"]

Fisher = Literal["enumerated", "sampled", "empirical"]
"""Whose labels: all of the model's, weighted; drawn from the model; the data's."""


@dataclass(frozen=True)
class Passes:
    """Batches of training examples with the backward passes that sum to the Fisher.

    Attributes
    ----------
    capture
        Entered hooks on the network.
    fisher, draws, seed, batch_size
        As for :func:`bayesinf.fit_curvature`.
    spool
        Where the rows of a first iteration are kept for further ones.
    """

    capture: Capture
    fisher: Fisher
    draws: int
    seed: int
    batch_size: int
    spool: Spool

    @property
    def weight(self) -> float:
        """Of every backward pass."""
        return 1 / self.draws if self.fisher == "sampled" else 1.0

    def __iter__(self) -> Iterator[tuple[Tensor | None, Iterator[tuple[bool, list[Rows]]]]]:
        """Positions that count, and the rows of every pull with whether it is the first."""
        task = self.capture.task
        generator = torch.Generator().manual_seed(self.seed)
        seeds = torch.randint(2**62, (task.n,), generator=generator)
        for i, (where, batch) in enumerate(task.train.batches(self.batch_size)):
            if i in self.spool:
                pulls = self.spool.pulls(i)
                yield None, ((k == 0, pull) for k, pull in enumerate(pulls))
            else:
                record = self.capture.record(batch)
                yield record.mask, self._pulls(record, batch, where, seeds[where].tolist(), i)

    def _pulls(
        self, record: Record, batch: Batch, where: slice, seeds: list[int], i: int
    ) -> Iterator[tuple[bool, list[Rows]]]:
        task = self.capture.task
        for k, (value, vector, last) in enumerate(self._targets(record, batch, seeds)):
            pull = record.pull(value, vector, keep=not last)
            for layer, rows in zip(self.capture.layers, pull, strict=True):
                require_finite(rows, layer.name, task.train.ids[where], "train")
            self.spool.put(i, pull, first=k == 0)
            yield k == 0, pull

    def _targets(
        self, record: Record, batch: Batch, seeds: list[int]
    ) -> Iterator[tuple[Tensor, Tensor | None, bool]]:
        """What to differentiate, in which direction, and whether it is the last."""
        likelihood = self.capture.task.likelihood
        if self.fisher == "enumerated":
            factor = require(likelihood, "fisher_factor", "fisher='enumerated'")
            rows = factor(record.outputs.detach(), batch[1])
            for k, row in enumerate(rows):
                yield record.outputs, row, k == len(rows) - 1
            return
        targets = (
            iter([batch[1]]) if self.fisher == "empirical" else self._sample(record, batch, seeds)
        )
        count = 1 if self.fisher == "empirical" else self.draws
        for k, target in enumerate(targets):
            with torch.enable_grad():
                total = likelihood.loss(record.outputs, target).sum()
            yield total, None, k == count - 1

    def _sample(self, record: Record, batch: Batch, seeds: list[int]) -> Iterator[Tensor]:
        task = self.capture.task
        sample = require(task.likelihood, "sample", "fisher='sampled'")
        generators = [torch.Generator(task.device).manual_seed(seed) for seed in seeds]
        outputs = tree_map(lambda leaf: leaf.detach(), record.outputs)
        for _ in range(self.draws):
            drawn = []
            for i, generator in enumerate(generators):
                one, target = (
                    tree_map(lambda leaf, i=i: leaf[i : i + 1], part)
                    for part in (outputs, batch[1])
                )
                drawn.append(sample(one, target, generator))
            yield torch.cat(drawn)
