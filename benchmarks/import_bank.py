"""Import retrained losses: ``python -m benchmarks.import_bank TASK MASKS LOSSES [--out DIR]``.

MASKS are the subsets, ``(M, n)``, not 0 where a training example was kept; LOSSES ``(M, Q)``, or
``(M, R, Q)`` for ``R`` seeds each. kronfluence's examples carry both as ``masks.pt`` and
``losses.pt`` (averages over five seeds); ``.npy`` and ``.npz`` files of one array are read as well.
The bank goes to ``DIR/TASK/evaluation.zarr``, where ``benchmarks.lds`` looks for it.
"""

from __future__ import annotations

import argparse
import codecs
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from bayesinf.evaluation import save_bank
from benchmarks.tasks import GROUND_TRUTH, TASKS

__all__ = ["load_array", "main", "make_bank"]


def load_array(path: Path) -> np.ndarray:
    """Read the one array of a file; nothing that a file may ask for is run.

    Parameters
    ----------
    path
        ``.npy``, ``.npz``, or what ``torch.save`` wrote of a tensor or a NumPy array.

    Raises
    ------
    ValueError
        If the file holds something else.
    """
    if path.suffix in (".npy", ".npz"):
        value: Any = np.load(path, allow_pickle=False)
        if isinstance(value, np.lib.npyio.NpzFile):
            value = [value[name] for name in value.files]
            value = value[0] if len(value) == 1 else value
    else:
        with torch.serialization.safe_globals(_array_parts()):
            value = torch.load(path, map_location="cpu", weights_only=True)
    array = value.numpy() if isinstance(value, torch.Tensor) else value
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise ValueError(
            f"{path} must hold one array of numbers; got {type(value).__name__}. Save it alone: "
            f"np.save(path, array)."
        )
    return array


def make_bank(masks: np.ndarray, losses: np.ndarray) -> xr.Dataset:
    """Label masks ``(M, n)`` and losses ``(M, Q)`` or ``(M, R, Q)`` as a bank.

    Raises
    ------
    ValueError
        If the shapes do not fit, or the masks hold more than two values.
    """
    values = losses[:, None] if losses.ndim == 2 else losses
    if masks.ndim != 2 or values.ndim != 3 or len(masks) != len(values):
        raise ValueError(
            f"masks must be (subsets, train) and losses (subsets, query) or (subsets, seeds, "
            f"query); got {masks.shape} and {losses.shape}. Usual cause: the two in each other's "
            f"place, or an average over the wrong axis."
        )
    if not np.isin(masks, (0, 1)).all():
        raise ValueError(
            f"masks must be 0 or 1; got values such as {np.unique(masks)[:5].tolist()}."
        )
    kept = masks.astype(bool)
    return xr.Dataset(
        {
            "loss": (("subset", "seed", "query"), values.astype(np.float32)),
            "subset_mask": (("subset", "train"), kept),
        },
        coords={
            "subset": np.arange(len(kept)),
            "seed": np.arange(values.shape[1]),
            "query": np.arange(values.shape[2]),
            "train": np.arange(kept.shape[1]),
        },
        attrs={"fraction": float(kept.mean()), "n": kept.shape[1], "bank": "evaluation"},
    )


def _array_parts() -> list[Any]:
    """What a saved NumPy array is made of: the only globals that such a file may name."""
    from numpy._core.multiarray import _reconstruct

    kinds = {type(np.dtype(kind)) for kind in ("bool", *np.typecodes["AllInteger"], "e", "f", "d")}
    names = [(_reconstruct, "numpy.core.multiarray._reconstruct"), _reconstruct]
    return [*names, np.ndarray, np.dtype, *kinds, codecs.encode]


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.import_bank", description=__doc__)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("masks", type=Path)
    parser.add_argument("losses", type=Path)
    parser.add_argument("--out", type=Path, default=GROUND_TRUTH, help="default: %(default)s")
    args = parser.parse_args(argv)
    bank = make_bank(load_array(args.masks), load_array(args.losses))
    path = args.out / args.task / "evaluation.zarr"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_bank(bank.assign_attrs(task=args.task), path)
    print(
        f"{path}: {bank.sizes['subset']} subsets of {bank.sizes['train']} examples × "
        f"{bank.sizes['seed']} seeds, {bank.sizes['query']} queries"
    )


if __name__ == "__main__":
    main()
