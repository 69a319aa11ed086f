"""A store that keeps sums instead of traces: its size does not depend on the number of draws."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.sparse import csr_array

from bayesinf._axes import Axis, Selection
from bayesinf._chains import ChainRecord
from bayesinf._covariance import CrossCovariance, combine
from bayesinf._disk import StoreError, disk, replacing
from bayesinf._running_sums import Part, RunningSums, Segments, Terms

__all__ = ["StreamingCovariance"]

_KIND = "bayesinf streaming covariance 1"
_COMMIT_SECONDS = 30.0
_COMMIT_SHARE = 0.05


class StreamingCovariance(ChainRecord):
    """Sums from which :func:`bayesinf.bif` makes the same scores as from traces.

    Give one to :func:`bayesinf.sample` as ``store=``: it then keeps sums over 12 to 24 batches of
    draws (one per chain where there are 12 chains or more) of train loss times query measurement,
    and sums of either and of their squares. For ``B`` batches this takes about ``8·B·Q·N`` bytes
    (``Q`` query values, ``N`` train examples, or tokens with ``sample(..., tokens=…)``, ``B`` at
    most ``2·chains·⌈12 / chains⌉``) however many draws there are, where traces take ``4·(Q + N)``
    bytes per draw: streams are for long runs and few queries. Traces can be looked at again, sums
    cannot: no rank R-hat, no plot of a chain, no ArviZ.

    Parameters
    ----------
    path
        One file, replaced atomically at every commit; continued where it exists. None for memory.
    dtype
        Of the sums of products, ``"float64"`` or ``"float32"``, which halves the memory; by default
        that of the file, or float64. Every block of draws is summed in float64, of losses less
        those of the first draw, so that float32 costs about ``10⁻⁶`` of a score's size: far less
        than its Monte-Carlo error.

    Attributes
    ----------
    config : dict
        Everything that identifies the draws; empty before the first.
    draws : int
        Number of draws per chain in the sums.

    Raises
    ------
    StoreError
        If ``path`` exists and is no such file, or is one of another ``dtype``.
    ValueError
        If ``dtype`` is neither.

    Notes
    -----
    A killed run goes on with the same call and ends with the same sums, bit for bit on the same
    device, thread count and versions. The file is written about every 30 seconds and at the end
    (less often where writing takes long: 5 % of the time at most).
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        dtype: Literal["float64", "float32"] | None = None,
    ) -> None:
        if dtype not in (None, "float64", "float32"):
            raise ValueError(f"dtype must be 'float64' or 'float32'; got {dtype!r}.")
        self._dtype = dtype
        self.path = None if path is None else Path(path)
        self.config: dict[str, Any] = {}
        self.draws = 0
        self._facts: dict[str, Any] = {}
        self._payload: bytes | None = None
        self._ids: dict[str, np.ndarray] = {}
        self._tokens: dict[str, Axis] = {}
        self._sums: RunningSums | None = None
        self._broken = False
        self._written, self._cost = time.monotonic(), 0.0
        if self.path is not None and self.path.exists():
            self._read()

    # ------------------------------------------------------------------ what the driver needs

    def begin(
        self,
        config: Mapping[str, Any],
        ids: Mapping[str, np.ndarray],
        measurements: Mapping[str, list[str]],
        tokens: Mapping[str, Axis] | None = None,
    ) -> None:
        """Get ready for a run, or check that it is the run that was begun.

        In the groups of ``tokens`` the loss is that of tokens.

        Raises
        ------
        StoreError
            If the sums are of other settings.
        """
        if self.config:
            self.check_identity(config)
            return
        self.config = json.loads(json.dumps(config))
        self._ids = {group: np.asarray(labels) for group, labels in ids.items()}
        self._tokens = dict(tokens or {})
        self._lay_out(list(measurements["query"]))

    def _lay_out(self, measurements: list[str]) -> None:
        self._measurements = measurements
        parts = [self._part("query", name) for name in measurements]
        queries = sum(part.size for part in parts)
        train = self._part("train", "loss")
        self._sums = RunningSums(
            self.chains, queries, train.size, [*parts, train], self._dtype or "float64"
        )

    def _part(self, group: str, measurement: str) -> Part:
        axis = self._tokens.get(group)
        if axis is None or axis.starts is None or measurement != "loss":
            return Part(len(self._ids[group]))
        return Part(axis.size, axis.starts[:-1])

    def grow(self, draws: int) -> None:
        """Nothing grows."""

    @property
    def chunk_draws(self) -> int:
        """Draws that a writer should hand over at once."""
        return self._ready.block

    def append(
        self, values: Mapping[str, np.ndarray], payload: bytes, extra: Mapping[str, Any]
    ) -> None:
        """Add draws to the sums; the file is written where the last time is long ago.

        Parameters
        ----------
        values
            By ``"group/variable"``: arrays ``(chain, new draws, …)``; what is not a measurement is
            left out.
        payload
            The sampler's state after the last of these draws.
        extra
            JSON-able facts kept in the commit, such as which chains failed.

        Raises
        ------
        StoreError
            If the disk refuses (the file then is as it was), or an interrupt broke the sums.
        """
        sums = self._ready
        if values:
            self._broken = True  # until all are in
            parts = [values[self._name("query", m)] for m in self._measurements]
            x = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
            sums.add(x, values[self._name("train", "loss")])
            self.draws = sums.draws
        self._payload, self._facts = payload, dict(extra)
        self._broken = False
        wait = max(_COMMIT_SECONDS, self._cost / _COMMIT_SHARE)
        if time.monotonic() - self._written > wait:
            self.flush()

    def _name(self, group: str, measurement: str) -> str:
        """Name of what the driver hands over."""
        by_token = measurement == "loss" and group in self._tokens
        return f"{group}_token/{measurement}" if by_token else f"{group}/{measurement}"

    def flush(self) -> None:
        """Write the file, if there is one.

        Raises
        ------
        StoreError
            If the disk refuses; the file then is as it was.
        """
        if self.path is None or self._broken or self._payload is None:
            return
        began = time.monotonic()
        with (
            disk(
                f"writing the sums over {self.draws} draws to {self.path}",
                "The file holds what was written before, intact; free space (or mend the disk) and "
                "call sample() again with the same arguments to go on.",
            ),
            replacing(self.path) as file,
        ):
            self._write(file)
        self._written = time.monotonic()
        self._cost = self._written - began

    @property
    def payload(self) -> bytes | None:
        """The sampler's state after the last draw, or None before the first."""
        return self._payload

    @property
    def commit_facts(self) -> dict[str, Any]:
        """What was said with the last draws."""
        return {"draws_written": self.draws, **self._facts}

    # ------------------------------------------------------------------ the file

    def _write(self, file: Any) -> None:
        arrays = self._ready.used()
        for group, axis in self._tokens.items():
            arrays.update(_pack(group, axis))
        header = {
            "kind": _KIND,
            "config": self.config,
            "ids": {group: labels.tolist() for group, labels in self._ids.items()},
            "measurements": self._measurements,
            "tokens": list(self._tokens),
            "draws": self.draws,
            "facts": self._facts,
            "payload": len(self._payload or b""),
            "arrays": {k: [v.dtype.str, list(v.shape)] for k, v in arrays.items()},
        }
        file.write(json.dumps(header).encode() + b"\n" + (self._payload or b""))
        for array in arrays.values():
            for part in array:  # one chain at a time: no copy of everything
                file.write(np.ascontiguousarray(part).data if part.size else b"")

    def _read(self) -> None:
        assert self.path is not None
        try:
            with open(self.path, "rb") as file:
                header = json.loads(file.readline(1 << 30))
                if header["kind"] != _KIND:
                    raise ValueError(header["kind"])
                self._payload = _exactly(file, header["payload"])
                found = self._take(header, file)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{os.fspath(self.path)!r} exists and holds no sums of a StreamingCovariance; give "
                f"another path, it never overwrites what it did not write."
            ) from error
        if self._dtype not in (None, found):
            raise StoreError(
                f"{os.fspath(self.path)!r} holds sums in {found}, and dtype={self._dtype!r} was "
                f"asked for. Leave dtype= out, or give another path."
            )
        self._dtype = found

    def _take(self, header: dict[str, Any], file: Any) -> Literal["float64", "float32"]:
        """Fill everything from an open file; return the dtype of its sums."""
        self.config, self._facts = header["config"], header["facts"]
        self._ids = {group: np.asarray(labels) for group, labels in header["ids"].items()}
        shapes = {k: (np.dtype(v[0]), tuple(v[1])) for k, v in header["arrays"].items()}
        kind: Any = shapes["product"][0].name
        offset, packed = file.tell(), {}
        for name, (dtype, shape) in shapes.items():
            size = dtype.itemsize * int(np.prod(shape))
            if name.startswith(_AXIS):
                file.seek(offset)
                packed[name] = np.frombuffer(_exactly(file, size), dtype).reshape(shape)
            offset += size
        self._tokens = {g: _unpack(g, self._ids[g], packed) for g in header.get("tokens", ())}
        asked, self._dtype = self._dtype, kind
        self._lay_out(header["measurements"])
        self._dtype = asked
        self.draws = self._ready.draws = int(header["draws"])
        file.seek(offset - sum(d.itemsize * int(np.prod(s)) for d, s in shapes.values()))
        for name, (dtype, shape) in shapes.items():
            if name.startswith(_AXIS):
                continue
            for mine in self._ready.arrays[name]:
                _fill(file, mine[: shape[1]] if len(shape) > 2 else mine, dtype, shape[1:])
        return "float32" if kind == "float32" else "float64"

    # ------------------------------------------------------------------ reading

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the sums take."""
        return sum(array.nbytes for array in self._ready.arrays.values())

    def ids(self, group: str) -> np.ndarray:
        """Ids of the observed examples of ``"train"`` or ``"query"``."""
        assert self._ready
        return self._ids[group]

    def has_tokens(self, group: str) -> bool:
        """Whether the losses of a group are those of tokens."""
        return group in self._tokens

    def axis(self, group: str, *, tokens: bool = False) -> Axis:
        """Labels of the observed examples of a group, or of their tokens.

        Raises
        ------
        KeyError
            If tokens are asked for and were not observed.
        """
        if not tokens:
            return Axis(group, self.ids(group))
        if group not in self._tokens:
            self.refuse_tokens(group)
        return self._tokens[group]

    def covariance(
        self,
        measurement: str,
        query: Selection,
        train: Selection,
        *,
        center: str,
        correlation: bool = False,
        batches_per_chain: int | None = None,
        block: int = 4096,
        replicates: bool = False,
        mix: csr_array | None = None,
        query_mix: csr_array | None = None,
    ) -> CrossCovariance:
        """What :func:`~bayesinf._covariance.cross_covariance` makes of the healthy chains' traces.

        Parameters
        ----------
        measurement
            Of the queries.
        query, train
            Examples or tokens, all or some.
        center, correlation, batches_per_chain, block, replicates
            As there.
        mix, query_mix
            ``(N, G)`` and ``(Q, H)``: covariances with ``losses @ mix``, of ``φ @ query_mix``.

        Raises
        ------
        StoreError
            If an interrupt broke the sums.
        KeyError
            If tokens are asked for that were not observed.
        ValueError
            If there are too few draws, or more batches are wanted than are kept apart.
        """
        rows, columns = (
            self._terms("query", measurement, query),
            self._terms("train", "loss", train),
        )
        shape = (
            len(rows.moments) if query_mix is None else query_mix.shape[1],
            len(columns.moments) if mix is None else mix.shape[1],
        )
        blocks = self._ready.blocks(
            self.healthy, rows, columns, batches_per_chain, block, mix, query_mix
        )
        return combine(blocks, shape, center, correlation, replicates)

    def _terms(self, group: str, measurement: str, what: Selection) -> Terms:
        """Where the values of a selection are."""
        offset, followed, token = self._offsets(group, measurement)
        split = measurement == "loss" and group in self._tokens
        if what.tokens and not split:
            self.refuse_tokens(group, measurement)
        axis = self.axis(group, tokens=split)
        count = axis.size if what.tokens else len(axis.examples)
        pick = np.arange(count) if what.pick is None else what.pick
        if what.tokens:
            return Terms(offset + pick, token + pick, None, True)
        if axis.starts is None:
            return Terms(offset + pick, followed + pick)
        lengths = np.diff(axis.starts)[pick]
        return Terms(offset + axis.tokens(pick), followed + pick, lengths.cumsum() - lengths)

    def _offsets(self, group: str, measurement: str) -> tuple[int, int, int]:
        """First entry of a measurement among the values, those of examples, those of tokens."""
        offset = followed = token = 0
        for name in self._measurements:
            if group == "query" and name == measurement:
                return offset, followed, token
            part = self._part("query", name)
            offset += part.size
            followed += part.size if part.starts is None else len(part.starts)
            token += 0 if part.starts is None else part.size
        return 0, followed, token

    def segments(self, group: str, positions: np.ndarray) -> Segments:
        """Sums over parts of the healthy chains of some examples' losses, for diagnostics."""
        return self._ready.segments(self.healthy, self._offsets(group, "loss")[1] + positions)

    @property
    def _ready(self) -> RunningSums:
        if self._sums is None:
            raise StoreError(
                "nothing was streamed yet: give it to sample(..., store=…) before it is read."
            )
        if self._broken:
            raise StoreError(
                "an interrupt came while draws were added, so that the sums are of no use. Make a "
                "StreamingCovariance anew (of the same path, to go on from its last commit)."
            )
        return self._sums


_AXIS = "axis/"


def _pack(group: str, axis: Axis) -> dict[str, np.ndarray]:
    """An axis of tokens as arrays with one row."""
    found = {"starts": axis.starts, "position": axis.position, "token_id": axis.token_id}
    return {f"{_AXIS}{group}/{k}": v[None] for k, v in found.items() if v is not None}


def _unpack(group: str, examples: np.ndarray, arrays: Mapping[str, np.ndarray]) -> Axis:
    found = {
        name.rsplit("/", 1)[1]: array[0]
        for name, array in arrays.items()
        if name.startswith(f"{_AXIS}{group}/")
    }
    return Axis(group, examples, **found)


def _exactly(file: Any, size: int) -> bytes:
    found: bytes = file.read(size)
    if len(found) < size:
        raise ValueError("the file ends early")
    return found


def _fill(file: Any, mine: np.ndarray, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Read into an array that has this place."""
    if mine.dtype != dtype or mine.shape != shape:
        raise ValueError(f"{dtype} {shape} in the file")
    if mine.size and file.readinto(mine.reshape(-1).view(np.uint8).data) < mine.nbytes:
        raise ValueError("the file ends early")
