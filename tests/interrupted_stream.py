"""A streaming run of its own, to be killed: ``python -m tests.interrupted_stream PATH``.

Slowed down and written at every draw, so that a kill lands anywhere.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

import bayesinf as bi
from bayesinf import _run, _streaming
from tests.interrupted import run


def main(path: str) -> None:
    torch.set_num_threads(1)
    _run._COMMIT_SECONDS = _streaming._COMMIT_SECONDS = 0.0
    _streaming._COMMIT_SHARE = float("inf")
    append = bi.StreamingCovariance.append

    def slow(self: bi.StreamingCovariance, *args: Any) -> None:
        append(self, *args)
        print(self.draws, flush=True)
        time.sleep(0.01)

    bi.StreamingCovariance.append = slow  # type: ignore[method-assign]
    run(bi.StreamingCovariance(path), "SGLD")


if __name__ == "__main__":
    main(*sys.argv[1:])
