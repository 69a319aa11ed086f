r"""What TRAK needs of the training set, at one checkpoint or at several.

At checkpoint ``m`` with projection ``P_m`` ``(k, d)`` and output function ``f`` (the margin):

* features ``φ_m(z_i) = P_m ∇f(z_i)`` of the training examples, ``(n, k)``;
* their second moment ``Φ_mᵀ Φ_m / n`` by its eigendecomposition, which serves every ridge;
* output-to-loss slopes ``Q_m = ∂ℓ_i/∂f_i`` ``(n,)``, of which the mean over checkpoints is kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bayesinf._checkpoint import Checkpoint
from bayesinf._data import Batch
from bayesinf._likelihoods import require
from bayesinf._task import Measurement, Task
from bayesinf.attribution._projected import (
    Kept,
    ProjectedGradients,
    columns,
    keep_gradients,
    second_moments,
    task_identity,
)
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._curvature import Curvature
from bayesinf.curvature._definite import require_memory
from bayesinf.curvature._find import find_layers
from bayesinf.curvature._layers import Layer
from bayesinf.curvature._projections import ProjectionKind, RandomProjection, plain_layer
from bayesinf.curvature._rows import Explicit, Rows
from bayesinf.curvature._sources import GradientSource, Tokens

__all__ = ["TrakFeatures", "TrakGradients", "trak_features"]

_KEEP = 2**26
"""Entries of all projections together that stay in memory."""


@dataclass(frozen=True)
class TrakFeatures:
    """Made by :func:`trak_features`; for any number of calls of :func:`trak`.

    Attributes
    ----------
    tasks
        One a checkpoint, in the order given.
    projections
        ``P_m``.
    kept
        Features ``(n, k)`` by checkpoint.
    curvature
        ``Φ_mᵀ Φ_m / n``, one block a checkpoint.
    slopes
        Mean over checkpoints of ``∂ℓ_i/∂f_i``, ``(n,)``.
    info
        Settings: ``dimension``, ``projection``, ``seed``, ``checkpoints``.
    layers
        Of the network.
    """

    tasks: tuple[Task, ...]
    projections: tuple[RandomProjection, ...]
    kept: tuple[Kept, ...]
    curvature: Curvature
    slopes: Tensor
    info: dict[str, int | str]
    layers: tuple[Layer, ...]

    def require_task(self, task: Task) -> None:
        """Raise ``ValueError`` unless they are of this task's training set and network."""
        mine, yours = task_identity(self.tasks[0]), task_identity(task)
        ignored = {"checkpoint"} if self.info["at"] == "given checkpoints" else set()
        odd = sorted(k for k in mine if mine[k] != yours[k] and k not in ignored)
        if odd:
            raise ValueError(
                f"these features belong to another task: {', '.join(odd)} differ. Make some for "
                f"this one: bi.trak_features(task, …)."
            )


