"""Filling a bank with rows: who trains which, on one machine or several.

Rows are trained in groups that never change. Of ``K`` ranks, rank ``k`` owns groups ``k``,
``k + K``, … and nobody else writes their rows; of the worker processes of a rank, none writes:
they hand their rows to the rank. A chunk of the store, which is one row, thus has one writer,
without any lock. A rank that is killed leaves rows without a mark, and whoever owns them when the
run is started again trains them.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from bayesinf.evaluation._processes import spread
from bayesinf.evaluation._rows import MemoryRows, Row, ZarrRows, open_rows

__all__ = ["Job", "Outcomes", "fill"]

Outcomes = Callable[[list[Row]], Iterable[dict[str, np.ndarray]]]
"""Trains the rows of a group; gives the measurements ``(Q,)`` of each."""

PATIENCE = 60.0
"""Seconds without a new row after which a rank that waits for the others says so."""


class Job(Protocol):
    """What is to be trained, as far as its store needs to know."""

    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def seeds(self) -> tuple[int, ...]: ...

    def identity(self) -> dict[str, Any]:
        """Everything that the outcomes depend on."""
        ...


def fill(
    job: Job,
    groups: Sequence[list[Row]],
    outcomes: Outcomes,
    build: Callable[[], Outcomes],
    *,
    store: str | os.PathLike[str] | None,
    worker: tuple[int, int] | None,
    workers: int,
    progress: bool,
) -> dict[str, np.ndarray]:
    """Train what is missing of a rank's groups, wait for the other ranks, and return all rows.

    Parameters
    ----------
    job, groups, outcomes
        What to train.
    build
        Makes ``outcomes`` anew in a worker process.
    store, worker, workers, progress
        As in :func:`~bayesinf.evaluation.retrain`.

    Returns
    -------
    dict[str, np.ndarray]
        ``(M, R, Q)`` by measurement.

    Raises
    ------
    ValueError
        If ``worker`` or ``workers`` are out of range, or an outcome is not finite.
    """
    rank, ranks = _rank(worker, store)
    if workers < 1:
        raise ValueError(f"workers must be at least 1; got {workers}.")
    rows: MemoryRows | ZarrRows = (
        MemoryRows(job.shape, job.names)
        if store is None
        else open_rows(store, job.identity(), job.shape, job.names)
    )
    own = [g for g in groups[rank::ranks] if not all(rows.is_done(*row) for row in g)]
    with tqdm(total=rows.done.size, initial=int(rows.done.sum()), disable=not progress) as bar:
        with closing(_trained(own, outcomes, build, workers)) as trained:
            for group, values in trained:
                for row, value in zip(group, values, strict=True):
                    _require_finite(value, row, job.seeds)
                    if not rows.is_done(*row):
                        rows.write(*row, value)
                        bar.update()
        _wait(rows, bar, rank, ranks)
    return rows.read()


def _rank(worker: tuple[int, int] | None, store: str | os.PathLike[str] | None) -> tuple[int, int]:
    """Which of how many this process is: said, or from the environment where there is a store."""
    if worker is None:
        if store is None:
            return 0, 1
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if not 0 <= worker[0] < worker[1] or (worker[1] > 1 and store is None):
        raise ValueError(
            f"worker must be (k, K) with 0 ≤ k < K, and several workers need a common store=; got "
            f"worker={worker} and store={store!r}."
        )
    return worker


def _trained(
    groups: list[list[Row]], outcomes: Outcomes, build: Callable[[], Outcomes], workers: int
) -> Generator[tuple[list[Row], Iterable[dict[str, np.ndarray]]]]:
    """Train groups here, or in processes of their own."""
    if workers == 1:
        for group in groups:
            yield group, outcomes(group)
    elif groups:
        yield from spread(build, groups, min(workers, len(groups)))


def _wait(rows: MemoryRows | ZarrRows, bar: Any, rank: int, ranks: int) -> None:
    """Return when the rows of the other ranks are there, too."""
    missing = [(int(j), int(s)) for j, s in np.argwhere(~rows.done)]
    began, pause, warned = time.monotonic(), 0.05, False
    while True:
        left = [row for row in missing if not rows.is_done(*row)]
        bar.update(len(missing) - len(left))
        if not left:
            return
        if len(left) < len(missing):
            began, missing = time.monotonic(), left
        elif not warned and time.monotonic() - began > PATIENCE:
            warned = True
            warnings.warn(
                f"rank {rank} of {ranks} has trained its rows and waits for {len(left)} of the "
                f"others; none came in {PATIENCE:.0f} s. If the other ranks are not running, start "
                f"them; a process that is to train everything by itself passes worker=(0, 1).",
                RuntimeWarning,
                stacklevel=4,
            )
        time.sleep(pause)
        pause = min(2 * pause, 2.0)


def _require_finite(values: dict[str, np.ndarray], row: Row, seeds: Sequence[int]) -> None:
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise ValueError(
                f"training on subset {row[0]} with seed {seeds[row[1]]} gave a {name} that is not "
                f"finite for {int((~np.isfinite(value)).sum())} of {len(value)} queries. Usual "
                f"cause: a learning rate that diverges on half of the data; lower recipe.lr."
            )
