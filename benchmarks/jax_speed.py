"""Draws a second by JAX and by torch, after compilation: ``python -m benchmarks.jax_speed``.

``sample_jax`` and ``bayesinf.sample`` draw from the same local posterior of the digits MLP: the
same kernel, chains, steps a draw and batches, 1,000 train and 200 query losses recorded at every
draw. Both run in this process on one thread of one processor, and take turns ``--repeats`` times,
so that noise of a shared machine hits both alike. Counted are processor seconds of the calls
themselves, stores and all, from the first draws on: what is compiled or recorded is so by then.

Printed are medians, and their ratio, JAX over torch; the exit status is 1 where it is below 1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bayesinf._posterior import PotentialKind
from benchmarks._table import format_table, verdict

__all__ = ["ROWS", "Clock", "Row", "main", "rate"]

BAR = 1.0
N_BETA, GAMMA = 1e5, 900.0
_HEADER = ("kernel", "batch", "torch, draws/s", "JAX, draws/s", "ratio", f"bar {BAR:g}")
_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


@dataclass(frozen=True)
class Row:
    """A kernel and its batches: ``None`` for all examples."""

    kernel: str
    settings: dict[str, float]
    batch_size: int | None
    potential: PotentialKind = "tilted"

    @property
    def words(self) -> str:
        """What a gradient is made of."""
        return "all" if self.batch_size is None else f"{self.batch_size}, {self.potential}"


_SGLD, _UNDERDAMPED = {"step_size": 1e-7}, {"step_size": 1e-7, "friction": 20.0}
ROWS = (
    Row("SGLD", _SGLD, 100),
    Row("SGLD", _SGLD, 100, "plain"),
    Row("SGLD", _SGLD, None),
    Row("RMSpropSGLD", {"step_size": 1e-8}, 100),
    Row("Underdamped", _UNDERDAMPED, 100),
    Row("Underdamped", _UNDERDAMPED, None),
)


@dataclass
class Clock:
    """Asked now and then whether to stop, never says so, and remembers when it was asked."""

    marks: list[tuple[int, float]] = field(default_factory=list)

    def __call__(self, store: Any) -> bool:
        """Note draws and processor seconds."""
        self.marks.append((store.draws, time.process_time()))
        return False


def rate(marks: list[tuple[int, float]]) -> float:
    """Draws a second from the first mark to the last.

    Parameters
    ----------
    marks
        Draws and seconds.
    """
    (few, began), (many, ended) = marks[0], marks[-1]
    return (many - few) / (ended - began)


def _loss(params: Any, batch: Any) -> Any:
    """Cross-entropies of a ReLU network, ``[(weight, bias), …]``."""
    import jax
    import jax.numpy as jnp

    x, label = batch
    for weight, bias in params[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    weight, bias = params[-1]
    scores = jax.nn.log_softmax(x @ weight + bias)
    return -jnp.take_along_axis(scores, label[:, None], axis=1)[:, 0]


Run = Callable[[Row, Any], Any]


def runs(draws: int, thin: int, chains: int) -> tuple[Run, Run]:
    """Make the two ways to draw, ``run(row, until)``: by torch, by JAX."""
    import torch
    from torch import nn

    import bayesinf as bi
    from bayesinf.interop.jax import sample_jax
    from benchmarks.tasks import get_task

    torch.set_num_threads(1)
    benchmark = get_task("digits-mlp")
    train, query = benchmark.data()
    network = benchmark.checkpoint()
    task = bi.Task(network, benchmark.likelihood, train=train, query=query)
    layers = [m for m in network.modules() if isinstance(m, nn.Linear)]
    params = [(m.weight.detach().T.numpy(), m.bias.detach().numpy()) for m in layers]
    mine, asked = (tuple(part.numpy() for part in split) for split in (train, query))
    common: dict[str, Any] = {
        "draws": draws, "warmup": 20, "thin": thin, "chains": chains, "jitter": 0.1,
        "max_excess": float("inf"), "progress": False,
    }  # fmt: skip
    decay = benchmark.weight_decay

    def by_torch(row: Row, until: Any) -> Any:
        posterior = bi.LocalPosterior(task, N_BETA, GAMMA, decay, row.potential)
        kernel = getattr(bi, row.kernel)(**row.settings)
        return bi.sample(posterior, kernel, batch_size=row.batch_size, until=until, **common)

    def by_jax(row: Row, until: Any) -> Any:
        return sample_jax(
            _loss, params, mine, asked, getattr(bi, row.kernel)(**row.settings), n_beta=N_BETA,
            gamma=GAMMA, weight_decay=decay, potential=row.potential,
            batch_size=row.batch_size, until=until, **common,
        )  # fmt: skip

    return by_torch, by_jax


def race(row: Row, ways: tuple[Run, Run], repeats: int) -> tuple[float, float]:
    """Median rates of a row's two ways, which take turns."""
    rates: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats):
        for k in (0, 1) if turn % 2 else (1, 0):
            clock = Clock()
            ways[k](row, clock)
            rates[k].append(rate(clock.marks))
    return statistics.median(rates[0]), statistics.median(rates[1])


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.jax_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--repeats", type=int, default=5, help="default: %(default)s")
    add("--draws", type=int, default=100, help="of a turn, at least 11 (default: %(default)s)")
    add("--thin", type=int, default=5, help="steps a draw (default: %(default)s)")
    add("--chains", type=int, default=4, help="default: %(default)s")
    add("--only", default="", help="kernels whose name contains this")
    args = parser.parse_args(argv)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_ONE_THREAD}".strip()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    ways = runs(args.draws, args.thin, args.chains)
    rows, met = [], True
    for row in (r for r in ROWS if args.only in r.kernel):
        torch_rate, jax_rate = race(row, ways, args.repeats)
        holds = jax_rate >= BAR * torch_rate
        met &= holds
        cells = f"{torch_rate:.1f}", f"{jax_rate:.1f}", f"{jax_rate / torch_rate:.2f}"
        rows.append((row.kernel, row.words, *cells, verdict(holds)))
        print(format_table(_HEADER, rows[-1:]), flush=True)
    print(f"\n{args.chains} chains, {args.thin} steps a draw\n{format_table(_HEADER, rows)}")
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
