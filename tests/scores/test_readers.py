"""Readers of files in the exact formats of other libraries, which are not needed here."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bayesinf.scores import (
    SignWarning,
    read_bergson,
    read_dattri,
    read_kronfluence,
    read_quanda,
)
from tests.score_formats import write_bergson, write_explanations, write_kronfluence

Q, N = 3, 5
SCORES = np.random.default_rng(0).standard_normal((Q, N)).astype(np.float32).astype(np.float64)
IDS = {"query": ["a", "b", "c"], "train": [10, 30, 20, 50, 40]}
SINGLE = torch.from_numpy(SCORES).float()


def check(data, source, orientation, *, n=8, scores=SCORES):
    np.testing.assert_allclose(data.influence.values, -scores / n, rtol=1e-15)
    assert data.influence.dims == ("query", "train")
    assert data["query"].values.tolist() == IDS["query"]
    assert data["train"].values.tolist() == IDS["train"]
    attrs = data.attrs
    assert attrs["source"] == attrs["method"] == source
    assert attrs["source_orientation"] == orientation
    assert attrs["source_sign"] == "positive is helpful"
    assert (attrs["estimand"], attrs["factor"], attrs["n"]) == ("influence", -1 / n, n)


# ---------------------------------------------------------------------------- kronfluence


def test_kronfluence(tmp_path):
    file = tmp_path / "pairwise_scores.safetensors"
    write_kronfluence(file, {"all_modules": SINGLE}, {"damping_factor": "0.001"})
    for path in (file, tmp_path, str(file)):
        data = read_kronfluence(path, **IDS, n=8)
        check(data, "kronfluence", "query × train")
        assert json.loads(data.attrs["source_settings"]) == {"damping_factor": "0.001"}
        assert data.attrs["source_file"] == file.name
    ranks = read_kronfluence(file)
    np.testing.assert_array_equal(ranks.influence, -SCORES)
    assert ranks.attrs["estimand"] == "similarity"
    margin = read_kronfluence(file, n=8, measurement="margin")
    np.testing.assert_array_equal(margin.influence, SCORES / 8)


def test_kronfluence_by_module(tmp_path):
    file = tmp_path / "scores.safetensors"
    parts = {"fc1": SINGLE, "fc2": 2 * SINGLE, "out": (-SINGLE).bfloat16()}
    write_kronfluence(file, parts)
    data = read_kronfluence(file, **IDS, n=8)
    expected = 3 * SCORES + parts["out"].double().numpy()
    check(data, "kronfluence", "query × train", scores=expected)
    assert json.loads(data.attrs["modules"]) == ["fc1", "fc2", "out"]
    one = read_kronfluence(file, **IDS, n=8, modules=["fc2"])
    check(one, "kronfluence", "query × train", scores=2 * SCORES)
    with pytest.raises(ValueError, match=r"no scores of the modules \['fc3'\]; it has \['fc1'"):
        read_kronfluence(file, modules=["fc1", "fc3"])


def test_kronfluence_by_token_adds_up(tmp_path):
    file = tmp_path / "scores.safetensors"
    tokens = np.random.default_rng(1).standard_normal((Q, N, 4))
    write_kronfluence(file, {"all_modules": tokens})
    data = read_kronfluence(file, **IDS, n=8)
    np.testing.assert_allclose(data.influence, -tokens.sum(-1) / 8, atol=1e-16)
    assert data.attrs["summed_tokens"] == 4


def test_kronfluence_self_scores(tmp_path):
    file = tmp_path / "self_scores.safetensors"
    own = np.arange(1.0, N + 1)
    write_kronfluence(file, {"fc1": own, "fc2": own})
    data = read_kronfluence(file, train=IDS["train"], n=8)
    np.testing.assert_array_equal(data.influence, -own / 4)
    assert (data.influence.dims, data.attrs["pairs"]) == (("train",), "self")
    with pytest.warns(SignWarning, match="5 of 5"):
        read_kronfluence(file, sign="harmful")


def test_kronfluence_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no pairwise_scores\.safetensors .*partitions"):
        read_kronfluence(tmp_path)
    file = tmp_path / "pairwise_scores.safetensors"
    write_kronfluence(file, {"all_modules": SINGLE[:, :1]}, {"aggregate_train_gradients": "True"})
    with pytest.raises(ValueError, match="made with aggregate_train_gradients=True"):
        read_kronfluence(file)
    write_kronfluence(file, {"fc1": SINGLE, "fc2": SINGLE[:, :2]})
    with pytest.raises(ValueError, match="not of one shape"):
        read_kronfluence(file)
    file.write_bytes(b"not that")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        read_kronfluence(file)


# ---------------------------------------------------------------------------- bergson


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_bergson(tmp_path, dtype):
    write_bergson(tmp_path, SCORES.T, dtype=dtype)
    data = read_bergson(tmp_path, **IDS, n=8, sign="helpful")
    stored = torch.from_numpy(SCORES)
    if dtype == "bfloat16":  # the file holds the upper half: rounded towards 0
        bits = SCORES.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        expected = bits.view(np.float32).astype(np.float64)
    else:
        expected = stored.to(getattr(torch, dtype)).double().numpy()
    check(data, "bergson", "train × query", scores=expected)


def test_bergson_says_itself_what_positive_means(tmp_path):
    write_bergson(tmp_path, SCORES.T, higher=True)
    check(read_bergson(tmp_path, **IDS, n=8), "bergson", "train × query")
    write_bergson(tmp_path, -SCORES.T, higher=False)
    data = read_bergson(tmp_path, **IDS, n=8)
    np.testing.assert_array_equal(data.influence, -SCORES / 8)
    assert data.attrs["source_sign"] == "positive is harmful"
    raised = read_bergson(tmp_path, sign="helpful")  # what is said comes first
    np.testing.assert_array_equal(raised.influence, SCORES)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "steps:\n- score:\n    index_cfg:\n      higher_is_better: true\n",
        "steps:\n- score:\n    score_cfg:\n      candidates:\n        higher_is_better: true\n",
    ],
)
def test_bergson_without_a_record_of_the_sign(tmp_path, text):
    write_bergson(tmp_path, SCORES.T)
    if text:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"does not record what a positive score means.*sign='h"):
        read_bergson(tmp_path)


def test_bergson_by_token_adds_up(tmp_path):
    offsets = np.array([0, 2, 2, 5, 6, 9])  # the second sequence has none
    tokens = np.random.default_rng(2).standard_normal((9, Q)).astype(np.float32)
    write_bergson(tmp_path, tokens, offsets=offsets)
    data = read_bergson(tmp_path, **IDS, n=8, sign="helpful")
    parts = np.split(tokens.astype(np.float64), offsets[1:-1])
    expected = np.stack([part.sum(axis=0) for part in parts], axis=1)
    np.testing.assert_allclose(data.influence, -expected / 8, atol=1e-16)
    assert data.attrs["summed_tokens"] == 9


def test_bergson_of_candidates(tmp_path):
    candidates = np.array([3, 17, 20, 40, 99])
    write_bergson(tmp_path, SCORES.T, candidates=candidates)
    data = read_bergson(tmp_path, sign="helpful", n=100)
    assert data["train"].values.tolist() == candidates.tolist()
    np.testing.assert_allclose(data.influence, -SCORES / 100, rtol=1e-15)


def test_bergson_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no info\.json and no scores\.bin"):
        read_bergson(tmp_path)
    write_bergson(tmp_path, SCORES.T, unwritten=[(1, 0), (4, 2)])
    with pytest.raises(ValueError, match="2 of 15 scores were never written"):
        read_bergson(tmp_path, sign="helpful")
    data = (tmp_path / "scores.bin").read_bytes()
    (tmp_path / "scores.bin").write_bytes(data[:-3])
    with pytest.raises(ValueError, match=r"117 bytes and .* 5 rows of 24, 120 bytes"):
        read_bergson(tmp_path, sign="helpful")


# ---------------------------------------------------------------------------- tensors


def test_dattri(tmp_path):
    torch.save(SINGLE.T, tmp_path / "scores.pt")
    save_file({"scores": SINGLE.T.contiguous()}, tmp_path / "scores.safetensors")
    for name in ("scores.pt", "scores.safetensors"):
        check(read_dattri(tmp_path / name, **IDS, n=8), "dattri", "train × query")
    torch.save(torch.ones(N), tmp_path / "self.pt")
    data = read_dattri(tmp_path / "self.pt", train=IDS["train"])
    np.testing.assert_array_equal(data.influence, -np.ones(N))
    torch.save(SINGLE, tmp_path / "turned.pt")
    with pytest.raises(ValueError, match=re.escape("dims=('query', 'train')")):
        read_dattri(tmp_path / "turned.pt", **IDS)


def test_quanda(tmp_path):
    torch.save(SINGLE, tmp_path / "explanations.pt")
    data = read_quanda(tmp_path / "explanations.pt", **IDS, n=8)
    check(data, "quanda", "query × train")


def test_quanda_s_cache_is_joined_in_the_order_of_its_batches(tmp_path):
    rng = np.random.default_rng(4)
    scores = rng.standard_normal((11, N))  # 11 batches of one query: 10.pt comes after 9.pt
    write_explanations(tmp_path / "cache", scores, 1)
    data = read_quanda(tmp_path / "cache", train=IDS["train"], n=8)
    np.testing.assert_array_equal(data.influence, -scores / 8)
    assert data.attrs["batches"] == 11
    (tmp_path / "cache" / "4.pt").unlink()
    with pytest.raises(ValueError, match=r"named 0\.pt, 1\.pt, ….*interrupted"):
        read_quanda(tmp_path / "cache")
    torch.save(torch.ones(1, N + 1), tmp_path / "cache" / "4.pt")
    with pytest.raises(ValueError, match="with the same examples in each"):
        read_quanda(tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.pt"):
        read_quanda(tmp_path / "empty")


class Evil:
    def __reduce__(self):
        return print, ("this ran",)


def test_nothing_is_unpickled(tmp_path, capsys):
    torch.save(Evil(), tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt cannot be read without running what it holds"):
        read_dattri(tmp_path / "evil.pt")
    assert capsys.readouterr().out == ""
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="is not whole"):
        read_dattri(tmp_path / "cut.pt")


def test_files_of_more_than_one_tensor(tmp_path):
    torch.save({"scores": SINGLE, "labels": SINGLE}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match=r"must hold one tensor; got a dict of \['labels'"):
        read_quanda(tmp_path / "two.pt")
    torch.save([SINGLE], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="must hold one tensor; got list"):
        read_dattri(tmp_path / "list.pt")


def test_readers_warn_their_own_caller(tmp_path):
    """Every reader of a Gram matrix said to be harmful."""
    gradients = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    gram, ids = gradients @ gradients.T, ["a", "b", "c", "d"]
    write_kronfluence(tmp_path / "k.safetensors", {"all_modules": gram})
    write_bergson(tmp_path / "b", gram.numpy())
    torch.save(gram, tmp_path / "t.pt")
    for reader, name in (
        (read_kronfluence, "k.safetensors"),
        (read_bergson, "b"),
        (read_dattri, "t.pt"),
        (read_quanda, "t.pt"),
    ):
        reader(tmp_path / name, query=ids, train=ids, sign="helpful")
        with pytest.warns(SignWarning, match="4 of 4") as caught:
            reader(tmp_path / name, query=ids, train=ids, sign="harmful")
        assert caught[0].filename == __file__
