"""diabetes-mlp: a 10-64-64-1 ReLU regression (4,929 parameters) on 342 patients."""

from __future__ import annotations

import torch
from torch import nn

from bayesinf import Gaussian
from bayesinf.evaluation import SGDRecipe
from benchmarks.tasks._task import BenchmarkTask, Data, split

__all__ = ["TASK"]


def make_model() -> nn.Module:
    """Make the untrained network."""
    return nn.Sequential(
        nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )


def data() -> Data:
    """Return the train and query tensors, standardised with the statistics of train."""
    from sklearn.datasets import load_diabetes

    features, progression = load_diabetes(return_X_y=True)
    x = torch.tensor(features, dtype=torch.float64)
    y = torch.tensor(progression, dtype=torch.float64)[:, None]
    train, query = split(len(x), 342, 100)
    x = (x - x[train].mean(0)) / x[train].std(0)
    y = (y - y[train].mean(0)) / y[train].std(0)
    x, y = x.float(), y.float()
    return (x[train], y[train]), (x[query], y[query])


TASK = BenchmarkTask(
    name="diabetes-mlp",
    make_model=make_model,
    likelihood=Gaussian(),
    data=data,
    recipe=SGDRecipe(epochs=60, batch_size=38, lr=0.02, weight_decay=1e-3),
)
