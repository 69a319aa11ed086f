"""Traces: one number per chain, draw and example, as an ``xarray.DataTree`` on Zarr.

Layout of a store (Zarr v3, float32, whole chunks of one chain × ``chunk_draws`` draws × a block of
examples, written by region):

* groups ``train`` and ``query``: a variable per measurement, dims ``(chain, draw, train)`` or
  ``(chain, draw, query)``, with ids as coordinates;
* groups ``train_token`` and ``query_token``, where losses were recorded token by token and instead
  of them in the groups above: ``loss (chain, draw, train_token)`` with coordinates ``train``,
  ``train_position`` and, where there are integer ids, ``train_token_id`` (or ``query``, …);
* group ``sample_stats``: ``lp``, ``step_size``, ``diverging``, ``distance``, ``acceptance_rate``
  (mean over the steps of a draw; NaN for kernels that accept everything), ``(chain, draw)``;
* root attributes: the configuration, its identity hash, versions.

**Identity** is everything that decides what a draw is: task, checkpoint, posterior, sampler, seed,
batching, warm-up, thinning, observed examples; not how many draws there are. Opening a store for
writing with another identity is refused, with both values shown. **Commit**: one file, replaced
atomically, holds the number of draws that count and the sampler's state; whatever lies beyond it is
overwritten when sampling goes on. Nothing here knows of torch: the state is bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.storage import MemoryStore

from bayesinf._axes import Axis, Selection, as_slice, runs
from bayesinf._chains import ChainRecord
from bayesinf._disk import StoreError, disk, replacing
from bayesinf._layout import lay_out

__all__ = ["TraceStore", "open_traces"]

_READ_VALUES = 1 << 22

_HELD_VALUES = 1 << 24
"""Arrays up to this size stay in memory once read, as pairs may be asked for block by block."""


class TraceStore(ChainRecord):
    """A store of traces on disk or in memory; made by :func:`bayesinf.sample`.

    Parameters
    ----------
    path
        Directory of a Zarr group (by custom ``*.zarr``), or None for memory.

    Attributes
    ----------
    config : dict
        Everything that identifies the draws.
    draws : int
        Number of committed draws per chain.
    chains : int
        Number of chains, failed ones included.
    """

    def __init__(self, path: str | os.PathLike[str] | None, root: Any, store: Any) -> None:
        self.path = None if path is None else Path(path)
        self._root = root  # a zarr.Group, whose static types do not follow paths into groups
        self._store = store
        self.config: dict[str, Any] = self._root.attrs["config"]
        self._facts: dict[str, Any] = {"draws_written": 0}
        self._kept: bytes | None = None  # the payload of a store in memory
        self.draws = 0
        self._with_tokens = [g for g in ("train", "query") if f"{g}_token" in root]
        self._ids: dict[str, np.ndarray] = {}
        self._axes: dict[str, Axis] = {}
        self._held: dict[str, np.ndarray] = {}
        self._read_commit()

    # ------------------------------------------------------------------ making and opening

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str] | None,
        config: Mapping[str, Any],
        ids: Mapping[str, np.ndarray],
        measurements: Mapping[str, list[str]],
        draws: int,
        tokens: Mapping[str, Axis] | None = None,
    ) -> TraceStore:
        """Make an empty store; ``ids``, ``measurements`` and ``tokens`` are by group.

        In the groups of ``tokens`` the loss is that of tokens.
        """
        if path is None:
            store = MemoryStore()
            root = lay_out(store, config, ids, measurements, draws, tokens or {})
            return cls(None, root, store)
        final = Path(path)
        partial = final.with_name(f".{final.name}.partial")
        with disk(f"making a store at {os.fspath(path)!r}"):
            lay_out(partial, config, ids, measurements, draws, tokens or {})
            os.rename(partial, final)  # whole or not at all, whenever the process is killed
        return cls.open(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TraceStore:
        """Open a store that exists.

        Raises
        ------
        StoreError
            If there is no store at ``path``, or it holds something else.
        """
        try:
            root = zarr.open_group(Path(path), mode="r+")
        except (OSError, zarr.errors.ContainsArrayError) as error:
            if os.path.exists(path):
                raise StoreError(
                    f"{os.fspath(path)!r} exists and is no trace store; give sample() another "
                    f"path, it never overwrites what it did not write."
                ) from error
            raise StoreError(
                f"there is no trace store at {os.fspath(path)!r}. Make one with "
                f"bayesinf.sample(..., store={os.fspath(path)!r})."
            ) from error
        if "config" not in root.attrs or "sample_stats" not in root:
            raise StoreError(
                f"{os.fspath(path)!r} is a Zarr group but holds no traces of bayesinf.sample; "
                f"give sample() another path, it never overwrites what it did not write."
            )
        return cls(path, root, Path(path))

    # ------------------------------------------------------------------ writing

    @property
    def chunk_draws(self) -> int:
        """Draws of one chunk: what a writer should collect before it writes."""
        return int(self._root["sample_stats/lp"].chunks[1])

    def grow(self, draws: int) -> None:
        """Make room for ``draws`` draws in all."""
        with disk(f"making room for {draws} draws in {self.path}"):
            for _, array in self._arrays():
                names = array.metadata.dimension_names or ()
                if "draw" in names and array.shape[names.index("draw")] < draws:
                    shape = [
                        draws if n == "draw" else s for n, s in zip(names, array.shape, strict=True)
                    ]
                    array.resize(tuple(shape))
                if names == ("draw",) and array[-1] != array.shape[0] - 1:  # or after a kill here
                    array[:] = np.arange(array.shape[0])

    def append(
        self, values: Mapping[str, np.ndarray], payload: bytes, extra: Mapping[str, Any]
    ) -> None:
        """Write draws after the committed ones, then commit them.

        Parameters
        ----------
        values
            By ``"group/variable"``: arrays ``(chain, new draws, …)``.
        payload
            The sampler's state after the last of these draws.
        extra
            JSON-able facts kept in the commit, such as which chains failed.

        Raises
        ------
        StoreError
            If the disk refuses (full, read-only): the committed draws stay as they are.
        """
        count = {v.shape[1] for v in values.values()} or {0}
        (k,) = count
        with disk(
            f"writing {k} draws to {self.path}",
            f"The {self.draws} draws before them are committed and intact; free space (or mend the "
            f"disk) and call sample() again with the same arguments to go on.",
        ):
            self._held.clear()
            for name, array in values.items():
                self._root[name][:, self.draws : self.draws + k] = array
            self._commit(self.draws + k, payload, extra)

    def flush(self) -> None:
        """Nothing waits: what was appended is committed."""

    def _commit(self, draws: int, payload: bytes, extra: Mapping[str, Any]) -> None:
        line = json.dumps({"draws_written": draws, **extra})
        if self.path is None:
            self._kept = payload
        else:
            with replacing(self._commit_path()) as file:
                file.write(line.encode() + b"\n")
                file.write(payload)
        self._facts, self.draws = json.loads(line), draws

    def _commit_path(self) -> Path:
        # Inside an array's folder, which Zarr readers never list.
        assert self.path is not None
        return self.path / "sample_stats" / "lp" / "commit"

    def _read_commit(self) -> None:
        if self.path is not None and self._commit_path().exists():
            with self._commit_path().open("rb") as file:
                self._facts = json.loads(file.readline())
            self.draws = int(self._facts["draws_written"])

    @property
    def payload(self) -> bytes | None:
        """The sampler's state at the last commit, or None before the first."""
        if self.path is None or not self._commit_path().exists():
            return self._kept
        with self._commit_path().open("rb") as file:
            file.readline()
            return file.read()

    @property
    def commit_facts(self) -> dict[str, Any]:
        """What the last commit says."""
        return dict(self._facts)

    # ------------------------------------------------------------------ reading

    @property
    def tree(self) -> xr.DataTree:
        """All committed draws, failed chains included, read lazily."""
        tree = xr.open_datatree(
            self._store,
            engine="zarr",
            consolidated=False,
        )
        cut = {name: node.to_dataset().isel(draw=slice(self.draws)) for name, node in tree.items()}
        out = xr.DataTree.from_dict(cut)
        out.attrs = dict(tree.attrs)
        return out

    def ids(self, group: str) -> np.ndarray:
        """Ids of the observed examples of ``"train"`` or ``"query"``."""
        if group not in self._ids:
            self._ids[group] = np.asarray(self._root[group][group][:])
        return self._ids[group]

    def axis(self, group: str, *, tokens: bool = False) -> Axis:
        """Labels of the observed examples of a group, or of their tokens.

        Parameters
        ----------
        group
            ``"train"`` or ``"query"``.
        tokens
            Of the tokens.

        Raises
        ------
        KeyError
            If tokens were not recorded.
        """
        if not tokens:
            return Axis(group, self.ids(group))
        if group not in self._axes:
            if not self.has_tokens(group):
                self.refuse_tokens(group)
            stored, examples = self._root[f"{group}_token"], self.ids(group)
            own = np.asarray(stored[group][:])
            starts = np.flatnonzero(np.concatenate([[True], own[1:] != own[:-1], [True]]))
            name = f"{group}_token_id"
            token_id = np.asarray(stored[name][:]) if name in stored else None
            position = np.asarray(stored[f"{group}_position"][:])
            self._axes[group] = Axis(group, examples, starts, position, token_id)
        return self._axes[group]

    def has_tokens(self, group: str) -> bool:
        """Whether the losses of a group were recorded token by token."""
        return group in self._with_tokens

    def values(
        self, group: str, measurement: str = "loss", *, tokens: bool = False
    ) -> xr.DataArray:
        """Draws of the healthy chains, ``(chain, draw, example)`` or ``(chain, draw, token)``.

        Parameters
        ----------
        group
            ``"train"`` or ``"query"``.
        measurement
            What was recorded of it.
        tokens
            The losses of tokens. Without it, losses that were recorded token by token are summed
            over the tokens of each example, in float64.

        Raises
        ------
        KeyError
            If the group, the measurement or its tokens were not recorded.
        StoreError
            If no draw is committed or every chain failed.

        Warns
        -----
        FailedChainsWarning
            Where chains failed, by number.
        """
        self._check_recorded(group, measurement, tokens)
        self.warn_of_failures(stacklevel=2)
        data = self.read(group, measurement, Selection(tokens))
        data = data if data.flags.writeable else data.copy()
        axis = self.axis(group, tokens=tokens)
        coords = {"chain": self.healthy, "draw": np.arange(self.draws), **axis.coords()}
        if not tokens:
            coords[group] = self.ids(group)
        return xr.DataArray(data, dims=("chain", "draw", axis.dim), coords=coords, name=measurement)

    def read(
        self, group: str, measurement: str = "loss", what: Selection | None = None
    ) -> np.ndarray:
        """Draws of the healthy chains as an array; only what is wanted is read.

        Parameters
        ----------
        group, measurement
            As of :meth:`values`, with the same errors.
        what
            Tokens or examples, all or some; None for all examples.

        Returns
        -------
        np.ndarray
            ``(chain, draw, entry)``: float32 as recorded, or float64 where tokens are summed.
        """
        what = what or Selection()
        self._check_recorded(group, measurement, what.tokens)
        by_token = measurement == "loss" and self.has_tokens(group)
        name = f"{group}_token/{measurement}" if by_token else f"{group}/{measurement}"
        if what.tokens == by_token:
            return self._columns(name, what.pick)
        axis = self.axis(group, tokens=True)
        assert axis.starts is not None
        pick = np.arange(len(axis.examples)) if what.pick is None else what.pick
        out = np.empty((len(self.healthy), self.draws, len(pick)))
        longest = int(np.diff(axis.starts).max())
        step = max(1, _READ_VALUES // (longest * self.draws * len(self.healthy)))
        for start in range(0, len(pick), step):
            own = pick[start : start + step]
            first = np.concatenate([[0], np.diff(axis.starts)[own].cumsum()[:-1]])
            entries = runs(axis.starts[own], axis.starts[own + 1])
            tokens = self._columns(name, entries)
            out[:, :, start : start + step] = np.add.reduceat(
                tokens, first, axis=2, dtype=np.float64
            )
        return out

    def _columns(self, name: str, pick: np.ndarray | None) -> np.ndarray:
        """Committed draws of the healthy chains, all columns or some; of a small array held."""
        where = slice(None) if pick is None else as_slice(pick)
        if name not in self._held:
            array = self._root[name]
            if self.draws * array.shape[0] * array.shape[2] > _HELD_VALUES:
                read = array if isinstance(where, slice) else array.oindex
                found = np.asarray(read[:, : self.draws, where])
                return found if not self.failed else found[self.healthy]
            self._held[name] = np.asarray(array[:, : self.draws])
            self._held[name].setflags(write=False)
        found = self._held[name][:, :, where]
        return found if not self.failed else found[self.healthy]

    def _check_recorded(self, group: str, measurement: str, tokens: bool) -> None:
        recorded = measurement in self.config["measurements"].get(group, ())
        if not recorded:
            have = {g: sorted(v) for g, v in self.config["measurements"].items()}
            raise KeyError(
                f"{measurement!r} of {group!r} was not recorded; this store has {have}. Record it "
                f"with sample(..., measurements=[…], observe=…)."
            )
        if tokens and (measurement != "loss" or not self.has_tokens(group)):
            self.refuse_tokens(group, measurement)
        if not self.draws or not self.healthy:
            raise StoreError(
                "the store holds no draw yet." if self.healthy else "every chain failed."
            )

    def to_arviz(self) -> xr.DataTree:
        """Healthy chains in ArviZ's layout.

        ``log_likelihood`` is ``−(nβ/n)·loss`` per train example, the log-likelihood of the tempered
        posterior, so that ``Cov(φ, log_likelihood)`` is the influence. ArviZ's ``loo`` on it
        estimates out-of-sample prediction only where ``n_beta == n``. ``posterior`` holds functions
        of the weights (mean losses and the distance to the checkpoint), not the weights.
        """
        train, query = self.values("train"), self.values("query")
        scale = self.config["posterior"]["n_beta"] / self.config["task"]["n"]
        stats = self.tree["sample_stats"].to_dataset().isel(chain=self.healthy).load()
        posterior = xr.Dataset(
            {
                "mean_train_loss": train.mean("train"),
                "mean_query_loss": query.mean("query"),
                "distance": stats["distance"],
            }
        )
        groups = {
            "posterior": posterior,
            "log_likelihood": (-scale * train).rename("loss").to_dataset(),
            "sample_stats": stats.drop_vars("distance"),
        }
        return xr.DataTree.from_dict(groups)

    def _arrays(self) -> list[tuple[str, Any]]:
        return [(k, v) for k, v in self._root.members(max_depth=2) if isinstance(v, zarr.Array)]


def open_traces(path: str | os.PathLike[str]) -> TraceStore:
    """Open the traces that :func:`bayesinf.sample` stored at ``path``.

    Parameters
    ----------
    path
        The ``store=`` of that call.

    Returns
    -------
    TraceStore
        With all committed draws.

    Raises
    ------
    StoreError
        If there is no store at ``path``, or it holds something else.
    """
    return TraceStore.open(path)
