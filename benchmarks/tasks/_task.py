"""What a benchmark task is: a network, its data, how it is trained and how it is judged."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import xarray as xr
from torch import Tensor, nn

from bayesinf._likelihoods import Likelihood
from bayesinf.evaluation import Recipe, SGDRecipe, open_bank, random_subsets, train_one
from bayesinf.training import Checkpoints, open_checkpoints

__all__ = ["BANKS", "GROUND_TRUTH", "BankPlan", "BenchmarkTask", "Data", "split"]

GROUND_TRUTH = Path(__file__).resolve().parent.parent / "ground_truth"

Data = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(train_x, train_y), (query_x, query_y)``."""

BankName = Literal["evaluation", "tuning"]


@dataclass(frozen=True)
class BankPlan:
    """Which subsets and seeds a bank consists of; no two plans share either."""

    subsets: int
    subset_seed: int
    seeds: tuple[int, ...]

    def masks(self, n: int) -> xr.DataArray:
        """Return the random halves of ``n`` examples."""
        return random_subsets(n, fraction=0.5, count=self.subsets, seed=self.subset_seed)


BANKS: dict[str, BankPlan] = {
    "evaluation": BankPlan(subsets=100, subset_seed=1, seeds=tuple(range(100, 106))),
    "tuning": BankPlan(subsets=40, subset_seed=2, seeds=tuple(range(200, 206))),
}
"""Methods are judged on ``evaluation``; hyper-parameters are chosen on ``tuning`` alone."""


@dataclass(frozen=True)
class BenchmarkTask:
    """A benchmark task.

    Parameters
    ----------
    name
        As on the command line.
    make_model
        Makes the untrained network.
    likelihood
        What the loss is.
    data
        Returns the train and query tensors, always the same.
    recipe
        How the checkpoint and every retraining are trained.
    seed
        Seed of the checkpoint.
    banks
        Subsets and seeds of its ground truth.
    fisher
        How curvatures are fitted; ``"sampled"`` where a loss has too many outputs to enumerate.
    """

    name: str
    make_model: Callable[[], nn.Module]
    likelihood: Likelihood
    data: Callable[[], Data]
    recipe: Recipe
    seed: int = 0
    banks: Mapping[str, BankPlan] = field(default_factory=lambda: BANKS)
    fisher: Literal["enumerated", "sampled"] = "enumerated"

    @property
    def weight_decay(self) -> float:
        """Coefficient of ``½‖w‖²`` in what training minimises: 0 where the decay is decoupled."""
        return self.recipe.weight_decay if isinstance(self.recipe, SGDRecipe) else 0.0

    def checkpoint(self) -> nn.Module:
        """Train the network that is attributed, on all the data: deterministic, takes seconds."""
        train, _ = self.data()
        return train_one(self.make_model, self.likelihood, self.recipe, train=train, seed=self.seed)

    def record(self, folder: str | os.PathLike[str], checkpoints: int = 6) -> Checkpoints:
        """Train that network again, to the bit the same, and record its run in a folder."""
        train, _ = self.data()
        train_one(
            self.make_model, self.likelihood, self.recipe,
            train=train, seed=self.seed, record=folder, checkpoints=checkpoints,
        )  # fmt: skip
        return open_checkpoints(folder)

    def bank(self, name: BankName = "evaluation", root: Path | None = None) -> xr.Dataset:
        """Open the shipped ground truth, or that under another directory ``root/TASK``."""
        return open_bank((root or GROUND_TRUTH) / self.name / f"{name}.zarr")


def split(count: int, train: int, query: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of ``train`` and ``query`` examples, disjoint and random, the same every time."""
    order = np.random.default_rng(0).permutation(count)
    return order[:train], order[train : train + query]
