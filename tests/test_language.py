"""The likelihood of language models: shift, mask, padding, and what Hugging Face computes."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bayesinf as bi
from bayesinf._language import CausalLM
from tests.token_cases import PAD, tokens

SEQUENCES = CausalLM(PAD)
SHAPE = (5, 6, 7)


@pytest.fixture
def f(rng):
    return 2 * torch.randn(*SHAPE, generator=rng, dtype=torch.float64)


@pytest.fixture
def y(rng, f):
    return tokens(rng, f)


def test_loss_is_the_cross_entropy_of_shifted_logits(f, y):
    shifted, predicted = f[:, :-1].transpose(1, 2), y[:, 1:]
    expected = F.cross_entropy(shifted, predicted, reduction="none", ignore_index=PAD)
    got = SEQUENCES.token_losses(f, y)
    torch.testing.assert_close(got[:, 1:], expected, rtol=1e-12, atol=0)
    assert bool((got[:, 0] == 0).all())
    assert torch.equal(got != 0, SEQUENCES.token_mask(y))
    torch.testing.assert_close(SEQUENCES.loss(f, y), expected.sum(1), rtol=1e-12, atol=0)


def test_losses_without_gradients_are_the_same(f, y):
    """Another computation, which must not see what is ignored either."""
    used = F.pad(SEQUENCES.token_mask(y)[:, 1:], (0, 1)).unsqueeze(2)
    for part in (SEQUENCES.token_losses, SEQUENCES.loss):
        expected = part(f, y)
        with torch.no_grad():
            got = part(torch.where(used, f, torch.nan), y)
            mapped = torch.vmap(part, in_dims=(0, None))(f.expand(2, *SHAPE), y)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(mapped[1], expected, rtol=1e-12, atol=0)


def test_margin_is_the_sum_of_log_odds(f, y):
    p = (-SEQUENCES.token_losses(f, y)).exp()
    odds = torch.where(SEQUENCES.token_mask(y), (p / (1 - p)).log(), 0.0).sum(1)
    torch.testing.assert_close(SEQUENCES.margin(f, y), odds, rtol=1e-10, atol=1e-12)


def test_hand_counted_tokens():
    y = torch.tensor([[0, 1, 2], [PAD, 1, 2], [0, PAD, 2], [1, 2, PAD]])
    expected = [[0, 1, 1], [0, 1, 1], [0, 0, 1], [0, 1, 0]]
    before = y.clone()
    assert SEQUENCES.token_mask(y).int().tolist() == expected
    assert torch.equal(y, before)


@pytest.mark.parametrize("part", ["loss", "margin", "bregman"])
def test_ignored_positions_reach_neither_value_nor_gradient(rng, f, y, part):
    """Logits at ignored tokens are NaN, as a fully masked attention row can leave them."""
    used = F.pad(SEQUENCES.token_mask(y)[:, 1:], (0, 1)).unsqueeze(2)
    reference = (torch.randn(SHAPE, generator=rng, dtype=f.dtype),) if part == "bregman" else ()

    def value(out):
        return getattr(SEQUENCES, part)(out, *reference, y)

    clean = f.clone().requires_grad_()
    broken = torch.where(used, f, torch.nan).requires_grad_()
    torch.testing.assert_close(value(broken), value(clean), rtol=1e-14, atol=0)
    (expected,) = torch.autograd.grad(value(clean).sum(), clean)
    (got,) = torch.autograd.grad(value(broken).sum(), broken)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)
    assert bool((got[~used.expand_as(got)] == 0).all())


@pytest.mark.parametrize("pads", [(0, 2), (2, 0)], ids=["right", "left"])
def test_more_padding_changes_nothing(rng, f, y, pads):
    y[:, 0] = PAD  # padding before the first token would give it a predecessor
    inside = slice(pads[0], pads[0] + SHAPE[1])
    padded = torch.randn(5, SHAPE[1] + 2, SHAPE[2], generator=rng, dtype=f.dtype)
    padded[:, inside] = f
    wider = F.pad(y, pads, value=PAD)
    for part in ("loss", "margin"):
        expected, got = (getattr(SEQUENCES, part)(*pair) for pair in ((f, y), (padded, wider)))
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)
    expected, got = SEQUENCES.token_losses(f, y), SEQUENCES.token_losses(padded, wider)
    torch.testing.assert_close(got[:, inside], expected, rtol=1e-14, atol=0)
    expected, got = (
        SEQUENCES.sample(*pair, torch.Generator().manual_seed(3))
        for pair in ((f, y), (padded, wider))
    )
    assert torch.equal(got[:, inside], expected)
    expected, got = SEQUENCES.fisher_factor(f, y), SEQUENCES.fisher_factor(padded, wider)
    torch.testing.assert_close(got[:, :, inside], expected, rtol=1e-14, atol=0)


def test_samples_leave_what_does_not_count(rng, f, y):
    before = y.clone()
    counted = SEQUENCES.token_mask(y)
    drawn = SEQUENCES.sample(f, y, rng)
    assert torch.equal(drawn[~counted], before[~counted])
    assert not torch.equal(drawn[counted], before[counted])
    assert torch.equal(y, before)


def test_parts_run_under_vmap(rng, f):
    """Chains are mapped over, with a batch of their own each or the same for all."""
    outputs = torch.randn(3, *SHAPE, generator=rng, dtype=f.dtype)
    targets = torch.stack([tokens(rng, f) for _ in range(3)])
    for part in ("loss", "margin", "token_losses"):
        method = getattr(SEQUENCES, part)
        looped = torch.stack([method(*pair) for pair in zip(outputs, targets, strict=True)])
        got = torch.vmap(method)(outputs, targets)
        torch.testing.assert_close(got, looped, rtol=1e-14, atol=0)
        looped = torch.stack([method(out, targets[0]) for out in outputs])
        got = torch.vmap(method, in_dims=(0, None))(outputs, targets[0])
        torch.testing.assert_close(got, looped, rtol=1e-14, atol=0)


def test_half_precision_loses_only_what_the_logits_lost(f, y):
    rounded = f.bfloat16()
    got = SEQUENCES.loss(rounded, y)
    assert got.dtype == torch.float32
    expected = SEQUENCES.loss(rounded.double(), y).float()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("outputs", "target", "words"),
    [
        ((2, 4), torch.zeros(2, 4, dtype=torch.long), r"expects logits \(B, T, V\)"),
        ((2, 4, 3), torch.zeros(2, 3, dtype=torch.long), "already shifted"),
        ((2, 4, 3), torch.zeros(2, 4), "float32 target .*`ids.long"),
        ((2, 4, 3), torch.ones(2, 4, dtype=torch.bool), "bool target"),
        ((2, 4, 3), torch.zeros(2, dtype=torch.long), "one label per sequence"),
        ((2, 4, 3), torch.full((2, 4), 3), "ids from 3 to 3 for a vocabulary of 3"),
        ((1, 3, 3), torch.tensor([[0, 1, -1]]), r"from -1 to 1 .*CausalLM\(ignore_index=-1\)"),
        ((1, 3, 3), torch.tensor([[0, 1, 9]]), r"from 0 to 9 .*CausalLM\(ignore_index=9\)"),
        (
            (3, 2, 3),
            torch.tensor([[0, 1], [0, -100], [2, -100]]),
            "2 of 3 examples have no counted token, the first is number 1",
        ),
    ],
)
def test_targets_that_do_not_fit_are_refused(outputs, target, words):
    with pytest.raises(ValueError, match=words):
        CausalLM().check(torch.zeros(outputs), target)


def test_targets_that_fit_pass():
    CausalLM().check(torch.zeros(2, 3, 4), torch.tensor([[-100, 3, -100], [0, 1, 2]]))
    CausalLM(0).check(torch.zeros(1, 3, 4), torch.tensor([[2, 3, 0]]))
    CausalLM(50).check(torch.zeros(1, 3, 4, dtype=torch.float16), torch.tensor([[2, 3, 50]]))


# --------------------------------------------------------------------------- Hugging Face


def gpt(kind):
    transformers = pytest.importorskip("transformers")
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=11, n_embd=8, n_head=2, n_layer=2, n_positions=16,
            attn_pdrop=0.1, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config).double()
    config = transformers.GPTNeoXConfig(
        vocab_size=11, hidden_size=8, num_attention_heads=2, num_hidden_layers=2,
        intermediate_size=16, max_position_embeddings=16, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config).double()


def sequences(rng, extra=0):
    """Six sequences of unequal lengths, padded on the right."""
    lengths = torch.tensor([7, 5, 2, 7, 3, 6])
    ids = torch.randint(11, (6, 7), generator=rng)
    there = torch.arange(7) < lengths[:, None]
    ids = F.pad(ids.masked_fill(~there, 0), (0, extra))
    there = F.pad(there, (0, extra))
    return {
        "input_ids": ids,
        "attention_mask": there.long(),
        "labels": ids.masked_fill(~there, -100),
    }


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_losses_are_those_of_hugging_face(rng, kind):
    model = gpt(kind).eval()
    data = sequences(rng)
    task = bi.Task(model, CausalLM(), train=data, query=data)
    got = task.losses(task.params, task.train.batch())
    for i in range(6):
        one = {key: value[i : i + 1] for key, value in data.items()}
        count = (one["labels"][:, 1:] != -100).sum()
        expected = (model(**one).loss * count).detach()  # in float32, whatever the model's is
        torch.testing.assert_close(got[i].float(), expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_padding_a_model_more_changes_nothing(rng, kind):
    model = gpt(kind)
    state = rng.get_state()
    losses = []
    for extra in (0, 4):
        data = sequences(rng.set_state(state), extra)
        task = bi.Task(copy.deepcopy(model), CausalLM(), train=data, query=data)
        losses.append(task.losses(task.params, task.train.batch()).detach().numpy())
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-10)
