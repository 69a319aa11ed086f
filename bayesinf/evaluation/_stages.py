"""The stages between retraining and influence functions: what each does with removed examples.

Masks of removed examples are ``(G, n)``. Rows of results are ``(1 + G, …)``: the first is the same
stage with nothing removed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from bayesinf._data import Examples
from bayesinf._task import Measurement, Task
from bayesinf.evaluation._descent import minimise
from bayesinf.evaluation._problem import ModelFactory
from bayesinf.evaluation._proximal import Metric, Neighbourhood, Objective, fit_metric, respond
from bayesinf.evaluation._recipes import SGDRecipe
from bayesinf.evaluation._retraining import retrain

__all__ = ["STAGES", "Stage", "Stages", "retrain_without", "standard_error"]

STAGES = ("cold_start", "warm_start", "proximal", "bregman", "linear")


@dataclass(frozen=True)
class Stage:
    """Measurements ``(1 + G, Q)`` after a stage, the first with nothing removed."""

    values: np.ndarray
    residual: np.ndarray | None  # (1 + G,)

    def change(self, origin: np.ndarray | None) -> np.ndarray:
        """Changes ``(Q, G)`` from ``origin``, or from the same stage with nothing removed."""
        return (self.values[1:] - (self.values[0] if origin is None else origin)).T


@dataclass
class Stages:
    """The stages that start at the checkpoint; :func:`~bayesinf.response_gaps` defines them.

    Attributes
    ----------
    origin
        Measurements ``(Q,)`` at the checkpoint.
    near
        The checkpoint with its account of examples.
    """

    task: Task
    recipe: SGDRecipe
    removed: np.ndarray
    damping: float
    measurement: Measurement
    tolerance: float
    max_iterations: int
    rank: int
    seed: int
    seconds: dict[str, float]
    near: Neighbourhood = field(init=False)
    metric: Metric = field(init=False)
    origin: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        began = time.perf_counter()
        self.near = Neighbourhood(self.task)
        n, device = self.task.n, self.near.center.device
        self.share = torch.full((n,), 1 / n, dtype=torch.float64, device=device)
        generator = torch.Generator().manual_seed(self.seed)
        self.metric = fit_metric(self.near, self.share, rank=self.rank, generator=generator)
        gone = torch.from_numpy(self.removed).to(self.share)
        self.gone = torch.cat([gone.new_zeros(1, n), gone]) / n
        self.drive = self.near.loss_gradients(-self.gone)
        self.scale = self.drive.norm(dim=1)
        self.scale[0] = self.scale[1:].mean()
        self.origin = self._measure(self.near.center[None])[0]
        self.seconds["preconditioner"] = time.perf_counter() - began

    def run(self, stage: str) -> Stage:
        """Carry out one stage for every group."""
        began = time.perf_counter()
        result = self._linear() if stage == "linear" else self._minimise(stage)
        self.seconds[stage] = time.perf_counter() - began
        return result

    def _minimise(self, stage: str) -> Stage:
        kept, decay = self.share - self.gone, self.recipe.weight_decay
        zero = torch.zeros_like(self.scale)
        if stage == "warm_start":
            objective = Objective(kept, None, zero, decay * kept.sum(1))
        elif stage == "proximal":
            objective = Objective(kept, None, zero + self.damping - decay, zero + decay)
        else:
            objective = Objective(-self.gone, self.share, zero + self.damping, zero)
        ends = minimise(
            self.near, objective, self.metric, self.scale,
            tolerance=self.tolerance, max_iterations=self.max_iterations,
        )  # fmt: skip
        return Stage(self._measure(ends.position), ends.residual.cpu().numpy())

    def _linear(self) -> Stage:
        direction, residual = respond(
            self.near, self.metric, self.share, self.damping, self.drive,
            tolerance=self.tolerance, max_iterations=self.max_iterations,
        )  # fmt: skip
        slope = self.near.slope(self.measurement, direction).detach().cpu().numpy()
        return Stage(self.origin + slope, residual.cpu().numpy())

    def _measure(self, position: Tensor) -> np.ndarray:
        return self.near.measure(self.measurement, position).cpu().numpy()


def retrain_without(
    task: Task,
    recipe: SGDRecipe,
    removed: np.ndarray,
    make_model: ModelFactory,
    seeds: Sequence[int],
    measurement: Measurement,
    store: str | os.PathLike[str] | None,
    progress: bool,
    seconds: dict[str, float],
) -> np.ndarray:
    """Outcomes ``(1 + G, R, Q)`` of cold starts, the first on all examples."""
    assert isinstance(measurement, str)
    began = time.perf_counter()
    subsets = xr.DataArray(
        np.concatenate([np.ones((1, task.n), dtype=bool), ~removed]),
        dims=("subset", "train"),
        coords={"train": task.train.ids},
    )
    bank = retrain(
        make_model, task.likelihood, recipe,
        train=_raw(task.train), query=_raw(task.query), subsets=subsets, seeds=list(seeds),
        measurements=(measurement,), query_ids=task.query.ids, store=store, progress=progress,
    )  # fmt: skip
    seconds["cold_start"] = time.perf_counter() - began
    return bank[measurement].transpose("subset", "seed", "query").values.astype(np.float64)


def _raw(examples: Examples) -> Any:
    """All examples in a form that training takes."""
    inputs, target = examples.batch()
    if isinstance(inputs, dict):
        return {**inputs, "target": target}
    return (*inputs, target) if isinstance(inputs, tuple) else (inputs, target)


def standard_error(bank: np.ndarray, *, paired: bool) -> np.ndarray:
    """Of the mean change ``(Q, G)``; with ``paired``, from the (as noisy) runs on all examples.

    Runs on different examples share no randomness, so that their variances add up.
    """
    runs = bank.shape[1]
    if runs < 2:
        return np.full((bank.shape[2], len(bank) - 1), np.nan)
    variance = bank.var(axis=1, ddof=1) / runs
    base = variance[0] if paired else 0.0
    return np.sqrt(variance[1:] + base).T
