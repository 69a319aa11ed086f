"""A network that is a single number, trained to the mean of its targets: all is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayesinf._scores import make_scores
from bayesinf.evaluation import SGDRecipe

N, Q = 24, 5
RECIPE = SGDRecipe(epochs=60, batch_size=N, lr=0.5, momentum=0.0, schedule="constant")
"""Full batches: ends at the mean of the subset, to rounding, from any start."""


class MeanModel(nn.Module):
    """Its output is its only parameter, whatever the input."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta.expand(len(x), 1)


class SignLikelihood:
    """Half squared error; a prediction is right where it has the target's sign."""

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (outputs - target).square().sum(1)

    def correct(self, outputs: Tensor, target: Tensor) -> Tensor:
        return ((outputs > 0) == (target > 0)).to(outputs.dtype)[:, 0]

    def __repr__(self) -> str:
        return "SignLikelihood()"


def data() -> tuple[np.ndarray, np.ndarray]:
    """Train and query targets; the mean of the train targets is positive."""
    rng = np.random.default_rng(3)
    y = rng.standard_normal(N)
    return y - y.mean() + 0.2, np.array([2.0, -1.0, 0.5, 3.0, 1.0])


def as_data(y: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.zeros(len(y), 1, dtype=torch.float64), torch.from_numpy(y)[:, None]


def influence() -> np.ndarray:
    """``dℓ_q/db_i = (θ − y_q)(y_i − θ)/n`` at ``θ = ȳ``."""
    y, query = data()
    return (y.mean() - query)[:, None] * (y - y.mean()) / N


def exact(**changes: Any) -> Any:
    return make_scores(
        changes.pop("influence", influence()), query=np.arange(Q), train=np.arange(N),
        method="exact", estimand="influence", **changes,
    )  # fmt: skip
