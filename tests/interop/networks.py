"""Tiny random language models of transformers, and text of unequal lengths for them."""

import warnings

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

VOCABULARY = 50
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
SIZES = {
    "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 32, **COMMON,
}  # fmt: skip


def gpt2(layers=2, **kwargs):
    config = transformers.GPT2Config(n_layer=layers, n_embd=16, n_head=4, n_positions=32, **COMMON)
    return transformers.GPT2LMHeadModel._from_config(config, **kwargs)


def neox(layers=2, **kwargs):
    config = transformers.GPTNeoXConfig(**SIZES, num_hidden_layers=layers)
    return transformers.GPTNeoXForCausalLM._from_config(config, **kwargs)


def llama(layers=2, **kwargs):
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=layers)
    return transformers.LlamaForCausalLM._from_config(config, **kwargs)


def qwen2(layers=2, **kwargs):
    config = transformers.Qwen2Config(
        **SIZES, num_hidden_layers=layers, num_key_value_heads=2, tie_word_embeddings=True
    )
    return transformers.Qwen2ForCausalLM._from_config(config, **kwargs)


def lora(layers=2, **kwargs):
    """Llama with an adapter that is not zero."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"]
    )
    with warnings.catch_warnings():  # peft asks transformers for a deprecated attribute
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(llama(layers, **kwargs), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


NETWORKS = {"gpt2": gpt2, "neox": neox, "llama": llama, "qwen2": qwen2, "lora": lora}


def large(model, scale=6.0):
    """Weights far from zero, so that attention and positions matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model


LENGTHS = (7, 3, 5, 8, 2, 6)


def sequences(rng, lengths=LENGTHS):
    """Ids of unequal lengths, 0 not among them."""
    return [torch.randint(1, VOCABULARY, (length,), generator=rng) for length in lengths]


def padded(rows, side="right", extra=0):
    """One batch of rows, with labels for every token but the first."""
    width = max(map(len, rows)) + extra
    parts = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        pads = (0, width - len(row)) if side == "right" else (width - len(row), 0)
        label = row.clone()
        label[0] = -100
        parts["input_ids"].append(F.pad(row, pads))
        parts["attention_mask"].append(F.pad(torch.ones_like(row), pads))
        parts["labels"].append(F.pad(label, pads, value=-100))
    return {key: torch.stack(value) for key, value in parts.items()}


def packed(rows):
    """All rows in one sequence, each a document of its own."""
    labels = [row.clone() for row in rows]
    for label in labels:
        label[0] = -100
    ids = torch.cat(rows).unsqueeze(0)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.cat(labels).unsqueeze(0),
        "segment_ids": torch.cat([torch.full_like(row, i) for i, row in enumerate(rows)]).unsqueeze(
            0
        ),
    }
