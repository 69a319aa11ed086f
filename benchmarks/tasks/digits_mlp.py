"""digits-mlp: a 64-128-64-10 ReLU network (17,226 parameters) on 1,000 digits."""

from __future__ import annotations

from torch import nn

from bayesinf import Categorical
from bayesinf.evaluation import SGDRecipe
from benchmarks.tasks._digits import digits
from benchmarks.tasks._task import BenchmarkTask, Data

__all__ = ["TASK"]


def make_model() -> nn.Module:
    """Make the untrained network."""
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def data() -> Data:
    """Return the train and query tensors."""
    train_x, train_y, query_x, query_y = digits()
    return (train_x, train_y), (query_x, query_y)


TASK = BenchmarkTask(
    name="digits-mlp",
    make_model=make_model,
    likelihood=Categorical(),
    data=data,
    recipe=SGDRecipe(epochs=30, batch_size=50, lr=0.1, weight_decay=1e-3),
)
