"""The store that a retraining run fills row by row and resumes from.

A Zarr v3 directory with arrays ``(subset, seed, query)``, one per measurement, and ``done``
``(subset, seed)``; one chunk a row, so that writing a row never touches another. A row's mark in
``done`` is written after its data: rows without a mark are trained again and overwritten. Several
processes may fill one store at a time, each its own rows.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import zarr

__all__ = ["MemoryRows", "Row", "ZarrRows", "open_rows"]

Row = tuple[int, int]
"""Positions of a subset and of a seed."""

FORMAT = "bayesinf-retraining-1"
DIMS = ("subset", "seed", "query")


class MemoryRows:
    """Rows kept in memory."""

    def __init__(self, shape: tuple[int, int, int], measurements: Sequence[str]) -> None:
        self.done = np.zeros(shape[:2], dtype=bool)
        self.values = {name: np.full(shape, np.nan, dtype=np.float32) for name in measurements}

    def write(self, subset: int, seed: int, row: dict[str, np.ndarray]) -> None:
        """Store the ``(query,)`` values of a row and mark it."""
        for name, value in row.items():
            self.values[name][subset, seed] = value
        self.done[subset, seed] = True

    def is_done(self, subset: int, seed: int) -> bool:
        """Whether a row has been written."""
        return bool(self.done[subset, seed])

    def read(self) -> dict[str, np.ndarray]:
        """Return all measurements, ``(subset, seed, query)``."""
        return self.values


class ZarrRows:
    """Rows kept in a Zarr directory; see :func:`open_rows`."""

    def __init__(self, group: zarr.Group, measurements: Sequence[str]) -> None:
        self._values = {name: _array(group, name) for name in measurements}
        self._marks = _array(group, "done")
        self.done = np.asarray(self._marks[:]) == 1

    def write(self, subset: int, seed: int, row: dict[str, np.ndarray]) -> None:
        """Store the ``(query,)`` values of a row, then mark it."""
        for name, value in row.items():
            self._values[name][subset, seed] = value.astype(np.float32)
        self._marks[subset, seed] = 1
        self.done[subset, seed] = True

    def is_done(self, subset: int, seed: int) -> bool:
        """Whether a row has been written, by this process or another."""
        if not self.done[subset, seed]:
            self.done[subset, seed] = np.asarray(self._marks[subset, seed]) == 1
        return bool(self.done[subset, seed])

    def read(self) -> dict[str, np.ndarray]:
        """Return all measurements, ``(subset, seed, query)``."""
        return {name: np.asarray(array[:]) for name, array in self._values.items()}


def open_rows(
    path: str | os.PathLike[str],
    identity: dict[str, Any],
    shape: tuple[int, int, int],
    measurements: Sequence[str],
) -> ZarrRows:
    """Create a store, or open one that was made with the same ``identity``.

    Raises
    ------
    ValueError
        If the store there was made with another identity (both values are shown), or the path
        holds something else.
    """
    root = Path(path)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        try:
            group = zarr.open_group(root, mode="r+", use_consolidated=False)
        except (OSError, KeyError, ValueError):
            group = None
        if group is None or group.attrs.get("format") != FORMAT:
            raise ValueError(
                f"{path} exists and is not a retraining store. Choose an empty path for store=; a "
                f"finished bank is opened with open_bank()."
            )
        made_with = group.attrs["identity"]
        assert isinstance(made_with, dict)
        _compare(made_with, identity, path)
        return ZarrRows(group, measurements)
    draft = root.with_name(f"{root.name}.{uuid.uuid4().hex}.new")
    group = zarr.create_group(draft, zarr_format=3, overwrite=True)
    for name in measurements:
        group.create_array(
            name,
            shape=shape,
            chunks=(1, 1, shape[2]),
            dtype="float32",
            fill_value=np.nan,
            dimension_names=DIMS,
        )
    group.create_array(
        "done",
        shape=shape[:2],
        chunks=(1, 1),
        dtype="uint8",
        fill_value=0,
        dimension_names=DIMS[:2],
    )
    group.attrs.update({"format": FORMAT, "identity": identity})
    if root.exists():
        with suppress(OSError):
            root.rmdir()
    try:
        os.replace(draft, root)
    except OSError:  # another worker was first
        shutil.rmtree(draft)
        return open_rows(path, identity, shape, measurements)
    return ZarrRows(zarr.open_group(root, mode="r+", use_consolidated=False), measurements)


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array


def _compare(there: dict[str, Any], here: dict[str, Any], path: str | os.PathLike[str]) -> None:
    differing = [k for k in {**there, **here} if there.get(k) != here.get(k)]
    if differing:
        lines = "; ".join(f"{k}: {there.get(k)!r} there, {here.get(k)!r} now" for k in differing)
        raise ValueError(
            f"the store {path} was made with another {', '.join(differing)} ({lines}). Rows of two "
            f"settings never share a store: give store= another path, or restore the setting."
        )
