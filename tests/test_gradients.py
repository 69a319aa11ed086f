"""Many chains at once against one chain at a time by plain ``torch.autograd``."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import bayesinf as bi
from bayesinf import _gradients
from bayesinf._footprint import numbers_left
from bayesinf._gradients import ChainFunctions
from bayesinf._tracing import record
from tests.cases import BY_NAME, CASES

CHAINS = 3


def positions(task, rng, chains=CHAINS):
    center = task.flatten(task.params)
    noise = torch.randn(chains, len(center), generator=rng, dtype=center.dtype)
    return center + 0.3 * noise


def plain(task, w, batch):
    """Gradient and value of the mean loss by ``Tensor.backward``."""
    leaves = {k: v.clone().requires_grad_() for k, v in task.unflatten(w).items()}
    outputs = functional_call(task.module, leaves, (batch[0],))
    loss = task.likelihood.loss(outputs, batch[1]).mean()
    loss.backward()
    return torch.cat([leaf.grad.flatten() for leaf in leaves.values()]), loss.detach()


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_gradients_of_the_grid(case, shared, vectorize, rng):
    task = case.task()
    functions = ChainFunctions(task, vectorize)
    for size in (5, 5, 1):  # a replay, and another shape
        w = positions(task, rng)
        shape = (size,) if shared else (CHAINS, size)
        index = torch.randint(task.n, shape, generator=rng)
        grad, losses = functions.loss_grad(w, task.train.batch(index), shared=shared)
        assert not grad.requires_grad
        for c in range(CHAINS):
            mine = task.train.batch(index if shared else index[c])
            expected, value = plain(task, w[c], mine)
            close(grad[c], expected)
            close(losses[c].mean(), value)
    assert functions.vectorize is vectorize


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_measurements_of_the_grid(case, vectorize, rng):
    task = case.task()

    def weighted(task, params, batch):
        total = sum(p.square().sum() for p in params.values())
        return total * task.outputs(params, batch)[:, 0] + batch[0].flatten(1)[:, 1]

    wanted = ["loss", weighted]
    if hasattr(task.likelihood, "margin"):
        wanted.insert(1, "margin")
    functions = ChainFunctions(task, vectorize)
    for _ in range(2):
        w = positions(task, rng)
        batch = task.query.batch()
        got = functions.observe(w, batch, wanted)
        assert len(got) == len(wanted)
        for c in range(CHAINS):
            params = task.unflatten(w[c])
            outputs = functional_call(task.module, params, (batch[0],))
            expected = [task.likelihood.loss(outputs, batch[1])]
            if len(wanted) == 3:
                expected.append(task.likelihood.margin(outputs, batch[1]))
            expected.append(w[c].square().sum() * outputs[:, 0] + batch[0].flatten(1)[:, 1])
            for values, exact in zip(got, expected, strict=True):
                close(values[c], exact)


def test_vectorised_runs_never_loop(monkeypatch, rng):
    """Which way was taken, so that the comparisons above compare two things."""
    task = BY_NAME["mlp-categorical"].task()
    monkeypatch.setattr(_gradients, "_loop", lambda *_: pytest.fail("looped"))
    w, batch = positions(task, rng), task.train.batch()
    ChainFunctions(task).loss_grad(w, batch, shared=True)
    with pytest.raises(pytest.fail.Exception, match="looped"):
        ChainFunctions(task, False).loss_grad(w, batch, shared=True)
    convolutional = BY_NAME["cnn"].task()
    at, images = positions(convolutional, rng), convolutional.train.batch()
    with pytest.raises(pytest.fail.Exception, match="looped"):
        ChainFunctions(convolutional).loss_grad(at, images, shared=True)
    ChainFunctions(convolutional, True).loss_grad(at, images, shared=True)
    own = tuple(torch.stack([leaf] * len(at)) for leaf in images)
    ChainFunctions(convolutional).loss_grad(at, own, shared=False)
    monkeypatch.setattr(_gradients, "MAX_VECTORIZED_PARAMETERS", task.dimension)
    assert ChainFunctions(task).vectorize
    monkeypatch.setattr(_gradients, "MAX_VECTORIZED_PARAMETERS", task.dimension - 1)
    assert not ChainFunctions(task).vectorize
    assert ChainFunctions(task, True).vectorize
    monkeypatch.setattr(_gradients, "MAX_VECTORIZED_PARAMETERS", task.dimension)
    for large, vectorized in ((numbers_left(task), True), (numbers_left(task) - 1, False)):
        monkeypatch.setattr(_gradients, "_LARGE", large)
        assert ChainFunctions(task).vectorize == vectorized


# ---------------------------------------------------------------- recording


def test_recording_changes_no_value(rng):
    """Transposes that cancel, expands, ones, a bias on either side, a product used twice."""
    bias = torch.randn(4, generator=rng, dtype=torch.float64)

    def busy(w, x):
        a = w[:12].view(4, 3)
        product = x @ a.t().t().t()
        biased = bias.expand(len(x), 4) + product
        other = (1 * x.t() @ torch.tanh(biased)) + w[12:24].view(3, 4)
        scaled = torch.sum(product * biased, dim=1, keepdim=True).expand(-1, 4)
        in_place = (x @ a.t()).mul_(2)
        late = in_place + bias
        return [biased, other, scaled, late, product, torch.tanh(x @ a.t() - w[:4])]

    w = torch.randn(CHAINS, 24, generator=rng, dtype=torch.float64)
    x = torch.randn(5, 3, generator=rng, dtype=torch.float64)
    one_each = torch.randn(CHAINS, 5, 3, generator=rng, dtype=torch.float64)
    for dims, given in (((0, None), x), ((0, 0), one_each)):
        run = record(busy, dims, w, given)
        for scale in (1.0, -0.7):
            got = run(scale * w, scale * given)
            for c in range(CHAINS):
                mine = given if dims[1] is None else given[c]
                for values, exact in zip(got, busy(scale * w[c], scale * mine), strict=True):
                    close(values[c], exact)


def test_recording_is_simpler(rng):
    """An MLP's layers become fused products, and operations without effect go."""
    layer = nn.Linear(3, 4).double().requires_grad_(False)

    def network(w, b, x):
        return [torch.tanh(functional_call(layer, {"weight": w, "bias": b}, (x,)))]

    w = torch.randn(CHAINS, 4, 3, generator=rng, dtype=torch.float64)
    b = torch.randn(CHAINS, 4, generator=rng, dtype=torch.float64)
    x = torch.randn(5, 3, generator=rng, dtype=torch.float64)
    replay = record(network, (0, 0, None), w, b, x)
    names = [str(node.target) for node in replay.__self__.graph.nodes]
    assert sum("baddbmm" in name for name in names) == 1
    assert not any("add.Tensor" in name or name == "aten.bmm.default" for name in names)
    close(replay(w, b, x)[0], torch.tanh(torch.einsum("bi,coi->cbo", x, w) + b[:, None]))


