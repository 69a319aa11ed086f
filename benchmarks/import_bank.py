"""Import retrained losses: ``python -m benchmarks.import_bank TASK MASKS LOSSES [--out DIR]``.

MASKS are the subsets, ``(M, n)``, not 0 where a training example was kept; LOSSES ``(M, Q)``, or
``(M, R, Q)`` for ``R`` seeds each. kronfluence's examples carry both as ``masks.pt`` and
``losses.pt`` (averages over five seeds); ``.npy`` and ``.npz`` files of one array are read as well.
The bank goes to ``DIR/TASK/evaluation.zarr``, where ``benchmarks.lds`` looks for it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bayesinf.evaluation import bank_from_kronfluence, save_bank
from benchmarks.tasks import GROUND_TRUTH, TASKS

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.import_bank", description=__doc__)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("masks", type=Path)
    parser.add_argument("losses", type=Path)
    parser.add_argument("--out", type=Path, default=GROUND_TRUTH, help="default: %(default)s")
    args = parser.parse_args(argv)
    bank = bank_from_kronfluence(args.masks, args.losses)
    path = args.out / args.task / "evaluation.zarr"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_bank(bank.assign_attrs(task=args.task, bank="evaluation"), path)
    print(
        f"{path}: {bank.sizes['subset']} subsets of {bank.sizes['train']} examples × "
        f"{bank.sizes['seed']} seeds, {bank.sizes['query']} queries"
    )


if __name__ == "__main__":
    main()
