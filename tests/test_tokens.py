"""Losses recorded token by token: what they are, what they sum to, stopping, lengths."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from torch import Tensor, nn

import bayesinf as bi
from bayesinf import _layout, _observing
from tests import language_task
from tests.cases import BY_NAME
from tests.language_task import QUERY, TRAIN, run

pytestmark = pytest.mark.filterwarnings("ignore::bayesinf.ConvergenceWarning")
SPLITS = {"train": TRAIN, "query": QUERY}


@pytest.fixture(scope="module")
def by_token():
    return run(tokens="both", measurements=["loss", "margin"])


@pytest.fixture(scope="module")
def by_sequence():
    return run(measurements=["loss", "margin"])


def counted(split: str) -> list[tuple[int, int]]:
    """Sequence and position of every token that has a loss, from the lengths alone."""
    lengths = SPLITS[split]
    return [(i, t) for i, n in enumerate(lengths) for t in range(1, n) if (i, t) != (0, 2)]


@pytest.mark.parametrize("split", ["train", "query"])
def test_labels(by_token, split):
    values = by_token.values(split, tokens=True)
    assert values.dims == ("chain", "draw", f"{split}_token")
    ids = by_token.ids(split).tolist()
    expected = counted(split)
    assert values[split].values.tolist() == [ids[i] for i, _ in expected]
    assert values[f"{split}_position"].values.tolist() == [t for _, t in expected]
    words = language_task.task().examples(split).batch()[1].numpy()
    assert values[f"{split}_token_id"].values.tolist() == [words[i, t] for i, t in expected]


def test_values_are_the_losses_of_the_tokens():
    """Without steps to speak of every draw is the checkpoint."""
    task = language_task.task()
    posterior = bi.LocalPosterior(task, n_beta=20.0, gamma=5.0)
    traces = bi.sample(
        posterior, bi.SGLD(1e-20), draws=2, warmup=0, chains=1, jitter=0, tokens="both",
        progress=False, vectorize=False,
    )  # fmt: skip
    for split in SPLITS:
        batch = task.examples(split).batch()
        log_p = task.outputs(task.params, batch).log_softmax(2)
        exact = [-log_p[i, t - 1, batch[1][i, t]].item() for i, t in counted(split)]
        got = traces.values(split, tokens=True)[0, 1]
        np.testing.assert_allclose(got, exact, rtol=1e-6)


def test_sequences_are_sums_over_tokens(by_token, by_sequence):
    """The draws are the same, whatever is observed."""
    for split in SPLITS:
        tokens = by_token.values(split, tokens=True)
        values = by_token.values(split)
        assert values.dtype == np.float64
        for i, key in enumerate(values[split].values.tolist()):
            own = tokens.values[:, :, [j == i for j, _ in counted(split)]].astype(np.float64)
            np.testing.assert_allclose(values.values[:, :, i], own.sum(2), rtol=1e-15)
            assert values[split].values[i] == key
        np.testing.assert_allclose(values, by_sequence.values(split), rtol=1e-6)
    np.testing.assert_array_equal(
        by_token.values("query", "margin"), by_sequence.values("query", "margin")
    )
    one, other = (t.tree["sample_stats"].load() for t in (by_token, by_sequence))
    np.testing.assert_allclose(one.lp, other.lp, rtol=1e-6)


def test_what_reads_traces_needs_no_change(by_token, by_sequence):
    quiet = {"center": "grand"}
    for make in (
        lambda t: bi.bif(t, **quiet)["influence"],
        lambda t: bi.bif(t, **quiet, normalize="correlation")["mcse"],
        lambda t: bi.bif(t, measurement="margin", **quiet)["influence"],
        lambda t: bi.group_influence(t, {"a": ["é1", "é5"]}, **quiet)["mcse"],
        lambda t: bi.diagnose(t)["rhat_train"],
        lambda t: t.to_arviz()["log_likelihood"]["loss"],
    ):
        one, other = make(by_token), make(by_sequence)
        assert one.dims == other.dims
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)
    assert bi.Until(mcse=0.99)(by_token) == bi.Until(mcse=0.99)(by_sequence)


def test_one_side_only():
    traces = run(tokens="query")
    assert traces.config["tokens"] == "query"
    assert set(traces.tree.children) == {"train", "query", "query_token", "sample_stats"}
    assert traces.values("train").dtype == np.float32
    with pytest.raises(KeyError, match=r"train tokens were not recorded.*query tokens.*'both'"):
        traces.values("train", tokens=True)
    with pytest.raises(KeyError, match=r"one loss an example.*tokens='query'"):
        run(draws=2).values("query", tokens=True)
    with pytest.raises(KeyError, match="'margin' of 'query' is one number an example"):
        run(draws=2, tokens="both", measurements=["margin"]).values("query", "margin", tokens=True)


def test_layout_opens_with_plain_xarray(tmp_path, by_token):
    path = tmp_path / "t.zarr"
    traces = run(path, tokens="both", measurements=["loss", "margin"])
    with xr.open_datatree(path, engine="zarr", consolidated=False) as tree:
        tree.load()
    token = tree["train_token"].to_dataset()
    assert token.loss.dims == ("chain", "draw", "train_token")
    assert {"train", "train_position", "train_token_id"} < set(token.coords)
    assert set(tree["query"].data_vars) == {"margin"}
    assert not tree["train"].data_vars
    np.testing.assert_array_equal(token.loss, by_token.values("train", tokens=True))
    same_tokens(bi.open_traces(path), by_token)
    assert traces.tree["train_token"].loss.dtype == np.float32


def same_tokens(one, other):
    for split in SPLITS:
        xr.testing.assert_identical(
            one.values(split, tokens=True), other.values(split, tokens=True)
        )


def test_more_draws_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(_layout, "_TOKEN_DRAWS", 7)
    monkeypatch.setattr(_layout, "_CHUNK_VALUES", 7 * 12)  # several blocks of columns, too
    whole = run(draws=40, tokens="both", batch_size=3)
    for draws in (1, 9, 21, 40):
        parts = run(tmp_path / "t.zarr", draws=draws, tokens="both", batch_size=3)
    assert zarr.open_array(tmp_path / "t.zarr/train_token/loss", mode="r").chunks == (1, 7, 12)
    same_tokens(bi.open_traces(tmp_path / "t.zarr"), whole)
    np.testing.assert_array_equal(parts.values("train"), whole.values("train"))


def test_tokens_are_part_of_the_identity(tmp_path):
    run(tmp_path / "t.zarr", draws=3)
    with pytest.raises(bi.StoreError, match=r"tokens: store has None, asked for 'train'"):
        run(tmp_path / "t.zarr", draws=3, tokens="train")


def test_vectorised_is_looped():
    options = {"draws": 10, "tokens": "both", "batch_size": 3}
    looped, together = run(**options), run(**options, vectorize=True)
    for split in SPLITS:
        one, other = looped.values(split, tokens=True), together.values(split, tokens=True)
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_a_named_subset_in_another_order():
    every = run(draws=5, tokens="both").values("train", tokens=True)
    some = run(draws=5, tokens="both", observe={"train": ["é5", "é0"]})
    got = some.values("train", tokens=True)
    where = [np.flatnonzero(every["train"].values == key) for key in ("é5", "é0")]
    xr.testing.assert_allclose(
        got, every.isel(train_token=np.concatenate(where)), rtol=1e-6, atol=1e-9
    )


class Broken(language_task.Decoder):
    """NaN logits once the weights have moved away."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits = super().forward(input_ids, attention_mask)
        bad = (self.head.bias.detach() != 0).any() & (input_ids == 3).unsqueeze(-1)
        return torch.where(bad, torch.nan, logits)


