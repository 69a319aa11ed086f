"""Text as batches: which ids, which of them are real, and which count in the loss.

A *piece* is a list of ids with, for each, whether it counts. Texts become pieces, pieces that are
too long are cut, and pieces become rows of one length, one each or several packed together.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bayesinf.interop.huggingface._examples import Piece, make_piece, rows_of

__all__ = ["TruncationWarning", "tokenize"]

_IGNORED = -100


class TruncationWarning(UserWarning):
    """Texts were longer than what a model reads, and were cut."""


class _Part(NamedTuple):
    """A piece in a row: where it came from, its ids, and which of them count."""

    source: int
    ids: list[int]
    counted: list[bool]


def tokenize(
    texts: Iterable[Any] | Mapping[str, Sequence[Any]],
    tokenizer: Any,
    *,
    max_length: int,
    padding_side: Literal["right", "left"] = "right",
    pack: bool = False,
    stride: int | None = None,
) -> dict[str, Tensor]:
    """Tokenise text, for ``Task(LanguageModel(…), CausalLM(), train=…, query=…)``.

    Parameters
    ----------
    texts
        Examples, each one of

        * a string;
        * a dict with ``"text"``;
        * a dict with ``"prompt"`` and ``"response"`` (or ``"completion"``): the loss is that of the
          response; a token that straddles the border belongs to it;
        * chat messages, a list of dicts with ``"role"`` and ``"content"``, or a dict with such a
          list under ``"messages"``: the loss is that of what the assistant says, as the tokeniser's
          chat template writes it, its end mark included;
        * ids, or a dict with ``"input_ids"`` and possibly ``"attention_mask"`` and ``"labels"``.

        Or a mapping from such keys to columns, or a ``datasets.Dataset`` with them.
    tokenizer
        A fast tokeniser of transformers. It adds the special tokens that it adds by itself; write
        an end-of-text token that should be learned into the text.
    max_length
        Tokens of a row, at most.
    padding_side
        Where rows that are shorter than the longest are filled up.
    pack
        Put several texts into a row, whole and in order, while they fit. ``segment_ids`` keep them
        apart: a packed text has the losses that it has alone.
    stride
        Cut a longer text into windows of ``max_length`` tokens that begin ``stride`` tokens after
        each other, in place of dropping its end. A token counts in the first window that holds it.

    Returns
    -------
    dict[str, Tensor]
        ``input_ids``, ``attention_mask``, ``labels``, all ``(B, T)``; labels are −100 where a token
        does not count: padding, prompts, and first tokens, which nothing predicts. With ``pack`` or
        ``stride`` also ``segment_ids``, the number of the text that a token is from, −1 in padding.

    Raises
    ------
    ValueError
        If a text has no token that counts, naming it, or an argument makes no sense.
    TypeError
        If an example is of another kind.

    Warns
    -----
    TruncationWarning
        If texts lose tokens, with their number.

    Examples
    --------
    >>> from bayesinf.interop.huggingface import tokenize
    >>> data = tokenize([[5, 3, 2], [4, 1]], None, max_length=8)
    >>> data["input_ids"], data["labels"]
    (tensor([[5, 3, 2],
            [4, 1, 0]]), tensor([[-100,    3,    2],
            [-100,    1, -100]]))
    """
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side must be 'right' or 'left'; got {padding_side!r}.")
    if max_length < 2 or (stride is not None and not 0 < stride < max_length):
        raise ValueError(
            f"max_length must be 2 or more, and stride between 1 and max_length − 1, so that every "
            f"window's tokens have some before them; got max_length={max_length}, stride={stride}."
        )
    pieces = [make_piece(i, example, tokenizer) for i, example in enumerate(rows_of(texts))]
    if not pieces:
        raise ValueError("there is nothing to tokenise: texts is empty.")
    parts = _windows(pieces, max_length, stride) if stride else _truncated(pieces, max_length)
    _require_counted(parts, len(pieces), max_length)
    rows = _packed(parts, max_length) if pack else [[part] for part in parts]
    return _batch(rows, padding_side, _padding(tokenizer), sources=pack or stride is not None)


def _truncated(pieces: list[Piece], max_length: int) -> list[_Part]:
    """Keep the beginning of each piece."""
    lost = [max(0, len(piece.ids) - max_length) for piece in pieces]
    cut = sum(n > 0 for n in lost)
    if cut:
        warnings.warn(
            f"{cut} of {len(pieces)} texts are longer than max_length={max_length} and lost their "
            f"ends, {sum(lost)} of {sum(len(piece.ids) for piece in pieces)} tokens. Raise "
            f"max_length, or cut texts into windows with stride=.",
            TruncationWarning,
            stacklevel=3,
        )
    return [
        _Part(i, piece.ids[:max_length], piece.counted[:max_length])
        for i, piece in enumerate(pieces)
    ]


def _windows(pieces: list[Piece], max_length: int, stride: int) -> list[_Part]:
    """Windows that overlap; windows in which nothing new counts are left out."""
    parts = []
    for i, piece in enumerate(pieces):
        done, start = 0, 0
        while done < len(piece.ids):
            stop = min(start + max_length, len(piece.ids))
            counted = [False] * (done - start) + piece.counted[done:stop]
            if any(counted[1:]):
                parts.append(_Part(i, piece.ids[start:stop], counted))
            done, start = stop, start + stride
    return parts


def _require_counted(parts: list[_Part], count: int, max_length: int) -> None:
    fine = {part.source for part in parts if any(part.counted[1:])}
    bare = [i for i in range(count) if i not in fine]
    if bare:
        raise ValueError(
            f"{len(bare)} of {count} texts have no token that counts: {bare[:8]}"
            f"{' …' if len(bare) > 8 else ''}. A token counts when one stands before it and it is "
            f"not of a prompt. Usual causes: texts of a single token, or a prompt that fills "
            f"max_length={max_length}. Drop these texts or raise max_length."
        )


def _packed(parts: list[_Part], max_length: int) -> list[list[_Part]]:
    """Rows of parts in order, each filled while the next part fits."""
    rows: list[list[_Part]] = []
    room = 0
    for part in parts:
        if len(part.ids) > room or part.source == rows[-1][-1].source:
            rows.append([])
            room = max_length
        rows[-1].append(part)
        room -= len(part.ids)
    return rows


def _batch(rows: list[list[_Part]], side: str, padding: int, *, sources: bool) -> dict[str, Tensor]:
    width = max(sum(len(part.ids) for part in row) for row in rows)
    shape = (len(rows), width)
    batch = {
        "input_ids": torch.full(shape, padding),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, _IGNORED),
        "segment_ids": torch.full(shape, -1),
    }
    for i, row in enumerate(rows):
        at = width - sum(len(part.ids) for part in row) if side == "left" else 0
        for part in row:
            where = slice(at, at + len(part.ids))
            ids, counted = torch.tensor(part.ids), torch.tensor(part.counted)
            counted[0] = False
            batch["input_ids"][i, where] = ids
            batch["attention_mask"][i, where] = 1
            batch["labels"][i, where] = ids.masked_fill(~counted, _IGNORED)
            batch["segment_ids"][i, where] = part.source
            at += len(part.ids)
    if not sources:
        del batch["segment_ids"]
    return batch


def _padding(tokenizer: Any) -> int:
    """Whatever id: padding is neither read nor predicted."""
    found = getattr(tokenizer, "pad_token_id", None)
    return 0 if found is None else int(found)
