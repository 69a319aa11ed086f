"""Which tokens scores belong to, and the text they stand in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

__all__ = ["Axis", "Passage", "Texts", "make_passage", "read_axis"]

Texts = Mapping[str, Mapping[Any, Sequence[str]]]
"""``{"train": {id: [piece, …]}, "query": {id: [piece, …]}}``, whole sequences from position 0."""


@dataclass(frozen=True)
class Axis:
    """The tokens of some scores, those of a sequence side by side.

    Attributes
    ----------
    ids
        The sequences, in order of appearance.
    starts
        ``(sequences + 1,)``: where each one's tokens begin.
    order
        Entry of the scores' own dimension for each token.
    position
        Of each token in its sequence, ascending within it.
    text
        Of each token, if the scores have it.
    """

    ids: tuple[Any, ...]
    starts: np.ndarray
    order: np.ndarray
    position: np.ndarray
    text: tuple[str, ...] | None

    def same_tokens(self, other: Axis) -> bool:
        """Whether both hold the same tokens of the same sequences."""
        return (
            self.ids == other.ids
            and np.array_equal(self.starts, other.starts)
            and np.array_equal(self.position, other.position)
        )


@dataclass(frozen=True)
class Passage:
    """A sequence as it is shown.

    Attributes
    ----------
    id
        Of the sequence, as text.
    pieces
        Text of its tokens, those without a score too where they are known.
    positions
        Of each piece in the sequence.
    scored
        Number of the piece of each scored token.
    """

    id: str
    pieces: tuple[str, ...]
    positions: np.ndarray
    scored: np.ndarray


def read_axis(scores: xr.Dataset, split: str, like: Axis | None = None) -> Axis:
    """Sort the tokens of a dimension by sequence and position.

    Parameters
    ----------
    scores
        With the dimension ``{split}_token`` and its coordinates.
    split
        ``"train"`` or ``"query"``.
    like
        Whose order of sequences to follow, where they are the same.

    Raises
    ------
    ValueError
        If a coordinate is missing or a token stands there twice.
    """
    dim = f"{split}_token"
    missing = [name for name in (split, f"{split}_position") if name not in scores.coords]
    if missing:
        raise ValueError(
            f"the tokens of dimension {dim!r} lack the coordinates {missing}: the id of each "
            f"token's sequence and its position there. bi.bif and bi.ekfac write them; usual "
            f"cause: drop_vars or reset_coords. Add one by "
            f"scores.assign_coords({missing[0]}=({dim!r}, values))."
        )
    own = scores[split].values.tolist()
    position = scores[f"{split}_position"].values
    ids = tuple(dict.fromkeys(own))
    if like is not None and set(like.ids) == set(ids):
        ids = like.ids
    rank = {key: k for k, key in enumerate(ids)}
    sequence = np.array([rank[key] for key in own], dtype=np.int64)
    order = np.lexsort((position, sequence))
    sequence, position = sequence[order], position[order]
    twice = np.flatnonzero((np.diff(sequence) == 0) & (np.diff(position) == 0))
    if twice.size:
        raise ValueError(
            f"{split} {ids[sequence[twice[0]]]!r} has two tokens at position "
            f"{int(position[twice[0]])}; a token has one score. Usual cause: datasets that were "
            f"joined, or two sequences of one id. Give each sequence an id of its own."
        )
    name = f"{split}_token_text"
    found = scores[name].values[order].tolist() if name in scores.coords else None
    starts = np.searchsorted(sequence, np.arange(len(ids) + 1))
    text = None if found is None else tuple(str(piece) for piece in found)
    return Axis(ids, starts, order, position, text)


def make_passage(axis: Axis, k: int, split: str, texts: Texts | None) -> Passage:
    """Return the text of sequence ``k``: whole where it was given, else its scored tokens.

    Raises
    ------
    ValueError
        If its text is unknown, or disagrees with the tokens that have scores.
    """
    key, part = axis.ids[k], slice(int(axis.starts[k]), int(axis.starts[k + 1]))
    position = axis.position[part]
    own = None if axis.text is None else axis.text[part]
    whole = (texts or {}).get(split, {}).get(key)
    if whole is not None:
        pieces = tuple(str(piece) for piece in whole)
        _check_whole(pieces, position, own, split, key)
        return Passage(str(key), pieces, np.arange(len(pieces)), position)
    if own is None:
        raise ValueError(
            f"the text of {split} {key!r} is unknown: the scores have no coordinate "
            f"'{split}_token_text', and texts= does not hold it. Add the text of every token by\n"
            f"    scores = bayesinf.interop.huggingface.add_token_text(scores, tokenizer)\n"
            f"or give whole sequences: texts={{'{split}': {{{key!r}: ['first', ' piece', …]}}}}."
        )
    return Passage(str(key), own, position, np.arange(len(own)))


def _check_whole(
    pieces: tuple[str, ...],
    position: np.ndarray,
    own: tuple[str, ...] | None,
    split: str,
    key: Any,
) -> None:
    if position.min() < 0 or position.max() >= len(pieces):
        raise ValueError(
            f"texts['{split}'][{key!r}] has {len(pieces)} pieces, but its scores have positions up "
            f"to {int(position.max())}. Give every token of the sequence, the first one too."
        )
    for place, piece in zip(position.tolist(), own or (), strict=own is not None):
        if pieces[place] != piece:
            raise ValueError(
                f"texts['{split}'][{key!r}] has {pieces[place]!r} at position {place}, where the "
                f"scores have {piece!r}. Usual causes: padding on the left, or a first token that "
                f"was left out. Positions count from the first token of the row."
            )
