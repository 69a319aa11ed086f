"""The grid of small problems, held as data: every case is float64 and takes milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

import bayesinf as bi


@dataclass(frozen=True)
class Case:
    name: str
    model: Callable[[], nn.Module]
    likelihood: Any
    features: tuple[int, ...]
    outputs: int
    n: int = 12
    queries: int = 5

    def task(self, **options: Any) -> bi.Task:
        g = torch.Generator().manual_seed(7)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = self.model().double()

        def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
            x = torch.randn(count, *self.features, generator=g, dtype=torch.float64)
            if isinstance(self.likelihood, bi.Categorical):
                return x, torch.randint(self.outputs, (count,), generator=g)
            y = torch.randn(count, self.outputs, generator=g, dtype=torch.float64)
            if isinstance(self.likelihood, bi.Bernoulli):
                y = (y > 0).double()
            return x, y

        return bi.Task(
            model, self.likelihood, train=draw(self.n), query=draw(self.queries), **options
        )


def _mlp(*sizes: int, bias: bool = True, act: type[nn.Module] = nn.Tanh) -> nn.Module:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(a, b, bias=bias)] + ([act()] if i < len(sizes) - 2 else [])
    return nn.Sequential(*layers)


def _cnn(bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=1, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 3 * 3, 3, bias=bias),
    )


CASES = [
    Case("linear-gaussian", lambda: nn.Linear(4, 1), bi.Gaussian(), (4,), 1),
    Case("linear-gaussian-2", lambda: nn.Linear(4, 2), bi.Gaussian(), (4,), 2),
    Case("softmax-regression", lambda: nn.Linear(4, 3), bi.Categorical(), (4,), 3),
    Case("logistic", lambda: nn.Linear(4, 1), bi.Bernoulli(), (4,), 1),
    Case("mlp-categorical", lambda: _mlp(4, 6, 5, 3), bi.Categorical(), (4,), 3),
    Case("mlp-no-bias", lambda: _mlp(4, 6, 3, bias=False), bi.Categorical(), (4,), 3),
    Case("mlp-gaussian", lambda: _mlp(4, 5, 2), bi.Gaussian(), (4,), 2),
    Case("mlp-bernoulli", lambda: _mlp(4, 5, 2), bi.Bernoulli(), (4,), 2),
    Case("cnn", _cnn, bi.Categorical(), (2, 5, 5), 3),
    Case("cnn-no-bias", lambda: _cnn(bias=False), bi.Categorical(), (2, 5, 5), 3),
]
BY_NAME = {case.name: case for case in CASES}
