"""Where blocks of scores go: a matrix in memory, the extremes of every query, a Zarr store.

A block is ``{variable: array (…, rows, columns)}``; one of the variables is ``influence (rows,
columns)``, and what has a dimension before rows and columns (modules, say) is named beforehand.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import xarray as xr
import zarr

from bayesinf._axes import Axis, axes
from bayesinf._disk import replacing
from bayesinf._layout import identity
from bayesinf._scores import finite, label_scores, text_labels

__all__ = ["COLUMNS", "ROWS", "Block", "Leading", "MatrixSink", "Sink", "StoreSink", "TopSink"]

Block = Mapping[str, np.ndarray]
Leading = tuple[str, np.ndarray | None]
"""Name and labels of the dimension before rows and columns."""

ROWS, COLUMNS = 256, 4096
"""Of a chunk of scores on disk."""

_FINITE = {"influence", "gradient"}
"""Variables that are refused where they are not finite."""

_SIDES = text_labels(np.array(["helpful", "harmful"]))


class Sink(Protocol):
    """Takes the blocks of a score matrix, in order.

    Attributes
    ----------
    errors
        Largest errors of approximations by name, over all blocks of queries so far.
    """

    errors: dict[str, float]

    def done(self, rows: slice, columns: slice) -> bool:
        """Whether the block was written by an earlier run."""
        ...

    def write(self, rows: slice, columns: slice, block: Block) -> None:
        """Take a block."""
        ...

    def finish(self, method: str, estimand: str, attrs: dict[str, Any]) -> xr.Dataset:
        """Return the labelled scores."""
        ...


class MatrixSink:
    """All scores in memory.

    Parameters
    ----------
    query, train
        The axes.
    leading
        Of variables that have a dimension before rows and columns.
    """

    def __init__(self, query: Axis, train: Axis, leading: Mapping[str, Leading]) -> None:
        self.query, self.train, self.leading = query, train, leading
        self.errors: dict[str, float] = {}
        self.values: dict[str, np.ndarray] = {}

    def done(self, rows: slice, columns: slice) -> bool:
        """Nothing is."""
        return False

    def write(self, rows: slice, columns: slice, block: Block) -> None:
        """Keep the block."""
        for name, array in block.items():
            if name not in self.values:
                shape = (*array.shape[:-2], self.query.size, self.train.size)
                self.values[name] = np.empty(shape, dtype=array.dtype)
            self.values[name][..., rows, columns] = array

    def finish(self, method: str, estimand: str, attrs: dict[str, Any]) -> xr.Dataset:
        """Label the matrix."""
        dims, coords = axes(self.query, self.train)
        arrays: dict[str, Any] = {}
        for name, values in self.values.items():
            before = self.leading[name][:1] if name in self.leading else ()
            arrays[name] = ((*before, *dims), values)
        coords.update(_labels(self.leading))
        return label_scores(arrays, coords, method, estimand, attrs)


class TopSink:
    """The most helpful and the most harmful of every query, with whatever else is known of them."""

    def __init__(self, query: Axis, train: Axis, k: int) -> None:
        self.query, self.train, self.k = query, train, min(k, train.size)
        self.errors: dict[str, float] = {}
        self.values: dict[str, np.ndarray] = {}
        self.places = np.zeros((query.size, 2, self.k), dtype=np.int64)

    def done(self, rows: slice, columns: slice) -> bool:
        """Nothing is."""
        return False

    def write(self, rows: slice, columns: slice, block: Block) -> None:
        """Merge the block into what is kept."""
        finite("influence", block["influence"], self.query.ids[rows], self.train.ids[columns])
        if not self.values:
            for name, array in block.items():
                self.values[name] = np.zeros(self.places.shape, dtype=array.dtype)
            self.values["influence"][:] = np.array([np.inf, -np.inf])[:, None]
        for row in range(rows.start, rows.stop):
            own = {name: array[row - rows.start] for name, array in block.items()}
            for side, sign in enumerate((1, -1)):
                self._merge((row, side), sign, own, columns.start)

    def _merge(self, at: tuple[int, int], sign: int, own: Block, first: int) -> None:
        """Merge one query's scores; of equal ones those that came first stay first."""
        near = _smallest(sign * own["influence"], self.k)
        values = np.concatenate([self.values["influence"][at], own["influence"][near]])
        order = np.argsort(sign * values, kind="stable")[: self.k]
        for name, kept in self.values.items():
            kept[at] = np.concatenate([kept[at], own[name][near]])[order]
        self.places[at] = np.concatenate([self.places[at], near + first])[order]

    def finish(self, method: str, estimand: str, attrs: dict[str, Any]) -> xr.Dataset:
        """Label what was kept."""
        dims = (self.query.dim, "side", "rank")
        coords: dict[str, Any] = {
            **self.query.coords(),
            "side": _SIDES,
            "rank": np.arange(self.k),
        }
        for name, labels in self.train.coords().items():
            array = labels[1] if isinstance(labels, tuple) else labels
            coords[name] = (dims, array[self.places])
        more = {**attrs, "top_k": self.k}
        arrays: dict[str, Any] = {name: (dims, kept) for name, kept in self.values.items()}
        return label_scores(arrays, coords, method, estimand, more)


