"""digits-cnn: two 3 × 3 convolutions and a linear layer (9,930 parameters) on 1,000 digits."""

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
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def data() -> Data:
    """Return the train and query tensors, images ``(B, 1, 8, 8)``."""
    train_x, train_y, query_x, query_y = digits()
    return (train_x.unflatten(1, (1, 8, 8)), train_y), (query_x.unflatten(1, (1, 8, 8)), query_y)


TASK = BenchmarkTask(
    name="digits-cnn",
    make_model=make_model,
    likelihood=Categorical(),
    data=data,
    recipe=SGDRecipe(epochs=30, batch_size=50, lr=0.05, weight_decay=1e-3),
)
