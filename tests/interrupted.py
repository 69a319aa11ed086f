"""A run in a process of its own, to be killed: ``python -m tests.interrupted PATH KERNEL [LIMIT]``.

Slowed down and committing at every draw, so that a kill lands anywhere. ``LIMIT`` bounds the size
of files in bytes, as a full disk does.
"""

from __future__ import annotations

import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import bayesinf as bi
from bayesinf import _rng, _run
from bayesinf.samplers import Sampler
from tests.cases import BY_NAME

KERNELS: dict[str, Callable[[bi.Task], Sampler]] = {
    "SGLD": lambda task: bi.SGLD(0.02),
    "RMSpropSGLD": lambda task: bi.RMSpropSGLD(0.01, alpha=0.9),
    "SGLD, preconditioned": lambda task: bi.SGLD(0.2, preconditioner(task)),
    "Underdamped": lambda task: bi.Underdamped(0.1, 1.0, preconditioner(task)),
    "SGHMC": lambda task: bi.SGHMC(0.02, 2.0, 0.1),
    "SGNHT": lambda task: bi.SGNHT(0.02, 2.0),
    "MALA": lambda task: bi.MALA(0.1),
    "HMC": lambda task: bi.HMC(0.3, 2, preconditioner=preconditioner(task)),
    "EKFACLaplace": lambda task: bi.EKFACLaplace(curvature(task)),
    "GaussNewtonLaplace": lambda task: bi.GaussNewtonLaplace(preconditioner(task)),
}


def curvature(task: bi.Task) -> bi.Curvature:
    return bi.fit_curvature(task, fisher="enumerated")


def preconditioner(task: bi.Task) -> bi.Preconditioner:
    return bi.Preconditioner(curvature(task).inverse(0.3), n_beta=10.0)


def run(path: Any, kernel: str, **options: Any) -> bi.TraceStore:
    task = BY_NAME["softmax-regression"].task(train_ids=[f"é{i}" for i in range(12)])
    posterior = bi.LocalPosterior(task, n_beta=10.0, gamma=5.0)
    sampler = KERNELS[kernel](task)
    settings = {"draws": 40, "warmup": 20, "thin": 2, "progress": False}
    settings["batch_size"] = None if sampler.full_batch else 4
    settings["vectorize"] = False  # recording a computation takes longer than these runs
    return bi.sample(posterior, sampler, store=path, **{**settings, **options})


def main(path: str, kernel: str, limit: str = "") -> None:
    torch.set_num_threads(1)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    else:
        _run._COMMIT_SECONDS = 0.0
        at = _rng.BatchStream.at

        def slow(self: _rng.BatchStream, step: int) -> torch.Tensor | None:
            print(step, flush=True)
            time.sleep(0.005)
            return at(self, step)

        _rng.BatchStream.at = slow  # type: ignore[method-assign]
    try:
        run(path, kernel)
    except bi.StoreError as error:
        print(error)
        sys.exit(3)


if __name__ == "__main__":
    main(*sys.argv[1:])
