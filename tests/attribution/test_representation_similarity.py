"""Cosines of hidden states against states taken from the network by hand."""

import numpy as np
import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf.attribution._registry import METHODS
from bayesinf.attribution._representation_similarity import representation_similarity


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.GRU(6, 5, batch_first=True)
        self.unused = nn.Linear(5, 5)
        self.head = nn.Linear(5, 11)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.mix(self.embed(input_ids))[0])


def language_task(g):
    sets = {}
    for split, n in (("train", 7), ("query", 3)):
        ids = torch.randint(0, 11, (n, 6), generator=g)
        keep = torch.arange(6) < torch.randint(2, 7, (n, 1), generator=g)
        labels = ids.masked_fill(~keep, -100)
        sets[split] = {"input_ids": ids, "attention_mask": keep.long(), "labels": labels}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return bi.Task(Reader().double(), bi.CausalLM(), **sets)


def cosine(left, right):
    unit = [x / x.norm(dim=1, keepdim=True) for x in (left, right)]
    return (unit[0] @ unit[1].T).detach().numpy()


def pooled(task, split, module):
    net, rows = task.module, []
    inputs, _ = task.examples(split).batch()
    for ids, keep in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        state = net.embed(ids[None])
        state = state if module == "embed" else net.mix(state)[0]
        rows.append(state[0, keep].mean(0))
    return torch.stack(rows)


@pytest.mark.parametrize("module", [None, "embed", "mix"])
def test_of_a_language_model(module, rng):
    """By default what the head reads, which is what the recurrent layer returns (in a tuple)."""
    task = language_task(rng)
    scores = representation_similarity(task, module=module, batch_size=2)
    expected = cosine(pooled(task, "query", module), pooled(task, "train", module))
    np.testing.assert_allclose(-scores.influence, expected, rtol=1e-12)
    assert scores.attrs["module"] == (module or "head (input)")
    assert scores.attrs["estimand"] == METHODS["representation_similarity"].estimand == "similarity"
    assert scores.attrs["forward_examples"] == 10
    assert not any(m._forward_hooks for m in task.module.modules())


def test_of_other_inputs(rng):
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 2)).double()
    x = torch.randn(6, 2, 4, generator=rng, dtype=torch.float64)
    y = torch.randn(6, 2, generator=rng, dtype=torch.float64)
    task = bi.Task(net, bi.Gaussian(), train=(x, y), query=(x[:2], y[:2]))
    state = net[0](x).flatten(1)
    for module in (None, "0", "1"):
        scores = representation_similarity(task, module=module)
        np.testing.assert_allclose(-scores.influence, cosine(state[:2], state), rtol=1e-12)


def test_a_state_of_zeros_is_like_nothing(rng):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    nn.init.constant_(net[0].bias, -1e3)
    x = torch.randn(5, 3, generator=rng)
    task = bi.Task(net, bi.Gaussian(), train=(x, x[:, :1]), query=(x, x[:, :1]))
    np.testing.assert_array_equal(representation_similarity(task).influence, np.zeros((5, 5)))


def test_refusals(rng):
    task = language_task(rng)
    with pytest.raises(ValueError, match=r"no module 'body'. Modules are \['embed', 'head', 'mix'"):
        representation_similarity(task, module="body")
    with pytest.raises(ValueError, match="'unused' does not run in the forward pass"):
        representation_similarity(task, module="unused")
    with pytest.raises(ValueError, match="batch_size must be a positive integer"):
        representation_similarity(task, batch_size=0)
    x = torch.randn(5, 3, generator=rng)
    scale = nn.Sequential(nn.LayerNorm(3))
    flat = bi.Task(scale, bi.Gaussian(), train=(x, x), query=(x, x))
    with pytest.raises(ValueError, match="Sequential runs no linear layer"):
        representation_similarity(flat)

    class Total(nn.Module):
        def forward(self, x):
            return x.sum()

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.total = nn.Linear(3, 3), Total()

        def forward(self, x):
            return self.fc(x) + 0 * self.total(x)

    odd = bi.Task(Odd(), bi.Gaussian(), train=(x, x), query=(x, x))
    with pytest.raises(ValueError, match=r"one row per example, \(5, …\) here; got \(\)"):
        representation_similarity(odd, module="total")
