"""A bank by a function of one's own that keeps a log, to be run by processes that are killed."""

import hashlib
import os
import time
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import nn

import bayesinf as bi
from bayesinf.evaluation import random_subsets, retrain_with

SUBSETS = random_subsets(12, count=6, seed=0)
SEEDS = (7, 8, 9)
ROWS = len(SUBSETS) * len(SEEDS)
LOG, PAUSE = "BANK_LOG", "BANK_PAUSE"


def data() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(12, 3, generator=g), torch.randint(0, 2, (12,), generator=g)


def train(kept: np.ndarray, seed: int) -> nn.Module:
    """Three steps from weights that the seed decides; one line in the log, in one write."""
    if LOG in os.environ:
        row = hashlib.sha256(kept.tobytes()).hexdigest()[:8]
        with open(os.environ[LOG], "ab", buffering=0) as log:
            log.write(f"{row}-{seed} {os.getpid()}\n".encode())
    time.sleep(float(os.environ.get(PAUSE, "0")))
    model = nn.Linear(3, 2)
    x, y = data()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1 + 0.01 * seed)
    for _ in range(3):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[kept]), y[kept]).backward()
        optimiser.step()
    return model


def bank(store: Path | str | None = None, **options: object) -> xr.Dataset:
    """6 subsets × 3 seeds."""
    arguments: dict = {
        "recipe": {"lr": "0.1 + seed/100", "steps": 3},
        "likelihood": bi.Categorical(),
        "query": data(),
        "subsets": SUBSETS,
        "seeds": SEEDS,
        **options,
    }
    return retrain_with(train, store=store, **arguments)


def run(store: Path, log: Path, rank: int = 0, ranks: int = 1, workers: int = 1) -> None:
    """One process of a run."""
    torch.set_num_threads(1)
    os.environ |= {LOG: str(log), PAUSE: "0.03", "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    result = bank(store, workers=workers)
    np.save(f"{store}.{rank}.npy", result["loss"].values)


if __name__ == "__main__":  # under torchrun
    import sys

    rank, ranks = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    run(Path(sys.argv[1]), Path(sys.argv[2]), rank, ranks)
