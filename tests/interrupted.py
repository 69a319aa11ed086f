"""A run in a process of its own, to be killed: ``python -m tests.interrupted PATH KERNEL [LIMIT]``.

Slowed down and committing at every draw, so that a kill lands anywhere. ``LIMIT`` bounds the size
of files in bytes, as a full disk does.
"""

from __future__ import annotations

import resource
import signal
import sys
import time
from typing import Any

import torch

import bayesinf as bi
from bayesinf import _sampling
from tests.cases import BY_NAME

KERNELS = {"SGLD": bi.SGLD(0.02), "RMSpropSGLD": bi.RMSpropSGLD(0.01, alpha=0.9)}


def run(path: Any, kernel: str, **options: Any) -> bi.TraceStore:
    task = BY_NAME["softmax-regression"].task(train_ids=[f"é{i}" for i in range(12)])
    posterior = bi.LocalPosterior(task, n_beta=10.0, gamma=5.0)
    settings = {"draws": 40, "warmup": 20, "thin": 2, "batch_size": 4, "progress": False}
    settings["vectorize"] = False  # recording a computation takes longer than these runs
    return bi.sample(posterior, KERNELS[kernel], store=path, **{**settings, **options})


def main(path: str, kernel: str, limit: str = "") -> None:
    torch.set_num_threads(1)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    else:
        _sampling._COMMIT_SECONDS = 0.0
        at = _sampling.BatchStream.at

        def slow(self: _sampling.BatchStream, step: int) -> torch.Tensor | None:
            print(step, flush=True)
            time.sleep(0.005)
            return at(self, step)

        _sampling.BatchStream.at = slow  # type: ignore[method-assign]
    try:
        run(path, kernel)
    except bi.StoreError as error:
        print(error)
        sys.exit(3)


if __name__ == "__main__":
    main(*sys.argv[1:])
