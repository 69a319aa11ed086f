"""wikitext2-gpt2: GPT-2 fine-tuned on WikiText-2, 4,656 train and 481 query sequences × 512 tokens.

The set-up of kronfluence's example, whose retrained losses :mod:`benchmarks.import_bank` reads:
rows of text are tokenised as they are, a thousand at a time joined and cut into sequences of 512
tokens (what is left over is dropped), validation sequences are the queries, and GPT-2 is trained
for 3 epochs with dropout off. Text and network come from the folders that the environment variables
``BAYESINF_WIKITEXT2`` and ``BAYESINF_GPT2`` name, or from the hub.
"""

from __future__ import annotations

import os
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayesinf import CausalLM
from bayesinf.evaluation import AdamWRecipe
from benchmarks.tasks._task import BenchmarkTask, Data

__all__ = ["TASK", "read_rows", "sequences"]

LENGTH, ROWS = 512, 1000
SPLITS = {"train": ("train",), "validation": ("validation", "valid")}


def read_rows(folder: str | os.PathLike[str], split: str) -> list[str]:
    """Rows of text of a split, one a line of the article.

    Parameters
    ----------
    folder
        With ``train-*.parquet`` and ``validation-*.parquet`` as on the hub, ``*train*.arrow`` files
        or folders ``train/*.arrow`` as datasets saves them, or ``wiki.train.raw`` and
        ``wiki.valid.raw`` (or ``.txt``), at any depth.
    split
        ``"train"`` or ``"validation"``.

    Returns
    -------
    list[str]
        Empty lines are empty rows; others keep their line break.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    """
    names = SPLITS[split]
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    for ending, read in (
        (".parquet", _parquet),
        (".arrow", _arrow),
        (".raw", _text),
        (".txt", _text),
    ):
        found = [p for p in files if p.suffix == ending and _is_of(p, Path(folder), names)]
        if found:
            return [row for path in found for row in read(path)]
    raise FileNotFoundError(
        f"{folder} has no {split} file of WikiText-2: {split}-*.parquet, *{split}*.arrow, "
        f"wiki.{names[-1]}.raw or {names[-1]}.txt. It has {[p.name for p in files[:8]]}."
    )


def sequences(rows: list[str], tokenizer: Any, length: int = LENGTH) -> Tensor:
    """Ids ``(sequences, length)`` of rows, a thousand rows at a time."""
    found = []
    for start in range(0, len(rows), ROWS):
        ids = list(chain(*tokenizer(rows[start : start + ROWS])["input_ids"]))
        whole = len(ids) // length * length
        found.append(torch.tensor(ids[:whole], dtype=torch.long).view(-1, length))
    return torch.cat(found)


def make_model() -> nn.Module:
    """Load the network before fine-tuning; dropout is off."""
    from transformers import AutoModelForCausalLM

    from bayesinf.interop.huggingface import LanguageModel

    model = AutoModelForCausalLM.from_pretrained(
        _network(),
        use_safetensors=True,
        dtype=torch.float32,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    return LanguageModel(model)


def data() -> Data:
    """Return ids as inputs and, again, as targets."""
    from transformers import AutoTokenizer

    folder = os.environ.get("BAYESINF_WIKITEXT2") or _from_hub()
    tokenizer = AutoTokenizer.from_pretrained(_network())
    train, query = (sequences(read_rows(folder, split), tokenizer) for split in SPLITS)
    return (train, train), (query, query)


def _network() -> str:
    return os.environ.get("BAYESINF_GPT2", "openai-community/gpt2")


def _from_hub() -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(
        "Salesforce/wikitext", repo_type="dataset", allow_patterns="wikitext-2-raw-v1/*.parquet"
    )


def _is_of(path: Path, folder: Path, names: tuple[str, ...]) -> bool:
    """Whether a file, or the folder that it is in, is named after a split."""
    parts = path.relative_to(folder).parts[-2:]
    words = "-".join(parts).replace(".", "-").replace("_", "-").split("-")
    return any(name in words for name in names)


def _parquet(path: Path) -> list[str]:
    parquet = import_module("pyarrow.parquet")
    rows: list[str] = parquet.read_table(path, columns=["text"])["text"].to_pylist()
    return rows


def _arrow(path: Path) -> list[str]:
    pyarrow = import_module("pyarrow")
    with pyarrow.memory_map(str(path)) as source:
        rows: list[str] = pyarrow.ipc.open_stream(source).read_all()["text"].to_pylist()
    return rows


def _text(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="\n") as lines:
        return [line if line.strip() else "" for line in lines]


TASK = BenchmarkTask(
    name="wikitext2-gpt2",
    make_model=make_model,
    likelihood=CausalLM(),
    data=data,
    recipe=AdamWRecipe(epochs=3, batch_size=8, lr=3e-5, weight_decay=0.01, schedule="constant"),
    fisher="sampled",
)