def test_a_failed_chain_is_named_by_token():
    model = Broken().double()
    nn.init.zeros_(model.head.bias)
    ids = torch.tensor([[0, 1, 2, 4], [1, 2, 3, 5]])
    there = {"input_ids": ids, "labels": ids}
    task = bi.Task(model, bi.CausalLM(), train={k: v[:1] for k, v in there.items()}, query=there)
    posterior = bi.LocalPosterior(task, n_beta=2.0, gamma=5.0)
    words = r"query/loss of the token at position 3 \(id 5\) of example 1 is not finite"
    with pytest.raises(bi.DivergenceError, match=words):
        bi.sample(
            posterior, bi.SGLD(1e-3), draws=2, warmup=0, tokens="both", progress=False,
            vectorize=False, divergence_bound=1e9,
        )  # fmt: skip


def test_refusals():
    with pytest.raises(ValueError, match="must be None, 'train', 'query' or 'both'; got 'test'"):
        run(tokens="test")
    task = BY_NAME["linear-gaussian"].task()
    posterior = bi.LocalPosterior(task, n_beta=2.0, gamma=5.0)
    with pytest.raises(NotImplementedError, match=r"needs `token_mask` of the likelihood"):
        bi.sample(posterior, bi.SGLD(0.1), draws=2, warmup=0, tokens="train")
    task = BY_NAME["softmax-regression"].task()
    posterior = bi.LocalPosterior(task, n_beta=2.0, gamma=5.0)
    with pytest.raises(ValueError, match=r"need one loss a token.*Leave tokens="):
        bi.sample(posterior, bi.SGLD(0.1), draws=2, warmup=0, tokens="train")
    with pytest.raises(ValueError, match=r"gives to a function\. Call it otherwise"):
        run(tokens="query", measurements={"loss": lambda task, params, batch: None})
    hidden = language_task.data((3, 4), 0)
    hidden["labels"][1] = -100

    class Silent(bi.CausalLM):
        def check(self, outputs, target):
            pass

    task = bi.Task(language_task.Decoder().double(), Silent(), train=hidden, query=hidden)
    with pytest.raises(ValueError, match="1 train examples have no token that counts, the first "):
        run(None, task, tokens="train")


