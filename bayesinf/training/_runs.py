"""Recorded training runs, as they are read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bayesinf._disk import StoreError
from bayesinf._task import Task
from bayesinf.training._intervals import equal_segments, interval_sums
from bayesinf.training._recorder import part
from bayesinf.training._rules import Rule
from bayesinf.training._writing import checkpoint_path, read_manifest, steps_path

__all__ = ["Checkpoints", "open_checkpoints", "placed"]

_NEAR = 1e-4
"""Relative distance of weights that rounding in another precision explains."""


class Checkpoints:
    r"""A recorded training run: ``C`` checkpoints of ``T`` steps, with rates and batches.

    Made by :func:`open_checkpoints`. A checkpoint at step ``t`` holds ``θ_t``, after ``t`` updates;
    step ``s`` leads from ``θ_s`` to ``θ_{s+1}``.

    Attributes
    ----------
    folder
        Where it is.
    rule
        The optimiser's; see :mod:`bayesinf.training._rules`.
    steps
        ``(C,)``: where the checkpoints are, one in the middle of every so many steps. Weights at 0
        and at the end are there besides.
    total
        ``T``.
    loss_scale
        What was minimised, as a multiple of the mean of a batch's losses.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        held = read_manifest(self.folder)
        self.rule = Rule.from_dict(held["rule"])
        self.steps = np.array(held["nodes"], dtype=np.int64)
        self.total = int(held["last"])
        self.loss_scale = float(held["loss_scale"])
        self._chunks: list[tuple[int, int]] = [(a, b) for a, b in held["chunks"]]

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        return (
            f"Checkpoints({os.fspath(self.folder)!r}: {len(self)} of {self.total} steps of "
            f"{self.rule.kind})"
        )

    # ------------------------------------------------------------------ weights

    def weights(self, step: int) -> dict[str, Tensor]:
        """Weights and buffers ``θ_t``, for :meth:`bayesinf.Task.at`; also at 0 and the end.

        Raises
        ------
        KeyError
            If there is no checkpoint at the step.
        StoreError
            If its file is missing or damaged.
        """
        return part(self._tensors(step), "model.")

    def optimizer_state(self, step: int) -> dict[str, dict[str, Tensor]]:
        """What the optimiser kept, by key and parameter; errors as of :meth:`weights`."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, value in part(self._tensors(step), "optimizer.").items():
            key, parameter = name.split(".", 1)
            found.setdefault(key, {})[parameter] = value
        return found

    def second_moments(self, step: int) -> dict[str, Tensor]:
        """Adam's ``v̂`` by parameter, free of its bias towards 0.

        Raises
        ------
        ValueError
            If the optimiser kept none at that step.
        """
        kept = self.optimizer_state(step)
        if "exp_avg_sq" not in kept:
            raise ValueError(
                f"{self.rule.kind} has no second moments at step {step}. Adam has them from its "
                f"first step on: record with every= 2 or more."
            )
        beta = self.rule.betas[1]
        return {
            name: second / (1 - beta ** float(kept["step"][name]))
            for name, second in kept["exp_avg_sq"].items()
        }

    def _tensors(self, step: int) -> dict[str, Tensor]:
        known = sorted({0, *self.steps.tolist(), self.total})
        if step not in known:
            raise KeyError(f"there is no checkpoint at step {step!r}; they are at {known}.")
        path = checkpoint_path(self.folder, step)
        try:
            return load_file(path)
        except (SafetensorError, OSError) as reason:
            raise StoreError(
                f"{path} is missing or damaged ({reason}). Record the run again."
            ) from reason

    def require_task(self, task: Task) -> None:
        """Raise ``ValueError`` unless a task is at the end of this run and selects trained weights.

        Weights may differ by what another precision rounds.
        """
        strange = [name for name in task.params if name not in self.rule.names]
        if strange:
            raise ValueError(
                f"{strange[:4]} were not trained in this run, whose parameters are "
                f"{list(self.rule.names)[:4]} …. Select what was: Task(..., parameters=…)."
            )
        end = self.weights(self.total)
        gap = size = 0.0
        for name, value in task.params.items():
            held = end[name].to(value)
            gap += float((held - value).double().square().sum())
            size += float(value.double().square().sum())
        if not gap <= _NEAR**2 * size:
            raise ValueError(
                f"the task is not where this run ended (step {self.total}): weights differ by "
                f"{(gap / size) ** 0.5 if size else gap**0.5:.2g} of their norm. Usual causes: "
                f"training went on after the last checkpoint because recorder.close() is missing, "
                f"or this is another run. task.at(checkpoints.weights({self.total})) is its end."
            )

    # ------------------------------------------------------------------ steps

    @cached_property
    def _read(self) -> list[dict[str, np.ndarray]]:
        found = []
        for start, stop in self._chunks:
            path = steps_path(self.folder, start, stop)
            try:
                with np.load(path, allow_pickle=False) as held:
                    found.append(dict(held))
            except (OSError, ValueError) as reason:
                raise StoreError(
                    f"{path} is missing or damaged ({reason}). Record the run again."
                ) from reason
        return found

    @property
    def group_rates(self) -> np.ndarray:
        """Learning rates ``(T, groups)``."""
        parts = [chunk["rates"] for chunk in self._read]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.rule.groups)))

    @property
    def learning_rates(self) -> np.ndarray:
        """Learning rates ``(T,)``.

        Raises
        ------
        ValueError
            If groups of parameters had different ones, or nothing was trained.
        """
        rates = self.group_rates
        if not rates.any():
            raise ValueError(f"{self!r} has no step with a positive learning rate.")
        if (rates != rates[:, :1]).any():
            raise ValueError(
                "groups of parameters had different learning rates, and these methods need one for "
                "all. Use one group, or groups that differ in weight decay alone."
            )
        return np.asarray(rates[:, 0])

    @property
    def batches(self) -> list[np.ndarray]:
        """Ids in the batch of each step.

        Raises
        ------
        ValueError
            If a step was recorded without.
        """
        if not all("ids" in chunk for chunk in self._read):
            raise ValueError(
                "the run was recorded without the ids of its batches. Record them: "
                "recorder.step(ids)."
            )
        found: list[np.ndarray] = []
        for chunk in self._read:
            found += np.split(chunk["ids"], np.cumsum(chunk["sizes"])[:-1])
        return found

    def rate_sums(self, segments: int | Sequence[int] = 1) -> np.ndarray:
        r"""Sums of learning rates ``(L, C)``: over the steps of a segment nearest to a checkpoint.

        Times ``1/(1 − μ)`` with momentum and times ``loss_scale``, for SGD: the time ``s = Σ η``
        that gradient flow on the mean loss would need. Rows sum to the whole segment's, columns to
        what a checkpoint stands for. A checkpoint next to a border counts on both sides of it.

        Parameters
        ----------
        segments
            How many, of equal numbers of steps; or the steps at which a new one begins.

        Raises
        ------
        ValueError
            If there is no checkpoint, or the segments are out of order or more than the steps.
        """
        if not len(self):
            raise ValueError(f"{self!r} holds no checkpoint. Record with a smaller every=.")
        edges = self._edges(segments)
        unit = self.rule.gain * (self.loss_scale if self.rule.kind == "sgd" else 1.0)
        return unit * interval_sums(self.learning_rates, self.steps, edges)

    def _edges(self, segments: int | Sequence[int]) -> np.ndarray:
        if isinstance(segments, int):
            return equal_segments(self.total, segments)
        edges = np.array([0, *segments, self.total], dtype=np.int64)
        if (np.diff(edges) <= 0).any():
            raise ValueError(
                f"segments must begin at ascending steps between 0 and {self.total}, both "
                f"excluded; got {list(segments)}."
            )
        return edges


def open_checkpoints(folder: str | os.PathLike[str]) -> Checkpoints:
    """Open what :class:`bayesinf.CheckpointRecorder` wrote.

    Parameters
    ----------
    folder
        Of the recorder.

    Returns
    -------
    Checkpoints
        Files are read as they are needed.

    Raises
    ------
    FileNotFoundError
        If the folder holds no run.
    StoreError
        If it is damaged, or of a newer version.
    """
    return Checkpoints(folder)


def placed(batches: Sequence[np.ndarray], task: Task) -> list[np.ndarray]:
    """Positions in a task's training examples of the ids in each batch; −1 for others.

    Raises
    ------
    ValueError
        If no id is one of the task's.
    """
    known = {key: i for i, key in enumerate(task.train.ids.tolist())}
    found = [np.array([known.get(key, -1) for key in batch.tolist()]) for batch in batches]
    if all((batch < 0).all() for batch in found):
        first: Any = batches[0][:3].tolist()
        raise ValueError(
            f"no id in the recorded batches is one of the task's training examples: {first} … "
            f"there, {task.train.ids[:3].tolist()} … here. Give the task the same ids: "
            f"Task(..., train_ids=…)."
        )
    return found
