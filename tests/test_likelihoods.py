"""Likelihoods against ``torch.nn.functional``, automatic differentiation and hand formulas."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import jacrev

import bayesinf as bi
from bayesinf._likelihoods import CausalLM, require
from tests.token_cases import PAD, tokens

B = 5
SHAPES = [(B, 3), (B, 3, 4), (B, 3, 2, 3)]


def logits(rng, *shape):
    return 2 * torch.randn(*shape, generator=rng, dtype=torch.float64)


def labels(rng, outputs):
    return torch.randint(outputs.shape[1], (B, *outputs.shape[2:]), generator=rng)


def soft(rng, outputs):
    return torch.rand(outputs.shape, generator=rng, dtype=torch.float64)


def target_of(likelihood, rng, outputs):
    if isinstance(likelihood, CausalLM):
        return tokens(rng, outputs)
    return labels(rng, outputs) if likelihood == bi.Categorical() else soft(rng, outputs)


EVERY = [
    *[(bi.Categorical(), shape) for shape in SHAPES],
    (CausalLM(PAD), (B, 4, 3)),
    *[(likelihood, shape) for likelihood in (bi.Gaussian(), bi.Bernoulli())
      for shape in ((B,), (B, 2), (B, 2, 3))],
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_categorical_loss_and_margin(rng, shape):
    f = logits(rng, *shape)
    y = labels(rng, f)
    expected = F.cross_entropy(f, y, reduction="none").reshape(B, -1).sum(1)
    torch.testing.assert_close(bi.Categorical().loss(f, y), expected, rtol=1e-12, atol=0)
    p = f.softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)
    margin = (p / (1 - p)).log().reshape(B, -1).sum(1)
    torch.testing.assert_close(bi.Categorical().margin(f, y), margin, rtol=1e-10, atol=1e-12)


def test_categorical_positions_sum_to_the_example(rng):
    f = logits(rng, B, 3, 4)
    y = labels(rng, f)
    got = bi.Categorical().token_losses(f, y)
    expected = F.cross_entropy(f, y, reduction="none")
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.sum(1), bi.Categorical().loss(f, y), rtol=1e-12, atol=0)
    mask = bi.Categorical().token_mask(y)
    assert mask.shape == y.shape
    assert bool(mask.all())


@pytest.mark.parametrize("shape", [(B,), (B, 2), (B, 2, 3)], ids=str)
def test_gaussian_and_bernoulli_losses(rng, shape):
    f = logits(rng, *shape)
    y = soft(rng, f)
    half = 0.5 * F.mse_loss(f, y, reduction="none").reshape(B, -1).sum(1)
    torch.testing.assert_close(bi.Gaussian().loss(f, y), half, rtol=1e-12, atol=0)
    p = f.sigmoid()
    entropy = -(y * p.log() + (1 - y) * (1 - p).log()).reshape(B, -1).sum(1)
    torch.testing.assert_close(bi.Bernoulli().loss(f, y), entropy, rtol=1e-11, atol=0)


def test_correct_is_the_share_of_right_predictions():
    f = torch.tensor([[[0.0, 2.0, 1.0], [1.0, 0.0, 0.0]], [[0.0, 0.0, 3.0], [-1.0, 5.0, 0.0]]])
    assert bi.Categorical().correct(f[:, :, 2], torch.tensor([0, 1])).tolist() == [1, 0]
    whole = bi.Categorical().correct(f, torch.tensor([[1, 1, 0], [0, 1, 0]]))
    torch.testing.assert_close(whole, torch.tensor([2 / 3, 1.0]))
    logits, labels = (
        torch.tensor([[2.0, -1.0], [-3.0, 4.0]]),
        torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
    )
    assert bi.Bernoulli().correct(logits, labels).tolist() == [1.0, 0.5]
    assert bi.Bernoulli().correct(logits[:, 0], labels[:, 0]).tolist() == [1.0, 0.0]


def test_bernoulli_margin(rng):
    f = logits(rng, B, 1)
    sign = torch.tensor([[1.0], [0], [1], [0], [1]], dtype=torch.float64)
    got = bi.Bernoulli().margin(f, sign)
    torch.testing.assert_close(got, (f * (2 * sign - 1))[:, 0], rtol=1e-10, atol=1e-12)
    f = logits(rng, B, 3)
    y = (soft(rng, f) > 0.5).double()
    p = torch.where(y > 0, f.sigmoid(), 1 - f.sigmoid()).prod(1)
    torch.testing.assert_close(bi.Bernoulli().margin(f, y), (p / (1 - p)).log(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("exponent", range(-6, 0))
def test_small_losses_keep_precision_in_float32(exponent):
    """Half the rounding error of ``1 + loss``: 10 % of 1e-6, where ``f_y − lse`` has none right."""
    loss = 10.0**exponent
    gap = -math.log(math.expm1(loss))
    for offset in (0.0, 12.5, 40.0):
        f = torch.tensor([[offset + gap, offset]], dtype=torch.float32)
        exact = math.log1p(math.exp(float(f[0, 1].double() - f[0, 0].double())))
        for likelihood, out, y in (
            (bi.Categorical(), f, torch.tensor([0])),
            (CausalLM(), f.expand(1, 2, 2), torch.tensor([[1, 0]])),
        ):
            got = float(likelihood.loss(out, y))
            assert abs(got - exact) <= 1e-7 + 1e-6 * exact
    f = torch.tensor([[gap]], dtype=torch.float32)
    exact = math.log1p(math.exp(-float(f)))
    got = float(bi.Bernoulli().loss(f, torch.ones(1, 1)))
    assert got == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(("likelihood", "shape"), EVERY, ids=str)
def test_fisher_factor_is_a_root_of_the_hessian(rng, likelihood, shape):
    f = logits(rng, *shape)
    y = target_of(likelihood, rng, f)
    rows = likelihood.fisher_factor(f, y)
    assert rows.shape[1:] == f.shape
    flat = rows.reshape(len(rows), B, -1)
    for b in range(B):
        one = jacrev(jacrev(lambda out, b=b: likelihood.loss(out, y[b : b + 1]).sum()))(
            f[b : b + 1]
        )
        size = f[b].numel()
        got = flat[:, b].T @ flat[:, b]
        torch.testing.assert_close(got, one.reshape(size, size), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("likelihood", "shape"), EVERY, ids=str)
def test_bregman_is_its_definition(rng, likelihood, shape):
    f, r = logits(rng, *shape), logits(rng, *shape)
    y = target_of(likelihood, rng, f)
    slope = jacrev(lambda out: likelihood.loss(out, y).sum())(r)
    linear = (slope * (f - r)).reshape(B, -1).sum(1)
    expected = likelihood.loss(f, y) - likelihood.loss(r, y) - linear
    got = likelihood.bregman(f, r, y)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert bool((got > 0).all())
    zero = likelihood.bregman(r, r, y)
    torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("likelihood", "shape"), EVERY, ids=str)
def test_samples_have_the_predictive_distribution(rng, likelihood, shape):
    """z-tests at 6 standard deviations: at most 72 of 2e-9 each, false alarms below 1e-6."""
    f = 0.5 * logits(rng, *shape)
    draws = 4000
    many = f.expand(draws, *f.shape).reshape(draws * B, *f.shape[1:])
    y = target_of(likelihood, rng, f)
    y = y.repeat(draws, *[1] * (y.ndim - 1))
    got = likelihood.sample(many, y, rng)
    if isinstance(likelihood, CausalLM):
        counted = likelihood.token_mask(y[:B])[:, 1:]
        got = got.reshape(draws, B, -1)[:, :, 1:][:, counted].flatten()
        f = f[:, :-1][counted]
        many = f.expand(draws, *f.shape).flatten(0, 1)
    if isinstance(likelihood, (bi.Categorical, CausalLM)):
        assert not got.is_floating_point()
        got = F.one_hot(got, f.shape[1]).movedim(-1, 1).double()
        mean = f.softmax(1)
        variance = mean * (1 - mean)
    elif likelihood == bi.Bernoulli():
        assert set(got.unique().tolist()) == {0.0, 1.0}
        mean = f.sigmoid()
        variance = mean * (1 - mean)
    else:
        mean, variance = f, torch.ones_like(f)
    assert got.shape == many.shape
    got = got.reshape(draws, *f.shape)
    z = (got.mean(0) - mean) / (variance / draws).sqrt()
    assert float(z.abs().max()) < 6
    if likelihood == bi.Gaussian():
        z = (got.var(0) - 1) / math.sqrt(2 / draws)
        assert float(z.abs().max()) < 6


@pytest.mark.parametrize("likelihood", [bi.Categorical(), bi.Gaussian(), bi.Bernoulli()], ids=str)
def test_samples_follow_their_generator(likelihood):
    f = torch.zeros(50, 2)
    y = target_of(likelihood, torch.Generator(), f)
    one, two, other = (
        likelihood.sample(f, y, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


class Huber:
    """A user's own likelihood: nothing but a loss."""

    def loss(self, outputs, target):
        return F.huber_loss(outputs, target, reduction="none").sum(1)


