"""Speed and accuracy beside other libraries, in one run: ``python -m benchmarks.peers DIR``.

Every program, ours and theirs, runs in a process of its own with the same number of threads; they
take turns ``--repeats`` times, and medians are compared. Times exclude imports on both sides. The
linear datamodelling score (LDS) is ours, on the peers' model and retrainings; the last row says
how far it is from the one that the peers' own program prints for the same matrices.
The exit status is 1 when a bar is missed; a peer that is not installed is named in its row.

``DIR`` is a working folder; what is missing in it is made by the peers' programs::

    python -m benchmarks.peers DIR --peers-python PYTHON --peers-programs PROGRAMS
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from bayesinf.evaluation import lds
from benchmarks._peer_digits import bank_from_truth, to_influence
from benchmarks._peer_programs import (
    MissingPeerError,
    Peers,
    Seconds,
    add_arguments,
    run_own,
    stage_seconds,
)
from benchmarks._table import format_table, verdict

__all__ = ["LDS_BARS", "SPEED", "Duel", "main", "median_seconds", "score_lds"]

_HEADER = ("comparison", "ours", "peer", "ratio / difference", "bar", "")
_FACTORS = ("covariance", "eigendecomposition", "lambda", "pairwise_scores")
_OBSERVED = ("sample_with_observables",)
LDS_BARS = {"closeness": 0.01, "bif": 0.42, "cpu": 4.0, "agreement": 1e-6}
BIF_OPTIONS = (
    "--potential", "tilted", "--step-size", "2e-4", "--chains", "16", "--draws", "400", "--scores",
    "--name", "bayesinf_bif",
)  # fmt: skip

Run = Callable[[], Seconds]


@dataclass(frozen=True)
class Duel:
    """A job of ours and a peer's program that does the same, with the bar on the ratio of times.

    Attributes
    ----------
    name
        First cell of the rows.
    job, options
        Ours.
    program, program_options, stages
        The peer's, and which of its stages count.
    bar
        Largest ratio allowed; None where there is only something to see.
    """

    name: str
    job: str
    options: tuple[str, ...]
    program: str
    program_options: tuple[str, ...]
    stages: tuple[str, ...]
    bar: float | None


SPEED = (
    Duel(
        "sampling, plain | devinterp", "sample", ("--potential", "plain"),
        "devinterp_digits.py", (), _OBSERVED, 1 / 3,
    ),
    Duel(
        "sampling, tilted | devinterp", "sample", ("--potential", "tilted"),
        "devinterp_digits.py", (), _OBSERVED, None,
    ),
    Duel(
        "EK-FAC, sampled | kronfluence", "ekfac", ("--fisher", "sampled"),
        "kronfluence_digits.py", (), _FACTORS, 1.0,
    ),
    Duel(
        "EK-FAC, empirical | kronfluence", "ekfac", ("--fisher", "empirical"),
        "kronfluence_digits.py", ("--empirical",), _FACTORS, 1.0,
    ),
)  # fmt: skip


class Measured:
    """Takes turns, and keeps what every program took and what a peer lacked."""

    def __init__(self, runs: Mapping[object, Run], repeats: int) -> None:
        self.seconds: dict[object, list[Seconds]] = {key: [] for key in runs}
        self.absent: dict[object, str] = {}
        for _ in range(repeats):
            for key, run in runs.items():
                if key in self.absent:
                    continue
                try:
                    self.seconds[key].append(run())
                except MissingPeerError as error:
                    self.absent[key] = str(error)

    def median(self, key: object) -> Seconds | None:
        """Medians of a program; None where it cannot be run."""
        return median_seconds(self.seconds[key]) if key not in self.absent else None


def median_seconds(runs: Sequence[Seconds]) -> Seconds:
    """Medians of processor and clock, each by itself."""
    return Seconds(
        statistics.median(run.cpu for run in runs), statistics.median(run.wall for run in runs)
    )


def score_lds(scores: np.ndarray, bank: xr.Dataset, name: str) -> float:
    """LDS of a matrix in the peers' orientation."""
    return float(lds(to_influence(scores, name), bank)["lds"])


# ---------------------------------------------------------------------------- speed


def _own(peers: Peers, job: str, *options: str) -> Run:
    def run() -> Seconds:
        report = run_own(job, peers.folder, peers.threads, *options)
        return Seconds(report["cpu_s"], report["wall_s"])

    return run


def _peer(peers: Peers, program: str, options: tuple[str, ...], stages: tuple[str, ...]) -> Run:
    return lambda: stage_seconds(peers.run(program, *options), stages)


def measure(peers: Peers, repeats: int) -> Measured:
    """Run both sides of every duel in turn; each program of a peer runs once a turn."""
    runs: dict[object, Run] = {}
    for duel in SPEED:
        key = (duel.program, *duel.program_options)
        runs.setdefault(key, _peer(peers, duel.program, duel.program_options, duel.stages))
        runs[duel.name] = _own(peers, duel.job, *duel.options)
    return Measured(runs, repeats)