def trak_features(
    task: Task,
    *,
    dimension: int = 512,
    projection: ProjectionKind = "rademacher",
    checkpoints: Sequence[Checkpoint] | None = None,
    gradients: str | os.PathLike[str] | None = None,
    memory_limit: float = 8.0,
    seed: int = 0,
    batch_size: int = 256,
    costs: Costs | None = None,
) -> TrakFeatures:
    r"""Project the margin gradients of the training set, for :func:`trak` at any ridge.

    Parameters
    ----------
    task
        Network, likelihood and training examples.
    dimension
        ``k``; more costs ``n k d`` operations more, and needs more training examples or ridge.
    projection
        Entries of ``P`` ``(k, d)``: ``"rademacher"`` ±1/√k, ``"normal"`` N(0, 1/k), ``"sjlt"``
        four ±1/2 in every column, so that ``E⟨P g, P g'⟩ = ⟨g, g'⟩``. It is made in blocks and
        never whole.
    checkpoints
        Further trained weights of the same network, state dicts, modules or files; each has a
        projection of its own. The checkpoint of the task is **not** added to them. Default: the
        task's alone.
    gradients
        Folder in which the features stay, and from which later calls with the same settings read
        them instead of differentiating.
    memory_limit
        GiB that features, where they are not on disk, and second moments may take: ``n k`` numbers
        of the network's precision and ``3 k²`` in float64 for each checkpoint.
    seed
        Of the projections.
    batch_size
        Examples at a time.
    costs
        Account to which seconds and passes are added.

    Raises
    ------
    ValueError
        If an argument is out of range, there are no checkpoints, memory would not suffice,
        ``gradients`` holds others, or a gradient is not finite.
    TypeError
        If the network's outputs are not one tensor.
    NotImplementedError
        If the likelihood has no ``margin``.

    References
    ----------
    Park et al. 2023, "TRAK: Attributing model behavior at scale", §3.
    """
    costs = costs if costs is not None else Costs()
    require(task.likelihood, "margin", "trak")
    tasks = _tasks(task, checkpoints)
    layers = find_layers(task, costs)
    projections = [
        RandomProjection(projection, dimension, layers, (seed, m), _KEEP // len(tasks))
        for m in range(len(tasks))
    ]
    gib = len(tasks) * 3 * dimension**2 * 8 / 2**30
    require_memory(gib, memory_limit, f"trak (dimension={dimension:,})", "Use a smaller dimension")
    kept, parts, slopes = [], [], torch.zeros(task.n, dtype=task.dtype, device=task.device)
    for m, (own, project) in enumerate(zip(tasks, projections, strict=True)):
        with GradientSource(own, layers, costs) as source:
            projected = ProjectedGradients(source, project)
            keep_gradients(
                projected,
                measurement="margin",
                path=None if gradients is None else Path(os.fspath(gradients)) / f"{m}",
                identity={"projection": projection, "dimension": dimension, "seed": [seed, m]},
                batch_size=batch_size,
                memory_limit=memory_limit / len(tasks),
                costs=costs,
            )
        assert projected.kept is not None
        kept.append(projected.kept)
        with costs.stage("curvature"):
            parts.append(_second_moment(own, projected.kept, m, dimension, batch_size))
        slopes += _slopes(own, batch_size, costs) / len(tasks)
    shapes = {name: shape for part in parts for name, shape in part.shapes.items()}
    curvature = Curvature(tuple(block for part in parts for block in part.blocks), shapes)
    info: dict[str, int | str] = {
        "dimension": dimension,
        "projection": projection,
        "seed": seed,
        "checkpoints": len(tasks),
        "at": "the task's checkpoint" if checkpoints is None else "given checkpoints",
    }
    return TrakFeatures(tasks, tuple(projections), tuple(kept), curvature, slopes, info, layers)


def _tasks(task: Task, checkpoints: Sequence[Checkpoint] | None) -> tuple[Task, ...]:
    if checkpoints is None:
        return (task,)
    if isinstance(checkpoints, (str, bytes, os.PathLike, dict)) or len(checkpoints) == 0:
        raise ValueError(
            "checkpoints must be a sequence of at least one: checkpoints=[model_a, model_b]. Leave "
            "it out for the task's own checkpoint."
        )
    return tuple(task.at(checkpoint) for checkpoint in checkpoints)


def _second_moment(task: Task, kept: Kept, m: int, dimension: int, batch_size: int) -> Curvature:
    layer = plain_layer(f"checkpoint {m}", (1, dimension))

    def rows() -> Iterator[list[Rows]]:
        for start in range(0, task.n, batch_size):
            where = slice(start, min(start + batch_size, task.n))
            yield columns(kept.read(where).to(task.device), (layer,))

    return second_moments((layer,), rows(), task.n, task.dtype, {})


def _slopes(task: Task, batch_size: int, costs: Costs) -> Tensor:
    r"""``∂ℓ/∂f`` of every training example, ``(n,)``.

    Where the loss is a function of the margin, its derivative: ``−(1 − p)`` for log-odds. Where it
    is one only output by output (positions of a sequence), the multiple of the margin's gradient in
    the outputs that is nearest to the loss's: a mean of those of the parts.
    """
    margin, found = require(task.likelihood, "margin", "trak"), []
    with costs.stage("slopes"):
        for where, batch in task.train.batches(batch_size):
            with torch.no_grad():
                outputs = task.outputs(task.params, batch)
            if not isinstance(outputs, Tensor):
                raise TypeError(
                    f"trak needs outputs that are one tensor, examples first; "
                    f"{type(task.module).__name__} returns a {type(outputs).__name__}. Wrap the "
                    f"module so that it returns the tensor the margin is computed from."
                )
            costs.forward_examples += where.stop - where.start
            with torch.enable_grad():
                leaf = outputs.detach().requires_grad_()
                loss = task.likelihood.loss(leaf, batch[1]).sum()
                f = margin(leaf, batch[1]).sum()
                (up,) = torch.autograd.grad(loss, leaf, retain_graph=True)
                (along,) = torch.autograd.grad(f, leaf)
            up, along = up.flatten(1), along.flatten(1)
            squares = along.square().sum(1)
            safe = torch.where(squares > 0, squares, 1.0)
            found.append((up * along).sum(1) / safe)
    return torch.cat(found)


class TrakGradients:
    """Features as rows, one entry a checkpoint: those of queries as needed, the others as kept.

    Parameters
    ----------
    task
        Whose queries.
    features
        Of the training set.
    weighted
        Whether features of training examples are multiplied by their slopes.
    costs
        Account to which passes are added.
    """

    def __init__(self, task: Task, features: TrakFeatures, weighted: bool, costs: Costs) -> None:
        self.task: Task = task
        self.layers: tuple[Layer, ...] = features.curvature.layers
        self._features, self._weighted, self._costs = features, weighted, costs

    def gradients(
        self,
        split: str,
        where: slice,
        batch: Batch,
        measurement: Measurement = "loss",
        tokens: Tokens | None = None,
    ) -> list[Rows]:
        """Features ``(B, 1)`` of examples, by checkpoint, whatever the measurement."""
        if split == "train":
            return self._train(where)
        found = []
        for own, project in zip(self._features.tasks, self._features.projections, strict=True):
            with self._source(own) as source:
                rows = source.gradients("query", where, batch, "margin")
            found += project(rows)
        return found

    def _train(self, where: slice) -> list[Rows]:
        parts = [kept.read(where).to(self.task.device) for kept in self._features.kept]
        if self._weighted:
            parts = [part * self._features.slopes[where, None] for part in parts]
        return [Explicit(part.view(len(part), 1, 1, -1)) for part in parts]

    @contextmanager
    def _source(self, own: Task) -> Iterator[GradientSource]:
        own = own.of(own.module, train=self.task.train, query=self.task.query)
        with GradientSource(own, self._features.layers, self._costs) as source:
            yield source
