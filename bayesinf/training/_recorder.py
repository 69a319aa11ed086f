"""Recording of a training loop."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bayesinf._checkpoint import load_into
from bayesinf.training._rules import rule_of
from bayesinf.training._writing import RunWriter

__all__ = ["CheckpointRecorder", "batch_ids", "model_tensors"]


class CheckpointRecorder:
    """Records a training loop for methods that follow it: checkpoints, schedule, batches.

    Two lines of a loop, one before it and one after each step of the optimiser::

        recorder = bi.CheckpointRecorder("run", model, optimizer, every=100)
        for ids, x, y in batches:
            optimizer.zero_grad()
            loss(model(x), y).mean().backward()
            optimizer.step()
            recorder.step(ids)
        recorder.close()

    A checkpoint is written in the middle of every ``every`` steps: it stands for the steps around
    it (:meth:`bayesinf.Checkpoints.rate_sums`). So are the weights before the first step and, by
    :meth:`close`, after the last; a ``with`` block closes unless an exception ends it. Learning
    rates are read as the optimiser steps, so that a scheduler may step before or after. What
    happens to gradients before the step (clipping) is not seen; of dropout and the like the mean is
    followed.

    Parameters
    ----------
    folder
        Where to write; see ``resume``. Files are replaced atomically: a killed run is whole up to
        its last checkpoint.
    model
        The network; its weights and buffers are written, with what the optimiser keeps of them.
    optimizer
        ``torch.optim.SGD``, ``Adam`` or ``AdamW``.
    every
        Steps a checkpoint stands for: training of T steps has six with ``T // 6``.
    loss_scale
        What is minimised, as a multiple of the mean over a batch of the **task's** losses. A task's
        loss of a sequence is the sum over its tokens; with the mean over T tokens it is ``1/T``.
    resume
        Where the folder holds a run of the same settings, load the last checkpoint into model and
        optimiser and go on from there: skip ``recorder.steps`` batches. Schedulers and generators
        are the loop's own.

    Attributes
    ----------
    steps
        How many are recorded.

    Raises
    ------
    TypeError
        If the optimiser is another.
    ValueError
        If a number is out of range, groups of parameters differ in more than learning rate and
        weight decay, or a parameter is not the model's.
    StoreError
        If the folder holds a run (and, to resume, of other settings), or cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        every: int,
        loss_scale: float = 1.0,
        resume: bool = False,
    ) -> None:
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._rule = rule_of(optimizer, self._names)
        self._model, self._optimizer = model, optimizer
        self._writer = RunWriter(
            folder, self._rule, every=every, loss_scale=loss_scale, resume=resume
        )
        if self._writer.resumed:
            self._load(load_file(self._writer.last))
        self._writer.begin(self._tensors)
        self._taken: list[list[float]] = []
        self._hook = optimizer.register_step_post_hook(self._stepped)

    @property
    def steps(self) -> int:
        """How many steps are recorded."""
        return self._writer.steps

    def step(self, ids: Sequence[Any] | np.ndarray | Tensor | None = None) -> None:
        """Record the step that the optimiser has just taken.

        Parameters
        ----------
        ids
            Ids of the examples in its batch, as of the task's ``train_ids`` (positions by default);
            of accumulated batches all of them. None if unknown: then only methods that average over
            the order of batches can follow the run.

        Raises
        ------
        RuntimeError
            If the optimiser has not taken exactly one step since the last call.
        ValueError
            If the ids are neither integers nor strings, or the optimiser's settings changed.
        StoreError
            If a checkpoint cannot be written.
        """
        if len(self._taken) != 1:
            raise RuntimeError(
                f"recorder.step() belongs after each optimizer.step(); the optimiser took "
                f"{len(self._taken)} steps since the last call. Where batches are accumulated, or "
                f"a step is skipped (mixed precision), call it only when the optimiser has stepped."
            )
        if rule_of(self._optimizer, self._names) != self._rule:
            raise ValueError(
                f"settings of the optimiser changed before step {self.steps}, and only learning "
                f"rates may. Usual cause: a schedule that cycles momentum; turn it off, as in "
                f"OneCycleLR(…, cycle_momentum=False)."
            )
        found = None if ids is None else batch_ids(ids)
        self._writer.add(self._taken.pop(), found, self._tensors)

    def close(self) -> None:
        """Write the end of the run; the recorder takes no further step."""
        self._hook.remove()
        self._writer.finish(self._tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._hook.remove()

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._taken.append([float(group["lr"]) for group in optimizer.param_groups])

    def _tensors(self) -> dict[str, Tensor]:
        found = model_tensors(self._model)
        for p, held in self._optimizer.state.items():
            for key, value in held.items():
                if isinstance(value, Tensor):
                    found[f"optimizer.{key}.{self._names[id(p)]}"] = value.detach().cpu().clone()
        return found

    def _load(self, tensors: dict[str, Tensor]) -> None:
        load_into(self._model, part(tensors, "model."))
        own = dict(self._model.named_parameters())
        for name, value in part(tensors, "optimizer.").items():
            key, parameter = name.split(".", 1)
            p = own[parameter]
            value = value if key == "step" else value.to(p.device, p.dtype)
            self._optimizer.state[p][key] = value


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers as a checkpoint holds them, tied ones once."""
    seen: set[int] = set()
    found = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            found[f"model.{name}"] = value.detach().cpu().contiguous().clone()
    return found


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Entries whose name has a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def batch_ids(ids: Sequence[Any] | np.ndarray | Tensor) -> np.ndarray:
    """Ids of a batch as an array ``(B,)`` of integers or text.

    Raises
    ------
    ValueError
        If they are not one or more integers or strings.
    """
    found = np.asarray(ids.detach().cpu() if isinstance(ids, Tensor) else ids)
    if found.dtype.kind not in "iuUT" or found.ndim != 1 or not len(found):
        raise ValueError(
            f"ids must be the integers or strings of the examples in the batch, one each; got "
            f"{found.dtype} of shape {found.shape}."
        )
    return found.astype(np.str_) if found.dtype.kind in "UT" else found.astype(np.int64)
