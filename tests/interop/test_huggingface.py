"""Networks of transformers: what padding and packing leave as it is, many chains at once."""

import copy

import pytest
import torch

import bayesinf as bi
from bayesinf._gradients import ChainFunctions, VectorizationWarning
from bayesinf.interop.huggingface import LanguageModel, SequenceClassifier
from tests import exact
from tests.interop.networks import (
    LENGTHS,
    NETWORKS,
    SIZES,
    VOCABULARY,
    gpt2,
    large,
    llama,
    neox,
    packed,
    padded,
    sequences,
    transformers,
)  # fmt: skip

LM = bi.CausalLM()
PADDINGS = [("right", 0), ("right", 4), ("left", 0), ("left", 4)]


def token_losses(model, data):
    """Losses of counted tokens in order, one flat vector."""
    inputs = {key: value for key, value in data.items() if key != "labels"}
    with torch.no_grad():
        losses = LM.token_losses(model(**inputs), data["labels"])
    return losses[LM.token_mask(data["labels"])]


def alone(model, rows):
    """The network's own logits, one sequence at a time, without a mask."""
    losses = []
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=row.unsqueeze(0)).logits
        losses.append(LM.token_losses(logits, row.unsqueeze(0))[0, 1:])
    return torch.cat(losses)


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NETWORKS)
def test_padding_and_packing_change_no_token(name, attention, rng):
    model = large(NETWORKS[name](attn_implementation=attention)).eval()
    wrapped, rows = LanguageModel(model), sequences(rng)
    expected = alone(model, rows)
    assert float(expected.std()) > 0.3  # context matters
    for side, extra in PADDINGS:
        close(token_losses(wrapped, padded(rows, side, extra)), expected)
    close(token_losses(wrapped, packed(rows)), expected)


def test_packing_with_padding_and_positions_of_ones_own(rng):
    model = large(gpt2()).eval()
    wrapped, rows = LanguageModel(model), sequences(rng)
    expected, data = alone(model, rows), packed(rows)
    positions = torch.cat([torch.arange(len(row)) for row in rows]).unsqueeze(0)
    close(token_losses(wrapped, {**data, "position_ids": positions}), expected)
    for pads in ((3, 0), (0, 3)):
        wider = {
            key: torch.nn.functional.pad(value, pads, value=-100 if key == "labels" else 0)
            for key, value in data.items()
        }
        close(token_losses(wrapped, wider), expected)
    shifted = token_losses(wrapped, {**data, "position_ids": positions + 1})
    assert float((shifted - expected).abs().max()) > 0.1


def test_causality_and_the_values_at_padding(rng):
    wrapped = LanguageModel(large(neox()).eval())
    ids = torch.randint(1, VOCABULARY, (1, 8), generator=rng)
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 1) % VOCABULARY
    with torch.no_grad():
        one, two = wrapped(ids), wrapped(other)
        left = torch.tensor([[0] * 3 + [1] * 5])
        assert bool(torch.isfinite(wrapped(ids, left)).all())
        assert bool(torch.isfinite(wrapped(ids, torch.zeros_like(ids))).all())
    assert torch.equal(one[:, :5], two[:, :5])
    assert not torch.allclose(one[:, 5:], two[:, 5:])


def test_windows_of_attention(rng):
    """Networks whose layers read a few tokens back, all of them or some."""
    sizes = {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 2, "sliding_window": 3}
    models = [
        transformers.MistralForCausalLM(transformers.MistralConfig(**sizes)),
        transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**sizes, use_sliding_window=True, max_window_layers=1)
        ),
    ]
    for model in models:
        large(model).eval()
        rows = sequences(rng)
        expected = alone(model, rows)
        for side, extra in PADDINGS:
            close(token_losses(LanguageModel(model), padded(rows, side, extra)), expected)
        close(token_losses(LanguageModel(model), packed(rows)), expected)
        wide = copy.deepcopy(model)
        wide.config.sliding_window = 32
        assert float((token_losses(LanguageModel(wide), padded(rows)) - expected).abs().max()) > 0.1


# ------------------------------------------------------------------ many chains


def task(name, rng, dtype=torch.float32, attention="sdpa", data=None, **options):
    model = NETWORKS[name](1, attn_implementation=attention)
    data = padded(sequences(rng), "left") if data is None else data
    return bi.Task(LanguageModel(model, **options).to(dtype), LM, train=data, query=data)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NETWORKS)