class StoreSink:
    """A folder with a Zarr store that blocks are written to by region; a killed run resumes in it.

    ``scores`` is the Zarr store, ``progress.json`` names the blocks that are done: it is replaced
    atomically after a block is on disk. A method may keep its curvature beside them.

    Parameters
    ----------
    path
        The folder.
    query, train
        The axes.
    variables
        Names, with the dimension before rows and columns of those that have one.
    config
        What identifies the scores.
    dtype
        In which they are kept.
    holds
        What the folder holds, for messages.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        query: Axis,
        train: Axis,
        variables: Mapping[str, Leading | None],
        config: dict[str, Any],
        dtype: str,
        holds: Literal["scores", "gradients"] = "scores",
    ) -> None:
        self.path, self.variables, self.holds = Path(path), variables, holds
        self._scores = self.path / "scores"
        self.query, self.train = query, train
        self._progress = self.path / "progress.json"
        self._done: set[str] = set()
        self.errors: dict[str, float] = {}
        if self._progress.exists():
            self._resume(config)
        else:
            self._create(config, dtype)
        self._written = False
        self._group: Any = zarr.open_group(self._scores, mode="r+")

    def done(self, rows: slice, columns: slice) -> bool:
        """Whether the block was written by an earlier run."""
        return _key(rows, columns) in self._done

    def write(self, rows: slice, columns: slice, block: Block) -> None:
        """Write the block, then mark it as done."""
        for name in _FINITE & block.keys():
            finite(name, block[name], self.query.ids[rows], self.train.ids[columns])
        for name, array in block.items():
            self._group[name][..., rows, columns] = array
        self._done.add(_key(rows, columns))
        self._written = True
        self._commit()

    def read(self, rows: slice, columns: slice) -> dict[str, np.ndarray]:
        """Read a block that is done."""
        return {name: self._group[name][..., rows, columns] for name in self.variables}

    def finish(self, method: str, estimand: str, attrs: dict[str, Any]) -> xr.Dataset:
        """Open the store lazily; a run that wrote nothing leaves its labels as they are."""
        if self._written or "method" not in self._group.attrs:
            self._group.attrs.update(label_scores({}, {}, method, estimand, attrs).attrs)
        return xr.open_zarr(self._scores, consolidated=False, chunks=None)

    def _create(self, config: dict[str, Any], dtype: str) -> None:
        names = {p.name for p in self.path.iterdir()} if self.path.exists() else set()
        if not names <= {"curvature", "scores", "progress.tmp"}:
            raise ValueError(
                f"{self._shown} exists and is no {self.holds[:-1]} store. Choose another path, or "
                f"remove it if it is not needed."
            )
        dims, coords = axes(self.query, self.train)
        named = {name: before for name, before in self.variables.items() if before is not None}
        coords.update(_labels(named))
        xr.Dataset(coords=coords).to_zarr(self._scores, mode="w", consolidated=False)
        group = zarr.open_group(self._scores, mode="r+")
        shape = (self.query.size, self.train.size)
        chunks = (min(shape[0], ROWS), min(shape[1], COLUMNS))
        for name, before in self.variables.items():
            dim, labels = ("", None) if before is None else before
            lead = () if labels is None else (len(labels),)
            every = (dim, *dims) if lead else dims
            self._array(group, name, every, (*lead, *shape), (*(1 for _ in lead), *chunks), dtype)
        self._config = config
        self._commit()

    @staticmethod
    def _array(
        group: Any, name: str, dims: tuple[str, ...], shape: Any, chunks: Any, dtype: str
    ) -> None:
        group.create_array(
            name,
            shape=shape,
            chunks=chunks,
            dtype=dtype,
            fill_value=float("nan"),
            dimension_names=list(dims),
            overwrite=True,
        )

    def _resume(self, config: dict[str, Any]) -> None:
        held = json.loads(self._progress.read_text())
        self._config = held["config"]
        if identity(held["config"]) != identity(config):
            keys = sorted(set(held["config"]) | set(config))
            odd = [
                f"{k}: {held['config'].get(k)!r} there, {config.get(k)!r} here"
                for k in keys
                if held["config"].get(k) != config.get(k)
            ]
            raise ValueError(
                f"{self._shown} holds {self.holds} of another run: {'; '.join(odd)}. "
                f"Choose another path, or run with the settings that it was made with."
            )
        self._done, self.errors = set(held["done"]), held["errors"]

    @property
    def _shown(self) -> str:
        option = "store" if self.holds == "scores" else self.holds
        return f"{option}={os.fspath(self.path)!r}"

    def _commit(self) -> None:
        held = {"config": self._config, "done": sorted(self._done), "errors": self.errors}
        with replacing(self._progress) as file:
            file.write(json.dumps(held).encode())


def _labels(leading: Mapping[str, Leading]) -> dict[str, np.ndarray]:
    """Coordinates of the dimensions before rows and columns."""
    return {dim: text_labels(labels) for dim, labels in leading.values() if labels is not None}


def _smallest(values: np.ndarray, k: int) -> np.ndarray:
    """Places of the ``k`` smallest, in the order of places; of equal ones the first."""
    if len(values) <= k:
        return np.arange(len(values))
    bound = np.partition(values, k - 1)[k - 1]
    below, equal = np.flatnonzero(values < bound), np.flatnonzero(values == bound)
    return np.sort(np.concatenate([below, equal[: k - len(below)]]))


def _key(rows: slice, columns: slice) -> str:
    return f"{rows.start}:{rows.stop},{columns.start}:{columns.stop}"
