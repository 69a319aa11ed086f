"""Linear maps by oneDNN against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from bayesinf import _linear
from bayesinf._linear import FusedLinear


@pytest.fixture
def calls(monkeypatch):
    """Counts how often oneDNN is asked for."""
    seen, fits = [], _linear._fits
    monkeypatch.setattr(_linear, "_fits", lambda *args: seen.append(fits(*args)) or seen[-1])
    return seen


def parts(rng, *lead, dtype=torch.float32):
    shapes = ((*lead, 5), (7, 5), (7,))
    return [torch.randn(shape, generator=rng).to(dtype) for shape in shapes]


@pytest.mark.parametrize("lead", [(100,), (4, 25), (2, 5, 10)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_same_map(rng, calls, lead, bias):
    x, weight, shift = parts(rng, *lead)
    given = (x, weight, shift) if bias else (x, weight)
    exact = F.linear(*(part.double() for part in given))
    with torch.no_grad(), FusedLinear():
        got = F.linear(*given)
    assert calls == [True]
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, b: (x.double(), w.double(), b.double()),
        lambda x, w, b: (x[:3], w, b),
        lambda x, w, b: (x.bfloat16(), w.bfloat16(), b.bfloat16()),
        lambda x, w, b: (x.T.contiguous().T, w, b),
    ],
    ids=["double", "few rows", "bfloat16", "not contiguous"],
)
def test_what_does_not_fit_is_left_alone(rng, calls, change):
    given = change(*parts(rng, 100))
    with torch.no_grad(), FusedLinear():
        got = F.linear(*given)
    assert calls == [False]
    assert torch.equal(got, F.linear(*given))


def test_gradients_are_left_alone(rng, calls):
    x, weight, shift = parts(rng, 100)
    weight.requires_grad_()
    with FusedLinear():
        F.linear(x, weight, shift).sum().backward()
    assert calls == [False]
    torch.testing.assert_close(weight.grad, x.sum(0).expand(7, 5))