def test_vectorised_chains_equal_looped_ones(name, attention, rng):
    one = task(name, rng, torch.float64, attention)
    w = one.flatten(one.params)
    w = w + 0.1 * torch.randn(2, len(w), generator=rng, dtype=w.dtype)
    many, looped = ChainFunctions(one, True), ChainFunctions(one, False)
    batch = one.train.batch()
    for got, expected in zip(
        (*many.loss_grad(w, batch, shared=True), *many.observe(w, batch, ["token_losses"])),
        (*looped.loss_grad(w, batch, shared=True), *looped.observe(w, batch, ["token_losses"])),
        strict=True,
    ):
        close(got, expected, 1e-6)  # norms and rotations are in float32 in some
    assert many.vectorize


def test_vectorised_chains_with_batches_of_their_own(rng):
    one = task("neox", rng, torch.float64)
    w = one.flatten(one.params).expand(2, -1)
    many, looped = ChainFunctions(one, True), ChainFunctions(one, False)
    index = torch.randint(one.n, (2, 3), generator=rng)
    own = one.train.batch(index)
    for got, expected in zip(
        many.loss_grad(w, own, shared=False), looped.loss_grad(w, own, shared=False), strict=True
    ):
        close(got, expected, 1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_half_precision_networks_are_vectorised(name, rng):
    """Losses in float32 from a forward pass in bfloat16."""
    one, full = (task(name, rng.manual_seed(1), d) for d in (torch.bfloat16, torch.float32))
    w = one.flatten(one.params).expand(2, -1)
    gradient, losses = ChainFunctions(one, True).loss_grad(w, one.train.batch(), shared=True)
    assert (gradient.dtype, losses.dtype) == (torch.float32, torch.float32)
    expected = ChainFunctions(full, False).loss_grad(w, full.train.batch(), shared=True)
    close(losses, expected[1], 0.03)
    assert float((gradient - expected[0]).norm()) < 0.05 * float(expected[0].norm())


def test_a_network_that_cannot_be_traced_is_looped_and_the_reason_named(rng):
    """The bare network asks whether its padding mask is all ones, which depends on values."""
    data = padded(sequences(rng))
    bare = bi.Task(gpt2(1), LM, train=data, query=data)
    w = bare.flatten(bare.params).expand(2, -1)
    functions = ChainFunctions(bare)
    with pytest.warns(VectorizationWarning, match="GPT2LMHeadModel.*data-dependent control flow"):
        got = functions.loss_grad(w, bare.train.batch(), shared=True)
    assert not functions.vectorize
    wrapped = bi.Task(LanguageModel(bare.module), LM, train=data, query=data, parameters=".*")
    expected = ChainFunctions(wrapped, False).loss_grad(w, wrapped.train.batch(), shared=True)
    close(got[1], expected[1])


# ------------------------------------------------------------------ scores


@pytest.mark.parametrize("name", NETWORKS)
def test_tokens_of_padded_sequences_sum_to_the_sequence(name, rng):
    rows = sequences(rng, (6, 3, 5, 4))
    one = task(name, rng, torch.float64, data=padded(rows, "left", 1))
    options = {"fisher": "empirical", "damping": 0.1}
    whole = bi.ekfac(one, **options)
    for kind in ("position", "loss"):
        tokens = bi.ekfac(one, **options, train_tokens=kind, query_tokens=kind)
        count = {"position": 18, "loss": 14}[kind]
        assert tokens.sizes["train_token"] == tokens.sizes["query_token"] == count
        sums = tokens.influence.groupby("query").sum().groupby("train").sum()
        exact.close(sums, whole.influence, 1e-5)
    shorter, longer = padded(rows), padded(rows, "right", 3)
    more = bi.Task(one.module, LM, train=shorter, query=longer, parameters=list(one.params))
    exact.close(bi.ekfac(more, **options).influence, whole.influence, 1e-5)


def test_layers_of_an_adapter(rng):
    from bayesinf.curvature import find_layers

    one = task("lora", rng, torch.float64)
    assert all("lora_" in name for name in one.params)
    layers = find_layers(one)
    assert {layer.kind for layer in layers} == {"linear"}
    assert len(layers) == 3 * 2  # adapted maps, A and B of each
    expected = exact.gradients(one)
    exact.close(bi.grad_dot(one).influence, -expected @ expected.T, 1e-9)


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_tied_weights_count_once(name, rng):
    one = task(name, rng, torch.float64)
    wanted = [n for n, _ in one.module.named_parameters()]
    assert list(one.params) == wanted
    assert not any("lm_head" in n for n in wanted)
    w = one.flatten(one.params).expand(1, -1)
    got, _ = ChainFunctions(one, False).loss_grad(w, one.train.batch(), shared=True)
    model = copy.deepcopy(one.module).requires_grad_()
    inputs, labels = one.train.batch()
    LM.loss(model(**inputs), labels).mean().backward()
    assert len(LENGTHS) == len(labels)
    # Qwen's norms round to float32 inside, whatever the rest
    tolerance = {"gpt2": 1e-9, "qwen2": 1e-5}[name]
    close(got[0], torch.cat([p.grad.flatten() for p in model.parameters()]), tolerance)


# ------------------------------------------------------------------ classification


def classifiers():
    sizes = {**SIZES, "num_hidden_layers": 1}
    return {
        "gpt2": transformers.GPT2ForSequenceClassification(
            transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, num_labels=3)
        ),
        "llama": transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**sizes, num_labels=3, pad_token_id=0)
        ),
        "bert": transformers.BertForSequenceClassification(
            transformers.BertConfig(**sizes, num_labels=3, pad_token_id=0)
        ),
    }


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_classifiers_of_padded_sequences(name, rng):
    model = large(classifiers()[name]).eval()
    wrapped, rows = SequenceClassifier(model), sequences(rng)
    with torch.no_grad():
        expected = torch.cat([model(input_ids=row.unsqueeze(0)).logits for row in rows])
        for side, extra in PADDINGS if name != "bert" else PADDINGS[:2]:
            data = padded(rows, side, extra)
            close(wrapped(data["input_ids"], data["attention_mask"]), expected)
    data = padded(rows, "right", 1)
    y = torch.randint(3, (len(rows),), generator=rng)
    data = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"], "labels": y}
    one = bi.Task(wrapped, bi.Categorical(), train=data, query=data)
    w = one.flatten(one.params).expand(2, -1)
    many = ChainFunctions(one, True).loss_grad(w, one.train.batch(), shared=True)
    close(many[1][0], torch.nn.functional.cross_entropy(expected, y, reduction="none"))
    assert bi.ekfac(one, fisher="empirical", damping=0.1).influence.shape == (6, 6)