def speed_rows(measured: Measured) -> list[tuple[str, ...]]:
    """Two rows a duel: processor and clock."""
    rows: list[tuple[str, ...]] = []
    for duel in SPEED:
        key = (duel.program, *duel.program_options)
        own, peer = measured.median(duel.name), measured.median(key)
        assert own is not None
        bar = "" if duel.bar is None else f"≤ {duel.bar:.3f}"
        for clock in ("cpu", "wall"):
            label = f"{duel.name}, {clock} seconds"
            mine = getattr(own, clock)
            if peer is None:
                rows.append((label, f"{mine:.2f}", measured.absent[key], "", bar, ""))
                continue
            theirs = getattr(peer, clock)
            ratio = mine / theirs
            holds = None if duel.bar is None else ratio <= duel.bar
            rows.append(
                (label, f"{mine:.2f}", f"{theirs:.2f}", f"{ratio:.3f}", bar, verdict(holds))
            )
    return rows


# ---------------------------------------------------------------------------- accuracy


def lds_rows(peers: Peers, repeats: int) -> list[tuple[str, ...]]:
    """LDS of EK-FAC and of the BIF, its cost, and the agreement of the two programs."""
    bank = bank_from_truth(peers.folder / "lds_truth.npz")
    ours = {"bayesinf_ekfac_enumerated": ("ekfac", "--fisher", "enumerated")}
    for name, (job, *options) in ours.items():
        run_own(job, peers.folder, peers.threads, *options, "--name", name)
    costs = Measured(
        {
            "devinterp": _peer(peers, "devinterp_digits.py", (), _OBSERVED),
            "bif": _own(peers, "sample", *BIF_OPTIONS),
        },
        repeats,
    )

    def score(name: str) -> float:
        return score_lds(np.load(peers.folder / f"{name}.npy"), bank, name)

    exact, bif = score("bayesinf_ekfac_enumerated"), score("bayesinf_bif")
    rows = [_closeness_row(peers, exact, score)]
    holds = bif >= LDS_BARS["bif"]
    theirs = costs.absent.get("devinterp") or f"{score('devinterp'):.4f}"
    rows.append(
        ("LDS, BIF | devinterp", f"{bif:.4f}", theirs, "", f"≥ {LDS_BARS['bif']}", verdict(holds))
    )
    rows.append(_cost_row(costs))
    rows.append(_agreement_row(peers, score))
    return rows


def _closeness_row(peers: Peers, exact: float, score: Callable[[str], float]) -> tuple[str, ...]:
    label, bar = "LDS, EK-FAC enumerated | curvlinops", LDS_BARS["closeness"]
    try:
        report = peers.run("curvlinops_digits.py", "--fisher", "type-2")
    except MissingPeerError as absent:
        return (label, f"{exact:.4f}", str(absent), "", f"within {bar}", "")
    theirs = score(report["name"])
    difference = exact - theirs
    figures = (f"{exact:.4f}", f"{theirs:.4f}", f"{difference:+.4f}")
    return (label, *figures, f"within {bar}", verdict(abs(difference) <= bar))


def _cost_row(costs: Measured) -> tuple[str, ...]:
    label, bar = "BIF of that LDS | devinterp, cpu seconds", LDS_BARS["cpu"]
    own, peer = costs.median("bif"), costs.median("devinterp")
    assert own is not None
    if peer is None:
        return (label, f"{own.cpu:.2f}", costs.absent["devinterp"], "", f"≤ {bar:g}", "")
    ratio = own.cpu / peer.cpu
    figures = (f"{own.cpu:.2f}", f"{peer.cpu:.2f}", f"{ratio:.2f}")
    return (label, *figures, f"≤ {bar:g}", verdict(ratio <= bar))


def _agreement_row(peers: Peers, score: Callable[[str], float]) -> tuple[str, ...]:
    """Largest difference from the LDS that the peers' program finds for the same files."""
    label, bar = "LDS here | lds_digits.py, worst file", LDS_BARS["agreement"]
    try:
        peers.run("lds_digits.py")
    except MissingPeerError as absent:
        return (label, "", str(absent), "", f"≤ {bar:.0e}", "")
    theirs = json.loads((peers.folder / "lds.json").read_text())
    files = [name for name in theirs if (peers.folder / f"{name}.npy").exists()]
    pairs = [(score(name), theirs[name]["loss"]) for name in files]
    mine, other = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
    gap = abs(mine - other)
    return (
        label, f"{mine:.6f}", f"{other:.6f}", f"{gap:.1e}", f"≤ {bar:.0e}", verdict(gap <= bar)
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--lds-repeats", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--only", choices=["speed", "lds"], help="default: both")
    args = parser.parse_args(argv)
    peers = Peers.of(args)
    try:
        peers.prepare("digits.pt", "lds_truth.npz")
    except MissingPeerError as absent:
        parser.error(f"{args.folder} lacks digits.pt or lds_truth.npz, and to make them: {absent}")
    rows: list[tuple[str, ...]] = []
    if args.only != "lds":
        rows += speed_rows(measure(peers, args.repeats))
    if args.only != "speed":
        rows += lds_rows(peers, args.lds_repeats)
    print(format_table(_HEADER, rows))
    return int(any(row[-1] == verdict(False) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
