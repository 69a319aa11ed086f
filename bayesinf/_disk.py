"""Files that are whole or not there, and what a refusal of the disk says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["StoreError", "disk", "replacing"]


class StoreError(RuntimeError):
    """A store that does not fit the request, or that could not be written."""


@contextmanager
def disk(doing: str, advice: str = "Free space and try again.") -> Iterator[None]:
    """Turn a refusal of the disk into a :class:`StoreError` that says what to do."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{doing} failed: {error}. {advice}") from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` at the end: one of them is whole at any kill."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