# ------------------------------------------------------------------ refusals


def test_networks_whose_masks_cannot_be_given_are_refused():
    with pytest.raises(TypeError, match="which has a config; got Linear"):
        LanguageModel(torch.nn.Linear(2, 2))
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)
    )
    with pytest.raises(TypeError, match="BloomForCausalLM cannot be called with a mask of four"):
        LanguageModel(bloom)
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1)
    )
    with pytest.raises(NotImplementedError, match=r"layers of kind \['linear_attention'\]"):
        LanguageModel(mamba)
    model = llama()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="Load it with attn_implementation='sdpa'"):
        LanguageModel(model)


def test_a_network_that_ignores_its_mask_is_refused():
    class Deaf(type(gpt2())):
        def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
            return super().forward(input_ids, **kwargs)

    with pytest.raises(ValueError, match="do not reach it"):
        LanguageModel(large(Deaf(gpt2().config)))


def test_wrapping_leaves_a_model_as_it_is():
    model = gpt2().train()
    model.transformer.wte.eval()
    before = {name: m.training for name, m in model.named_modules()}
    LanguageModel(model, chunked_head=True)
    assert {name: m.training for name, m in model.named_modules()} == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# ------------------------------------------------------------------ a chunked head


@pytest.mark.parametrize("name", ["gpt2", "neox", "lora"])
def test_a_chunked_head_changes_no_loss_and_no_gradient(name, rng, monkeypatch):
    """Tied weights, weights apart, a frozen head; classical methods see the logits all the same."""
    monkeypatch.setattr("bayesinf._head._BLOCK", 20 * VOCABULARY)
    monkeypatch.setattr("bayesinf._head._ROWS", 1)
    plain = task(name, rng, torch.float64)
    data = padded(sequences(rng.manual_seed(0)), "left")
    chunked = bi.Task(
        LanguageModel(plain.module.model, chunked_head=True), LM, train=data, query=data,
        parameters=list(plain.params),
    )  # fmt: skip
    assert torch.equal(plain.train.batch()[1], chunked.train.batch()[1])
    w = plain.flatten(plain.params)
    w = w + 0.1 * torch.randn(2, len(w), generator=rng, dtype=w.dtype)
    expected = ChainFunctions(plain, False)
    expected = [
        *expected.loss_grad(w, plain.train.batch(), shared=True),
        *expected.observe(w, plain.train.batch(), ["token_losses"]),
    ]
    for vectorize in (True, False):
        functions = ChainFunctions(chunked, vectorize)
        got = [
            *functions.loss_grad(w, plain.train.batch(), shared=True),
            *functions.observe(w, plain.train.batch(), ["token_losses"]),
        ]
        for one, other in zip(got, expected, strict=True):
            close(one, other, 1e-6)
    options = {"fisher": "empirical", "damping": 0.1}
    exact.close(bi.ekfac(chunked, **options).influence, bi.ekfac(plain, **options).influence, 1e-9)


