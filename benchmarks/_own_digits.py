"""Our half of a comparison, in a process of its own: ``python -m benchmarks._own_digits JOB DIR``.

Prints one line of JSON: seconds of the job, imports excluded as in the peers' programs, and the
name of the scores it leaves in the folder, in the peers' orientation (see ``_peer_digits``).
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from bayesinf import SGLD, LocalPosterior, Task, bif, ekfac, sample
from bayesinf.attribution._trak import trak
from benchmarks._peer_digits import load_task, to_peer

__all__ = ["main"]

_LAZY = (
    "torch._dynamo",
    "torch._inductor.standalone_compile",
    "torch.fx.experimental.proxy_tensor",
)
"""What torch imports when something is recorded for the first time. Imports are no part of the
peers' times, so these come before the clock starts; recording itself is timed."""


def _sampling(task: Task, args: argparse.Namespace) -> xr.Dataset | None:
    posterior = LocalPosterior(task, n_beta=1000.0, gamma=100.0, potential=args.potential)
    traces = sample(
        posterior, SGLD(step_size=args.step_size), chains=args.chains, draws=args.draws, warmup=200,
        thin=5, batch_size=100, jitter=args.jitter, seed=args.seed, progress=False,
    )  # fmt: skip
    if not args.scores:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bif(traces)


def _factored(task: Task, args: argparse.Namespace) -> xr.Dataset:
    return ekfac(task, fisher=args.fisher, damping=args.damping, seed=args.seed)


def _regressed(task: Task, args: argparse.Namespace) -> xr.Dataset:
    return trak(task, damping=args.damping, dimension=args.dimension, seed=args.seed)


JOBS: dict[str, Callable[[Task, argparse.Namespace], xr.Dataset | None]] = {
    "sample": _sampling,
    "ekfac": _factored,
    "trak": _regressed,
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run a job; prints and returns its report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks._own_digits", description=__doc__)
    add = parser.add_argument
    add("job", choices=sorted(JOBS))
    add("folder", type=Path)
    add("--name", help="of the scores to leave in the folder; default: none are left")
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--potential", default="tilted", choices=["tilted", "plain"])
    add("--step-size", type=float, default=1e-4)
    add("--chains", type=int, default=4)
    add("--draws", type=int, default=200)
    add("--jitter", type=float, default=0.0)
    add("--scores", action="store_true", help="sample: compute the BIF too, on the same clock")
    add("--fisher", default="sampled")
    add("--damping", type=float, default=1e-3)
    add("--dimension", type=int, default=512)
    add("--no-bias", action="store_true")
    add("--float64", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    for module in _LAZY:
        importlib.import_module(module)
    dtype = torch.float64 if args.float64 else torch.float32
    task = load_task(args.folder, bias=not args.no_bias, dtype=dtype)
    wall, cpu = time.perf_counter(), time.process_time()
    scores = JOBS[args.job](task, args)
    report = {
        "name": args.name,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
    }
    if args.name and scores is not None:
        np.save(args.folder / f"{args.name}.npy", to_peer(scores))
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    main()
