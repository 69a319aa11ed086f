"""Make the ground truth of a task: ``python -m benchmarks.retrain TASK [--out DIR]``.

Trains every subset of the evaluation and the tuning bank with every seed and writes
``DIR/TASK/{evaluation,tuning}.zarr`` (default: the directory that ships with the repository).
Rows are kept as they finish: a run that was killed goes on when it is started again. A bank that
is there already is left alone.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch

from bayesinf.evaluation import noise_ceiling, open_bank, retrain, save_bank
from benchmarks.tasks import GROUND_TRUTH, TASKS, BenchmarkTask, get_task

__all__ = ["main", "make_banks"]


def make_banks(
    task: BenchmarkTask | str,
    out: Path | str | None = None,
    progress: bool = True,
    workers: int = 1,
) -> dict[str, Path]:
    """Train and save both banks of a task; returns their paths by name.

    Parameters
    ----------
    task
        A task or its name.
    out
        Directory that gets a folder ``TASK``; default: the repository's ground truth.
    progress
        Show a progress bar.
    workers
        Processes at a time, each of one thread; 1 trains in this one.

    Returns
    -------
    dict[str, Path]
        Paths of ``evaluation`` and ``tuning``.
    """
    task = get_task(task) if isinstance(task, str) else task
    folder = Path(out if out is not None else GROUND_TRUTH) / task.name
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name in task.banks:
        paths[name] = folder / f"{name}.zarr"
        if paths[name].exists():
            continue
        partial = folder / f"{name}.partial"
        train, query = task.data()
        plan = task.banks[name]
        bank = retrain(
            task.make_model,
            task.likelihood,
            task.recipe,
            train=train,
            query=query,
            subsets=plan.masks(len(train[0])),
            seeds=plan.seeds,
            store=partial,
            workers=workers,
            progress=progress,
        )
        save_bank(bank.assign_attrs(task=task.name, bank=name), paths[name])
        shutil.rmtree(partial)
    return paths


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrain", description=__doc__)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--out", type=Path, default=GROUND_TRUTH, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    paths = make_banks(args.task, args.out, workers=args.workers)
    print(f"{args.task}: {time.perf_counter() - start:.0f} s")
    for path in paths.values():
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        bank = open_bank(path)
        for measurement in [m for m in ("loss", "margin") if m in bank]:
            ceiling = float(noise_ceiling(bank, measurement)["ceiling"])
            print(f"  {path}  {size / 1e6:.2f} MB  noise ceiling of {measurement} {ceiling:.3f}")


if __name__ == "__main__":
    main()
