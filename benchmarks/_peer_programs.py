"""Running other libraries' programs, each in a process of its own, by their own interpreter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["MissingPeerError", "Peers", "Seconds", "add_arguments", "run_own", "stage_seconds"]

_HERE = Path(__file__).resolve().parent
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class MissingPeerError(RuntimeError):
    """A peer cannot be run here; the message is what a table says in its place."""


@dataclass(frozen=True)
class Seconds:
    """Seconds of the processor and of the clock."""

    cpu: float
    wall: float


@dataclass(frozen=True)
class Peers:
    """Where the peers are and how they are run.

    Attributes
    ----------
    folder
        Working folder, given to every program as ``--out``.
    python
        Interpreter that has the peers installed; None: no peer is run.
    programs
        Directory of their programs; None: no peer is run.
    threads
        Given to every program as ``--threads``.
    """

    folder: Path
    python: str | None
    programs: Path | None
    threads: int = 1

    @classmethod
    def of(cls, args: Namespace) -> Peers:
        """Make it from the arguments of :func:`add_arguments`."""
        args.folder.mkdir(parents=True, exist_ok=True)
        return cls(args.folder.resolve(), args.peers_python, args.peers_programs, args.threads)

    def run(self, program: str, *options: str) -> dict[str, Any]:
        """Run a peer's program and return the report that it leaves.

        Parameters
        ----------
        program
            File name in the directory of programs, or the path of one of ours.
        *options
            Further arguments.

        Returns
        -------
        dict
            ``stages`` with ``wall_s`` and ``cpu_s`` each, ``info``, ``versions``, ….

        Raises
        ------
        MissingPeerError
            If interpreter, program or a package is not there.
        RuntimeError
            If the program fails for another reason.
        """
        if self.python is None:
            raise MissingPeerError("not run: no --peers-python")
        path = Path(program)
        if not path.is_absolute():
            if self.programs is None:
                raise MissingPeerError("not run: no --peers-programs")
            path = self.programs.resolve() / program
            if not path.exists():
                raise MissingPeerError(f"not run: no {program} in --peers-programs")
        arguments = ["--out", str(self.folder), "--threads", str(self.threads), *options]
        command = [self.python, "-W", "ignore", str(path), *arguments]
        try:
            printed = _run(command, self.threads, path.parent)
        except FileNotFoundError as error:
            raise MissingPeerError("not run: --peers-python does not exist") from error
        name = json.loads(printed.strip().splitlines()[-1])["name"]
        report: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        return report

    def scores(self, report: dict[str, Any]) -> np.ndarray:
        """Scores ``[query, train]`` that a program's report belongs to."""
        scores: np.ndarray = np.load(self.folder / f"{report['name']}.npy")
        return scores

    def prepare(self, *names: str) -> None:
        """Make those of the shared files that are not there yet (minutes)."""
        makers = {
            "digits.pt": "digits_train.py",
            "digits_nobias.pt": "digits_train.py",
            "lds_truth.npz": "lds_digits.py",
            "lm_ids.npz": "lm_train.py",
        }
        for name in names:
            if not (self.folder / name).exists():
                self.run(makers[name])


def stage_seconds(report: dict[str, Any], stages: Sequence[str]) -> Seconds:
    """Sum stages of a report."""
    parts = [report["stages"][stage] for stage in stages]
    return Seconds(sum(p["cpu_s"] for p in parts), sum(p["wall_s"] for p in parts))


def run_own(
    job: str, folder: Path, threads: int, *options: str, module: str = "_own_digits"
) -> dict[str, Any]:
    """Run a job of one of our own runners in a process of its own; returns its report."""
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{module}", job, str(folder)]
    printed = _run([*command, "--threads", str(threads), *options], threads, _HERE.parent)
    report: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    return report


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments that say where things are."""
    parser.add_argument("folder", type=Path, help="working folder: model, data, truth, scores")
    parser.add_argument("--peers-python", help="interpreter that has the peers installed")
    parser.add_argument("--peers-programs", type=Path, help="directory of the peers' programs")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")


def _run(command: Sequence[str], threads: int, cwd: Path) -> str:
    environment = {**os.environ, **dict.fromkeys(_THREADS, str(threads))}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )
    if done.returncode == 0:
        return done.stdout
    absent = re.search(r"No module named '([\w.]+)'", done.stderr)
    if absent:
        raise MissingPeerError(f"not run: {absent[1]} is not installed")
    raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
