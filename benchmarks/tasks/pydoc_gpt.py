"""pydoc-gpt: a GPT-NeoX of 2 layers, width 64 (231,168 parameters), on 384 × 64 tokens of help.

The text is Python's own, ``pydoc_data.topics``; see :mod:`benchmarks.tasks.pydoc_tokens` for how
it became the token ids that ship with the ground truth.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from bayesinf import CausalLM
from bayesinf.evaluation import AdamWRecipe
from benchmarks.tasks._task import BankPlan, BenchmarkTask, Data
from benchmarks.tasks.pydoc_tokens import LENGTH, TOKENS, VOCABULARY

__all__ = ["TASK", "CausalNeoX"]


class CausalNeoX(nn.Module):
    """A GPT-NeoX that maps ids ``(B, T)`` to logits ``(B, T, V)``.

    The causal mask is given to the network rather than made by it, so that ``vmap`` can trace it.
    """

    mask: Tensor
    position: Tensor

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        config = GPTNeoXConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=length,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
        config._attn_implementation = "sdpa"
        self.model = GPTNeoXForCausalLM(config)
        blocked = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
        self.register_buffer("mask", blocked[None, None], persistent=False)
        self.register_buffer("position", torch.arange(length)[None], persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits that predict the next token."""
        length = ids.shape[-1]
        outputs = self.model(
            ids,
            attention_mask=self.mask[:, :, :length, :length],
            position_ids=self.position[:, :length],
        )
        logits: Tensor = outputs.logits
        return logits


def make_model() -> nn.Module:
    """Make the untrained network."""
    return CausalNeoX(VOCABULARY, width=64, layers=2, heads=4, length=LENGTH)


def data() -> Data:
    """Return ids as inputs and, again, as targets."""
    with np.load(TOKENS, allow_pickle=False) as held:
        train, query = (torch.from_numpy(held[k].astype(np.int64)) for k in ("train", "query"))
    return (train, train), (query, query)


TASK = BenchmarkTask(
    name="pydoc-gpt",
    make_model=make_model,
    likelihood=CausalLM(),
    data=data,
    recipe=AdamWRecipe(
        epochs=8, batch_size=16, lr=6e-3, betas=(0.9, 0.95), weight_decay=0.1, warmup=0.1
    ),
    banks={
        "evaluation": BankPlan(subsets=64, subset_seed=1, seeds=(100, 101, 102, 103)),
        "tuning": BankPlan(subsets=24, subset_seed=2, seeds=(200, 201)),
    },
    fisher="sampled",
)
