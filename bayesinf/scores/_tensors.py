"""Scores that other libraries return as tensors, and that were saved with torch or safetensors."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bayesinf.scores._convention import Convention, Ids, convert
from bayesinf.scores._self_sign import Sign

__all__ = ["read_dattri", "read_quanda"]


def read_dattri(
    path: str | os.PathLike[str],
    *,
    query: Ids = None,
    train: Ids = None,
    n: int | None = None,
    sign: Sign = "helpful",
    measurement: str = "loss",
    method: str = "dattri",
) -> xr.Dataset:
    r"""Read what an attributor of dattri returned, saved as a tensor.

    ``attribute`` returns train × query, ``self_attribute`` ``(train,)``. Its influence functions
    are :math:`+\nabla f_q^\top (C + \lambda I)^{-1} \nabla\ell_t`, where ``f`` is the task's target
    function, so that ``influence = −score/n``. (Those that go through the training set batch by
    batch add up solutions: load it in one batch, or scores are as many times too large.)

    Parameters
    ----------
    path
        What ``torch.save(scores, path)`` wrote, or a safetensors file of the one tensor.
    query, train, measurement, method
        As of :func:`~bayesinf.scores.from_array`; ids are positions by default.
    n
        Examples of the training set, also where fewer are scored: the scores become influences.
        None: they only rank (TRAK, TracIn).
    sign
        ``"helpful"`` where target and training function are of one kind: both losses, or, as for
        TRAK, both margins. ``"harmful"`` where a loss is paired with a margin.

    Returns
    -------
    xr.Dataset
        ``influence (query, train)``; of self scores ``influence (train)``.

    Raises
    ------
    ValueError
        As in :func:`~bayesinf.scores.from_array`, and if the file holds something else than a
        tensor.

    Warns
    -----
    SignWarning
        As in :func:`~bayesinf.scores.from_array`.
    """
    file = Path(path)
    return convert(
        _load(file),
        query,
        train,
        Convention("dattri", sign, ("train", "query"), notes={"source_file": file.name}),
        measurement=measurement,
        method=method,
        n=n,
    )


def read_quanda(
    path: str | os.PathLike[str],
    *,
    query: Ids = None,
    train: Ids = None,
    n: int | None = None,
    sign: Sign = "helpful",
    measurement: str = "loss",
    method: str = "quanda",
) -> xr.Dataset:
    """Read explanations of quanda: a tensor, or the folder of its explanations cache.

    ``explain`` returns query × train, positive = proponent, in the unit of the library that it
    wraps; ``self_influence`` ``(train,)``.

    Parameters
    ----------
    path
        A tensor saved with ``torch.save`` or safetensors, or a folder of ``0.pt``, ``1.pt``, …, one
        for each batch of queries, as ``ExplanationsCache.save`` writes them.
    query, train, measurement, method
        As of :func:`~bayesinf.scores.from_array`; ids are positions by default.
    n
        Examples of the training set, where the wrapped explainer leaves ``1/n`` out (kronfluence,
        dattri): the scores become influences. None: they only rank.
    sign
        What a positive score means.

    Returns
    -------
    xr.Dataset
        ``influence (query, train)``; of self scores ``influence (train)``.

    Raises
    ------
    FileNotFoundError
        If the folder holds no explanations.
    ValueError
        As in :func:`~bayesinf.scores.from_array`, if a batch is missing, or batches do not fit.

    Warns
    -----
    SignWarning
        As in :func:`~bayesinf.scores.from_array`.
    """
    where = Path(path)
    notes: dict[str, Any] = {"source_file": where.name}
    if where.is_dir():
        files = _batches(where)
        notes["batches"] = len(files)
        tensor = _join([_load(file) for file in files], where.name)
    else:
        tensor = _load(where)
    return convert(
        tensor,
        query,
        train,
        Convention("quanda", sign, notes=notes),
        measurement=measurement,
        method=method,
        n=n,
    )


def _batches(folder: Path) -> list[Path]:
    names = [file.stem for file in folder.glob("*.pt")]
    if not names:
        raise FileNotFoundError(
            f"{folder} holds no *.pt. ExplanationsCache.save(path, tensor, i) writes i.pt."
        )
    numbers = sorted(int(name) for name in names if name.isdigit())
    if numbers != list(range(len(names))):
        raise ValueError(
            f"batches of explanations are named 0.pt, 1.pt, …; {folder.name} holds "
            f"{sorted(names)}. Usual cause: a run that was interrupted, or another folder."
        )
    return [folder / f"{number}.pt" for number in numbers]


def _join(tensors: list[Tensor], folder: str) -> Tensor:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
        raise ValueError(
            f"the batches in {folder} must be (queries, train examples), with the same examples in "
            f"each; got {shapes}."
        )
    return torch.cat(tensors)


def _load(file: Path) -> Tensor:
    """Read the one tensor of a file; nothing that a file may ask for is run."""
    try:
        if file.suffix == ".safetensors":
            held: Any = load_file(file)
            held = next(iter(held.values())) if len(held) == 1 else held
        else:
            held = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, EOFError, RuntimeError) as reason:
        raise ValueError(
            f"{file.name} cannot be read without running what it holds, or is not whole "
            f"({str(reason).splitlines()[0]}). Save the scores alone: "
            f"torch.save(torch.as_tensor(scores), path)."
        ) from reason
    if not isinstance(held, Tensor):
        what = f"a dict of {sorted(held)}" if isinstance(held, dict) else type(held).__name__
        raise ValueError(
            f"{file.name} must hold one tensor; got {what}. Save the scores alone: "
            f"torch.save(scores, path)."
        )
    return held
