"""Banks that are killed at random moments, by one process, by two ranks, and by workers."""

import collections
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import interrupted
import numpy as np
import pytest
import zarr

FOLDER = Path(__file__).parent
Start = Callable[..., ForkServerProcess]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Start processes forked from one that has imported everything and has a single thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["interrupted"])

    def begin(*arguments: object) -> ForkServerProcess:
        process = context.Process(target=interrupted.run, args=arguments)
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{FOLDER}{os.pathsep}{FOLDER.parents[1]}")
        yield begin


def trained(log: Path) -> collections.Counter:
    """How often each row was begun."""
    lines = log.read_text().splitlines() if log.exists() else []
    return collections.Counter(line.split()[0] for line in lines)


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path: Path, start: Start, ranks: int, seed: int) -> None:
    """SIGKILL five times, of either rank: no row is lost, and none trained again but those in hand.

    A kill costs at most the one row that the killed process was at; each row that had its mark
    keeps its files. The bank is bitwise that of a run that nobody disturbed.
    """
    rng = np.random.default_rng(seed)
    store, log, kills = tmp_path / "store", tmp_path / "log", 5
    processes = [start(store, log, rank, ranks) for rank in range(ranks)]
    for _ in range(kills):
        before = trained(log).total()
        wait_for(lambda before=before: trained(log).total() > before or not any_alive(processes))
        time.sleep(rng.uniform(0, 0.06))
        victim = int(rng.integers(ranks))
        processes[victim].kill()
        processes[victim].join()
        kept = written(store)
        processes[victim] = start(store, log, victim, ranks)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    counts = trained(log)
    assert len(counts) == interrupted.ROWS
    assert counts.total() <= interrupted.ROWS + kills
    assert all(written(store)[path] == when for path, when in kept.items())
    assert (zarr.open_group(store, mode="r")["done"][:] == 1).all()
    expected = interrupted.bank()
    for rank in range(ranks):
        np.testing.assert_array_equal(np.load(f"{store}.{rank}.npy"), expected["loss"])
    np.testing.assert_array_equal(interrupted.bank(store, worker=(0, 1))["margin"], expected.margin)
    assert trained(log) == counts


def any_alive(processes: list[ForkServerProcess]) -> bool:
    return any(process.is_alive() for process in processes)


def written(store: Path) -> dict[Path, int]:
    """When the data of the rows that have a mark were written."""
    marks = [p for p in (store / "done").glob("c/*/*") if p.name.isdigit()]
    rows = [p.relative_to(store / "done") for p in marks]
    return {row: (store / "loss" / row / "0").stat().st_mtime_ns for row in rows}


def test_workers_end_with_the_process_that_started_them(tmp_path: Path, start: Start) -> None:
    """Killed while its two workers train, and finished by one process: the same bank."""
    store, log = tmp_path / "store", tmp_path / "log"
    process = start(store, log, 0, 1, 2)
    wait_for(lambda: len(pids(log)) == 2 and len(written(store)) > 0)
    workers = pids(log)
    process.kill()
    process.join()
    assert process.pid not in workers
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 10)
    done, begun = written(store), trained(log).total()
    assert interrupted.ROWS > len(done) >= begun - 4  # two in hand, two on their way
    process = start(store, log)  # alone
    process.join(60)
    assert process.exitcode == 0
    assert trained(log).total() == begun + interrupted.ROWS - len(done)
    assert all(written(store)[path] == when for path, when in done.items())
    np.testing.assert_array_equal(np.load(f"{store}.0.npy"), interrupted.bank()["loss"])


def pids(log: Path) -> set[int]:
    lines = log.read_text().splitlines() if log.exists() else []
    return {int(line.split()[1]) for line in lines}


@pytest.mark.slow  # torchrun starts three processes that import everything
def test_under_torchrun(tmp_path: Path) -> None:
    store, log = tmp_path / "store", tmp_path / "log"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": f"{FOLDER}{os.pathsep}{FOLDER.parents[1]}"}
    arguments = [str(FOLDER / "interrupted.py"), str(store), str(log)]
    subprocess.run([*command, *arguments], check=True, timeout=120, env=environment)
    assert set(trained(log).values()) == {1}
    assert len(pids(log)) == 2
    expected = interrupted.bank()["loss"]
    for rank in range(2):
        np.testing.assert_array_equal(np.load(f"{store}.{rank}.npy"), expected)