def test_a_users_own_likelihood_needs_only_a_loss(rng):
    assert isinstance(Huber(), bi.Likelihood)
    x = torch.randn(8, 3, generator=rng, dtype=torch.float64)
    y = torch.randn(8, 2, generator=rng, dtype=torch.float64)
    model = nn.Linear(3, 2).double()
    task = bi.Task(model, Huber(), train=(x, y), query=(x[:2], y[:2]))
    posterior = bi.LocalPosterior(task, n_beta=8.0, gamma=4.0)
    traces = bi.sample(posterior, bi.SGLD(1e-12), draws=2, warmup=0, jitter=0, progress=False)
    expected = Huber().loss(model(x), y).detach().numpy()
    np.testing.assert_allclose(traces.values("train")[0, 0], expected, rtol=1e-4)


@pytest.mark.parametrize("part", ["margin", "sample", "fisher_factor", "bregman"])
def test_a_missing_part_is_named(part):
    with pytest.raises(NotImplementedError, match=f"the gadget needs `{part}` .* Huber does not"):
        require(Huber(), part, "the gadget")
    f = torch.zeros(2, 2)
    assert require(bi.Gaussian(), "loss", "x")(f, f + 2).tolist() == [4.0, 4.0]


def test_a_measurement_that_the_likelihood_lacks_is_refused(rng):
    x, y = torch.randn(4, 3, generator=rng), torch.randn(4, 1, generator=rng)
    task = bi.Task(nn.Linear(3, 1), bi.Gaussian(), train=(x, y), query=(x, y))
    with pytest.raises(NotImplementedError, match=r"measurement 'margin' needs `margin`.*Gaussian"):
        task.measure("margin", task.params, task.train.batch())


