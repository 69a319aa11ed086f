"""Our influence against other libraries', in value: ``python -m benchmarks.parity DIR``.

Every row compares two matrices on the same model, data and damping as ``‖a − b‖_F / ‖b‖_F``, ``b``
the peer's. The peers store ``+∇φ_qᵀ (C + λI)⁻¹ ∇ℓ_t``, so ours is compared as ``−n · influence``.
The exit status is 1 when a bar is missed; a peer that is not installed is named in its row.

``DIR`` is a working folder; what is missing in it is made by the peers' programs::

    python -m benchmarks.parity DIR --peers-python PYTHON --peers-programs PROGRAMS
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bayesinf import ekfac
from benchmarks._peer_digits import load_task, relative_difference, to_peer
from benchmarks._peer_programs import MissingPeerError, Peers, add_arguments
from benchmarks._table import format_table, verdict

__all__ = ["CASES", "Case", "compare", "main"]

DAMPING = 1e-3
_FLOAT64_RUNNER = str(Path(__file__).resolve().with_name("_kronfluence_float64.py"))
_HEADER = ("comparison", "relative difference", "bar", "")


@dataclass(frozen=True)
class Case:
    """One row: which program of a peer, and what of ours it must agree with.

    Attributes
    ----------
    name
        First cell of the row.
    program, options
        The peer's.
    fisher
        Ours.
    bias, dtype
        Of the model.
    bar
        Largest relative difference allowed.
    """

    name: str
    program: str
    options: tuple[str, ...]
    fisher: str
    bias: bool
    dtype: torch.dtype
    bar: float


def _kronfluence(bias: bool, double: bool) -> Case:
    options = () if bias else ("--no-bias",)
    precision = "float64" if double else "float32"
    return Case(
        f"kronfluence, empirical, {precision}{'' if bias else ', no bias'}",
        _FLOAT64_RUNNER if double else "kronfluence_digits.py",
        options if double else ("--empirical", *options),
        "empirical",
        bias,
        torch.float64 if double else torch.float32,
        1e-9 if double else 1e-5,
    )


CASES = (
    _kronfluence(bias=True, double=False),
    _kronfluence(bias=False, double=False),
    _kronfluence(bias=True, double=True),
    _kronfluence(bias=False, double=True),
    Case(
        "curvlinops, exact Fisher, float32", "curvlinops_digits.py", ("--fisher", "type-2"),
        "enumerated", True, torch.float32, 1e-3,
    ),
)  # fmt: skip


def compare(case: Case, peers: Peers) -> float:
    """Relative difference of our influence from the peer's.

    Parameters
    ----------
    case
        What to compare.
    peers
        Where the peers are.

    Returns
    -------
    float
        ``‖−n·influence − peer‖_F / ‖peer‖_F``.

    Raises
    ------
    MissingPeerError
        If the peer cannot be run.
    """
    peers.prepare("digits.pt" if case.bias else "digits_nobias.pt")
    report = peers.run(case.program, "--damping", str(DAMPING), *case.options)
    task = load_task(peers.folder, bias=case.bias, dtype=case.dtype)
    ours = ekfac(task, fisher=case.fisher, damping=DAMPING)
    return relative_difference(to_peer(ours), peers.scores(report))


def main(
    argv: list[str] | None = None, comparison: Callable[[Case, Peers], float] = compare
) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    peers = Peers.of(args := parser.parse_args(argv))
    torch.set_num_threads(args.threads)
    rows, missed = [], False
    for case in CASES:
        try:
            difference = comparison(case, peers)
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
