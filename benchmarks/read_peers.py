"""Other libraries' scores, read by our readers and judged: ``python -m benchmarks.read_peers DIR``.

Each peer's program scores the digits. What its library wrote, in its own format, is read by our
reader for it; the ``.npy`` file that the program leaves beside it, by ``read_npy``. The linear
datamodelling score of what was read must be the one that the peers' ``lds_digits.py`` finds for
that file on the same retrainings, for losses and for margins, within 1e-6. quanda, which has no
program there, is read from a cache of batches of another's scores. The exit status is 1 when a bar
is missed; a peer that is not installed is named in its row. Other matrices that are in the folder
are read by ``read_npy``.

``DIR`` is a working folder; what is missing in it is made by the peers' programs::

    python -m benchmarks.read_peers DIR --peers-python PYTHON --peers-programs PROGRAMS

``--reuse`` takes scores that are there already.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from bayesinf.evaluation import lds
from bayesinf.scores import read_bergson, read_dattri, read_kronfluence, read_npy, read_quanda
from benchmarks._peer_digits import bank_from_truth
from benchmarks._peer_programs import MissingPeerError, Peers, add_arguments
from benchmarks._table import format_table, verdict

__all__ = ["CASES", "Case", "gaps", "main"]

BAR = 1e-6
_HEADER = ("scores", "reader", "LDS, loss", "theirs", "LDS, margin", "theirs", "largest gap", "")
_RUNNER = str(Path(__file__).resolve().with_name("_peer_native.py"))
_N = 1000

Reader = Callable[[Path, str], xr.Dataset]


def _kronfluence(folder: Path, measurement: str) -> xr.Dataset:
    (file,) = folder.glob("*/digits/scores_s")
    return read_kronfluence(file, n=_N, measurement=measurement)


def _bergson(folder: Path, measurement: str) -> xr.Dataset:
    (file,) = folder.glob("*/scores")
    return read_bergson(file, n=_N, sign="helpful", measurement=measurement)


def _dattri(folder: Path, measurement: str) -> xr.Dataset:
    return read_dattri(folder / "attribute.pt", n=_N, measurement=measurement)


@dataclass(frozen=True)
class Case:
    """A program of a peer, and how to read what its library left.

    Attributes
    ----------
    name
        Of the report and the ``.npy`` file that it leaves.
    program, options
        How it is run.
    read
        From the folder of what the library left, and the measurement, to scores; None where it
        leaves nothing of its own.
    """

    name: str
    program: str
    options: tuple[str, ...] = ()
    read: Reader | None = None

    @property
    def native(self) -> str:
        """Folder of what the library left, in the working folder."""
        return f"native/{self.name}"


CASES = (
    Case("kronfluence_ekfac", "kronfluence_digits.py", (), _kronfluence),
    Case("kronfluence_ekfac_emp", "kronfluence_digits.py", ("--empirical",), _kronfluence),
    Case("kronfluence_identity", "kronfluence_digits.py", ("--strategy", "identity"), _kronfluence),
    Case("bergson_ekfac_emp", "bergson_digits.py", ("--empirical",), _bergson),
    Case("bergson_graddot", "bergson_digits.py", ("--method", "graddot"), _bergson),
    Case("dattri_ekfac_patched", "dattri_digits.py", ("--patch-eig",), _dattri),
    Case("dattri_graddot", "dattri_digits.py", ("--method", "graddot"), _dattri),
    Case("dattri_trak", "dattri_digits.py", ("--method", "trak"), _dattri),
    Case("trak", "trak_digits.py"),
)


def gaps(
    read: Callable[[str], xr.Dataset], bank: xr.Dataset, theirs: dict[str, float]
) -> tuple[dict[str, float], float]:
    """LDS of what ``read(measurement)`` gives, and how far they are from another program's.

    Parameters
    ----------
    read
        From the name of the measurement to scores.
    bank
        Retrained models.
    theirs
        LDS by measurement.

    Returns
    -------
    dict, float
        LDS by measurement, and the largest difference.
    """
    ours = {
        measurement: float(
            lds(read(measurement), bank, measurement=measurement, constant="zero")["lds"]
        )
        for measurement in theirs
    }
    return ours, max(abs(ours[name] - theirs[name]) for name in theirs)


def _make(case: Case, peers: Peers, reuse: bool) -> None:
    """Run a program, keeping what its library leaves."""
    native = peers.folder / case.native
    if reuse and (native.exists() or (case.read is None and _npy(peers, case).exists())):
        return
    if peers.programs is None:
        raise MissingPeerError("not run: no --peers-programs")
    program = peers.programs.resolve() / case.program
    if not program.exists():
        raise MissingPeerError(f"not run: no {case.program} in --peers-programs")
    peers.run(_RUNNER, "--program", str(program), "--native", str(native), *case.options)


def _npy(peers: Peers, case: Case) -> Path:
    return peers.folder / f"{case.name}.npy"


def _as_quanda(file: Path, folder: Path) -> Path:
    """Write a matrix as quanda caches its explanations: a tensor for each batch of queries."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(torch.from_numpy(np.load(file)).split(64)):
        torch.save(part.clone(), folder / f"{i}.pt")
    return folder


