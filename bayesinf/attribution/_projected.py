r"""Projected gradients: made from gradients as they come, or read where they were kept.

Of every training example ``K`` numbers are kept, ``n·K`` in all: in memory, or in a Zarr store that
later queries, in later processes, score against without a backward pass over the training set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bayesinf._axes import Axis
from bayesinf._data import Batch
from bayesinf._task import Measurement, Task
from bayesinf.attribution._scoring import Options
from bayesinf.attribution._sinks import ROWS, StoreSink
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._bases import DenseBasis
from bayesinf.curvature._curvature import Block, Curvature
from bayesinf.curvature._definite import require_memory
from bayesinf.curvature._layers import Layer
from bayesinf.curvature._projections import Projection
from bayesinf.curvature._rows import Explicit, Rows
from bayesinf.curvature._sources import Gradients, Tokens

__all__ = [
    "Kept",
    "ProjectedGradients",
    "columns",
    "keep_gradients",
    "refuse",
    "second_moments",
    "task_identity",
]

_ELEMENTS = 2**24
"""Numbers of a block on disk."""


class ProjectedGradients:
    """Gradients of a source after a projection; those of training examples perhaps kept.

    Parameters
    ----------
    source
        Open source of gradients.
    projection
        ``P``.
    """

    def __init__(self, source: Gradients, projection: Projection) -> None:
        self.task: Task = source.task
        self.layers: tuple[Layer, ...] = projection.layers
        self.kept: Kept | None = None
        self._source, self._projection = source, projection

    def gradients(
        self,
        split: str,
        where: slice,
        batch: Batch,
        measurement: Measurement = "loss",
        tokens: Tokens | None = None,
    ) -> list[Rows]:
        """As of :meth:`bayesinf.curvature._sources.GradientSource.gradients`, projected."""
        if split == "train" and tokens is None and self.kept is not None:
            return columns(self.kept.read(where).to(self.task.device), self.layers)
        return self.project(self._source.gradients(split, where, batch, measurement, tokens))

    def project(self, rows: list[Rows]) -> list[Rows]:
        """``P`` times rows of the source."""
        return self._projection(rows)


def columns(values: Tensor, layers: tuple[Layer, ...]) -> list[Rows]:
    """Numbers ``(B, K)``, layer after layer, as rows ``(B, 1)``."""
    parts = values.split([layer.size for layer in layers], dim=1)
    return [
        Explicit(part.view(-1, 1, *layer.shape)) for part, layer in zip(parts, layers, strict=True)
    ]


# ---------------------------------------------------------------------------- kept


class Kept(Protocol):
    """Numbers ``(n, K)`` of the training examples."""

    def read(self, where: slice) -> Tensor:
        """Those of some examples."""
        ...


class _InMemory:
    def __init__(self, values: Tensor) -> None:
        self.values = values

    def read(self, where: slice) -> Tensor:
        return self.values[where]


class _OnDisk:
    def __init__(self, sink: StoreSink) -> None:
        self.sink, self.every = sink, slice(0, sink.train.size)

    def read(self, where: slice) -> Tensor:
        return torch.from_numpy(self.sink.read(where, self.every)["gradient"])


def keep_gradients(
    source: ProjectedGradients,
    *,
    measurement: Measurement,
    path: str | os.PathLike[str] | None,
    identity: dict[str, Any],
    batch_size: int,
    memory_limit: float,
    costs: Costs,
) -> None:
    """Give a source the projected gradients of all training examples, ``n·K`` numbers.

    Parameters
    ----------
    source
        The source; it reads them from now on.
    measurement
        What is differentiated.
    path
        Folder of a Zarr store. What is in it is not computed again; a run that was killed goes on.
        None keeps them in memory.
    identity
        What the numbers depend on, beside the checkpoint and the training set.
    batch_size
        Examples at a time.
    memory_limit
        GiB that they may take in memory.
    costs
        Account to which seconds are added.

    Raises
    ------
    ValueError
        If they do not fit, the store holds others, or a gradient is not finite.
    """
    task, width = source.task, sum(layer.size for layer in source.layers)
    if path is None:
        gib = task.n * width * task.dtype.itemsize / 2**30
        what = f"{task.n:,} training examples with {width:,} numbers each"
        require_memory(gib, memory_limit, what, "Keep them on disk with gradients='path'")
        found = torch.empty(task.n, width, dtype=task.dtype, device=task.device)
        with costs.stage("train gradients"):
            for where, batch in task.train.batches(batch_size):
                found[where] = _numbers(source, where, batch, measurement)
        source.kept = _InMemory(found)
        return
    sink = _open_store(task, width, path, {**identity, "measurement": str(measurement)})
    every, step = slice(0, width), max(1, _ELEMENTS // width)
    step -= step % ROWS if step > ROWS else 0  # whole chunks
    with costs.stage("train gradients"):
        for first in range(0, task.n, step):
            last = min(first + step, task.n)
            if sink.done(slice(first, last), every):
                continue
            block = torch.cat(
                [
                    _numbers(source, where, task.train.batch(where), measurement)
                    for start in range(first, last, batch_size)
                    for where in [slice(start, min(start + batch_size, last))]
                ]
            )
            sink.write(slice(first, last), every, {"gradient": block.cpu().numpy()})
    source.kept = _OnDisk(sink)


def _numbers(
    source: ProjectedGradients, where: slice, batch: Batch, measurement: Measurement
) -> Tensor:
    rows = source.gradients("train", where, batch, measurement)
    return torch.cat([layer.flat() for layer in rows], dim=1).detach()


def _open_store(
    task: Task, width: int, path: str | os.PathLike[str], identity: dict[str, Any]
) -> StoreSink:
    config = {"task": task_identity(task), **identity}
    dtype = str(task.dtype).removeprefix("torch.")
    train, numbers = Axis("train", task.train.ids), Axis("number", np.arange(width))
    return StoreSink(Path(path), train, numbers, {"gradient": None}, config, dtype, "gradients")


def task_identity(task: Task) -> dict[str, Any]:
    """What gradients of training examples depend on: all of a task but its queries."""
    held = task.fingerprint()
    del held["query"]
    return held


# ---------------------------------------------------------------------------- curvature


def second_moments(
    layers: tuple[Layer, ...],
    rows: Iterator[list[Rows]],
    n: int,
    dtype: torch.dtype,
    info: dict[str, Any],
) -> Curvature:
    """Full second moments ``(1/n) Σ_r r rᵀ`` of projected rows, layer by layer.

    Parameters
    ----------
    layers
        Of the rows; each takes ``K²`` numbers in float64.
    rows
        Blocks of rows.
    n
        What to divide by.
    dtype
        Of the result; sums and eigendecompositions are in float64.
    info
        How they came about.

    Returns
    -------
    Curvature
        Dense blocks by their eigendecomposition: every damping afterwards costs nothing. What is
        positive by rounding alone is 0.
    """
    totals: dict[str, Tensor] = {}
    for block in rows:
        for layer, part in zip(layers, block, strict=True):
            flat = part.flat().double()
            held = totals.setdefault(layer.name, flat.new_zeros(layer.size, layer.size))
            held.addmm_(flat.T, flat)
    blocks = []
    for layer in layers:
        values, vectors = torch.linalg.eigh(totals[layer.name] / n)
        rounding = layer.size * torch.finfo(torch.float64).eps * values[-1]
        values = torch.where(values > rounding, values, 0.0)
        basis = DenseBasis(vectors.to(dtype).contiguous())
        kept = values.to(dtype).view(layer.shape)
        blocks.append(Block(layer, "dense", basis, kept))
    return Curvature(tuple(blocks), {layer.name: layer.shape for layer in layers}, info)


def refuse(method: str, options: Options, reasons: dict[str, str]) -> None:
    """Raise ``ValueError`` where an option is given that a method does not have, saying why."""
    for name, reason in reasons.items():
        if getattr(options, name):
            raise ValueError(f"{method} has no {name}=: {reason}. Leave it out.")
