"""Losses a block of tokens at a time against those of all logits: values, gradients, memory."""

import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bayesinf as bi
from bayesinf import _head
from bayesinf._gradients import ChainFunctions
from bayesinf._head import Head
from tests.token_cases import PAD, tokens

LM = bi.CausalLM(PAD)
B, T, M, V = 5, 6, 4, 7


@pytest.fixture(params=[1, 3 * V, 10**6], ids=["one-token", "blocks", "at-once"])
def block(request, monkeypatch):
    monkeypatch.setattr(_head, "_BLOCK", request.param)
    monkeypatch.setattr(_head, "_ROWS", 1)


def parts(rng, bias=True, dtype=torch.float64):
    hidden = torch.randn(B, T, M, generator=rng, dtype=dtype)
    weight = torch.randn(V, M, generator=rng, dtype=dtype)
    shift = torch.randn(V, generator=rng, dtype=dtype) if bias else None
    return hidden, weight, shift


@pytest.mark.parametrize("bias", [True, False])
def test_losses_and_gradients_are_those_of_all_logits(rng, block, bias):
    leaves = [leaf.requires_grad_() for leaf in parts(rng, bias) if leaf is not None]
    y = tokens(rng, torch.empty(B, T, V))
    head = Head(*leaves)
    for part in ("token_losses", "loss"):
        got, expected = (getattr(LM, part)(out, y) for out in (head, head.all_logits()))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
        by = torch.randn(got.shape, generator=rng, dtype=got.dtype)
        found, exact = (torch.autograd.grad(out, leaves, by) for out in (got, expected))
        for one, other in zip(found, exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_a_frozen_head_and_chains_of_heads(rng, block):
    """Under ``vmap`` and ``grad``, with any of the parts shared by the chains."""
    hidden, weight, bias = parts(rng)
    y = tokens(rng, torch.empty(B, T, V))
    stacks = [torch.stack([leaf, 2 * leaf, leaf - 1]) for leaf in (hidden, weight, bias)]

    def value(hidden, weight, bias, chunked):
        head = Head(hidden, weight, bias)
        return LM.loss(head if chunked else head.all_logits(), y).square().sum()

    for dims in ((0, None, None), (0, 0, None), (None, 0, 0), (0, 0, 0)):
        given = [
            many if d == 0 else one
            for d, many, one in zip(dims, stacks, (hidden, weight, bias), strict=True)
        ]
        wanted = tuple(i for i, d in enumerate(dims) if d == 0)
        gradient = torch.func.grad(value, wanted)
        got, expected = (
            torch.func.vmap(partial(gradient, chunked=chunked), in_dims=dims)(*given)
            for chunked in (True, False)
        )
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def test_derivatives_of_gradients(rng, block):
    hidden, weight, bias = parts(rng)
    y = tokens(rng, torch.empty(B, T, V))
    v = torch.randn(V, M, generator=rng, dtype=weight.dtype)

    def product(w, chunked):
        def value(w):
            head = Head(hidden, w, bias)
            return LM.loss(head if chunked else head.all_logits(), y).sum()

        return (torch.func.grad(value)(w) * v).sum()

    got, expected = (torch.func.grad(product)(weight, chunked) for chunked in (True, False))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_derivatives_by_finite_differences(rng, block, bias):
    """By autograd alone, first and second, of some inputs or all."""
    hidden, weight, shift = parts(rng, bias)
    y = torch.randint(V, (2, 3), generator=rng)

    def losses(h, w, *c):
        return _head.blockwise_losses(Head(h, w, *c), y)

    given = [hidden[:2, :3], weight] + ([shift] if bias else [])
    for free in ((0,), (1,), range(len(given))):
        leaves = [x.clone().requires_grad_(i in free) for i, x in enumerate(given)]
        assert torch.autograd.gradgradcheck(losses, leaves)


def test_half_precision(rng, block):
    hidden, weight, bias = (leaf.requires_grad_() for leaf in parts(rng, dtype=torch.bfloat16))
    y = tokens(rng, torch.empty(B, T, V))
    head = Head(hidden, weight, bias)
    got, expected = LM.loss(head, y), LM.loss(head.all_logits(), y)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    found, exact = (
        torch.autograd.grad(out.sum(), (hidden, weight, bias)) for out in (got, expected)
    )
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


def test_other_parts_of_the_likelihood_make_the_logits(rng):
    head = Head(*parts(rng))
    y = tokens(rng, torch.empty(B, T, V))
    f = head.all_logits()
    LM.check(head, y)
    assert torch.equal(LM.margin(head, y), LM.margin(f, y))
    assert torch.equal(LM.fisher_factor(head, y), LM.fisher_factor(f, y))
    assert torch.equal(LM.bregman(head, f + 1, y), LM.bregman(f, f + 1, y))
    one, two = (LM.sample(out, y, torch.Generator().manual_seed(1)) for out in (head, f))
    assert torch.equal(one, two)


def test_ignored_positions_reach_neither_value_nor_gradient(rng):
    hidden, weight, _ = parts(rng)
    y = tokens(rng, torch.empty(B, T, V))
    used = torch.nn.functional.pad(LM.token_mask(y)[:, 1:], (0, 1)).unsqueeze(2)
    broken = torch.where(used, hidden, torch.nan).requires_grad_()
    clean, weight = hidden.clone().requires_grad_(), weight.requires_grad_()
    for found in zip(
        *(
            torch.autograd.grad(LM.loss(Head(h, weight), y).sum(), (h, weight))
            for h in (broken, clean)
        ),
        strict=True,
    ):
        torch.testing.assert_close(*found, rtol=1e-13, atol=1e-15)


# ------------------------------------------------------------------ memory


class Living(TorchDispatchMode):
    """The largest tensor that any operation makes, and the most elements that live at a time."""

    def __init__(self):
        super().__init__()
        self.largest = self.now = self.most = 0
        self._known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
                self._hold(leaf.untyped_storage(), leaf.element_size())
        return out

    def _hold(self, storage, size):
        if storage in self._known:
            return
        count = storage.nbytes() // size
        self._known[storage] = True
        self.now += count
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, count)

    def _drop(self, count):
        self.now -= count