def _readers(peers: Peers, case: Case) -> Iterable[tuple[str, Callable[[str], xr.Dataset]]]:
    npy = _npy(peers, case)
    if case.read is not None:
        native, read = peers.folder / case.native, case.read
        yield read.__name__.replace("_", "read_", 1), lambda measurement: read(native, measurement)
    yield (
        "read_npy",
        lambda measurement: read_npy(npy, sign="helpful", n=_N, measurement=measurement),
    )
    if case is CASES[0]:
        cache = _as_quanda(npy, peers.folder / "native" / "quanda")
        yield "read_quanda", lambda measurement: read_quanda(cache, n=_N, measurement=measurement)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.read_peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--reuse", action="store_true", help="take scores that are there already")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args(argv)
    peers = Peers.of(args)
    try:
        peers.prepare("digits.pt", "lds_truth.npz")
    except MissingPeerError as absent:
        parser.error(f"{args.folder} lacks digits.pt or lds_truth.npz, and to make them: {absent}")
    torch.set_num_threads(args.threads)
    cases = [case for case in CASES if args.only in case.name]
    missing: dict[str, str] = {}
    for case in cases:
        try:
            _make(case, peers, args.reuse)
        except MissingPeerError as absent:
            missing[case.name] = str(absent)
    peers.run("lds_digits.py")
    theirs = json.loads((peers.folder / "lds.json").read_text())
    if not args.only:
        names = sorted(set(theirs) - {case.name for case in CASES})
        others = (Case(name, "") for name in names)
        cases += [case for case in others if _npy(peers, case).exists()]
    rows = _rows(peers, cases, missing, theirs)
    print(format_table(_HEADER, rows))
    return int(any(row[-1] == verdict(False) for row in rows))


def _rows(
    peers: Peers,
    cases: Sequence[Case],
    missing: Mapping[str, str],
    theirs: Mapping[str, dict[str, float]],
) -> list[tuple[str, ...]]:
    """A row for each case and reader, or what is missing of a case."""
    bank = bank_from_truth(peers.folder / "lds_truth.npz")
    rows: list[tuple[str, ...]] = []
    for case in cases:
        if case.name in missing:
            rows.append((case.name, missing[case.name], *[""] * 6))
            continue
        expected = theirs[case.name]
        for reader, read in _readers(peers, case):
            ours, gap = gaps(read, bank, expected)
            figures = [
                f"{part[name]:.7f}" for name in ("loss", "margin") for part in (ours, expected)
            ]
            rows.append((case.name, reader, *figures, f"{gap:.1e}", verdict(gap <= BAR)))
    return rows


if __name__ == "__main__":
    sys.exit(main())
