"""Axes of traces and scores: examples, or the counted tokens of examples, one after another.

Token axes are **flat**: padded and masked tokens are absent, and an example's tokens stand side by
side, so that sums over examples are sums over runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bayesinf._scores import text_labels

__all__ = ["Axis", "Selection", "as_slice", "axes", "runs"]


@dataclass(frozen=True)
class Axis:
    """One axis of traces or of a score matrix.

    Attributes
    ----------
    split
        ``"train"`` or ``"query"``.
    examples
        Ids of the examples, in order.
    starts
        Entry at which the tokens of each example begin, and the number of entries; None: entries
        are examples.
    position, token_id
        Of each entry that is a token; ``token_id`` None where there are no integer ids.
    """

    split: str
    examples: np.ndarray
    starts: np.ndarray | None = None
    position: np.ndarray | None = None
    token_id: np.ndarray | None = None

    @property
    def dim(self) -> str:
        """Name of the dimension."""
        return self.split if self.starts is None else f"{self.split}_token"

    @property
    def size(self) -> int:
        """Number of entries."""
        return len(self.examples) if self.starts is None else int(self.starts[-1])

    @property
    def ids(self) -> np.ndarray:
        """Example of each entry."""
        if self.starts is None:
            return self.examples
        return np.repeat(self.examples, np.diff(self.starts))

    def entries(self, where: slice) -> slice:
        """Entries of a slice of examples."""
        if self.starts is None:
            return where
        return slice(int(self.starts[where.start]), int(self.starts[where.stop]))

    def coords(self) -> dict[str, Any]:
        """Coordinates of the dimension; ids as Zarr has a specification for them."""
        ids = text_labels(self.ids)
        if self.starts is None:
            return {self.split: ids}
        found = {self.split: (self.dim, ids), f"{self.split}_position": (self.dim, self.position)}
        if self.token_id is not None:
            found[f"{self.split}_token_id"] = (self.dim, self.token_id)
        return found

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum the tokens (last dimension) of every example, in float64."""
        if self.starts is None:
            return values
        return np.add.reduceat(values, self.starts[:-1], axis=-1, dtype=np.float64)

    def part(self, pick: np.ndarray | None) -> Axis:
        """The axis of some of the examples, by position; None for all."""
        if pick is None:
            return self
        if self.starts is None:
            return Axis(self.split, self.examples[pick])
        chosen, lengths = self.tokens(pick), np.diff(self.starts)[pick]
        return Axis(
            self.split,
            self.examples[pick],
            np.concatenate([[0], lengths.cumsum()]),
            None if self.position is None else self.position[chosen],
            None if self.token_id is None else self.token_id[chosen],
        )

    def tokens(self, pick: np.ndarray) -> np.ndarray:
        """Entries of some examples, in the order of ``pick``."""
        return pick if self.starts is None else runs(self.starts[pick], self.starts[pick + 1])

    def find(self, ids: Any) -> np.ndarray:
        """Positions of examples by id (one, or several).

        Raises
        ------
        KeyError
            If an id is not there, naming it.
        """
        several = isinstance(ids, (Sequence, np.ndarray)) and not isinstance(ids, str)
        wanted = np.asarray(ids).tolist() if several else [ids]
        place = {key: i for i, key in enumerate(self.examples.tolist())}
        unknown = [key for key in wanted if key not in place]
        if unknown or not wanted:
            known = self.examples.tolist()
            raise KeyError(
                f"{self.split}={ids!r} names no observed example"
                f"{f': {unknown[0]!r} is unknown' if unknown else ''}; ids run from {known[0]!r} "
                f"to {known[-1]!r} ({len(known)} of them). Leave {self.split}= out for all, or "
                f"observe more: sample(..., observe=…)."
            )
        return np.array([place[key] for key in wanted], dtype=np.int64)


@dataclass(frozen=True)
class Selection:
    """What of a group's losses is looked at.

    Attributes
    ----------
    tokens
        Tokens; else examples, which are sums over their tokens where tokens were recorded.
    pick
        Entries (tokens or examples), by position; None for all.
    """

    tokens: bool = False
    pick: np.ndarray | None = None


def axes(query: Axis, train: Axis) -> tuple[tuple[str, str], dict[str, Any]]:
    """Dimensions and coordinates of a score matrix."""
    return (query.dim, train.dim), {**query.coords(), **train.coords()}


def runs(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """``first[0] … last[0] − 1, first[1] … last[1] − 1, …``."""
    lengths = last - first
    ends = lengths.cumsum()
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - lengths), lengths)


def as_slice(pick: np.ndarray) -> np.ndarray | slice:
    """The same positions as a slice, where they follow each other: no copy is needed then."""
    if len(pick) and (np.diff(pick) == 1).all():
        return slice(int(pick[0]), int(pick[-1]) + 1)
    return pick
