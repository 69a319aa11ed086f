"""Rows that one pass over the data computed, kept for the next: in memory, then in a file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from bayesinf.curvature._rows import Rows

__all__ = ["Spool"]

_MEMORY = 2**24
"""Bytes beyond which the rows move to a temporary file."""


@dataclass(frozen=True)
class _Slot:
    """Where a tensor is."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


class Spool:
    """Pulls of batches, in the order in which they were put, up to a limit of bytes.

    Tensors that the pulls of a batch share are kept once. A batch that does not fit, or that the
    disk has no room for, is not kept: it is to be computed again.

    Parameters
    ----------
    limit
        Bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._end = limit, 0
        self._file = tempfile.SpooledTemporaryFile(max_size=_MEMORY)  # noqa: SIM115
        self._held: dict[int, list[list[Any]]] = {}
        self._shared: dict[int, tuple[Tensor, _Slot]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def __contains__(self, batch: int) -> bool:
        return batch in self._held

    def put(self, batch: int, pull: list[Rows], *, first: bool) -> None:
        """Keep a pull of a batch, if all of the batch so far was kept and there is room."""
        if first:
            self._held[batch], self._shared = [], {}
        elif batch not in self._held:
            return
        known = dict(self._shared)
        try:
            self._held[batch].append([rows.each(self._write) for rows in pull])
        except (OSError, _FullError):
            del self._held[batch]
            self._limit = 0
        if not first:
            self._shared = known  # only the first pull's tensors come again

    def pulls(self, batch: int) -> Iterator[list[Rows]]:
        """Read the pulls of a batch again."""
        shared: dict[_Slot, Tensor] = {}
        for k, pull in enumerate(self._held[batch]):
            read = dict(shared)
            yield [rows.each(partial(self._read, read=read)) for rows in pull]
            shared = read if k == 0 else shared

    def _write(self, leaf: Tensor) -> _Slot:
        if id(leaf) in self._shared:
            return self._shared[id(leaf)][1]
        size = leaf.numel() * leaf.element_size()
        if self._end + size > self._limit:
            raise _FullError
        self._file.seek(self._end)
        self._file.write(_bytes(leaf.contiguous()))
        slot = _Slot(self._end, leaf.shape, leaf.dtype)
        self._shared[id(leaf)] = leaf, slot
        self._end += size
        return slot

    def _read(self, slot: _Slot, read: dict[_Slot, Tensor]) -> Tensor:
        if slot not in read:
            leaf = torch.empty(slot.shape, dtype=slot.dtype)
            self._file.seek(slot.offset)
            self._file.readinto(_bytes(leaf))
            read[slot] = leaf
        return read[slot]


class _FullError(Exception):
    """No room under the limit."""


def _bytes(leaf: Tensor) -> memoryview:
    return leaf.detach().numpy().reshape(-1).view("uint8").data
