"""Retraining many networks at once, beside a loop: ``python -m benchmarks.retraining_speed``.

Retrains ``digits-mlp`` on the subsets and seeds of its evaluation bank, vectorised by
:func:`bayesinf.retrain`, and by a loop in plain PyTorch over models of the same recipe
(``torch.optim.SGD``, cosine schedule, a new permutation each epoch). Two loops: one indexes tensors
in memory, and is what the bar is for; one takes its batches from a ``DataLoader``, and is timed on
a tenth of the subsets. All take turns, some subsets each, on one thread, in CPU seconds.

Prints one line for each and ends with status 1 if retraining takes more than 0.25 of the CPU time
of the loop, or its losses differ in distribution from those of the loop. The test of that: the
seeds of a subset give a mean and a log-variance of the mean loss over queries, whose differences
between the two are compared with 0 by t-tests over subsets, as are the mean differences of each
query, at the largest of them; the three tests share a chance of 1 % of a false alarm by Bonferroni.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bayesinf.evaluation import SGDRecipe, retrain
from benchmarks.tasks import BenchmarkTask, get_task

__all__ = ["Comparison", "compare", "main", "same_distribution", "train_plain"]

BAR = 0.25
FALSE_ALARM = 0.01
TURN = 10
LOADED = 10
"""Subsets of a turn, and of how many the DataLoader's loop trains one."""

Batches = Callable[[Tensor, Tensor, int], Iterable[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Comparison:
    """CPU seconds, scaled to all networks, and the losses ``(M, R, Q)``."""

    networks: int
    vectorised_s: float
    loop_s: float
    loader_s: float
    vectorised: np.ndarray
    loop: np.ndarray


def indexed(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of an epoch by indexing tensors in memory."""
    for batch in torch.randperm(len(x)).split(size):
        yield x[batch], y[batch]


def loaded(x: Tensor, y: Tensor, size: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Batches of an epoch from a data loader."""
    return DataLoader(TensorDataset(x, y), batch_size=size, shuffle=True)


def train_plain(
    task: BenchmarkTask, x: Tensor, y: Tensor, seed: int, batches: Batches
) -> nn.Module:
    """Train one network as one would by hand."""
    recipe = task.recipe
    assert isinstance(recipe, SGDRecipe)
    torch.manual_seed(seed)
    model = task.make_model()
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps(len(x)))
    for _ in range(recipe.epochs):
        for inputs, target in batches(x, y, recipe.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), target).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def compare(task: BenchmarkTask, subsets: int, seeds: int) -> Comparison:
    """Train the first ``subsets`` of a task's evaluation bank with ``seeds`` seeds each."""
    (x, y), (query_x, query_y) = task.data()
    plan = task.banks["evaluation"]
    masks, numbers = plan.masks(len(x))[:subsets], list(plan.seeds[:seeds])
    spent = {"vectorised": 0.0, "indexed": 0.0, "loaded": 0.0}
    vectorised, looped = [], []
    for start in range(0, subsets, TURN):
        part = masks[start : start + TURN]
        began = time.process_time()
        bank = retrain(
            task.make_model, task.likelihood, task.recipe, train=(x, y), query=(query_x, query_y),
            subsets=part, seeds=numbers, measurements=("loss",),
        )  # fmt: skip
        spent["vectorised"] += time.process_time() - began
        vectorised.append(bank["loss"].values)
        for place, row in enumerate(part.values, start):
            kept = torch.from_numpy(row)
            own = _Loop(task, x[kept], y[kept], query_x, query_y)
            seconds, losses = own.run([place * 1000 + s for s in range(seeds)], indexed)
            spent["indexed"] += seconds
            looped.append(losses)
            if place % LOADED == 0:
                spent["loaded"] += own.run([place], loaded)[0]
    share = len(range(0, subsets, LOADED)) / (subsets * seeds)
    return Comparison(
        networks=subsets * seeds,
        vectorised_s=spent["vectorised"],
        loop_s=spent["indexed"],
        loader_s=spent["loaded"] / share,
        vectorised=np.concatenate(vectorised),
        loop=np.stack(looped),
    )


@dataclass(frozen=True)
class _Loop:
    task: BenchmarkTask
    x: Tensor
    y: Tensor
    query_x: Tensor
    query_y: Tensor

    def run(self, seeds: list[int], batches: Batches) -> tuple[float, np.ndarray]:
        """CPU seconds, and losses ``(R, Q)``."""
        began, losses = time.process_time(), []
        for seed in seeds:
            model = train_plain(self.task, self.x, self.y, seed, batches)
            with torch.no_grad():
                outputs = model(self.query_x)
                loss = nn.functional.cross_entropy(outputs, self.query_y, reduction="none")
            losses.append(loss.numpy())
        return time.process_time() - began, np.stack(losses)


def same_distribution(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """p-values of three tests that losses ``(M, R, Q)`` have one distribution, corrected for three.

    ``mean`` and ``log_variance`` of the mean loss over queries, and ``query``: the largest
    difference of a query, corrected for their number.
    """
    first, second = a.astype(np.float64), b.astype(np.float64)
    difference = first.mean(axis=1) - second.mean(axis=1)  # (M, Q)
    spread = [np.log(v.mean(axis=2).var(axis=1, ddof=1)) for v in (first, second)]
    p = {
        "mean": stats.ttest_1samp(difference.mean(axis=1), 0).pvalue,
        "log_variance": stats.ttest_1samp(spread[0] - spread[1], 0).pvalue,
        "query": difference.shape[1] * np.nanmin(stats.ttest_1samp(difference, 0, axis=0).pvalue),
    }
    return {name: float(min(1.0, 3 * value)) for name, value in p.items()}


def report(found: Comparison) -> tuple[str, bool]:
    """Return the lines of the table, and whether the bar was met."""
    p = same_distribution(found.vectorised, found.loop)
    ratio, easy = found.vectorised_s / found.loop_s, found.vectorised_s / found.loader_s
    same = min(p.values()) >= FALSE_ALARM
    lines = [
        f"{found.networks} networks, CPU seconds",
        f"  retrain, vectorised      {found.vectorised_s:8.1f}",
        f"  loop, tensors indexed    {found.loop_s:8.1f}   ratio {ratio:.3f}, bar {BAR}",
        f"  loop, DataLoader         {found.loader_s:8.1f}   ratio {easy:.3f} (a share, scaled)",
        f"  mean loss {found.vectorised.mean():.5f} and {found.loop.mean():.5f}; corrected p: "
        + ", ".join(f"{name} {value:.3f}" for name, value in p.items()),
        f"  {'met' if ratio <= BAR else 'MISSED'}: time;  {'met' if same else 'MISSED'}: "
        f"one distribution",
    ]
    return "\n".join(lines), ratio <= BAR and same


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.retraining_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", default="digits-mlp", help="default: %(default)s")
    parser.add_argument("--subsets", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=6, help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    text, passed = report(compare(get_task(args.task), args.subsets, args.seeds))
    print(text)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
