"""Memory of streamed token scores: ``python -m benchmarks.streaming``.

A micro language model (one layer, width 32, random weights: what is trained does not matter here)
is sampled by 4 chains on 4,000 sequences of 64 tokens. The losses of 32 queries and of all 252,000
train tokens go into a :class:`bayesinf.StreamingCovariance` with sums in float32, and the scores of
all pairs, with their standard errors, to a store on disk. Each number of draws has a process of its
own, which runs a tiny problem first: what is imported is no part of it. Printed is the peak of
resident memory above what was resident when sampling began: it should stay below 1 GB, and be the
same after 20 and after 100 draws, to 5 %. The exit status is 1 where either is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayesinf import SGLD, CausalLM, LocalPosterior, StreamingCovariance, Task, bif, sample
from bayesinf._measuring import measured
from benchmarks._table import format_table, verdict

__all__ = ["Micro", "Size", "main", "measure"]

BAR_MB, GROWTH = 1e9 / 2**20, 1.05
_HEADER = ("draws", "train tokens", "seconds", "sums, MB", "peak, MB", "bar", "")


@dataclass(frozen=True)
class Size:
    """A run's size."""

    sequences: int = 4000
    length: int = 64
    queries: int = 32
    chains: int = 4
    width: int = 32
    vocabulary: int = 256


class Micro(nn.Module):
    """A transformer of one layer."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.words = nn.Embedding(size.vocabulary, size.width)
        self.places = nn.Embedding(size.length, size.width)
        self.attention = nn.Linear(size.width, 3 * size.width)
        self.up = nn.Linear(size.width, 4 * size.width)
        self.down = nn.Linear(4 * size.width, size.width)
        self.head = nn.Linear(size.width, size.vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``(B, T, V)``."""
        x = self.words(ids) + self.places.weight[: ids.shape[-1]]
        q, k, v = self.attention(x).chunk(3, dim=-1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        logits: Tensor = self.head(x + self.down(torch.relu(self.up(x))))
        return logits


def measure(size: Size, draws: int) -> dict[str, float]:
    """Sample and score; seconds, and mebibytes above those at the start.

    Parameters
    ----------
    size
        Of the run.
    draws
        Per chain.

    Returns
    -------
    dict
        ``seconds``, ``sums`` (memory of the sums), ``peak`` and ``tokens``.
    """
    generator = torch.Generator().manual_seed(0)

    def sequences(count: int) -> dict[str, Tensor]:
        ids = torch.randint(size.vocabulary, (count, size.length), generator=generator)
        return {"ids": ids, "labels": ids}

    torch.manual_seed(0)
    task = Task(
        Micro(size), CausalLM(), train=sequences(size.sequences), query=sequences(size.queries)
    )
    posterior = LocalPosterior(task, n_beta=1000.0, gamma=1000.0)
    sums = StreamingCovariance(dtype="float32")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, measured() as cost, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether these chains mix is not the question
        sample(
            posterior, SGLD(1e-5), draws=draws, warmup=0, chains=size.chains,
            batch_size=min(64, size.sequences // 2), tokens="train", store=sums, vectorize=False,
            chunk_size=32, progress=False,
        )  # fmt: skip
        scores = bif(sums, tokens="train", store=Path(folder) / "scores")
        assert scores.sizes["query"] == size.queries
    return {
        "seconds": time.perf_counter() - began,
        "sums": sums.nbytes / 2**20,
        "peak": cost.memory,
        "tokens": scores.sizes["train_token"],
    }


def _in_a_process(size: Size, draws: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.streaming", "--child", json.dumps(asdict(size))]
    done = subprocess.run(
        [*command, "--draws", str(draws)], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: list[str] | None = None, size: Size | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.streaming",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--draws", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        torch.set_num_threads(1)
        measure(Size(sequences=4, length=4, queries=2, width=4, vocabulary=4), 8)  # imports
        print(json.dumps(measure(Size(**json.loads(args.child)), args.draws[0])))
        return 0
    rows: list[tuple[str, ...]] = []
    peaks: list[float] = []
    for draws in args.draws:
        found = _in_a_process(size or Size(), draws)
        peaks.append(found["peak"])
        rows.append(_row(draws, found))
    flat = max(peaks) <= GROWTH * min(peaks)
    growth: list[Any] = ["growth", "", "", "", f"{max(peaks) / min(peaks):.3f}", f"≤ {GROWTH:g}"]
    rows.append((*growth, verdict(flat)))
    print(format_table(_HEADER, rows))
    return int(any(row[-1] == verdict(False) for row in rows))


def _row(draws: int, found: dict[str, float]) -> tuple[str, ...]:
    return (
        f"{draws}",
        f"{found['tokens']:.0f}",
        f"{found['seconds']:.0f}",
        f"{found['sums']:.0f}",
        f"{found['peak']:.0f}",
        f"≤ {BAR_MB:.0f}",
        verdict(found["peak"] <= BAR_MB),
    )


if __name__ == "__main__":
    sys.exit(main())
