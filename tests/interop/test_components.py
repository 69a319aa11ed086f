"""Components of tiny transformers, by what changing their entries does to attention."""

import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf.interop.huggingface import LanguageModel, components
from tests.interop.networks import NETWORKS, SIZES, large, transformers

OUTPUTS = {"gpt2": "c_proj", "neox": "dense", "llama": "o_proj", "qwen2": "o_proj"}
GROUPED = {"qwen2": 2, "wide": 2}
KEPT = 10  # positions of the inputs


def wide(**kwargs):
    """Llama with two groups, a head width of its own and biases everywhere."""
    sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 6, "attention_bias": True}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2)
    return transformers.LlamaForCausalLM._from_config(config, **kwargs)


def build(name):
    torch.manual_seed(4)
    make = wide if name == "wide" else NETWORKS[name]
    model = large(make(attn_implementation="eager")).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def mixer(model, name):
    """The module that mixes the heads of block 1."""
    end = OUTPUTS.get(name, "o_proj")
    ends = tuple(f".1.{part}.{end}" for part in ("attn", "attention", "self_attn"))
    (site,) = (s for s, _ in model.named_modules() if s.endswith(ends))
    return model.get_submodule(site)


def run(model, name, mask_heads=None):
    """Inputs of the mixing module ``(B, T, H, k)`` of block 1, and its outputs."""
    mixing = mixer(model, name)
    seen = {}

    def before(module, args):
        x = args[0]
        if mask_heads is not None:
            x = x.unflatten(-1, (4, -1)).clone()
            x[:, :, mask_heads] = 0
            x = x.flatten(-2)
        seen["heads"] = x.unflatten(-1, (4, -1)).detach()
        return (x,)

    def after(module, args, output):
        seen["out"] = output.detach()

    handles = [mixing.register_forward_pre_hook(before), mixing.register_forward_hook(after)]
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 50, (2, KEPT), generator=generator)
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen["heads"], seen["out"]


