"""A small causal language model on sequences of unequal lengths, in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayesinf as bi

VOCABULARY = 6
TRAIN, QUERY = (7, 5, 2, 7, 3, 6, 4, 2), (5, 3, 7)


class Decoder(nn.Module):
    """Embedding, one causal average over the past, a gated layer, logits."""

    def __init__(self, vocabulary: int = VOCABULARY, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, vocabulary)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.seen.append(tuple(input_ids.shape))
        e = self.embedding(input_ids)
        length = input_ids.shape[-1]
        past = torch.ones(length, length, dtype=e.dtype, device=e.device).tril()
        if attention_mask is not None:
            past = past * attention_mask.to(e.dtype).unsqueeze(-2)
        mean = past @ e / past.sum(-1, keepdim=True).clamp_min(1)
        logits: Tensor = self.head(torch.tanh(self.mix(torch.cat([e, mean], dim=-1))))
        return logits


def data(lengths: tuple[int, ...], seed: int, extra: int = 0, mask: bool = True) -> dict[str, Any]:
    """Right-padded sequences, ``extra`` wider than the longest; the first hides its third token."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (len(lengths), max(lengths)), generator=g)
    there = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids, there = F.pad(ids.masked_fill(~there, 0), (0, extra)), F.pad(there, (0, extra))
    labels = ids.masked_fill(~there, -100)
    labels[0, 2] = -100
    found = {"input_ids": ids, "labels": labels}
    return {**found, "attention_mask": there.long()} if mask else found


def task(extra: int = 0, mask: bool = True, **options: Any) -> bi.Task:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = Decoder().double()
    named = {"train_ids": [f"é{i}" for i in range(len(TRAIN))], **options}
    return bi.Task(
        model, bi.CausalLM(), train=data(TRAIN, 1, extra, mask), query=data(QUERY, 2, extra, mask),
        **named,
    )  # fmt: skip


def run(store: Any = None, the_task: bi.Task | None = None, **options: Any) -> Any:
    """Sample it, looped, without minibatches."""
    posterior = bi.LocalPosterior(the_task or task(), n_beta=20.0, gamma=5.0)
    settings: dict[str, Any] = {
        "draws": 40,
        "warmup": 10,
        "thin": 1,
        "progress": False,
        "vectorize": False,
    }
    settings["max_excess"] = 100.0  # hot on purpose
    return bi.sample(posterior, bi.SGLD(0.05), store=store, **{**settings, **options})
