"""The folder of a recorded run, as it is written.

``run.json`` says what there is and is replaced last and atomically, so that a killed run is whole
up to its last checkpoint. ``checkpoint-STEP.safetensors`` holds weights and buffers
(``model.NAME``) and what the optimiser keeps (``optimizer.KEY.NAME``) after STEP steps;
``steps-START-STOP.npz`` the learning rates ``(STOP − START, groups)`` of the steps between two
checkpoints, their batch sizes and the ids in their batches, one after another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import Tensor

from bayesinf._disk import StoreError, disk, replacing
from bayesinf.training._rules import Rule

__all__ = ["FORMAT", "RunWriter", "checkpoint_path", "read_manifest", "steps_path"]

FORMAT = 1

Tensors = Callable[[], dict[str, Tensor]]
"""Makes what a checkpoint holds."""


class RunWriter:
    """Writes a run step by step.

    Parameters
    ----------
    folder
        Where.
    rule
        Of the optimiser.
    every
        One checkpoint in the middle of every so many steps.
    loss_scale
        What training minimises, as a multiple of the mean of the losses of a batch.
    resume
        Go on with the run that is there, if there is one.

    Attributes
    ----------
    steps
        How many were taken.

    Raises
    ------
    ValueError
        If a number is out of range.
    StoreError
        If the folder holds a run, or to resume one of other settings, or cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        rule: Rule,
        *,
        every: int,
        loss_scale: float,
        resume: bool,
    ) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(
                f"every must be a positive number of steps; got {every!r}. Training of T steps has "
                f"six checkpoints with every=T // 6."
            )
        if not 0 < loss_scale < float("inf"):
            raise ValueError(f"loss_scale must be a positive number; got {loss_scale!r}.")
        self.folder = Path(folder)
        self._rates: list[Sequence[float]] = []
        self._batches: list[np.ndarray | None] = []
        settings = {"rule": rule.as_dict(), "every": every, "loss_scale": float(loss_scale)}
        self._held: dict[str, Any] = {
            "format": FORMAT,
            **json.loads(json.dumps(settings)),
            "nodes": [],
            "last": 0,
            "chunks": [],
        }
        self.resumed = (self.folder / "run.json").exists()
        if self.resumed:
            self._resume(resume, settings)
        self.steps = self._held["last"]

    @property
    def last(self) -> Path:
        """File of the last checkpoint."""
        return checkpoint_path(self.folder, self._held["last"])

    def begin(self, tensors: Tensors) -> None:
        """Write the checkpoint before the first step, where the run is new."""
        if not self.resumed:
            with disk(f"making {self.folder}"):
                self.folder.mkdir(parents=True, exist_ok=True)
            self._commit(tensors)

    def add(self, rates: Sequence[float], ids: np.ndarray | None, tensors: Tensors) -> None:
        """Take a step: its learning rates by group, and the ids of its batch."""
        self._rates.append(tuple(rates))
        self._batches.append(ids)
        self.steps += 1
        if self._at_node():
            self._commit(tensors)

    def finish(self, tensors: Tensors) -> None:
        """Write the steps since the last checkpoint and where they led."""
        if self._rates:
            self._commit(tensors)

    def _at_node(self) -> bool:
        """Whether ``every`` steps, of which the first begin at ``θ_0``, have their middle here."""
        every = self._held["every"]
        return bool(self.steps % every == every // 2)

    def _commit(self, tensors: Tensors) -> None:
        before, now = self._held["last"], self.steps
        chunks = [[before, now]] if self._rates else []
        held = {
            **self._held,
            "nodes": self._held["nodes"] + ([now] if self._at_node() else []),
            "last": now,
            "chunks": self._held["chunks"] + chunks,
        }
        path = checkpoint_path(self.folder, now)
        with disk(f"writing {path}", "Free space and resume the run."):
            with replacing(path) as file:
                file.write(save(tensors()))
            if self._rates:
                with replacing(steps_path(self.folder, before, now)) as file:
                    np.savez(file, **_packed(self._rates, self._batches))
            with replacing(self.folder / "run.json") as file:
                file.write(json.dumps(held).encode())
        self._held, self._rates, self._batches = held, [], []
        if before and before not in held["nodes"]:  # where an earlier session closed
            checkpoint_path(self.folder, before).unlink(missing_ok=True)

    def _resume(self, wanted: bool, settings: dict[str, Any]) -> None:
        held = read_manifest(self.folder)
        if not wanted:
            raise StoreError(
                f"{os.fspath(self.folder)!r} holds a run of {held['last']} steps. Choose another "
                f"folder, or go on with it: CheckpointRecorder(…, resume=True)."
            )
        new = json.loads(json.dumps(settings))
        odd = [f"{k}: {held[k]!r} there, {v!r} here" for k, v in new.items() if held[k] != v]
        if odd:
            raise StoreError(
                f"{os.fspath(self.folder)!r} holds a run of other settings: {'; '.join(odd)}. "
                f"Resume with the same ones, or choose another folder."
            )
        self._held = held


def checkpoint_path(folder: Path, step: int) -> Path:
    """File of the checkpoint after ``step`` steps."""
    return folder / f"checkpoint-{step:08d}.safetensors"


def steps_path(folder: Path, start: int, stop: int) -> Path:
    """File of the steps from ``start`` on, before ``stop``."""
    return folder / f"steps-{start:08d}-{stop:08d}.npz"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read ``run.json``.

    Raises
    ------
    FileNotFoundError
        If there is none.
    StoreError
        If it is damaged or of a newer version.
    """
    path = folder / "run.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{os.fspath(folder)!r} holds no recorded run (no run.json). One is written by "
            f"bi.CheckpointRecorder(folder, model, optimizer, every=…)."
        )
    try:
        held: dict[str, Any] = json.loads(path.read_text())
        missing = {"format", "rule", "every", "loss_scale", "nodes", "last", "chunks"} - set(held)
    except (json.JSONDecodeError, TypeError) as reason:
        raise StoreError(f"{path} is damaged ({reason}). Record the run again.") from reason
    if missing or held["format"] != FORMAT:
        raise StoreError(
            f"{path} is of format {held.get('format')!r}, and this version reads {FORMAT}. Record "
            f"the run again."
        )
    return held


def _packed(rates: list[Sequence[float]], batches: list[np.ndarray | None]) -> dict[str, Any]:
    packed = {"rates": np.array(rates, dtype=np.float64)}
    known = [batch for batch in batches if batch is not None]
    if len(known) == len(batches):
        packed["sizes"] = np.array([len(batch) for batch in known], dtype=np.int64)
        packed["ids"] = np.concatenate(known)
    return packed