# ---------------------------------------------------------------- lengths


def shapes(monkeypatch, **options):
    """Traces, and the shapes that went forward after the start."""
    task = language_task.task(**options)
    original, seen = _observing.Observer.__call__, []

    def watched(self, functions, position):
        task.module.seen.clear()
        found = original(self, functions, position)
        seen.extend(task.module.seen)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(_observing.Observer, "__call__", watched)
        traces = run(None, task, tokens="both", draws=4, chunk_size=3, batch_size=4)
    return traces, seen


def test_padding_is_cut_off(monkeypatch):
    """With and without a mask: the same values, fewer positions computed, few shapes."""
    cut, less = shapes(monkeypatch, extra=33)
    plain, more = shapes(monkeypatch, mask=False)
    wide, most = shapes(monkeypatch, extra=33, mask=False)
    for split in SPLITS:
        for other in (plain, wide):
            np.testing.assert_allclose(
                cut.values(split, tokens=True), other.values(split, tokens=True), rtol=1e-5
            )
    positions = [sum(b * t for b, t in seen) for seen in (less, more, most)]
    assert positions[0] < positions[2] / 4
    assert {t for _, t in less} == {5, 10}
    assert {t for _, t in most} == {40}


def test_sequences_are_sorted_by_length(monkeypatch):
    traces, seen = shapes(monkeypatch)
    assert set(seen) == {(3, 3), (3, 6), (2, 7), (3, 7)}  # of 2 2 3, 4 5 6, 7 7; of 3 5 7
    assert traces.values("train").shape == (4, 4, 8)


class Careless(language_task.Decoder):
    """Averages over padding, too, and over the future."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        e = self.embedding(input_ids)
        mean = e.mean(-2, keepdim=True).expand_as(e)
        return self.head(torch.tanh(self.mix(torch.cat([e, mean], dim=-1))))


def test_a_network_that_padding_changes_is_told():
    data = language_task.data(TRAIN, 1)
    task = bi.Task(Careless().double(), bi.CausalLM(), train=data, query=data)
    with pytest.warns(_observing.PaddingWarning, match="example 2 is .* without its padd"):
        careless = run(None, task, draws=2)
    data = {key: value for key, value in data.items() if key != "attention_mask"}
    task = bi.Task(task.module, bi.CausalLM(), train=data, query=data, parameters=".*")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(
            run(None, task, draws=2).values("train"), careless.values("train")
        )


def test_large_outputs_go_in_smaller_chunks(monkeypatch):
    expected = run(draws=3, tokens="both")
    monkeypatch.setattr(_observing, "_NEAR_VALUES", 7 * language_task.VOCABULARY * 2)
    got, seen = shapes(monkeypatch)
    assert max(b for b, _ in seen) == 2
    assert got.draws == 4
    small = run(draws=3, tokens="both")
    for split in SPLITS:
        np.testing.assert_allclose(small.values(split), expected.values(split), rtol=1e-6)
