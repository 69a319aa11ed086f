"""Networks of transformers, tiny: which layers they are found to have, and their gradients."""

import pytest
import torch

import bayesinf as bi
from bayesinf.curvature import find_layers
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._sources import GradientSource
from tests import exact
from tests.layered_cases import text

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 7, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0}


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_embd=4, n_head=2, n_positions=8, **SMALL)
    )


def sizes(intermediate=6):
    return {
        "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": intermediate, "max_position_embeddings": 8, **SMALL,
    }  # fmt: skip


def neox():
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**sizes(), use_parallel_residual=True)
    )


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes(), num_key_value_heads=1, tie_word_embeddings=True)
    )


def gemma():
    return transformers.GemmaForCausalLM(
        transformers.GemmaConfig(**sizes(), num_key_value_heads=1, head_dim=2)
    )


KINDS = {
    gpt2: {"tied": 1, "embedding": 1, "affine": 3, "linear": 4},
    neox: {"embedding": 1, "affine": 3, "linear": 5},
    llama: {"tied": 1, "affine": 3, "linear": 7},
    gemma: {"free": 1, "affine": 3, "linear": 7},  # its embedding scales what it looks up
}


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_layers_and_gradients(model, side):
    torch.manual_seed(2)
    g = torch.Generator().manual_seed(1)
    data = {"train": text(7, 4, side)(g, 5), "query": text(7, 4, side)(g, 2)}
    task = bi.Task(model().double(), bi.CausalLM(), **data)
    layers = find_layers(task)
    found = [layer.kind for layer in layers]
    assert {kind: found.count(kind) for kind in dict.fromkeys(found)} == KINDS[model]
    with GradientSource(task, layers, Costs()) as source:
        for where, batch in task.train.batches(4):  # batches of 4 and 1, with 4 positions
            flat = source.flat(source.gradients("train", where, batch))
            exact.close(flat, exact.gradients(task)[where], 1e-9)


@pytest.mark.parametrize("model", [gpt2, neox])  # the others' norms are in float32
def test_tokens_sum_to_the_sequence(model):
    torch.manual_seed(2)
    g = torch.Generator().manual_seed(1)
    task = bi.Task(
        model().double(), bi.CausalLM(), train=text(7, 4, "right")(g, 4),
        query=text(7, 4, "right")(g, 2),
    )  # fmt: skip
    options = {"fisher": "empirical", "damping": 0.1}
    whole = bi.ekfac(task, **options).influence
    for kind in ("position", "loss"):
        tokens = bi.ekfac(task, **options, train_tokens=kind, query_tokens=kind).influence
        exact.close(tokens.groupby("query").sum().groupby("train").sum(), whole, 1e-10)
