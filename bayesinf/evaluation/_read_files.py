"""Numbers in files of other libraries; nothing that a file may ask for is run."""

from __future__ import annotations

import codecs
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["read_array", "read_lists", "read_numbers"]

_ITEM = re.compile(r"(?P<first>- )?\s*- *(?P<value>\[.*\]|-?\d+)\s*")


def read_array(path: str | os.PathLike[str]) -> np.ndarray:
    """Read the one array of a file.

    Parameters
    ----------
    path
        ``.npy``, ``.npz``, or what ``torch.save`` wrote of a tensor or a NumPy array.

    Returns
    -------
    np.ndarray
        Of numbers or booleans.

    Raises
    ------
    ValueError
        If the file holds something else.
    """
    file = Path(path)
    if file.suffix in (".npy", ".npz"):
        value: Any = np.load(file, allow_pickle=False)
        if isinstance(value, np.lib.npyio.NpzFile):
            value = [value[name] for name in value.files]
            value = value[0] if len(value) == 1 else value
    else:
        value = read_numbers(file)
    array = value.numpy() if isinstance(value, torch.Tensor) else value
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise ValueError(
            f"{path} must hold one array of numbers; got {type(value).__name__}. Save it alone: "
            f"np.save(path, array)."
        )
    return array


def read_numbers(path: str | os.PathLike[str]) -> Any:
    """Read what ``torch.save`` wrote of tensors and NumPy arrays, and dicts or lists of them."""
    with torch.serialization.safe_globals(_array_parts()):
        return torch.load(path, map_location="cpu", weights_only=True)


def read_lists(path: str | os.PathLike[str]) -> list[list[int]]:
    """Read a list of lists of integers from JSON or YAML.

    Raises
    ------
    ValueError
        If the file holds something else.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = _block_lists(text.rstrip().splitlines())
    if not isinstance(found, list) or not found or not all(map(_are_integers, found)):
        raise ValueError(
            f"{path} must hold a list of lists of positions, one list for each subset, in JSON or "
            f"YAML, such as [[0, 2], [1, 2]]."
        )
    return found


def _are_integers(own: Any) -> bool:
    return isinstance(own, list) and all(type(value) is int for value in own)


def _block_lists(lines: list[str]) -> Any:
    """Lists in YAML's block style, ``- - 3`` and ``  - 5``, or ``- [3, 5]``; None for others."""
    lists: list[Any] = []
    for line in lines:
        item = _ITEM.fullmatch(line)
        if item is None or (line[0] == " " and not lists):
            return None
        value = json.loads(item["value"])
        if line[0] == "-":
            lists.append([value] if item["first"] else value)
        else:
            lists[-1].append(value)
    return lists


def _array_parts() -> list[Any]:
    """What a saved NumPy array is made of: the only globals that such a file may name."""
    from numpy._core.multiarray import _reconstruct

    kinds = {type(np.dtype(kind)) for kind in ("bool", *np.typecodes["AllInteger"], "e", "f", "d")}
    names = [(_reconstruct, "numpy.core.multiarray._reconstruct"), _reconstruct]
    return [*names, np.ndarray, np.dtype, *kinds, codecs.encode]