class Attention(nn.Module):
    """Transposes, expands and products of products, with one weight used twice."""

    def __init__(self):
        super().__init__()
        self.qk, self.v = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        x = x.view(len(x), 3, 4)
        q, k = self.qk(x), self.qk(x.flip(1)).transpose(1, 2)
        weights = (q @ k / 2).softmax(-1)
        pooled = (weights @ self.v(x)).transpose(1, 2).transpose(1, 2) + x.mean(1, True).expand(
            -1, 3, -1
        )
        return self.out(self.norm(pooled)).mean(1)


@pytest.mark.parametrize("shared", [True, False])
def test_attention(rng, shared):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Attention().double()
    x = torch.randn(8, 12, generator=rng, dtype=torch.float64)
    y = torch.randint(3, (8,), generator=rng)
    task = bi.Task(model, bi.Categorical(), train=(x, y), query=(x, y))
    w = positions(task, rng)
    index = torch.randint(8, (4,) if shared else (CHAINS, 4), generator=rng)
    functions = ChainFunctions(task, True)
    for _ in range(2):
        grad, losses = functions.loss_grad(w, task.train.batch(index), shared=shared)
        for c in range(CHAINS):
            expected, value = plain(task, w[c], task.train.batch(index if shared else index[c]))
            close(grad[c], expected)
            close(losses[c].mean(), value)


# ---------------------------------------------------------------- what cannot be vectorised


class OnWeights(nn.Linear):
    """Control flow that depends on a chain's own numbers."""

    def forward(self, x):
        out = super().forward(x)
        return out if out.sum().item() > 0 else -2 * out


class OnInputs(nn.Linear):
    """Control flow that depends on the batch, which all chains may share."""

    def forward(self, x):
        out = super().forward(x)
        return out if x[0, 0].item() > 0 else -2 * out


class ByMask(nn.Linear):
    """A number of rows that depends on the batch, used as a number."""

    def forward(self, x):
        out = super().forward(x)
        return out * len(x[x[:, 0] > 0])


REASONS = {
    OnWeights: r"calling \.item\(\)",
    OnInputs: r"data-dependent control flow",
    ByMask: r"shape of aten\.index\.Tensor's result depends",
}


def stubborn(kind, rng):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(4, 3).double()
    x = torch.randn(8, 4, generator=rng, dtype=torch.float64)
    x[0, 0], x[1, 0] = 1.0, -1.0
    y = torch.randint(3, (8,), generator=rng)
    return bi.Task(model, bi.Categorical(), train=(x, y), query=(x, y))


