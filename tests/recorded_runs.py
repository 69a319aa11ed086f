"""Small recorded runs in float64, for tests of what follows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bayesinf as bi
from bayesinf.training import CheckpointRecorder, Checkpoints, open_checkpoints

N, STEPS, BATCH, EVERY = 12, 30, 4, 5
SGD = lambda p: torch.optim.SGD(p, 0.1, momentum=0.6, weight_decay=0.02)  # noqa: E731
NESTEROV = lambda p: torch.optim.SGD(p, 0.1, momentum=0.6, nesterov=True)  # noqa: E731
ADAM = lambda p: torch.optim.Adam(p, 0.02, betas=(0.8, 0.95), weight_decay=0.02)  # noqa: E731
ADAMW = lambda p: torch.optim.AdamW(p, 0.02, betas=(0.8, 0.95), weight_decay=0.1)  # noqa: E731


class Tied(nn.Module):
    """Predicts a token from the mean of a few, with the embedding as its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 3)
        self.middle = nn.Linear(3, 3)
        self.head = nn.Linear(3, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.middle(self.embed(ids).mean(1))))
        return out


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def numbers(count: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=g, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=g)


def tokens(count: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(6, (count, 4), generator=g), torch.randint(6, (count,), generator=g)


def batches(steps: int = STEPS, n: int = N, size: int = BATCH) -> list[Tensor]:
    """Positions by epochs of random order."""
    g = torch.Generator().manual_seed(3)
    found: list[Tensor] = []
    while len(found) < steps:
        found += torch.randperm(n, generator=g).split(size)
    return found[:steps]


def train(
    optimizer: Callable[[Any], torch.optim.Optimizer],
    folder: Path | None = None,
    *,
    make: Callable[[], nn.Module] = mlp,
    data: tuple[Tensor, Tensor] | None = None,
    weights: Tensor | None = None,
    scale: float = 1.0,
    clip: float | None = None,
) -> nn.Module:
    """Train with a cosine schedule; the examples' losses have weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = make().double()
    x, y = numbers(N, 1) if data is None else data
    b = torch.ones(len(x), dtype=torch.float64) if weights is None else weights
    steps = optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(steps, STEPS)
    if folder is not None:
        recorder = CheckpointRecorder(folder, model, steps, every=EVERY, loss_scale=scale)
    for ids in batches():
        steps.zero_grad()
        losses = nn.functional.cross_entropy(model(x[ids]), y[ids], reduction="none")
        (scale * (b[ids] * losses).mean()).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        steps.step()
        schedule.step()
        if folder is not None:
            recorder.step(ids)
    if folder is not None:
        recorder.close()
    return model


def recorded(
    optimizer: Callable[[Any], torch.optim.Optimizer], folder: Path, **options: Any
) -> tuple[bi.Task, Checkpoints]:
    """Train, record, and make the task at the end."""
    make = tokens if options.get("make") is Tied else numbers
    if make is tokens:
        options["data"] = tokens(N, 1)
    model = train(optimizer, folder, **options)
    task = bi.Task(model, bi.Categorical(), train=make(N, 1), query=make(5, 2))
    return task, open_checkpoints(folder)
