"""TRAK beside the authors' own library: ``python -m benchmarks.trak DIR``.

Both project the margin gradients of the digits network to the same dimension by ±1 entries (other
random ones) and solve with the same ridges. The first table is the linear datamodelling score (LDS)
by ridge, on the peers' network and retrainings: ours over several seeds of the projection, whose
spread says what a difference means; the peer's at its seed 0. The second is time: every run a
process of its own with the same number of threads, taking turns ``--repeats`` times; imports are
excluded on both sides. The exit status is 1 when a bar is missed.

``DIR`` is a working folder; what is missing in it is made by the peers' programs::

    python -m benchmarks.trak DIR --peers-python PYTHON --peers-programs PROGRAMS
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from bayesinf.attribution._trak import trak
from bayesinf.attribution._trak_features import trak_features
from bayesinf.evaluation import lds
from benchmarks._peer_digits import bank_from_truth, load_task
from benchmarks._peer_programs import (
    MissingPeerError,
    Peers,
    add_arguments,
    run_own,
    stage_seconds,
)
from benchmarks._table import format_table, verdict
from benchmarks.peers import Measured, Seconds, score_lds

__all__ = ["BARS", "damping_of", "lds_rows", "main", "speed_rows"]

RIDGES = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""In the peer's units: added to ``ΦᵀΦ`` of gradients divided by √d, with ±1 entries of ``P``."""

BARS = {"lds": 0.03, "ratio": 1.0}
_PROGRAM = "trak_digits.py"
_STAGES = ("prepare", "featurize", "finalize_features", "score")
_LDS_HEADER = ("ridge (peer's units)", "damping", "ours", "spread", "peer", "difference", "bar", "")
_TIME_HEADER = ("seconds", "ours", "peer", "ratio", "bar", "")


def damping_of(ridge: float, *, n: int, d: int, k: int) -> float:
    """Our λ of the peer's ridge: its ``ΦᵀΦ`` is ``n k/d`` times our mean of squared features."""
    return ridge * d / (k * n)


def own_lds(folder: Path, ridges: Sequence[float], k: int, seeds: int) -> dict[float, list[float]]:
    """LDS by ridge, one a seed of the projection; each seed projects once for all ridges."""
    task, bank = load_task(folder), bank_from_truth(folder / "lds_truth.npz")
    found: dict[float, list[float]] = {ridge: [] for ridge in ridges}
    for seed in range(seeds):
        features = trak_features(task, dimension=k, seed=seed)
        for ridge in ridges:
            damping = damping_of(ridge, n=task.n, d=task.dimension, k=k)
            scores = trak(task, damping=damping, features=features)
            found[ridge].append(float(lds(scores, bank)["lds"]))
    return found


def peer_lds(peers: Peers, ridges: Sequence[float], k: int) -> dict[float, float | str]:
    """LDS of the peer by ridge, or why it cannot be run."""
    bank = bank_from_truth(peers.folder / "lds_truth.npz")
    found: dict[float, float | str] = {}
    for ridge in ridges:
        try:
            report = peers.run(_PROGRAM, "--lambda-reg", str(ridge), "--proj-dim", str(k))
        except MissingPeerError as absent:
            return dict.fromkeys(ridges, str(absent))
        found[ridge] = score_lds(peers.scores(report), bank, "trak")
    return found


def lds_rows(
    ours: Mapping[float, Sequence[float]], theirs: Mapping[float, float | str], unit: float
) -> list[tuple[str, ...]]:
    """One row a ridge, and the best of both with the bar; ``unit`` is our λ of ridge 1."""
    rows: list[tuple[str, ...]] = []
    for ridge, values in ours.items():
        mean, spread, peer = statistics.mean(values), max(values) - min(values), theirs[ridge]
        cells = (f"{ridge:g}", f"{ridge * unit:.3g}", f"{mean:.4f}", f"{spread:.4f}")
        if isinstance(peer, str):
            rows.append((*cells, peer, "", "", ""))
        else:
            rows.append((*cells, f"{peer:.4f}", f"{mean - peer:+.4f}", "", ""))
    best = max(statistics.mean(values) for values in ours.values())
    numbers = [value for value in theirs.values() if not isinstance(value, str)]
    bar = f"within {BARS['lds']}"
    if numbers:
        gap = best - max(numbers)
        figures = (f"{max(numbers):.4f}", f"{gap:+.4f}", bar, verdict(abs(gap) <= BARS["lds"]))
    else:
        figures = (str(next(iter(theirs.values()))), "", bar, "")
    return [*rows, ("best", "", f"{best:.4f}", "", *figures)]


def measure(peers: Peers, repeats: int, ridge: float, k: int, unit: float) -> Measured:
    """Run both in turn."""
    options = ("--damping", str(ridge * unit), "--dimension", str(k))

    def own() -> Seconds:
        report = run_own("trak", peers.folder, peers.threads, *options)
        return Seconds(report["cpu_s"], report["wall_s"])

    def peer() -> Seconds:
        report = peers.run(_PROGRAM, "--lambda-reg", str(ridge), "--proj-dim", str(k))
        return stage_seconds(report, _STAGES)

    return Measured({"own": own, "peer": peer}, repeats)


def speed_rows(measured: Measured) -> list[tuple[str, ...]]:
    """Processor and clock."""
    own, peer = measured.median("own"), measured.median("peer")
    assert own is not None
    rows: list[tuple[str, ...]] = []
    for clock in ("cpu", "wall"):
        mine, bar = getattr(own, clock), f"≤ {BARS['ratio']:g}"
        if peer is None:
            rows.append((clock, f"{mine:.2f}", measured.absent["peer"], "", bar, ""))
            continue
        ratio = mine / getattr(peer, clock)
        figures = (f"{mine:.2f}", f"{getattr(peer, clock):.2f}", f"{ratio:.3f}")
        rows.append((clock, *figures, bar, verdict(ratio <= BARS["ratio"])))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--dimension", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--ridges", type=float, nargs="+", default=list(RIDGES))
    args = parser.parse_args(argv)
    peers = Peers.of(args)
    try:
        peers.prepare("digits.pt", "lds_truth.npz")
    except MissingPeerError as absent:
        parser.error(f"{args.folder} lacks digits.pt or lds_truth.npz, and to make them: {absent}")
    torch.set_num_threads(args.threads)
    task, k = load_task(args.folder), args.dimension
    unit = damping_of(1.0, n=task.n, d=task.dimension, k=k)
    ours = own_lds(args.folder, args.ridges, k, args.seeds)
    rows = lds_rows(ours, peer_lds(peers, args.ridges, k), unit)
    print(format_table(_LDS_HEADER, rows), flush=True)
    best = max(ours, key=lambda ridge: float(np.mean(ours[ridge])))
    times = speed_rows(measure(peers, args.repeats, best, k, unit))
    print(f"\n{format_table(_TIME_HEADER, times)}")
    return int(any(row[-1] == verdict(False) for row in [*rows, *times]))


if __name__ == "__main__":
    sys.exit(main())