@pytest.mark.parametrize("kind", REASONS)
@pytest.mark.parametrize("shared", [True, False])
def test_what_cannot_be_vectorised_is_looped_with_a_reason(rng, kind, shared):
    task = stubborn(kind, rng)
    w, functions = positions(task, rng, 6), ChainFunctions(task)
    indices = [torch.tensor([k, 5, 3]) for k in (0, 1)]
    if not shared:
        indices = [index.expand(6, 3) for index in indices]
    for turn, index in enumerate(indices):
        batch = task.train.batch(index)
        if turn == 0:
            why = REASONS[kind] if shared else ""
            words = rf"{kind.__name__} cannot be vectorised: \w*Error: .*{why}"
            with pytest.warns(bi.VectorizationWarning, match=words):
                grad, losses = functions.loss_grad(w, batch, shared=shared)
        else:  # said once
            grad, losses = functions.loss_grad(w, batch, shared=shared)
        for c in range(6):
            expected, value = plain(task, w[c], task.train.batch(index if shared else index[c]))
            close(grad[c], expected)
            close(losses[c].mean(), value)
    assert not functions.vectorize


@pytest.mark.parametrize("kind", REASONS)
def test_forced_vectorisation_raises(rng, kind):
    task = stubborn(kind, rng)
    functions = ChainFunctions(task, True)
    with pytest.raises(RuntimeError, match=REASONS[kind]):
        functions.loss_grad(positions(task, rng), task.train.batch(), shared=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ChainFunctions(task, False).loss_grad(positions(task, rng), task.train.batch(), shared=True)


def test_sampling_falls_back_and_gives_the_same(rng):
    task = stubborn(OnWeights, rng)
    posterior = bi.LocalPosterior(task, n_beta=10.0, gamma=5.0)
    options = {"draws": 5, "warmup": 5, "progress": False}
    with pytest.warns(bi.VectorizationWarning, match="Results are the same"):
        got = bi.sample(posterior, bi.SGLD(0.01), **options)
    expected = bi.sample(posterior, bi.SGLD(0.01), vectorize=False, **options)
    assert (got.values("train").values == expected.values("train").values).all()


@pytest.mark.parametrize("wrong", [lambda out: 1.01 * out, lambda out: out * float("nan")])
def test_a_recording_that_disagrees_is_not_used(monkeypatch, rng, wrong):
    task = BY_NAME["mlp-categorical"].task()

    def flawed(*args):
        run = record(*args)
        return lambda *inputs: [wrong(out) for out in run(*inputs)]

    monkeypatch.setattr(_gradients, "record", flawed)
    w, batch, functions = positions(task, rng), task.train.batch(), ChainFunctions(task)
    with pytest.warns(bi.VectorizationWarning, match="do not reproduce its outputs"):
        grad, losses = functions.loss_grad(w, batch, shared=True)
    for c in range(CHAINS):
        expected, value = plain(task, w[c], batch)
        close(grad[c], expected)
        close(losses[c].mean(), value)


def test_a_diverged_chain_does_not_end_vectorisation(rng):
    task = BY_NAME["mlp-categorical"].task()
    w, functions = positions(task, rng), ChainFunctions(task)
    w[-1] = float("nan")
    (got,) = functions.observe(w, task.train.batch(), ["loss"])
    assert functions.vectorize
    assert bool(got[-1].isnan().all())
    exact = F.cross_entropy(
        functional_call(task.module, task.unflatten(w[0]), (task.train.batch()[0],)),
        task.train.batch()[1],
        reduction="none",
    )
    close(got[0], exact)


@pytest.mark.parametrize("weighted", [False, True])
def test_large_networks_take_few_examples_at_a_time(monkeypatch, weighted):
    """Pieces of 3, 3 and 1 examples give the gradient and losses of all 7 at once."""
    seen = []

    class Counting(nn.Linear):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    torch.manual_seed(0)
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randint(3, (7,))
    task = bi.Task(Counting(4, 3).double(), bi.Categorical(), train=(x, y), query=(x, y))
    w = torch.stack([task.flatten(task.params) + 0.1 * c for c in range(2)])
    weights = torch.rand(7, dtype=torch.float64) if weighted else None
    functions, batch = ChainFunctions(task, vectorize=False), task.train.batch()
    expected = functions.loss_grad(w, batch, shared=True, weights=weights)
    monkeypatch.setattr(_gradients, "_LEAST", 1)
    monkeypatch.setattr(_gradients, "_NEAR", 3 * numbers_left(task))
    seen.clear()
    got = functions.loss_grad(w, batch, shared=True, weights=weights)
    assert seen == [3, 3, 1] * 2
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_network_at_its_exact_optimum_is_vectorised() -> None:
    """Its gradient is rounding alone, which no two computations share."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=rng)
    y = x @ torch.randn(5, 2, generator=rng) + torch.randn(200, 2, generator=rng)
    model = nn.Linear(5, 2, bias=False)
    model.weight.data = torch.linalg.lstsq(x.double(), y.double()).solution.T.float()
    task = bi.Task(model, bi.Gaussian(), train=(x, y), query=(x[:3], y[:3]))
    functions = ChainFunctions(task)
    position = task.flatten(task.params)[None]
    gradient, _ = functions.loss_grad(position.repeat(4, 1), (x, y), shared=True)
    assert gradient.abs().max() < 1e-5
    assert functions.vectorize
