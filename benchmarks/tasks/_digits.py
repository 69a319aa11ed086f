"""The digits of scikit-learn: 1,000 train and 200 query images of 8 × 8 pixels in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.tasks._task import split

__all__ = ["digits"]


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``train_x, train_y, query_x, query_y``, images flat."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16.0, dtype=torch.float32)
    y = torch.tensor(labels, dtype=torch.long)
    train, query = split(len(x), 1000, 200)
    return x[train], y[train], x[query], y[query]
