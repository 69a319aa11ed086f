"""What the token page holds, as JSON: the sums exactly, single tokens rounded and, if many, sparse.

A page with every token pair would be tens of megabytes: 128 query tokens × 25,600 training tokens
are 3.3 million numbers a method. So a row (the whole query, or one of its tokens) keeps its
``K`` strongest training tokens, ``K`` as large as the size of the page allows; the row of the
whole query keeps all. A row is

* ``gaps``: ``uint8``, steps from one kept token to the next; 255 goes 254 on without one;
  absent where every token is kept;
* ``values``: ``int8`` in units of ``scale`` = largest ``|value| / 127``;
* ``errors``: ``uint8`` in units of ``error_scale`` = largest half width ``/ 255``;
* ``below``: the largest ``|value|`` that was left out.

Arrays are base64 of little-endian bytes.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

from bayesinf.plots._token_scores import MethodScores, TokenScores
from bayesinf.plots._token_sums import CONFIDENCE
from bayesinf.plots._token_texts import Passage

__all__ = ["PAGE_BYTES", "embedded_json", "pack", "pack_row"]

PAGE_BYTES = 2_900_000
_LEAST_KEPT = 64
_ROW_OVERHEAD = 200


def pack(scores: TokenScores, page_bytes: int = PAGE_BYTES) -> dict[str, Any]:
    """Return all that the page needs, at most ``page_bytes`` long as JSON where that can be."""
    methods = [_method(method) for method in scores.methods]
    data = {
        "query": _passage(scores.query),
        "train": [_passage(passage) for passage in scores.train],
        "available": scores.available,
        "confidence": CONFIDENCE,
        "methods": methods,
    }
    kept = _kept(scores, page_bytes - len(embedded_json(data)))
    for packed, method in zip(methods, scores.methods, strict=True):
        errors = method.error
        for r in range(1, len(method.tokens)):
            half = None if errors is None else errors.tokens[r]
            packed["rows"].append(pack_row(method.tokens[r], half, kept))
    return data


def pack_row(values: np.ndarray, half: np.ndarray | None, kept: int) -> dict[str, Any]:
    """Round the ``kept`` strongest of ``values (N,)`` and their half widths."""
    sizes = np.abs(values)
    row: dict[str, Any] = {"below": 0.0}
    chosen = np.arange(len(values))
    if kept < len(values):
        order = np.argpartition(-sizes, kept)
        chosen, row["below"] = np.sort(order[:kept]), float(sizes[order[kept]])
        steps = np.diff(chosen, prepend=-1)
        skips, rest = np.divmod(steps - 1, 254)
        gaps = np.full(int(skips.sum()) + len(chosen), 255, np.uint8)
        gaps[np.cumsum(skips + 1) - 1] = rest + 1
        row["gaps"] = _base64(gaps)
    row["scale"] = float(sizes.max()) / 127
    row["values"] = _base64(_rounded(values[chosen], row["scale"], np.int8))
    if half is not None:
        row["error_scale"] = float(half.max()) / 255
        row["errors"] = _base64(_rounded(half[chosen], row["error_scale"], np.uint8))
    return row


def embedded_json(data: Any) -> str:
    """JSON that may stand inside a ``<script>``: ASCII, without ``<``, ``>`` and ``&``."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for mark in "<>&":  # these stand in strings only
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def _method(method: MethodScores) -> dict[str, Any]:
    error = method.error
    half = None if error is None else error.tokens[0]
    packed = {
        "name": method.name,
        "estimand": method.estimand,
        "sums": _base64(method.sums.astype("<f4")),
        "rows": [pack_row(method.tokens[0], half, method.tokens.shape[1])],
    }
    if error is not None:
        packed["sum_errors"] = _base64(error.sums.astype("<f4"))
        packed["token_bound"] = error.token_bound.tolist()
        packed["sum_bound"] = error.sum_bound.tolist()
    return packed


def _kept(scores: TokenScores, free: int) -> int:
    """How many tokens of a row fit, the same for all."""
    arrays = sum(2 if m.error is None else 3 for m in scores.methods)
    rows, count = len(scores.methods[0].tokens) - 1, scores.methods[0].tokens.shape[1]
    if rows == 0:
        return count
    overhead = len(scores.methods) * (_ROW_OVERHEAD + count // 190)
    fit = int((free / rows - overhead) / (arrays * 4 / 3))
    return int(np.clip(fit, min(_LEAST_KEPT, count), count))


def _passage(passage: Passage) -> dict[str, Any]:
    """Pieces and positions; runs of neighbours as ``[first, length]``."""
    return {
        "id": passage.id,
        "pieces": list(passage.pieces),
        "positions": _runs(passage.positions),
        "scored": _runs(passage.scored),
    }


def _runs(numbers: np.ndarray) -> list[list[int]]:
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return [[int(part[0]), len(part)] for part in parts if len(part)]


def _rounded(values: np.ndarray, scale: float, kind: type[np.generic]) -> np.ndarray:
    return np.rint(values / scale if scale > 0 else np.zeros_like(values)).astype(kind)


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")
