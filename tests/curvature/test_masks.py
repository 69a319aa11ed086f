"""Padding changes nothing: not the curvature, not the scores."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bayesinf as bi
from bayesinf import fit_curvature
from tests import exact
from tests.layered_cases import LM, Decoder, text


class Recurrent(Decoder):
    """A block that is called twice: its positions follow one another."""

    def forward(self, input_ids, attention_mask):
        h = self.words(input_ids) + self.places((attention_mask.cumsum(1) - 1).clamp_min(0))
        h = self.block(self.block(h, attention_mask), attention_mask)
        return self.head(self.norm(h))


class Bag(nn.Module):
    """An embedding whose padding is told by ``padding_idx`` alone."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(5, 3, padding_idx=0), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.words(x).sum(1)))


def pad(data, left, right):
    """More padding, of another token, with anything in it."""
    fill = {"input_ids": 3, "attention_mask": 0, "labels": -100}
    return {k: F.pad(v, (left, right), value=fill[k]) for k, v in data.items()}


def make(kind, side, left=0, right=0):
    torch.manual_seed(4)
    if kind == "recurrent":
        model = Recurrent("llama", length=12).double()
    else:
        model = Decoder(kind, length=12).double()
    g = torch.Generator().manual_seed(1)
    train, query = (text(5, 5, side)(g, n) for n in (4, 2))
    if side == "right":  # the first token is not predicted, not even from padding
        for data in (train, query):
            data["labels"][:, 0] = -100
    return bi.Task(model, LM, train=pad(train, left, right), query=pad(query, left, right))


KINDS = ["tied", "llama", "recurrent"]  # "hf" counts places from the left edge
CASES = [(kind, side) for kind in KINDS for side in ("left", "right")]
PADS = [(0, 3), (2, 0), (1, 2)]


@pytest.mark.parametrize(("kind", "side"), CASES)
@pytest.mark.parametrize("fisher", ["enumerated", "sampled", "empirical"])
def test_curvature(kind, side, fisher):
    forms = [("ekfac", "expand"), ("kfac", "expand"), ("kfac", "reduce"), ("dense", "expand")]
    pads = PADS
    if fisher != "empirical":
        forms, pads = forms[:1], PADS[2:]
    for form, sequence in forms:
        options = {"fisher": fisher, "form": form, "sequence": sequence, "seed": 2}
        expected = fit_curvature(make(kind, side), **options)
        for left, right in pads:
            found = fit_curvature(make(kind, side, left, right), **options)
            for block, other in zip(found.blocks, expected.blocks, strict=True):
                exact.close(block.dense(), other.dense(), 1e-10)


def test_padding_told_by_the_embedding_alone():
    """``diag(frequency)`` and ``S`` leave padding out, whatever there is of it."""
    g = torch.Generator().manual_seed(1)
    ids, y = torch.randint(1, 5, (6, 3), generator=g), torch.randint(3, (6,), generator=g)
    ids[0, 1:] = 0
    model = Bag().double()
    for form in ("kfac", "ekfac"):
        found = []
        for right in (0, 2):
            x = F.pad(ids, (0, right))
            task = bi.Task(
                model, bi.Categorical(), train=(x, y), query=(x, y), parameters="words.weight"
            )
            found.append(fit_curvature(task, fisher="enumerated", form=form).dense())
            assert not found[-1][:3].any()  # the row of padding
        exact.close(found[1], found[0], 1e-12)


@pytest.mark.parametrize(("kind", "side"), CASES)
def test_scores_of_sequences_and_tokens(kind, side):
    def scores(task, **options):
        return bi.ekfac(task, fisher="empirical", damping=0.05, **options)

    plain = make(kind, side)
    whole = scores(plain).influence
    tokens = {
        (t, q): scores(plain, train_tokens=t, query_tokens=q)
        for t, q in [("position", "loss"), ("loss", "position")]
    }
    for left, right in PADS:
        task = make(kind, side, left, right)
        exact.close(scores(task).influence, whole, 1e-10)
        for (t, q), expected in tokens.items():
            got = scores(task, train_tokens=t, query_tokens=q)
            exact.close(got.influence, expected.influence, 1e-10)
            for split in ("train", "query"):
                for name in (split, f"{split}_token_id"):
                    np.testing.assert_array_equal(got[name], expected[name])
                shifted = expected[f"{split}_position"] + left
                np.testing.assert_array_equal(got[f"{split}_position"], shifted)


@pytest.mark.parametrize(("kind", "side"), CASES)
def test_every_method(kind, side):
    methods = {
        "grad_dot": bi.grad_dot,
        "grad_cos": bi.grad_cos,
        "gauss_newton": lambda task: bi.gauss_newton(task, damping=0.1),
        "hessian": lambda task: bi.hessian(task, damping=40.0),
        "kfac": lambda task: bi.kfac(task, fisher="empirical", damping=0.1),
    }
    for method in methods.values():
        expected = method(make(kind, side)).influence
        exact.close(method(make(kind, side, 1, 2)).influence, expected, 1e-9)