def test_heads_that_cannot_be_chunked_are_refused():
    sizes = {**SIZES, "num_hidden_layers": 1, "num_key_value_heads": 2}
    capped = transformers.Gemma2Config(**sizes, head_dim=8, attn_implementation="eager")
    scaled = transformers.GraniteConfig(**sizes, logits_scaling=2.0)
    for model in (
        transformers.Gemma2ForCausalLM(capped),
        transformers.GraniteForCausalLM(scaled),
    ):
        LanguageModel(model)
        with pytest.raises(ValueError, match="chunked_head=True needs logits that are a linear"):
            LanguageModel(model, chunked_head=True)


# ------------------------------------------------------------------ sampling


def hessian_product(one, v):
    """By central differences of looped gradients."""
    center, step = one.flatten(one.params), 1e-5
    functions = ChainFunctions(one, False)
    w = torch.stack([center + step * v, center - step * v])
    gradient, _ = functions.loss_grad(w, one.train.batch(), shared=True)
    return (gradient[0] - gradient[1]) / (2 * step)


@pytest.mark.parametrize("chunked", [True, False])
def test_second_derivatives_through_fused_attention(chunked, rng):
    one = task("gpt2", rng, torch.float64, chunked_head=chunked)
    potential = bi.LocalPosterior(one, n_beta=2.0, gamma=3.0).bind()
    v = torch.randn(1, one.dimension, generator=rng, dtype=torch.float64)
    w = one.flatten(one.params)[None]
    got = potential.hvp(w, v)[0]
    expected = 2.0 * hessian_product(one, v[0]) + 3.0 * v[0]
    assert float((got - expected).norm()) < 1e-6 * float(expected.norm())


@pytest.mark.filterwarnings("ignore::bayesinf.ConvergenceWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_influence_of_the_tokens_of_padded_sequences(name, rng):
    """Sampled with padding on either side, summed over tokens, chains together or in a loop."""
    rows = sequences(rng)
    model = LanguageModel(NETWORKS[name](1)).double()
    wanted = {}
    for side in ("left", "right"):
        data = {"train": padded(rows, side), "query": padded(rows[:3], side, 2)}
        posterior = bi.LocalPosterior(bi.Task(model, LM, **data), n_beta=2.0, gamma=100.0)
        traces = bi.sample(
            posterior, bi.samplers.SGLD(1e-4), draws=8, warmup=0, chains=2, batch_size=3, seed=0,
            tokens="both", vectorize=False, progress=False,
        )  # fmt: skip
        scores = bi.bif(traces, tokens="both").influence
        assert (scores.sizes["query_token"], scores.sizes["train_token"]) == (12, 25)
        whole = bi.bif(traces).influence
        exact.close(scores.groupby("query").sum().groupby("train").sum(), whole, 1e-5)
        wanted[side] = whole
    exact.close(wanted["left"], wanted["right"], 1e-5)


def test_sampling_together_is_sampling_in_a_loop(rng):
    """Of an adapter, whose network stays where it is."""
    one = task("lora", rng, torch.float64, chunked_head=True)
    before = {n: p.clone() for n, p in one.module.named_parameters()}
    posterior = bi.LocalPosterior(one, n_beta=2.0, gamma=100.0)
    found = [
        bi.sample(
            posterior, bi.samplers.SGLD(1e-4), draws=4, warmup=0, chains=2, batch_size=3,
            seed=0, vectorize=vectorize, progress=False,
        ).values("train")
        for vectorize in (True, False)
    ]  # fmt: skip
    assert found[0].std() > 0
    close(*(torch.from_numpy(values.values) for values in found), 1e-5)
    assert all(torch.equal(p, before[n]) for n, p in one.module.named_parameters())
