"""Our influence against other libraries', in value: ``python -m benchmarks.parity DIR``.

Every row compares two arrays on the same model, data and damping as ``‖a − b‖_F / ‖b‖_F``, ``b``
the peer's. The peers store ``+∇φ_qᵀ (C + λI)⁻¹ ∇ℓ_t``, so ours is compared as ``−n · influence``.
What the peers' conventions on the language model are, and where they differ from each other, stands
in ``_peer_lm``. The exit status is 1 when a bar is missed; a peer that is not installed is named in
its row.

``DIR`` is a working folder; what is missing in it is made by the peers' programs::

    python -m benchmarks.parity DIR --peers-python PYTHON --peers-programs PROGRAMS

``--reuse`` takes scores that a peer left in the folder earlier, which saves the minutes that its
language-model program takes.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bayesinf import ekfac
from benchmarks._peer_digits import load_task, relative_difference, to_peer
from benchmarks._peer_lm import load_lm_task, token_grid
from benchmarks._peer_programs import MissingPeerError, Peers, add_arguments
from benchmarks._table import format_table, verdict

__all__ = ["CASES", "Case", "compare", "main", "our_digits", "our_lm"]

DAMPING, RELATIVE_DAMPING = 1e-3, 0.1
_FLOAT64_RUNNER = str(Path(__file__).resolve().with_name("_kronfluence_float64.py"))
_HEADER = ("comparison", "relative difference", "bar", "")


def our_digits(folder: Path, *, fisher: str, bias: bool, dtype: torch.dtype) -> np.ndarray:
    """Our scores ``[query, train]`` on the digits, in the peers' orientation."""
    return to_peer(ekfac(load_task(folder, bias=bias, dtype=dtype), fisher=fisher, damping=DAMPING))


def our_lm(folder: Path, *, whole: bool, tokens: bool) -> np.ndarray:
    """Our scores on the language model, ``[query, train]`` or ``[query, train, position]``."""
    task = load_lm_task(folder, whole=whole)
    length = task.train.batch(slice(0, 1))[1].shape[1] + (not whole)
    settings = {"fisher": "empirical", "relative_damping": RELATIVE_DAMPING, "batch_size": 64}
    if not tokens:
        return to_peer(ekfac(task, **settings))
    return token_grid(ekfac(task, **settings, train_tokens="position"), length)


@dataclass(frozen=True)
class Case:
    """One row: which program of a peer, and what of ours it must agree with.

    Attributes
    ----------
    name
        First cell of the row.
    program, options
        The peer's.
    report
        Name of the report that the program leaves.
    ours
        From the working folder to our array.
    bar
        Largest relative difference allowed.
    needs
        Shared file of the folder.
    part
        End of the name of the peer's array, after the report's.
    """

    name: str
    program: str
    options: tuple[str, ...]
    report: str
    ours: Callable[[Path], np.ndarray]
    bar: float
    needs: str = "digits.pt"
    part: str = ""


def _digits(
    name: str,
    program: str,
    report: str,
    *options: str,
    fisher: str = "empirical",
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    bar: float,
) -> Case:
    ours = functools.partial(our_digits, fisher=fisher, bias=bias, dtype=dtype)
    options = ("--damping", str(DAMPING), *options, *(() if bias else ("--no-bias",)))
    needs = "digits.pt" if bias else "digits_nobias.pt"
    return Case(name, program, options, report + "_nobias" * (not bias), ours, bar, needs)


def _kronfluence(*, bias: bool, double: bool) -> Case:
    precision, ending = "float64" if double else "float32", "" if bias else ", no bias"
    name = f"digits, kronfluence, {precision}{ending}"
    if double:
        return _digits(
            name, _FLOAT64_RUNNER, "kronfluence_float64", bias=bias, dtype=torch.float64, bar=1e-9
        )
    return _digits(
        name, "kronfluence_digits.py", "kronfluence_ekfac_emp", "--empirical", bias=bias, bar=1e-5
    )


def _lm(peer: str, *, whole: bool, tokens: bool) -> Case:
    options = ("--empirical", *(("--tokens",) if peer == "bergson" else ()))
    return Case(
        f"GPT-NeoX, {peer}, {'tokens' if tokens else 'sequences'}",
        f"{peer}_lm.py",
        options,
        f"{peer}_lm_ekfac_emp",
        functools.partial(our_lm, whole=whole, tokens=tokens),
        1e-4,
        "lm_ids.npz",
        "_token_scores" if tokens else "",
    )


CASES = (
    _kronfluence(bias=True, double=False),
    _kronfluence(bias=False, double=False),
    _kronfluence(bias=True, double=True),
    _kronfluence(bias=False, double=True),
    _digits(
        "digits, bergson, float32", "bergson_digits.py", "bergson_ekfac_emp", "--empirical",
        bar=1e-4,
    ),
    _digits(
        "digits, curvlinops, exact Fisher, float32", "curvlinops_digits.py",
        "curvlinops_ekfac_type-2", "--fisher", "type-2", fisher="enumerated", bar=1e-3,
    ),
    _lm("kronfluence", whole=True, tokens=False),
    _lm("kronfluence", whole=True, tokens=True),
    _lm("bergson", whole=False, tokens=False),
    _lm("bergson", whole=False, tokens=True),
)  # fmt: skip


class Finished:
    """Programs of peers that have run: each runs once, however many rows it has.

    Parameters
    ----------
    peers
        Where the peers are.
    reuse
        Take what the folder has from earlier runs.
    """

    def __init__(self, peers: Peers, reuse: bool = False) -> None:
        self.peers, self.reuse = peers, reuse
        self._done: set[str] = set()

    def scores(self, case: Case) -> np.ndarray:
        """The peer's array of a case."""
        path = self.peers.folder / f"{case.report}{case.part}.npy"
        if case.report not in self._done and not (self.reuse and path.exists()):
            self.peers.prepare(case.needs)
            self.peers.run(case.program, *case.options)
            self._done.add(case.report)
        scores: np.ndarray = np.load(path)
        return scores


def compare(case: Case, finished: Finished) -> float:
    """Relative difference of our influence from the peer's.

    Parameters
    ----------
    case
        What to compare.
    finished
        The peers' scores.

    Returns
    -------
    float
        ``‖−n·influence − peer‖_F / ‖peer‖_F``.

    Raises
    ------
    MissingPeerError
        If the peer cannot be run.
    """
    theirs = finished.scores(case)
    return relative_difference(case.ours(finished.peers.folder), theirs)


def main(
    argv: list[str] | None = None, comparison: Callable[[Case, Finished], float] = compare
) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--reuse", action="store_true", help="take scores that are there already")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    args = parser.parse_args(argv)
    finished = Finished(Peers.of(args), args.reuse)
    torch.set_num_threads(args.threads)
    rows, missed = [], False
    for case in (case for case in CASES if args.only in case.name):
        try:
            difference = comparison(case, finished)
        except MissingPeerError as absent:
            rows.append((case.name, str(absent), f"≤ {case.bar:.0e}", ""))
            continue
        holds = difference <= case.bar
        missed |= not holds
        rows.append((case.name, f"{difference:.2e}", f"≤ {case.bar:.0e}", verdict(holds)))
    print(format_table(_HEADER, rows))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
