"""Scores written in the formats of other libraries, by hand: none of them is needed."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

CONFIG = """\
steps:
- score:
    score_cfg:
      query_path: runs/query
      score: individual
      modules:
      - h.0
      higher_is_better: {higher}
      candidates:
        scores: ''
        higher_is_better: null
    index_cfg:
      run_path: runs/scores
      higher_is_better: null
metadata:
  bergson_version: 2.5.1
"""


def write_kronfluence(path, scores, settings=None):
    """``scores``: by module, tensors (query, train), (query, train, token) or (train,)."""
    save_file(
        {name: torch.as_tensor(s).contiguous().clone() for name, s in scores.items()},
        path,
        settings,
    )


def write_bergson(
    folder, scores, *, higher=None, offsets=None, candidates=None, dtype="float32", unwritten=()
):
    """``scores (rows, queries)``: pairs of a score and its flag, each a power of two of bytes."""
    rows, queries = scores.shape
    size = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
    step = 1 << size.bit_length()
    total = -(-queries * step // 8) * 8
    data = np.zeros((rows, total), np.uint8)
    names, formats, places = [], [], []
    for q in range(queries):
        column = np.ascontiguousarray(scores[:, q], dtype=np.float32)
        if dtype == "bfloat16":
            column = (column.view(np.uint32) >> 16).astype(np.uint16)
        else:
            column = column.astype(dtype)
        data[:, q * step : q * step + size] = column.view(np.uint8).reshape(rows, size)
        data[:, q * step + size] = 1
        names += [f"score_{q}", f"written_{q}"]
        formats += [dtype, "bool"]
        places += [q * step, q * step + size]
    for row, q in unwritten:
        data[row, q * step + size] = 0
    folder.mkdir(exist_ok=True)
    data.tofile(folder / "scores.bin")
    described = {"names": names, "formats": formats, "offsets": places, "itemsize": total}
    info = {
        "attribute_tokens": offsets is not None,
        "num_items": rows if offsets is None else len(offsets) - 1,
        "num_rows": rows,
        "num_scores": queries,
        "dtype": described,
    }
    (folder / "info.json").write_text(json.dumps(info, indent=2))
    if offsets is not None:
        np.save(folder / "offsets.npy", offsets)
    if candidates is not None:
        np.save(folder / "candidates.npy", candidates)
    if higher is not None:
        (folder / "config.yaml").write_text(CONFIG.format(higher=str(higher).lower()))


def write_explanations(folder, scores, sizes):
    """A cache of batches of queries, one file each."""
    folder.mkdir(exist_ok=True)
    for i, part in enumerate(torch.as_tensor(scores).split(sizes)):
        torch.save(part.clone(), folder / f"{i}.pt")