LONG = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("likelihood", "outputs", "target", "words"),
    [
        (bi.Categorical(), torch.zeros(2), LONG, "expects logits"),
        (bi.Categorical(), torch.zeros(2, 3), torch.zeros(2, 3), "one-hot or float labels"),
        (bi.Categorical(), torch.zeros(2, 3), LONG.float(), "float labels"),
        (bi.Categorical(), torch.zeros(2, 3, 4), LONG, r"target \(2,\)"),
        (bi.Categorical(), torch.zeros(2, 1), LONG, "labels from 0 to 1 for 1 classes"),
        (bi.Categorical(), torch.zeros(2, 3), LONG - 1, "labels from -1 to 0"),
        (bi.Gaussian(), torch.zeros(2, 1), torch.zeros(2), r"targets \(B,\) for outputs \(B, 1\)"),
        (bi.Gaussian(), torch.zeros(2), LONG, "float targets of the outputs' shape"),
        (bi.Bernoulli(), torch.zeros(2), LONG, "integer labels"),
        (bi.Bernoulli(), torch.zeros(2), torch.tensor([-1.0, 1]), r"labels −1/\+1"),
        (bi.Bernoulli(), torch.zeros(2, 1), torch.zeros(2), r"outputs \(B, 1\) for targets"),
    ],
)
def test_targets_that_do_not_fit_are_refused(likelihood, outputs, target, words):
    with pytest.raises(ValueError, match=words):
        likelihood.check(outputs, target)


def test_targets_that_fit_pass():
    bi.Categorical().check(torch.zeros(2, 2), LONG)
    bi.Categorical().check(torch.zeros(2, 2, 3), torch.zeros(2, 3, dtype=torch.long))
    bi.Gaussian().check(torch.zeros(2), torch.ones(2))
    bi.Bernoulli().check(torch.zeros(2, 1), torch.full((2, 1), 0.5))
