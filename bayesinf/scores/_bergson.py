"""Scores of bergson, from the folder that it maps into memory.

``scores.bin`` is an array of structures, a row for each training sequence (or token), with fields
``score_q`` and ``written_q`` for each query ``q``; ``info.json`` describes them. ``offsets.npy``
says which rows are whose tokens, ``candidates.npy`` which sequences have rows, and ``config.yaml``
what the run was asked for.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import xarray as xr

from bayesinf.scores._convention import Convention, Ids, convert
from bayesinf.scores._self_sign import Sign

__all__ = ["read_bergson"]


def read_bergson(
    path: str | os.PathLike[str],
    *,
    query: Ids = None,
    train: Ids = None,
    n: int | None = None,
    sign: Sign | None = None,
    measurement: str = "loss",
    method: str = "bergson",
) -> xr.Dataset:
    r"""Read a folder of scores of bergson.

    Its scores of a Hessian approximation are
    :math:`+\nabla\varphi_q^\top (C + \lambda I)^{-1} \nabla\ell_t`, so that ``influence =
    −score/n``; its unrolled ones have the sign of the influence. The file is train × query. Scores
    by token add up to their sequence's, and are added.

    Parameters
    ----------
    path
        The folder with ``info.json`` and ``scores.bin``.
    query, measurement, method
        As of :func:`~bayesinf.scores.from_array`; ids are positions by default.
    train
        Ids of the sequences that have rows; by default their positions in the training set.
    n
        Examples of the training set, also where fewer are scored: the scores become influences.
        None: they only rank.
    sign
        As of :func:`~bayesinf.scores.from_array`. By default from ``higher_is_better`` in the
        run's ``config.yaml``.

    Returns
    -------
    xr.Dataset
        ``influence (query, train)``.

    Raises
    ------
    FileNotFoundError
        If the folder holds no scores.
    ValueError
        As in :func:`~bayesinf.scores.from_array`; if some scores were never written, the file is of
        another length than it says, or its sign is not known.

    Warns
    -----
    SignWarning
        As in :func:`~bayesinf.scores.from_array`.
    """
    folder = Path(path)
    missing = [name for name in ("info.json", "scores.bin") if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {' and no '.join(missing)}. bergson's score step writes both into "
            f"its run path."
        )
    info = json.loads((folder / "info.json").read_text())
    scores = _read(folder / "scores.bin", info)
    notes: dict[str, Any] = {}
    if info.get("attribute_tokens"):
        notes["summed_tokens"] = len(scores)
        scores = _sum_tokens(scores, np.load(folder / "offsets.npy"))
    if train is None and (folder / "candidates.npy").exists():
        train = np.load(folder / "candidates.npy")
    return convert(
        scores,
        query,
        train,
        Convention("bergson", sign or _recorded_sign(folder), ("train", "query"), notes=notes),
        measurement=measurement,
        method=method,
        n=n,
    )


def _read(file: Path, info: dict[str, Any]) -> np.ndarray:
    """Scores ``(rows, queries)``, float64."""
    described = dict(info["dtype"])
    described["formats"] = ["<u2" if f == "bfloat16" else f for f in described["formats"]]
    dtype = np.dtype(cast(Any, described))
    rows, queries = info["num_rows"], info["num_scores"]
    expected, size = rows * dtype.itemsize, file.stat().st_size
    if size != expected:
        raise ValueError(
            f"{file.name} has {size} bytes and info.json describes {rows} rows of "
            f"{dtype.itemsize}, {expected} bytes. Usual cause: a copy that was cut short."
        )
    held = np.memmap(file, dtype=dtype, mode="r", shape=(rows,))
    scores, unwritten = np.empty((rows, queries)), 0
    for q in range(queries):
        column = held[f"score_{q}"]
        if column.dtype == np.uint16:  # the upper half of a float32; NumPy has no bfloat16
            column = (column.astype(np.uint32) << 16).view(np.float32)
        scores[:, q] = column
        unwritten += int((~held[f"written_{q}"]).sum())
    if unwritten:
        raise ValueError(
            f"{unwritten} of {scores.size} scores were never written: the run was interrupted. Run "
            f"it again on the same path, and it goes on where it stopped."
        )
    return scores


def _sum_tokens(scores: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum rows ``offsets[i]:offsets[i+1]``; of a sequence without tokens 0."""
    sums = np.zeros((len(offsets) - 1, scores.shape[1]))
    filled = offsets[1:] > offsets[:-1]
    sums[filled] = np.add.reduceat(scores, offsets[:-1][filled])
    return sums


def _recorded_sign(folder: Path) -> Sign:
    """From the entry ``higher_is_better`` directly below ``score_cfg``."""
    config = folder / "config.yaml"
    text = config.read_text() if config.exists() else ""
    block = re.search(r"^( *)score_cfg:\n((?:\1 +\S.*\n?)+)", text, re.MULTILINE)
    own = re.search(r"\A( +)", block[2]) if block else None
    found = (
        re.search(rf"^{own[1]}higher_is_better: (true|false)$", block[2], re.MULTILINE)
        if block and own
        else None
    )
    if found is None:
        raise ValueError(
            f"{folder.name} does not record what a positive score means (no config.yaml with "
            f"score_cfg: higher_is_better). Say it: sign='helpful' for gradient similarities and "
            f"influence functions, sign='harmful' for unrolled differentiation."
        )
    return "helpful" if found[1] == "true" else "harmful"