class Reader(nn.Module):
    """An embedding and an output embedding, the same one; a vocabulary much wider than itself."""

    chunked_head = True

    def __init__(self, vocabulary=512, width=4):
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)

    def forward(self, ids, return_head=False):
        head = Head(torch.tanh(self.words(ids)), self.words.weight)
        return head if return_head else head.all_logits()


@pytest.mark.parametrize("vectorize", [True, False])
def test_all_logits_never_exist(rng, monkeypatch, vectorize):
    """512 words, 2 chains of 8 × 13 tokens: blocks of 8 tokens, not 96, and few at a time."""
    monkeypatch.setattr(_head, "_BLOCK", 8 * 512)
    monkeypatch.setattr(_head, "_ROWS", 1)
    ids = torch.randint(512, (8, 13), generator=rng)
    chunked, plain = Reader().double(), Reader().double()
    plain.load_state_dict(chunked.state_dict())
    plain.chunked_head = False
    seen, found = [], []
    for model in (chunked, plain):
        task = bi.Task(model, LM, train=(ids, ids), query=(ids, ids))
        w = task.flatten(task.params)
        w = torch.stack([w, w + 0.1])
        functions, batch = ChainFunctions(task, vectorize), task.train.batch()

        def run(w=w, functions=functions, batch=batch):
            gradient, losses = functions.loss_grad(w, batch, shared=True)
            return gradient, losses, *functions.observe(w, batch, ["token_losses"])

        run()  # records
        with Living() as memory:
            found.append(run())
        seen.append(memory)
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    chains = 2 if vectorize else 1
    block, whole = (chains * tokens * 512 for tokens in (8, 96))
    assert seen[0].largest == max(block, len(w.flatten()))
    assert seen[1].largest >= whole
    assert seen[0].most < 10 * block
    assert seen[1].most > 1.5 * whole
