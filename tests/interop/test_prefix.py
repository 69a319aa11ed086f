"""Networks cut before the first block that is sampled, against the whole ones."""

import pytest
import torch
from torch.utils.data import Dataset

import bayesinf as bi
from bayesinf.interop.huggingface import (
    LanguageModel,
    SequenceClassifier,
    components,
    reuse_prefix,
)
from tests import exact
from tests.interop.networks import NETWORKS, SIZES, large, packed, padded, sequences, transformers

LAST = {
    "gpt2": r".*\.h\.2\..*", "lora": r".*layers\.2\..*lora_.*",
    "neox": r".*layers\.2\..*", "llama": r".*layers\.2\..*", "qwen2": r".*layers\.2\..*",
}  # fmt: skip


def make(name, rng, data=None, parameters=None, **options):
    model = LanguageModel(large(NETWORKS[name](3), 3.0).double(), **options)
    train = padded(sequences(rng)) if data is None else data
    query = padded(sequences(rng, (4, 6)))
    return bi.Task(
        model, bi.CausalLM(), train=train, query=query,
        parameters=LAST[name] if parameters is None else parameters,
    )  # fmt: skip


def moved(task, seed=0):
    w = task.flatten(task.params)
    noise = torch.randn(len(w), generator=torch.Generator().manual_seed(seed), dtype=w.dtype)
    return task.unflatten(w + 0.05 * noise)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_losses_anywhere_are_those_of_the_whole_network(name, chunked, rng):
    whole = make(name, rng, chunked_head=chunked)
    cut = reuse_prefix(whole, batch_size=4)
    assert list(cut.params) == list(whole.params)
    assert len(list(cut.module.parameters())) < len(list(whole.module.parameters()))
    for split in ("train", "query"):
        batches = (one.examples(split).batch() for one in (whole, cut))
        expected, got = (
            one.losses(moved(one), batch) for one, batch in zip((whole, cut), batches, strict=True)
        )
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    still = whole.losses(whole.params, whole.train.batch())
    assert float((still - whole.losses(moved(whole), whole.train.batch())).abs().max()) > 0.01


@pytest.mark.filterwarnings("ignore::bayesinf.ConvergenceWarning")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_same_draws_and_factors_for_less(name, rng):
    whole = make(name, rng, parameters=r".*(layers|h)\.2\.mlp\..*(weight|bias)")
    calls = []

    def run(task):
        seen = [m for m in task.module.modules() if isinstance(m, torch.nn.LayerNorm)]
        seen += [m for m in task.module.modules() if "RMSNorm" in type(m).__name__]
        handles = [m.register_forward_pre_hook(lambda *_: calls.append(1)) for m in seen]
        posterior = bi.LocalPosterior(task, n_beta=10.0, gamma=100.0)
        traces = bi.sample(
            posterior, bi.SGLD(1e-4), draws=4, warmup=2, chains=2, batch_size=3, tokens="both",
            vectorize=False, progress=False,
        )  # fmt: skip
        for handle in handles:
            handle.remove()
        curvature = bi.fit_curvature(task, fisher="empirical")
        scores = bi.ekfac(task, curvature=curvature, damping=0.1)
        count = len(calls)
        calls.clear()
        return traces.values("train", tokens=True).values, scores["influence"].values, count

    (draws, scores, many), (other, again, few) = run(whole), run(reuse_prefix(whole))
    torch.testing.assert_close(torch.tensor(other), torch.tensor(draws), rtol=1e-6, atol=1e-6)
    exact.close(again, scores, 1e-9)
    assert few < 0.6 * many


def test_packed_documents_and_what_follows_the_blocks(rng):
    whole = make("llama", rng, packed(sequences(rng)), parameters=["model.model.norm.weight"])
    cut = reuse_prefix(whole)
    expected = whole.losses(moved(whole), whole.train.batch())
    torch.testing.assert_close(cut.losses(moved(cut), cut.train.batch()), expected)
    assert not [n for n, _ in cut.module.named_parameters() if ".layers." in n]


def test_masks_other_precision_and_classifiers(rng):
    task = make("gpt2", rng)
    part = components(task.module, "heads")["l2.h1"]
    whole = task.restrict(part)
    cut = reuse_prefix(whole)
    assert cut.dimension == whole.dimension < task.dimension
    expected = whole.losses(moved(whole), whole.train.batch())
    torch.testing.assert_close(cut.losses(moved(cut), cut.train.batch()), expected)
    half = cut.to(dtype=torch.bfloat16)
    low = half.losses(half.params, half.train.batch())
    plain = whole.losses(whole.params, whole.train.batch())
    torch.testing.assert_close(low.double(), plain, rtol=0.1, atol=0.1)

    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=2, num_labels=3, pad_token_id=0)
    model = SequenceClassifier(transformers.LlamaForSequenceClassification(config).double())
    data = padded(sequences(rng))
    data["labels"] = torch.arange(len(data["labels"])) % 3
    whole = bi.Task(
        model, bi.Categorical(), train=data, query=data, parameters=r".*layers\.1\..*|.*score.*"
    )
    cut = reuse_prefix(whole)
    expected = whole.losses(moved(whole), whole.train.batch())
    torch.testing.assert_close(cut.losses(moved(cut), cut.train.batch()), expected)


class Items(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data["labels"])

    def __getitem__(self, k):
        return {key: value[k] for key, value in self.data.items()}


def test_datasets_are_read_once(rng):
    data = padded(sequences(rng))
    whole = make("neox", rng, Items(data))
    cut = reuse_prefix(whole, batch_size=4)
    assert cut.train.held
    expected = whole.losses(moved(whole), whole.train.batch())
    torch.testing.assert_close(cut.losses(moved(cut), cut.train.batch()), expected)


def test_nothing_to_reuse(rng):
    first = r".*layers\.0\.mlp\..*"
    for name, parameters in (("llama", first), ("qwen2", r".*embed_tokens.*"), ("neox", None)):
        one = (
            make(name, rng, parameters=parameters) if parameters else make(name, rng).restrict(None)
        )
        with pytest.raises(ValueError, match="in the first block or in the embedding"):
            reuse_prefix(one)


def test_states_and_networks_belong_together(rng):
    whole = make("neox", rng)
    cut = reuse_prefix(whole)
    inputs, _ = cut.train.batch()
    with pytest.raises(ValueError, match="prefix= was given, and the first 0 blocks"):
        whole.module(**inputs)
    del inputs["prefix"]
    with pytest.raises(ValueError, match="prefix= is missing, and the first 2 blocks"):
        cut.module(**inputs)
    net = torch.nn.Linear(2, 1)
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="components are known of"):
        reuse_prefix(bi.Task(net, bi.Gaussian(), train=(x, x[:, :1]), query=(x, x[:, :1])))
