"""A store that keeps sums instead of traces: its size does not depend on the number of draws."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bayesinf._chains import ChainRecord
from bayesinf._covariance import CrossCovariance, combine
from bayesinf._disk import StoreError, disk, replacing
from bayesinf._running_sums import RunningSums, Segments

__all__ = ["StreamingCovariance"]

_KIND = "bayesinf streaming covariance 1"
_COMMIT_SECONDS = 30.0
_COMMIT_SHARE = 0.05


class StreamingCovariance(ChainRecord):
    """Sums from which :func:`bayesinf.bif` makes the same scores as from traces.

    Give one to :func:`bayesinf.sample` as ``store=``: it then keeps, in float64, sums over 12 to 24
    batches of draws (one per chain where there are 12 chains or more) of train loss times query
    measurement, and sums of either and of their squares. For ``B`` batches this takes about
    ``8·B·Q·N`` bytes (``Q`` query values, ``N`` train examples, ``B`` at most ``2·chains·⌈12 /
    chains⌉``) however many draws there are, where traces take ``4·(Q + N)`` bytes per draw: streams
    are for long runs and few queries. Traces can be looked at again, sums cannot: no rank R-hat, no
    plot of a chain, no ArviZ.

    Parameters
    ----------
    path
        One file, replaced atomically at every commit; continued where it exists. None for memory.

    Attributes
    ----------
    config : dict
        Everything that identifies the draws; empty before the first.
    draws : int
        Number of draws per chain in the sums.

    Raises
    ------
    StoreError
        If ``path`` exists and is no such file.

    Notes
    -----
    A killed run goes on with the same call and ends with the same sums, bit for bit on the same
    device, thread count and versions. The file is written about every 30 seconds and at the end
    (less often where writing takes long: 5 % of the time at most).
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.config: dict[str, Any] = {}
        self.draws = 0
        self._facts: dict[str, Any] = {}
        self._payload: bytes | None = None
        self._ids: dict[str, np.ndarray] = {}
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
    ) -> None:
        """Get ready for a run, or check that it is the run that was begun.

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
        self._lay_out(list(measurements["query"]))

    def _lay_out(self, measurements: list[str]) -> None:
        self._measurements = measurements
        queries = len(measurements) * len(self._ids["query"])
        self._sums = RunningSums(self.chains, queries, len(self._ids["train"]))

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
            x = np.concatenate([values[f"query/{m}"] for m in self._measurements], axis=2)
            sums.add(x, values["train/loss"])
            self.draws = sums.draws
        self._payload, self._facts = payload, dict(extra)
        self._broken = False
        wait = max(_COMMIT_SECONDS, self._cost / _COMMIT_SHARE)
        if time.monotonic() - self._written > wait:
            self.flush()

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
        arrays = {k: np.ascontiguousarray(v) for k, v in self._ready.used().items()}
        header = {
            "kind": _KIND,
            "config": self.config,
            "ids": {group: labels.tolist() for group, labels in self._ids.items()},
            "measurements": self._measurements,
            "draws": self.draws,
            "facts": self._facts,
            "payload": len(self._payload or b""),
            "arrays": {k: [v.dtype.str, list(v.shape)] for k, v in arrays.items()},
        }
        file.write(json.dumps(header).encode() + b"\n" + (self._payload or b""))
        for array in arrays.values():
            file.write(array.data if array.size else b"")

    def _read(self) -> None:
        assert self.path is not None
        try:
            with open(self.path, "rb") as file:
                header = json.loads(file.readline(1 << 30))
                if header["kind"] != _KIND:
                    raise ValueError(header["kind"])
                self._payload = file.read(header["payload"])
                arrays = {
                    name: np.frombuffer(
                        file.read(np.dtype(kind).itemsize * int(np.prod(shape))), kind
                    ).reshape(shape)
                    for name, (kind, shape) in header["arrays"].items()
                }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{os.fspath(self.path)!r} exists and holds no sums of a StreamingCovariance; give "
                f"another path, it never overwrites what it did not write."
            ) from error
        self.config, self._facts = header["config"], header["facts"]
        self._ids = {group: np.asarray(labels) for group, labels in header["ids"].items()}
        self._lay_out(header["measurements"])
        self.draws = int(header["draws"])
        self._ready.restore(self.draws, arrays)

    # ------------------------------------------------------------------ reading

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the sums take."""
        return sum(array.nbytes for array in self._ready.arrays.values())

    def ids(self, group: str) -> np.ndarray:
        """Ids of the observed examples of ``"train"`` or ``"query"``."""
        assert self._ready
        return self._ids[group]

    def covariance(
        self,
        measurement: str,
        *,
        center: str,
        correlation: bool = False,
        batches_per_chain: int | None = None,
        block: int = 4096,
        replicates: bool = False,
        mix: np.ndarray | None = None,
    ) -> CrossCovariance:
        """What :func:`~bayesinf._covariance.cross_covariance` makes of the healthy chains' traces.

        Parameters
        ----------
        measurement
            Of the queries.
        center, correlation, batches_per_chain, block, replicates
            As there.
        mix
            ``(N, G)``: covariances with ``losses @ mix``.

        Raises
        ------
        StoreError
            If an interrupt broke the sums.
        ValueError
            If there are too few draws, or more batches are wanted than are kept apart.
        """
        self._warn_of_failures(stacklevel=2)
        queries = len(self._ids["query"])
        first = self._measurements.index(measurement) * queries
        rows = slice(first, first + queries)
        columns = len(self._ids["train"]) if mix is None else mix.shape[1]
        blocks = self._ready.blocks(self.healthy, rows, batches_per_chain, block, mix)
        return combine(blocks, (queries, columns), center, correlation, replicates)

    def segments(self, group: str, positions: np.ndarray) -> Segments:
        """Sums over parts of the healthy chains of some examples' losses, for diagnostics."""
        self._warn_of_failures(stacklevel=2)
        start = self._measurements.index("loss") * len(self._ids["query"])
        offset = self._ready.queries if group == "train" else start
        return self._ready.segments(self.healthy, offset + positions)

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
