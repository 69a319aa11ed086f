"""EK-FAC's time and memory beside other libraries, in one run: ``python -m benchmarks.speed DIR``.

Every program, ours and theirs, runs in a process of its own with the same number of threads. They
take turns ``--repeats`` times, each turn starting with another one, so that noise of a shared
machine hits all alike; medians are compared, by processor and by clock, with the **faster** peer.
Counted are query gradients, factors and scores. Imports come before the clock on all sides, and so
does the reading of model and data, except that bergson reads them anew in each of its stages.
Memory is the peak beyond what is resident after the imports.

The language model has two rows. *sequences*: factors and scores of sequences; *tokens*: factors and
scores of tokens, which sum to those of sequences, so that the peers' separate pass for the latter
is left out of it.

The exit status is 1 when a bar is missed; a peer that is not installed is named in its row. ``DIR``
is a working folder; what is missing in it is made by the peers' programs, and ``speed.json`` with
every single run is left there::

    python -m benchmarks.speed DIR --peers-python PYTHON --peers-programs PROGRAMS
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks._peer_programs import MissingPeerError, Peers, add_arguments, run_own
from benchmarks._table import format_table, verdict

__all__ = ["RACES", "Entry", "Race", "Turns", "cost_of", "main", "take_turns"]

MEMORY_BAR = 1.0
QUANTITIES = ("cpu_s", "wall_s", "memory_mb")
_UNITS = {"cpu_s": "cpu seconds", "wall_s": "wall seconds", "memory_mb": "peak MiB"}
_HEADER = ("comparison", "ours", "kronfluence", "bergson", "ratio", "bar", "")

Report = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A peer's program and which of its stages count."""

    program: str
    options: tuple[str, ...]
    stages: tuple[str, ...]

    @property
    def key(self) -> str:
        """Name of the run: entries that differ only in what counts share it."""
        return " ".join((self.program, *self.options))


@dataclass(frozen=True)
class Race:
    """A job of ours against peers' programs that do the same.

    Attributes
    ----------
    name
        First words of the rows.
    job
        Of :mod:`benchmarks._own_ekfac`.
    kronfluence, bergson
        The peers' entries.
    bar
        Largest ratio of our time to the faster peer's.
    """

    name: str
    job: str
    kronfluence: Entry
    bergson: Entry
    bar: float

    @property
    def peers(self) -> tuple[Entry, Entry]:
        """Both, in the order of the columns."""
        return self.kronfluence, self.bergson


_KRONFLUENCE_FIT = ("covariance", "eigendecomposition", "lambda")
_BERGSON_FIT = ("query_gradients", "fit_factors", "apply_inverse")
_DIGITS = ("--empirical", "--damping", "1e-3")


def _lm_race(name: str, job: str, last: str) -> Race:
    return Race(
        name,
        job,
        Entry("kronfluence_lm.py", ("--empirical",), (*_KRONFLUENCE_FIT, last)),
        Entry("bergson_lm.py", ("--empirical", "--tokens"), (*_BERGSON_FIT, last)),
        0.5,
    )


RACES = (
    Race(
        "digits", "digits",
        Entry("kronfluence_digits.py", _DIGITS, (*_KRONFLUENCE_FIT, "pairwise_scores")),
        Entry("bergson_digits.py", _DIGITS, (*_BERGSON_FIT, "pairwise_scores")),
        0.7,
    ),
    _lm_race("GPT-NeoX, sequences", "lm-sequences", "pairwise_scores"),
    _lm_race("GPT-NeoX, tokens", "lm-tokens", "pairwise_token_scores"),
)  # fmt: skip


def cost_of(report: Report, stages: Sequence[str] | None = None) -> dict[str, float]:
    """Seconds and memory of a report.

    Parameters
    ----------
    report
        Ours, or a peer's.
    stages
        The stages of a peer's that count; None: a report of ours, which has one.

    Returns
    -------
    dict[str, float]
        By :data:`QUANTITIES`.
    """
    parts = [report] if stages is None else [report["stages"][stage] for stage in stages]
    return {
        "cpu_s": sum(part["cpu_s"] for part in parts),
        "wall_s": sum(part["wall_s"] for part in parts),
        "memory_mb": max(part["peak_rss_mb"] for part in parts) - report["rss_after_import_mb"],
    }


@dataclass(frozen=True)
class Turns:
    """What ran.

    Attributes
    ----------
    reports
        By key, one a turn.
    absent
        By key, why a program cannot run.
    """

    reports: dict[str, list[Report]]
    absent: dict[str, str]

    def median(self, key: str, stages: Sequence[str] | None = None) -> dict[str, float] | None:
        """Median of each quantity; None where the program cannot run."""
        costs = [cost_of(report, stages) for report in self.reports[key]]
        if key in self.absent:
            return None
        return {name: statistics.median(cost[name] for cost in costs) for name in QUANTITIES}


def take_turns(runs: Mapping[str, Callable[[], Report]], repeats: int) -> Turns:
    """Run all programs in turn; every turn starts one program later than the one before."""
    turns = Turns({key: [] for key in runs}, {})
    keys = list(runs)
    for turn in range(repeats):
        first = turn % len(keys)
        for key in keys[first:] + keys[:first]:
            if key in turns.absent:
                continue
            try:
                turns.reports[key].append(runs[key]())
            except MissingPeerError as error:
                turns.absent[key] = str(error)
    return turns


def programs(peers: Peers, races: Sequence[Race]) -> dict[str, Callable[[], Report]]:
    """Every program of the races once."""
    runs: dict[str, Callable[[], Report]] = {}
    for race in races:
        runs[race.job] = functools.partial(
            run_own, race.job, peers.folder, peers.threads, module="_own_ekfac"
        )
        for entry in race.peers:
            runs[entry.key] = functools.partial(peers.run, entry.program, *entry.options)
    return runs


def rows_of(race: Race, turns: Turns) -> list[tuple[str, ...]]:
    """Three rows: processor, clock, memory."""
    own = turns.median(race.job)
    assert own is not None
    theirs = [turns.median(entry.key, entry.stages) for entry in race.peers]
    rows = []
    for name in QUANTITIES:
        bar = MEMORY_BAR if name == "memory_mb" else race.bar
        cells = [
            turns.absent[entry.key] if cost is None else f"{cost[name]:.2f}"
            for entry, cost in zip(race.peers, theirs, strict=True)
        ]
        best = min((cost[name] for cost in theirs if cost is not None), default=None)
        ratio = None if best is None else own[name] / best
        rows.append(
            (
                f"{race.name}, {_UNITS[name]}",
                f"{own[name]:.2f}",
                *cells,
                "" if ratio is None else f"{ratio:.3f}",
                f"≤ {bar:g}",
                verdict(None if ratio is None else ratio <= bar),
            )
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--only", default="", help="comparisons whose name contains this")
    args = parser.parse_args(argv)
    peers = Peers.of(args)
    races = [race for race in RACES if args.only in race.name]
    needed = {"digits.pt" if race.job == "digits" else "lm_ids.npz" for race in races}
    try:
        peers.prepare(*sorted(needed))
    except MissingPeerError as absent:
        parser.error(f"{args.folder} lacks one of {sorted(needed)}, and to make it: {absent}")
    turns = take_turns(programs(peers, races), args.repeats)
    (peers.folder / "speed.json").write_text(json.dumps(turns.reports, indent=1))
    rows = [row for race in races for row in rows_of(race, turns)]
    print(format_table(_HEADER, rows))
    return int(any(row[-1] == verdict(False) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
