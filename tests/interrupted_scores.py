"""Scoring in a process of its own, to be killed: it tells every step before it takes it."""

from __future__ import annotations

import time
from typing import Any

import torch
import xarray as xr

import bayesinf as bi
from bayesinf.attribution import _sinks
from bayesinf.curvature._capture import Capture
from tests.layered_cases import LAYERED_BY_NAME

OPTIONS: dict[str, Any] = {"batch_size": 1, "query_batch_size": 1, "modules": True}
METHODS = {
    "ekfac": lambda task, **o: bi.ekfac(task, fisher="sampled", relative_damping=0.1, seed=3, **o),
    "gauss_newton": lambda task, **o: bi.gauss_newton(task, damping=0.1, **o),
}


def run(path: Any, method: str) -> xr.Dataset:
    """18 blocks, after 6 batches of a fit."""
    task = LAYERED_BY_NAME["called-twice"].task(train_ids=[f"é{i}" for i in range(6)])
    return METHODS[method](task, store=path, **OPTIONS)


def tell(path: Any, method: str, pipe: Any) -> None:
    """Run slowly, and send a word for every forward pass and every block written."""
    torch.set_num_threads(1)

    def told(cls: Any, name: str) -> None:
        original = getattr(cls, name)

        def slow(self: Any, *args: Any) -> Any:
            pipe.send(name)
            time.sleep(0.003)
            return original(self, *args)

        setattr(cls, name, slow)

    told(Capture, "record")
    told(_sinks.StoreSink, "write")
    run(path, method)
    pipe.send("done")
