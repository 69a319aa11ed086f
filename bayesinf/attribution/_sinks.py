"""Where blocks of scores go: a matrix in memory, the extremes of every query, a Zarr store."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xarray as xr
import zarr

from bayesinf._disk import replacing
from bayesinf._layout import identity
from bayesinf._scores import finite, label_scores, text_labels
from bayesinf.attribution._labels import Labels

__all__ = ["MatrixSink", "Sink", "StoreSink", "TopSink"]

_SIDES = text_labels(np.array(["helpful", "harmful"]))


class Sink(Protocol):
    """Takes the blocks of a score matrix ``(module, query, train)``, in order.

    Attributes
    ----------
    errors
        Largest errors of approximations by name, over all blocks of queries so far.
    """

    errors: dict[str, float]

    def done(self, rows: slice, columns: slice) -> bool:
        """Whether the block was written by an earlier run."""
        ...

    def write(self, rows: slice, columns: slice, block: np.ndarray) -> None:
        """Take a block ``(module, rows, columns)``."""
        ...

    def finish(self, method: str, estimand: str, attrs: dict[str, Any]) -> xr.Dataset:
        """Return the labelled scores."""
        ...


class MatrixSink:
    """All scores in memory."""

    def __init__(self, query: Labels, train: Labels, modules: list[str] | None) -> None:
        self.query, self.train, self.modules = query, train, modules
        self.errors: dict[str, float] = {}
        self.values: np.ndarray | None = None

    def done(self, rows: slice, columns: slice) -> bool:
        """Nothing is."""
        return False

    def write(self, rows: slice, columns: slice, block: np.ndarray) -> None:
        """Keep the block."""
        if self.values is None:
            shape = (len(block), self.query.size, self.train.size)
            self.values = np.empty(shape, dtype=block.dtype)
        self.values[:, rows, columns] = block

    def finish(self, method: str, estimand: str, attrs: dict[str, Any]) -> xr.Dataset:
        """Label the matrix."""
        assert self.values is not None
        dims, coords = axes(self.query, self.train)
        arrays: dict[str, Any] = {"influence": (dims, self.values.sum(0))}
        if self.modules is not None:
            arrays["influence_by_module"] = (("module", *dims), self.values)
            coords["module"] = text_labels(np.array(self.modules))
        return label_scores(arrays, coords, method, estimand, attrs)


class TopSink:
    """The most helpful and the most harmful of every query."""

    def __init__(self, query: Labels, train: Labels, k: int) -> None:
        self.query, self.train, self.k = query, train, min(k, train.size)
        self.errors: dict[str, float] = {}
        self.values: np.ndarray | None = None
        self.places = np.zeros((query.size, 2, self.k), dtype=np.int64)

    def done(self, rows: slice, columns: slice) -> bool:
        """Nothing is."""
        return False

    def write(self, rows: slice, columns: slice, block: np.ndarray) -> None:
        """Merge the block into what is kept."""
        scores = block.sum(0)
        finite("influence", scores, self.query.ids[rows], self.train.ids[columns])
        if self.values is None:
            self.values = np.full(self.places.shape, np.inf, dtype=scores.dtype)
        places = np.broadcast_to(np.arange(columns.start, columns.stop), scores.shape)
        for side, sign in enumerate((1, -1)):
            values = np.concatenate([self.values[rows, side], sign * scores], axis=1)
            where = np.concatenate([self.places[rows, side], places], axis=1)
            order = np.argsort(values, axis=1, kind="stable")[:, : self.k]
            self.values[rows, side] = np.take_along_axis(values, order, axis=1)
            self.places[rows, side] = np.take_along_axis(where, order, axis=1)

    def finish(self, method: str, estimand: str, attrs: dict[str, Any]) -> xr.Dataset:
        """Label what was kept."""
        assert self.values is not None
        dims = (self.query.dim, "side", "rank")
        values = self.values * np.array([1, -1], dtype=self.values.dtype)[:, None]
        coords: dict[str, Any] = {
            **self.query.coords(),
            "side": _SIDES,
            "rank": np.arange(self.k),
        }
        for name, labels in self.train.coords().items():
            array = labels[1] if isinstance(labels, tuple) else labels
            coords[name] = (dims, array[self.places])
        more = {**attrs, "top_k": self.k}
        return label_scores({"influence": (dims, values)}, coords, method, estimand, more)


class StoreSink:
    """A folder with a Zarr store that blocks are written to by region; a killed run resumes in it.

    ``scores`` is the Zarr store, ``progress.json`` names the blocks that are done: it is replaced
    atomically after a block is on disk. A method may keep its curvature beside them.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        query: Labels,
        train: Labels,
        modules: list[str] | None,
        config: dict[str, Any],
        dtype: str,
    ) -> None:
        self.path, self.modules = Path(path), modules
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

    def write(self, rows: slice, columns: slice, block: np.ndarray) -> None:
        """Write the block, then mark it as done."""
        finite("influence", block.sum(0), self.query.ids[rows], self.train.ids[columns])
        self._group["influence"][rows, columns] = block.sum(0)
        if self.modules is not None:
            self._group["influence_by_module"][:, rows, columns] = block
        self._done.add(_key(rows, columns))
        self._written = True
        self._commit()

    def finish(self, method: str, estimand: str, attrs: dict[str, Any]) -> xr.Dataset:
        """Open the store lazily; a run that wrote nothing leaves its labels as they are."""
        if self._written or "method" not in self._group.attrs:
            self._group.attrs.update(label_scores({}, {}, method, estimand, attrs).attrs)
        return xr.open_zarr(self._scores, consolidated=False, chunks=None)

    def _create(self, config: dict[str, Any], dtype: str) -> None:
        names = {p.name for p in self.path.iterdir()} if self.path.exists() else set()
        if not names <= {"curvature", "scores", "progress.tmp"}:
            raise ValueError(
                f"store={os.fspath(self.path)!r} exists and is no score store. Choose another "
                f"path, or remove it if it is not needed."
            )
        dims, coords = axes(self.query, self.train)
        if self.modules is not None:
            coords["module"] = text_labels(np.array(self.modules))
        xr.Dataset(coords=coords).to_zarr(self._scores, mode="w", consolidated=False)
        group = zarr.open_group(self._scores, mode="r+")
        shape = (self.query.size, self.train.size)
        chunks = (min(shape[0], 256), min(shape[1], 4096))
        self._array(group, "influence", dims, shape, chunks, dtype)
        if self.modules is not None:
            count = len(self.modules)
            self._array(
                group,
                "influence_by_module",
                ("module", *dims),
                (count, *shape),
                (1, *chunks),
                dtype,
            )
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
                f"store={os.fspath(self.path)!r} holds scores of another run: {'; '.join(odd)}. "
                f"Choose another path, or run with the settings that it was made with."
            )
        self._done, self.errors = set(held["done"]), held["errors"]

    def _commit(self) -> None:
        held = {"config": self._config, "done": sorted(self._done), "errors": self.errors}
        with replacing(self._progress) as file:
            file.write(json.dumps(held).encode())


def axes(query: Labels, train: Labels) -> tuple[tuple[str, str], dict[str, Any]]:
    """Dimensions and coordinates of a score matrix."""
    return (query.dim, train.dim), {**query.coords(), **train.coords()}


def _key(rows: slice, columns: slice) -> str:
    return f"{rows.start}:{rows.stop},{columns.start}:{columns.stop}"
