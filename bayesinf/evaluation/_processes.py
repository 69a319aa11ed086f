"""Work spread over processes of one machine, that end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar, cast

import torch

__all__ = ["spread"]

T = TypeVar("T")
R = TypeVar("R")


def spread(
    build: Callable[[], Callable[[T], R]], tasks: Sequence[T], workers: int
) -> Iterator[tuple[T, R]]:
    """Yield each task with its result, in the order in which they are finished.

    ``workers`` new processes, of one thread each, call ``build()`` once and its result on a task
    at a time. They are stopped when the iterator is closed, and end at once when this process is
    killed.

    Raises
    ------
    ValueError
        If ``build`` cannot be sent to another process.
    RuntimeError
        If a task fails, with the traceback there, or a process ends before its task does.
    """
    payload = _pickled(build)
    context = multiprocessing.get_context("spawn")
    pool: dict[Connection, SpawnProcess] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            pool[ours] = context.Process(target=_serve, args=(payload, theirs))
            pool[ours].start()
            theirs.close()
        yield from _hand_out(pool, list(tasks))
    finally:
        for connection, process in pool.items():
            connection.close()
            process.terminate()
            process.join()


def _hand_out(pool: dict[Connection, SpawnProcess], tasks: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Give each process a task, and the next one when it is done."""
    tasks.reverse()
    at: dict[Any, Any] = {}
    free = list(pool)
    while tasks or at:
        for connection in free[: len(tasks)]:
            at[connection] = tasks.pop()
            with suppress(BrokenPipeError):  # it has ended, which receiving finds out
                connection.send(at[connection])
        free = []
        for connection in cast(list[Connection], wait(list(at))):
            try:
                succeeded, result = connection.recv()
            except (EOFError, ConnectionResetError):
                raise RuntimeError(_ended(pool[connection])) from None
            if not succeeded:
                raise RuntimeError(f"a worker process failed. What was done is kept.\n{result}")
            free.append(connection)
            yield at.pop(connection), result


def _serve(payload: bytes, connection: Connection) -> None:
    """Do tasks until the connection is closed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with suppress(EOFError, BrokenPipeError):
        try:
            work = pickle.loads(payload)()
            while True:
                task = connection.recv()
                connection.send((True, work(task)))
        except (EOFError, BrokenPipeError):
            raise
        except Exception:
            connection.send((False, traceback.format_exc()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _pickled(build: Callable[[], Any]) -> bytes:
    try:
        return pickle.dumps(build)
    except (pickle.PicklingError, AttributeError, TypeError) as reason:
        raise ValueError(
            f"several workers need arguments that can be sent to another process: {reason}. Usual "
            f"cause: a lambda or a function inside a function. Define it at the top level of a "
            f"module (or of a script that runs under `if __name__ == '__main__':`), or use "
            f"workers=1."
        ) from reason


def _ended(process: SpawnProcess) -> str:
    process.join()
    return (
        f"a worker process ended with exit code {process.exitcode} before its task was done; what "
        f"was done is kept. Usual causes: too little memory for all of them (-9; use fewer "
        f"workers), or a script without `if __name__ == '__main__':` around what it runs."
    )