class changed:
    """Entries of a component, changed for the length of a block."""

    def __init__(self, model, part, function):
        self.model, self.part, self.function = model, part, function

    def __enter__(self):
        own = dict(self.model.named_parameters(remove_duplicate=False))
        self.before = {name: own[name].detach().clone() for name in self.part}
        with torch.no_grad():
            for name, mask in self.part.items():
                new = self.function(own[name])
                own[name].copy_(new if mask is None else torch.where(mask, new, own[name]))

    def __exit__(self, *error):
        own = dict(self.model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, value in self.before.items():
                own[name].copy_(value)


def only(part, mixes, name):
    """A component's entries of the mixing module, or the others."""
    end = OUTPUTS.get(name, "o_proj")
    return {k: v for k, v in part.items() if (f".{end}." in k) is mixes}


NAMES = ["gpt2", "neox", "llama", "qwen2", "wide"]


@pytest.mark.parametrize("name", NAMES)
def test_a_head_is_its_own_attention_and_what_it_writes(name):
    model = build(name)
    heads, out = run(model, name)
    parts = components(model, "heads")
    assert list(parts) == [f"l{i}.h{h}" for i in range(2) for h in range(4)]
    for h in range(4):
        part = parts[f"l1.h{h}"]
        others = [k for k in range(4) if k != h]
        with changed(model, only(part, False, name), lambda p: p + 0.3):
            moved, _ = run(model, name)
        torch.testing.assert_close(moved[:, :, others], heads[:, :, others], rtol=0, atol=0)
        assert float((moved[:, :, h] - heads[:, :, h]).abs().max()) > 1e-3
        _, masked = run(model, name, mask_heads=[h])
        with changed(model, only(part, True, name), torch.zeros_like):
            same, zeroed = run(model, name)
        torch.testing.assert_close(same, heads, rtol=0, atol=0)
        torch.testing.assert_close(zeroed, masked, rtol=1e-10, atol=1e-12)
        assert float((zeroed - out).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_all_that_a_head_reads_is_in_it(name):
    """With nothing but its own projections left, a head attends as before."""
    model = build(name)
    heads, _ = run(model, name)
    parts = components(model, "heads")
    for h in range(4):
        own = only(parts[f"l1.h{h}"], False, name)
        every = {k: ~own[k] for k in own}
        with changed(model, every, torch.zeros_like):
            alone, _ = run(model, name)
        torch.testing.assert_close(alone[:, :, h], heads[:, :, h], rtol=1e-12, atol=1e-13)
        rest = [k for k in range(4) if k != h]
        assert not alone[:, :, rest].any()  # no values, no attention
    with pytest.raises(ValueError, match=r"has no kv_groups. Each head has keys and values"):
        components(model, "kv_groups")


@pytest.mark.parametrize("name", list(GROUPED))
def test_a_group_is_the_keys_and_values_of_its_heads(name):
    model = build(name)
    heads, _ = run(model, name)
    parts = components(model, "kv_groups")
    assert list(parts) == [f"l{i}.g{g}" for i in range(2) for g in range(2)]
    for g in range(2):
        mine, others = [2 * g, 2 * g + 1], [2 - 2 * g, 3 - 2 * g]
        with changed(model, parts[f"l1.g{g}"], lambda p: p + 0.3 * torch.randn_like(p)):
            moved, _ = run(model, name)
        torch.testing.assert_close(moved[:, :, others], heads[:, :, others], rtol=0, atol=0)
        assert (moved - heads).abs().amax((0, 1, 3))[mine].min() > 1e-3
        with changed(model, parts[f"l1.g{g}"], torch.zeros_like):
            nothing, _ = run(model, name)
        assert not nothing[:, :, mine].any()


@pytest.mark.parametrize("name", [*NAMES, "lora"])
def test_parts_do_not_overlap_and_nothing_is_left_out(name):
    model = build(name)
    shapes = {n: p.shape for n, p in model.named_parameters(remove_duplicate=False)}

    def count(part):
        marks = {n: torch.zeros(shape, dtype=torch.int) for n, shape in shapes.items()}
        for p in part:
            for n, mask in p.items():
                marks[n] += 1 if mask is None else mask.int()
        return marks

    layers = count(components(model, "layers", "embedding").values())
    outside = {n for n in shapes if ".0." not in n and ".1." not in n}
    for n, mark in layers.items():
        ends = "norm" in n or "ln_f" in n or "lm_head" in n or "embed_out" in n
        expected = 0 if (n in outside and ends) or "lora_" in n else 1
        assert bool((mark == expected).all()), n
    whole = count(components(model, "attention").values())
    kinds = ["heads", "kv_groups"] if name in GROUPED else ["heads"]
    split = count(components(model, *kinds).values())
    shared = OUTPUTS.get(name, "o_proj") + ".bias"
    for n, mark in split.items():
        expected = torch.zeros_like(whole[n]) if n.endswith(shared) else whole[n]
        assert bool((mark == expected).all()), n
    both = count(components(model, "attention", "mlps").values())
    assert all(bool((both[n] <= 1).all()) for n in shapes)
    assert any(
        "down_proj" in n or "c_fc" in n or "dense_h" in n for n, m in both.items() if m.any()
    )


def test_embeddings_adapters_and_wrappers():
    tied, apart = build("gpt2"), build("neox")
    assert list(components(tied, "embedding")["embedding"]) == [
        "transformer.wte.weight", "transformer.wpe.weight",
    ]  # fmt: skip
    assert list(components(tied, "unembedding")["unembedding"]) == ["lm_head.weight"]
    assert list(components(apart, "embedding")["embedding"]) == ["gpt_neox.embed_in.weight"]
    adapted = build("lora")
    lora = components(adapted, "adapters")
    assert list(lora) == ["l0.adapters", "l1.adapters"]
    named = {n for part in lora.values() for n in part}
    assert named == {n for n, _ in adapted.named_parameters() if "lora_" in n}
    with pytest.raises(ValueError, match=r"has no adapters. They are parameters with 'lora_'"):
        components(tied, "adapters")
    inside = components(LanguageModel(tied), "layers", "embedding")
    assert all(n.startswith("model.transformer.") for part in inside.values() for n in part)


def test_a_task_restricted_to_a_head():
    model = build("qwen2").float()
    ids = torch.randint(1, 50, (6, 5), generator=torch.Generator().manual_seed(1))
    data = {"input_ids": ids, "labels": ids}
    task = bi.Task(LanguageModel(model), bi.CausalLM(), train=data, query=data, target="labels")
    parts = components(task.module, "heads", "kv_groups", "unembedding")
    sizes = {name: task.restrict(part).dimension for name, part in parts.items()}
    assert sizes["l1.h2"] == 4 * 16 + 4 + 16 * 4  # rows and biases of queries, columns of outputs
    assert sizes["l0.g1"] == 2 * (4 * 16 + 4)
    assert sizes["unembedding"] == 50 * 16  # tied, under its other name
    head = task.restrict(parts["l1.h2"])
    traces = bi.sample(
        bi.LocalPosterior(head, n_beta=6.0, gamma=100.0), bi.SGLD(1e-3),
        draws=4, warmup=0, chains=2, progress=False, vectorize=False,
    )  # fmt: skip
    assert (traces.values("train").values.std(axis=(0, 1)) > 0).all()


def test_refusals():
    with pytest.raises(ValueError, match=r"components are known of .* no model of transformers"):
        components(nn.Linear(2, 2), "layers")
    model = build("gpt2")
    for kinds in ((), ("head",)):
        with pytest.raises(ValueError, match="kinds must be among"):
            components(model, *kinds)
    with pytest.raises(ValueError, match=r"has no 'transformer.h'.*with its head"):
        components(model.transformer, "layers")
    other = transformers.BertModel(
        transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                intermediate_size=8, vocab_size=9)
    )  # fmt: skip
    with pytest.raises(ValueError, match="this BertModel is bert"):
        components(other, "layers")
