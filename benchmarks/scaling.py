"""How our EK-FAC's cost grows: ``python -m benchmarks.scaling FIGURE``.

Random MLPs and data: nothing is trained, as cost does not depend on it. From a common size one of
four quantities grows at a time: training examples, queries, width, depth (hidden layers). Each
point is the median of ``--repeats`` runs in processor seconds of factors and scores on one thread;
the points are visited in turn, so that noise hits all alike.

Printed is the exponent ``p`` of ``cost ~ size^p``, by least squares over the larger half of the
sizes, where constant costs no longer count. Cost should be linear in examples, queries and depth,
and between the square (products with gradients) and the cube (rotations, eigendecompositions) of
the width. The exit status is 1 when an exponent exceeds its bar by more than 0.15. The figure shows
all points with the fitted lines.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bayesinf import Categorical, Task, ekfac
from benchmarks._table import format_table, verdict

__all__ = ["BASE", "SWEEPS", "Size", "Sweep", "draw", "exponent", "main", "measure", "seconds"]

TOLERANCE = 0.15
INPUTS, CLASSES = 64, 10
_HEADER = ("growing", "from", "to", "seconds", "to", "exponent", "bar", "")


@dataclass(frozen=True)
class Size:
    """A problem's size."""

    examples: int = 2000
    queries: int = 64
    width: int = 96
    depth: int = 3


@dataclass(frozen=True)
class Sweep:
    """A quantity of :class:`Size`, its values, and the largest exponent expected."""

    quantity: str
    values: tuple[int, ...]
    bar: float

    def sizes(self) -> list[Size]:
        """The problems, smallest first."""
        return [replace(BASE, **{self.quantity: value}) for value in self.values]


BASE = Size()
SWEEPS = (
    Sweep("examples", (500, 1000, 2000, 4000, 8000, 16000), 1.0),
    Sweep("queries", (16, 64, 256, 1024, 2048, 4096), 1.0),
    Sweep("width", (32, 64, 128, 256, 384, 512), 3.0),
    Sweep("depth", (1, 2, 4, 8, 16, 32), 1.0),
)


def seconds(size: Size) -> float:
    """Processor seconds of factors and scores for a random problem."""
    generator = torch.Generator().manual_seed(0)

    def data(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(count, INPUTS, generator=generator)
        return x, torch.randint(CLASSES, (count,), generator=generator)

    widths = [INPUTS, *[size.width] * size.depth]
    layers: list[nn.Module] = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.Tanh()]
        network = nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))
    task = Task(network, Categorical(), train=data(size.examples), query=data(size.queries))
    start = time.process_time()
    ekfac(task, fisher="empirical", relative_damping=0.1)
    return time.process_time() - start


def measure(
    sweeps: Sequence[Sweep], repeats: int, run: Callable[[Size], float] = seconds
) -> dict[Size, float]:
    """Median cost of every size, all of them visited once a turn."""
    sizes = list(dict.fromkeys(size for sweep in sweeps for size in sweep.sizes()))
    run(sizes[0])  # what is done once in a process
    costs: dict[Size, list[float]] = {size: [] for size in sizes}
    for _ in range(repeats):
        for size in sizes:
            costs[size].append(run(size))
    return {size: statistics.median(found) for size, found in costs.items()}


def exponent(values: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """Fit ``cost = exp(c) · value^p`` over the larger half of the values.

    Parameters
    ----------
    values
        Sizes, smallest first.
    costs
        As many.

    Returns
    -------
    p, c : float
        Least squares of the logarithms.
    """
    half = len(values) // 2
    slope, level = np.polyfit(np.log(values[half:]), np.log(costs[half:]), 1)
    return float(slope), float(level)


def row_of(sweep: Sweep, costs: Mapping[Size, float]) -> tuple[str, ...]:
    """A line of the table."""
    found = [costs[size] for size in sweep.sizes()]
    power, _ = exponent(sweep.values, found)
    holds = power <= sweep.bar + TOLERANCE
    span = (f"{sweep.values[0]}", f"{sweep.values[-1]}", f"{found[0]:.2f}", f"{found[-1]:.2f}")
    return (sweep.quantity, *span, f"{power:.2f}", f"≤ {sweep.bar:g}", verdict(holds))


def draw(sweeps: Sequence[Sweep], costs: Mapping[Size, float], path: Path) -> None:
    """Save the log-log figure: a panel a sweep, points and the fitted line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(sweeps), 3), layout="constrained")
    panels = figure.subplots(1, len(sweeps), sharey=True, squeeze=False)[0]
    for axes, sweep in zip(panels, sweeps, strict=True):
        found = [costs[size] for size in sweep.sizes()]
        power, level = exponent(sweep.values, found)
        ends = np.array(sweep.values[len(sweep.values) // 2 :: len(sweep.values) // 2 - 1 or 1])
        axes.loglog(sweep.values, found, "o", color="tab:blue")
        axes.loglog(ends, np.exp(level) * ends**power, color="black", label=f"exponent {power:.2f}")
        axes.set_xlabel(sweep.quantity)
        axes.legend(frameon=False)
    panels[0].set_ylabel("processor seconds, EK-FAC")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None, run: Callable[[Size], float] = seconds) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("figure", type=Path, help="file to save the figure to, .png or .svg")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    costs = measure(SWEEPS, args.repeats, run)
    rows = [row_of(sweep, costs) for sweep in SWEEPS]
    print(format_table(_HEADER, rows))
    draw(SWEEPS, costs, args.figure)
    return int(any(row[-1] == verdict(False) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
