"""Our EK-FAC in a process of its own, for timing: ``python -m benchmarks._own_ekfac TASK DIR``.

Prints one line of JSON with the fields of the peers' reports that are compared: seconds of factors
and scores (imports and reading of model and data excluded, as in theirs), memory resident after
the imports, and the peak of it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from bayesinf import Task, ekfac
from bayesinf._measuring import peak_mb, resident_mb
from benchmarks._peer_digits import load_task, to_peer
from benchmarks._peer_lm import load_lm_task, token_grid

__all__ = ["JOBS", "main"]

_LAZY = ("torch._dynamo", "torch.fx.experimental.proxy_tensor")
"""What torch imports at first use; see ``_own_digits``."""


def _digits(task: Task, args: argparse.Namespace) -> xr.Dataset:
    return ekfac(task, fisher="empirical", damping=1e-3, batch_size=args.batch or 256)


def _sequences(task: Task, args: argparse.Namespace) -> xr.Dataset:
    return ekfac(task, fisher="empirical", relative_damping=0.1, batch_size=args.batch or 16)


def _tokens(task: Task, args: argparse.Namespace) -> xr.Dataset:
    return ekfac(
        task,
        fisher="empirical",
        relative_damping=0.1,
        batch_size=args.batch or 16,
        train_tokens="position",
    )


JOBS: dict[str, Callable[[Task, argparse.Namespace], xr.Dataset]] = {
    "digits": _digits,
    "lm-sequences": _sequences,
    "lm-tokens": _tokens,
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run a job; prints and returns its report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks._own_ekfac", description=__doc__)
    add = parser.add_argument
    add("job", choices=sorted(JOBS))
    add("folder", type=Path)
    add("--name", help="of the scores to leave in the folder; default: none are left")
    add("--threads", type=int, default=1)
    add("--batch", type=int, help="examples at a time")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    modules = (*_LAZY, *(["transformers.models.gpt_neox"] if args.job != "digits" else []))
    for module in modules:
        importlib.import_module(module)
    after_import = resident_mb()
    task = load_task(args.folder) if args.job == "digits" else load_lm_task(args.folder)
    wall, cpu = time.perf_counter(), time.process_time()
    scores = JOBS[args.job](task, args)
    report = {
        "name": args.name,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "rss_after_import_mb": after_import,
        "peak_rss_mb": peak_mb(),
        "stages": scores.attrs["seconds"],
    }
    if args.name:
        tokens = args.job == "lm-tokens"
        length = task.train.batch(slice(0, 1))[1].shape[-1] if tokens else 0
        matrix = token_grid(scores, length) if tokens else to_peer(scores)
        np.save(args.folder / f"{args.name}.npy", matrix)
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    main()
