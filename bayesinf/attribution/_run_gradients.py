r"""Gradients at the checkpoints of a run as one: a row holds those of every checkpoint in turn.

``Σ_c ⟨u_c, ∇ℓ(θ_c)⟩`` is then one inner product of rows with ``C`` times as many layers, which the
engine of :mod:`bayesinf.attribution._pairwise` takes as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from bayesinf._data import Batch
from bayesinf._task import Measurement, Task
from bayesinf.attribution._scoring import Options
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._layers import Layer
from bayesinf.curvature._rows import Explicit, Indexed, Mixed, Rows, mixed
from bayesinf.curvature._sources import GradientSource, Tokens
from bayesinf.training._runs import Checkpoints

__all__ = ["RunGradients", "bounded", "run_attrs", "scaled", "tasks_of", "total"]

_QUERY_ELEMENTS, _TRAIN_ELEMENTS = 2**27, 2**25
"""Most elements of explicit gradients of a block, at all checkpoints together."""


class RunGradients:
    """Gradients at several checkpoints, for the length of a ``with`` block.

    Parameters
    ----------
    task
        At the end of the run.
    tasks
        At the checkpoints.
    places
        What these are called, steps or segments, in the names of layers: ``"0.weight @ 291"``.
    layers
        Of the task.
    costs
        Account to which passes are added.
    query, train
        Where gradients of a split are taken: at the end of the run, at the checkpoints, or at both,
        the end first.
    weights
        ``(C, n)``: of the train gradients at each checkpoint; 1 by default.

    Attributes
    ----------
    task, layers
        As for the engine: the task at the end, and the layers of every checkpoint in turn.
    """

    def __init__(
        self,
        task: Task,
        tasks: Sequence[Task],
        places: Sequence[object],
        layers: tuple[Layer, ...],
        costs: Costs,
        *,
        query: Sequence[str],
        train: Sequence[str],
        weights: np.ndarray | None = None,
    ) -> None:
        self.task: Task = task
        self.layers: tuple[Layer, ...] = tuple(
            replace(layer, name=f"{layer.name} @ {place}") for place in places for layer in layers
        )
        self._where = {"query": query, "train": train}
        self._sources = {
            "end": [GradientSource(task, layers, costs)],
            "checkpoints": [GradientSource(own, layers, costs) for own in tasks],
        }
        self._weights = None if weights is None else torch.from_numpy(weights).to(task.device)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for where in sorted({place for places in self._where.values() for place in places}):
            for source in self._sources[where]:
                self._stack.enter_context(source)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def gradients(
        self,
        split: str,
        where: slice,
        batch: Batch,
        measurement: Measurement = "loss",
        tokens: Tokens | None = None,
    ) -> list[Rows]:
        """As of :meth:`GradientSource.gradients`, checkpoint after checkpoint."""
        found: list[Rows] = []
        for place in self._where[split]:
            for c, source in enumerate(self._sources[place]):
                rows = source.gradients(split, where, batch, measurement, tokens)
                if split == "train" and place == "checkpoints" and self._weights is not None:
                    rows = [scaled(own, self._weights[c, where]) for own in rows]
                found += rows
        return found


def scaled(rows: Rows, factor: Tensor | float) -> Rows:
    """Rows times a number, or times one ``(B,)`` for each example (``B·T`` rows: tokens of it)."""
    if isinstance(rows, Mixed):
        return mixed(scaled(own, factor) for own in rows.parts)
    if isinstance(factor, Tensor):
        factor = factor.to(rows.values).repeat_interleave(len(rows.values) // len(factor))
        factor = factor.view(-1, *[1] * (rows.values.ndim - 1))
    return replace(rows, values=rows.values * factor)


def total(one: Rows | None, other: Rows) -> Rows:
    """Sum of rows of the same examples, explicit or of one embedding."""
    if one is None:
        return other
    if isinstance(one, Indexed) and isinstance(other, Indexed):
        return replace(one, values=one.values + other.values)
    return Explicit(one.matrices() + other.matrices())


def tasks_of(task: Task, checkpoints: Checkpoints, steps: np.ndarray) -> list[Task]:
    """The task at some of a run's checkpoints."""
    return [task.at(checkpoints.weights(step)) for step in steps.tolist()]


def run_attrs(checkpoints: Checkpoints, tasks: Sequence[Task], steps: np.ndarray) -> dict[str, Any]:
    """What scores record of a run, and identify a store by."""
    return {
        "checkpoint_steps": steps.tolist(),
        "checkpoint_hashes": [own.fingerprint()["checkpoint"] for own in tasks],
        "steps": checkpoints.total,
        "optimizer": checkpoints.rule.kind,
    }


def bounded(options: Options, task: Task, copies: int) -> Options:
    """Options with fewer examples at a time, as rows are longer."""

    def most(elements: int, asked: int | None) -> int:
        size = max(1, elements // (task.dimension * copies))
        return size if asked is None else min(size, asked)

    return replace(
        options,
        batch_size=most(_TRAIN_ELEMENTS, options.batch_size),
        query_batch_size=most(_QUERY_ELEMENTS, options.query_batch_size),
    )
