"""Checkpoints saved and loaded again, with an adapter or without; what is refused."""

import json
import sys

import pytest
import torch

import bayesinf as bi
from bayesinf.curvature import find_layers
from bayesinf.interop.huggingface import from_pretrained
from tests import exact
from tests.interop.networks import (
    NETWORKS,
    gpt2,
    large,
    llama,
    lora,
    padded,
    sequences,
    transformers,
)


@pytest.fixture(autouse=True)
def quiet():
    from transformers.utils import logging

    logging.disable_progress_bar()


def logits(model, data):
    with torch.no_grad():
        return model(data["input_ids"], data["attention_mask"])


@pytest.mark.parametrize("name", ["gpt2", "neox", "qwen2"])
@pytest.mark.parametrize("shard", [None, "8KB"])
def test_saved_and_loaded(name, shard, rng, tmp_path):
    model = large(NETWORKS[name](1)).eval()
    model.save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shard
    loaded = from_pretrained(tmp_path, attn_implementation="eager")
    assert not loaded.training
    assert loaded.model.config._attn_implementation == "eager"
    state = model.state_dict()
    for key, value in loaded.model.state_dict().items():
        assert torch.equal(value, state[key])
    half = from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    if name != "neox":  # tied
        assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight


@pytest.fixture
def adapted(tmp_path):
    """Folders of a model and of an adapter for it, and the two together."""
    model = lora(1)
    base = llama(1)
    state = {
        key.replace(".base_layer", "").removeprefix("base_model.model."): value
        for key, value in model.state_dict().items()
        if "lora_" not in key
    }
    base.load_state_dict(state)
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", model.eval()


def test_an_adapter_alone_is_sampled_and_attributed(adapted, rng):
    base, adapter, model = adapted
    loaded = from_pretrained(base, adapter=adapter, dtype=torch.float64)
    names = {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert len(names) == 6
    assert all("lora_" in name for name in names)
    data = padded(sequences(rng))
    task = bi.Task(loaded, bi.CausalLM(), train=data, query=data)
    assert set(task.params) == names
    with torch.no_grad():
        expected = model.double()(**{k: v for k, v in data.items() if k != "labels"}).logits
    there = data["attention_mask"].bool()
    got = task.outputs(task.params, task.train.batch())
    torch.testing.assert_close(got[there], expected[there], rtol=1e-5, atol=1e-6)
    assert {layer.kind for layer in find_layers(task)} == {"linear"}
    gradients = exact.gradients(task)
    exact.close(bi.grad_dot(task).influence, -gradients @ gradients.T, 1e-9)
    half = from_pretrained(base, adapter=adapter, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


# ------------------------------------------------------------------ refusals


def test_folders_that_lack_something(tmp_path, adapted):
    base, adapter, _ = adapted
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        from_pretrained("/no/such/place")
    with pytest.raises(FileNotFoundError, match=r"no config.json; it holds \['adapter', 'base'\]"):
        from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds an adapter, not a model.*adapter="):
        from_pretrained(adapter)
    with pytest.raises(FileNotFoundError, match=r"base has no adapter_config.json"):
        from_pretrained(base, adapter=base)
    with pytest.raises(FileNotFoundError, match=r"has no model.gguf"):
        from_pretrained(base, gguf_file="model.gguf")


def test_nothing_is_unpickled(tmp_path, adapted):
    base, adapter, _ = adapted
    for folder, name in ((base, "model.safetensors"), (adapter, "adapter_model.safetensors")):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name.replace("safetensors", "bin")).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        options = {} if folder == base else {"adapter": adapter}
        with pytest.raises(FileNotFoundError, match="formats can run code"):
            from_pretrained(base, **options)
        (folder / name).write_bytes(kept)


def test_weights_that_would_be_random(tmp_path):
    model = llama(1)
    model.model.save_pretrained(tmp_path)  # without the head
    with pytest.raises(ValueError, match=r"lacks 1 weights of LlamaForCausalLM.*lm_head.weight"):
        from_pretrained(tmp_path)
    gpt2(1).save_pretrained(tmp_path / "gpt2")
    config = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    config["n_layer"] = 2
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks 12 weights of GPT2LMHeadModel"):
        from_pretrained(tmp_path / "gpt2")


def test_hub_names_without_a_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def fails(*_, **__):
        raise OSError("We couldn't connect.\nAnd so on.")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(FileNotFoundError, match=r"'some/model' .*couldn't connect. Give a folder"):
        from_pretrained("some/model")


def test_libraries_that_are_missing(monkeypatch, adapted):
    base, adapter, _ = adapted
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"adapter= needs peft, .*pip install 'bayesinf\[hf\]'"):
        from_pretrained(base, adapter=adapter)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="models of Hugging Face need transformers"):
        from_pretrained(base)
