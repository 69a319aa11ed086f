"""BIF of a language model beside devinterp: ``python -m benchmarks.language_speed DIR``.

On the peers' small GPT-NeoX, the same SGLD run on both sides: 2 chains of 20 draws, 2 steps apart,
after 20 steps, minibatches of 32 sequences, and at every draw the losses of all tokens of 1,024
training and 32 query sequences, kept on disk. Then the influence of 256 sequences on 256 others, of
sequences and of tokens, from **its** draws on both sides, sixteen query sequences at a time: the
matrix alone, as the peer has it, and with standard errors, which it has not. Ours diagnoses the
chains before the first scores of a store, which has a row of its own. The peer's attention is that
of its own program (``eager``). Rows without a bar show our sampling of the same network in bfloat16
(float32 masters and losses, the same seeds), and how far that moves its scores, as a share of them.

Every program runs in a process of its own with the same number of threads; they take turns
``--repeats`` times, and medians are compared. Imports and the reading of the model come before the
clock. Verdicts are by processor seconds, as other programs share the machine; the clock is shown
beside them. Memory is the peak of sampling beyond what is resident after the imports. Scores of the
same draws must be equal, after sign and factor (its covariances are of means over tokens), relative
to the largest.

The exit status is 1 when a bar is missed. ``DIR`` is a working folder; what is missing in it is
made by the peers' programs::

    python -m benchmarks.language_speed DIR --peers-python PYTHON --peers-programs PROGRAMS
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._own_language import SETTINGS
from benchmarks._peer_programs import MissingPeerError, Peers, add_arguments, run_own
from benchmarks._table import format_table, verdict
from benchmarks.speed import Turns, take_turns

__all__ = ["BLOCK", "main", "table_of"]

BLOCK = 256
TIME_BAR, RATE_BAR, EQUAL_BAR, MEMORY_BAR = 0.8, 5.0, 1e-5, 0.5
_HEADER = ("comparison", "ours", "devinterp", "ratio", "bar", "")
_PEER = str(Path(__file__).with_name("_devinterp_language.py"))

Row = tuple[str, ...]


def programs(
    peers: Peers, settings: dict[str, float], block: int
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Our sampling in two precisions, and the peer's with both sides' scores of its draws."""
    options = [
        text
        for name, value in settings.items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    options += ["--block", str(block)]

    def own(job: str) -> dict[str, Any]:
        return run_own(job, peers.folder, peers.threads, *options, module="_own_language")

    def peer() -> dict[str, Any]:
        report = peers.run(_PEER, *options)
        return {**report, "own": own("bif")}

    jobs = ("sample", "sample-bfloat16")
    return {job: functools.partial(own, job) for job in jobs} | {"peer": peer}


def table_of(turns: Turns, block: int) -> list[Row]:
    """Rows with their verdicts; of an absent peer one that says why."""
    ours = turns.reports["sample"]
    if "peer" in turns.absent:
        seconds = _median(ours, "sample", "cpu_s")
        return [
            ("sampling, cpu seconds", f"{seconds:.1f}", turns.absent["peer"], "", "", ""),
        ]
    theirs = turns.reports["peer"]
    scored = [report["own"] for report in theirs]
    rows = [_time_row(ours, theirs, key) for key in ("cpu_s", "wall_s")]
    half = turns.reports["sample-bfloat16"]
    rows.append(_time_row(half, theirs, "cpu_s", " in bfloat16"))
    moved = statistics.median(report["moved"] for report in half)
    rows.append(("scores in bfloat16, share by which they move", f"{moved:.3f}", "", "", "", ""))
    pairs = {"sequence": block**2, "token": _size(theirs[0]["token_shape"])}
    for stage, count in pairs.items():
        rows += [_rate_row(scored, theirs, stage, count, key) for key in ("cpu_s", "wall_s")]
        rows.append(_rate_row(scored, theirs, stage, count, "cpu_s", " with errors"))
    checked = f"{_median(scored, 'diagnosis', 'cpu_s'):.2f}"
    rows.append(("diagnosis of the chains, cpu seconds", checked, "", "", "", ""))
    for stage in pairs:
        worst = max(report["differences"][stage] for report in scored)
        name = f"{stage} scores, largest difference"
        cells = (f"{worst:.1e}", f"≤ {EQUAL_BAR:.0e}", verdict(worst <= EQUAL_BAR))
        rows.append((name, "", "", *cells))
    rows.append(_memory_row("sampling, peak MiB", ours, theirs, "sample", MEMORY_BAR))
    rows.append(_memory_row("sampling in bfloat16, peak MiB", half, theirs, "sample", None))
    rows.append(_memory_row("scores, peak MiB", scored, theirs, "token", None))
    return rows


def _size(shape: list[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _median(reports: list[dict[str, Any]], stage: str, key: str) -> float:
    return statistics.median(report["stages"][stage][key] for report in reports)


def _time_row(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str, extra: str = ""
) -> Row:
    mine, other = (_median(reports, "sample", key) for reports in (ours, theirs))
    bar = ("", "") if extra else _bar(mine / other <= TIME_BAR, f"≤ {TIME_BAR:g}", key)
    return (
        f"sampling{extra}, {_SECONDS[key]}",
        f"{mine:.1f}",
        f"{other:.1f}",
        f"{mine / other:.3f}",
        *bar,
    )


def _rate_row(
    ours: list[dict[str, Any]],
    theirs: list[dict[str, Any]],
    stage: str,
    pairs: int,
    key: str,
    extra: str = "",
) -> Row:
    mine = pairs / _median(ours, stage + extra, key)
    other = pairs / _median(theirs, stage, key)
    bar = ("", "") if extra else _bar(mine / other >= RATE_BAR, f"≥ {RATE_BAR:g}", key)
    name = f"{stage} pairs{extra} in a {_SECONDS[key].removesuffix('s')}, 10⁶"
    return (name, f"{mine / 1e6:.2f}", f"{other / 1e6:.2f}", f"{mine / other:.2f}", *bar)


_SECONDS = {"cpu_s": "cpu seconds", "wall_s": "wall seconds"}


def _bar(holds: bool, text: str, key: str) -> tuple[str, str]:
    return (text, verdict(holds)) if key == "cpu_s" else ("", "")


def _memory_row(
    name: str,
    ours: list[dict[str, Any]],
    theirs: list[dict[str, Any]],
    stage: str,
    bar: float | None,
) -> Row:
    mine, other = (
        statistics.median(
            r["stages"][stage]["peak_rss_mb"] - r["rss_after_import_mb"] for r in side
        )
        for side in (ours, theirs)
    )
    cells = (f"{mine:.0f}", f"{other:.0f}", f"{mine / other:.3f}")
    return (
        name,
        *cells,
        *(("", "") if bar is None else (f"≤ {bar:g}", verdict(mine / other <= bar))),
    )


def main(
    argv: list[str] | None = None,
    settings: dict[str, float] | None = None,
    block: int = BLOCK,
) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.language_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args(argv)
    peers = Peers.of(args)
    try:
        peers.prepare("lm_ids.npz")
    except MissingPeerError as absent:
        parser.error(f"{args.folder} lacks lm_ids.npz, and to make it: {absent}")
    turns = take_turns(programs(peers, settings or SETTINGS, block), args.repeats)
    (peers.folder / "language_speed.json").write_text(json.dumps(turns.reports, indent=1))
    rows = table_of(turns, block)
    print(format_table(_HEADER, rows))
    return int(any(row[-1] == verdict(False) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
