"""LDS at multiples of kronfluence's processor time, in one run: ``python -m benchmarks.curve DIR``.

On the peers' digits network and retrainings. kronfluence fits EK-FAC and scores ``--repeats`` times
(its default, labels sampled anew by every seed; the median time counts); then calibrated BIF runs
in one process, and is scored when it has spent 1, 3, 10, 30 and 100 times that. Beside the plain
scores stand those that are shrunk by their own errors, towards zero (sampled losses alone) and
towards conjugate gradients at the calibrated damping (a hybrid, whose parent's time is added).

The exit status is 1 when the bar is missed. ``DIR`` is a working folder; what is missing in it is
made by the peers' programs::

    python -m benchmarks.curve DIR --peers-python PYTHON --peers-programs PROGRAMS
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import xarray as xr

import bayesinf as bi
from benchmarks._peer_digits import bank_from_truth, load_task, to_influence
from benchmarks._peer_programs import MissingPeerError, Peers, add_arguments, stage_seconds
from benchmarks._staged import staged_bif
from benchmarks._table import format_table, verdict

__all__ = ["BAR", "MULTIPLES", "curve", "main"]

MULTIPLES = (1, 3, 10, 30, 100)
BAR = (10, 0.50)
"""Multiple of the peer's time within which BIF shall reach an LDS."""
_FACTORS = ("covariance", "eigendecomposition", "lambda", "pairwise_scores")
_HEADER = ("method", "× kronfluence", "CPU s", "draws", "LDS", "bar", "")

Row = tuple[str, ...]


def curve(folder: Path, unit: float, multiples: Sequence[float] = MULTIPLES) -> list[Row]:
    """Rows of our side.

    Parameters
    ----------
    folder
        With ``digits.pt`` and ``lds_truth.npz``.
    unit
        Processor seconds of the peer.
    multiples
        Of them, ascending.
    """
    task, bank = load_task(folder), bank_from_truth(folder / "lds_truth.npz")

    def row(name: str, seconds: float, scores: xr.Dataset, draws: str) -> Row:
        lds = float(bi.lds(scores, bank)["lds"])
        judged = name == "BIF, shrunk" and seconds <= 1.05 * BAR[0] * unit
        met[0] = met[0] or (judged and lds >= BAR[1])
        return (name, f"{seconds / unit:.1f}", f"{seconds:.1f}", draws, f"{lds:.4f}", "", "")

    met, rows, parent = [False], [], None
    for stage in staged_bif(task, [unit * k for k in multiples]):
        if parent is None:
            began = time.process_time()
            parent = bi.conjugate_gradient(
                task, fisher="enumerated", damping=stage.calibration.posterior.damping
            )
            spent = time.process_time() - began
            rows.append(row("conjugate gradients", spent, parent, ""))
        draws = f"{stage.scores.attrs['chains']} × {stage.scores.attrs['draws']}"
        rows.append(row("BIF", stage.seconds, stage.scores, draws))
        rows.append(row("BIF, shrunk", stage.seconds, bi.shrink(stage.scores), draws))
        hybrid = bi.shrink(stage.scores, parent)
        rows.append(row("hybrid", stage.seconds + spent, hybrid, draws))
    bar = f"≥ {BAR[1]} within {BAR[0]} ×"
    rows.append(("BIF, shrunk", "", "", "", "", bar, verdict(met[0])))
    return rows


def _kronfluence(peers: Peers, repeats: int) -> tuple[list[Row], float]:
    """Row and median seconds of the peer."""
    bank = bank_from_truth(peers.folder / "lds_truth.npz")
    seconds, scores = [], []
    for seed in range(repeats):
        report = peers.run("kronfluence_digits.py", "--seed", str(seed))
        seconds.append(stage_seconds(report, _FACTORS).cpu)
        scores.append(float(bi.lds(to_influence(peers.scores(report), "kronfluence"), bank)["lds"]))
    median = statistics.median(seconds)
    spread = f"{min(scores):.4f} to {max(scores):.4f}"
    return [("kronfluence, EK-FAC", "1.0", f"{median:.1f}", "", spread, "", "")], median


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.curve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    peers = Peers.of(args)
    try:
        peers.prepare("digits.pt", "lds_truth.npz")
        rows, unit = _kronfluence(peers, args.repeats)
    except MissingPeerError as absent:
        parser.error(f"the unit of time is kronfluence's: {absent}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bi.ConvergenceWarning)  # early stages are short
        rows += curve(args.folder, unit)
    print(format_table(_HEADER, rows))
    return int(any(row[-1] == verdict(False) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
