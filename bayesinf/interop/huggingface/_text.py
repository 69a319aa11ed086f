"""Token ids of scores as the text that they stand for."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import xarray as xr

from bayesinf._scores import text_labels

__all__ = ["add_token_text"]


def add_token_text(scores: xr.Dataset, tokenizer: Any) -> xr.Dataset:
    """Add the text of each token beside its id.

    Parameters
    ----------
    scores
        With ``train_token_id`` or ``query_token_id``, as token scores have them.
    tokenizer
        That made the ids, of transformers.

    Returns
    -------
    xr.Dataset
        With ``train_token_text`` and ``query_token_text`` where there are ids: exactly the
        characters that a token adds to a text, spaces and line breaks included. A token that is
        part of a character is shown by its bytes, ``<0xE2><0x82>``.

    Raises
    ------
    ValueError
        If scores have no token ids.
    """
    texts: dict[str, Any] = {}
    for split in ("train", "query"):
        found = scores.coords.get(f"{split}_token_id")
        if found is not None:
            unique, where = np.unique(found.values, return_inverse=True)
            pieces = np.array([token_text(tokenizer, int(i)) for i in unique], dtype=object)
            texts[f"{split}_token_text"] = (found.dims, text_labels(pieces[where].astype(str)))
    if not texts:
        raise ValueError(
            f"scores have no train_token_id or query_token_id; their coordinates are "
            f"{sorted(map(str, scores.coords))}. Score tokens: bif(…, tokens='both'), or "
            f"train_tokens= and query_tokens= of classical methods."
        )
    return scores.assign_coords(texts)


def token_text(tokenizer: Any, token: int) -> str:
    """Text that a token adds behind another one."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    anchor = _anchor(tokenizer)
    before = tokenizer.decode(anchor, **options)
    text = str(tokenizer.decode([*anchor, token], **options))
    text = text[len(before) :] if text.startswith(before) else tokenizer.decode([token], **options)
    if "�" not in text:
        return text
    piece = tokenizer.convert_ids_to_tokens(token)
    values = _byte_values()
    if all(character in values for character in piece):
        return "".join(f"<0x{values[character]:02X}>" for character in piece)
    return str(piece)


def _anchor(tokenizer: Any) -> list[int]:
    """Something to decode behind, so that a first token's space is not dropped."""
    return list(tokenizer("a", add_special_tokens=False)["input_ids"])


@cache
def _byte_values() -> dict[str, int]:
    """Characters that stand for bytes in byte-level BPE: printable ones for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {chr(byte): byte for byte in printable}
    return names | {chr(256 + i): byte for i, byte in enumerate(others)}
