"""Products with Gauss–Newton matrix and Hessian against the dense matrices."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import bayesinf as bi
from bayesinf import _footprint
from bayesinf._footprint import examples_at_once, numbers_left
from bayesinf.curvature import _mean_product
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._mean_product import FiniteMean
from bayesinf.curvature._operator import SymmetricOperator
from bayesinf.curvature._products import GaussNewtonProduct, HessianProduct
from tests import exact
from tests.layered_cases import LAYERED, LAYERED_BY_NAME

DENSE = {GaussNewtonProduct: exact.gauss_newton, HessianProduct: exact.loss_hessian}


def make_task(model, rng, likelihood=None, features=(4,), n=7, **options):
    x = torch.randn(n, *features, generator=rng, dtype=torch.float64)
    y = torch.randint(2, (n,), generator=rng)
    likelihood = likelihood or bi.Categorical()
    return bi.Task(model.double(), likelihood, train=(x, y), query=(x[:2], y[:2]), **options)


def eye(task):
    return torch.eye(task.dimension, dtype=torch.float64)


@pytest.mark.parametrize("kind", DENSE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("case", LAYERED, ids=lambda c: c.name)
def test_products_with_the_identity_are_the_matrix(case, kind):
    task = case.task()
    expected = DENSE[kind](task)
    operator = kind(task, batch_size=5)
    exact.close(operator.apply(eye(task)), expected, 1e-11)
    v = torch.linspace(-1, 1, task.dimension, dtype=torch.float64)
    exact.close(operator @ v, expected @ v, 1e-10)
    largest = expected.norm(dim=0).topk(3).indices
    exact.close(operator @ eye(task)[:, largest], expected[:, largest], 1e-10)
    assert operator.shape == expected.shape
    assert isinstance(operator, SymmetricOperator)
    assert isinstance(operator, FiniteMean)


@pytest.mark.parametrize("kind", DENSE, ids=lambda kind: kind.__name__)
def test_blocks_of_vectors_and_loops_change_nothing(kind, monkeypatch, rng):
    task = LAYERED_BY_NAME["cnn"].task()
    rows = torch.randn(2, 3, task.dimension, generator=rng, dtype=torch.float64)
    expected = rows @ DENSE[kind](task)
    for chunk in (_mean_product._CHUNK, 1, 2500):
        monkeypatch.setattr(_mean_product, "_CHUNK", chunk)
        exact.close(kind(task, batch_size=7).apply(rows), expected, 1e-11)
    exact.close(kind(task, vectorize=False).apply(rows), expected, 1e-11)
    assert kind(task).apply(rows[:0]).shape == (0, 3, task.dimension)


class Opaque(torch.autograd.Function):
    """tanh, with a backward that has a data-dependent branch: autograd cannot vectorise it."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        if float(grad.detach().abs().sum()) < 0:
            raise AssertionError
        return grad * (1 - y**2)


class Once(Opaque):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0] ** 2)


class Custom(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.one, self.two, self.function = nn.Linear(4, 3), nn.Linear(3, 2), function

    def forward(self, x):
        return self.two(self.function(self.one(x)))


@pytest.mark.parametrize("kind", DENSE, ids=lambda kind: kind.__name__)
def test_what_cannot_be_vectorised_is_looped(kind, rng):
    model = Custom(Opaque.apply)
    task = make_task(model, rng)
    plain = Custom(torch.tanh)
    plain.load_state_dict(model.state_dict())
    x, y = task.train.batch()
    reference = bi.Task(plain.double(), bi.Categorical(), train=(x, y), query=(x, y))
    operator = kind(task)
    exact.close(operator.apply(eye(task)), DENSE[kind](reference), 1e-11)
    assert not operator._state.vectorize


@pytest.mark.parametrize("kind", DENSE, ids=lambda kind: kind.__name__)
def test_without_second_derivative_says_so(kind, rng):
    task = make_task(Custom(Once.apply), rng)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*once_differentiable"):
        kind(task).apply(eye(task)[:1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(8, 24), nn.Linear(8, 2)

    def forward(self, x):
        q, k, v = self.mix(x).unflatten(-1, (2, 12)).transpose(1, 2).chunk(3, dim=-1)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(out.transpose(1, 2).flatten(2)).mean(1)


def test_fused_attention(rng):
    task = make_task(Attention(), rng, features=(5, 8), n=4)
    v = torch.randn(3, task.dimension, generator=rng, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        expected = v @ exact.gauss_newton(task)
    exact.close(GaussNewtonProduct(task).apply(v), expected, 1e-11)


class Huber:
    """A user's own: nothing but a loss, linear for large errors."""

    def loss(self, outputs, target):
        difference = outputs - target[:, None].to(outputs)
        return nn.functional.huber_loss(
            difference, torch.zeros_like(difference), reduction="none", delta=0.5
        ).sum(1)


class Absolute:
    def loss(self, outputs, target):
        return (outputs - target[:, None].to(outputs)).abs().sum(1)


def test_a_likelihood_needs_only_a_loss(rng):
    task = make_task(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), rng, Huber())
    exact.close(GaussNewtonProduct(task).apply(eye(task)), exact.gauss_newton(task), 1e-11)
    exact.close(HessianProduct(task).apply(eye(task)), exact.loss_hessian(task), 1e-11)
    flat = make_task(nn.Linear(4, 2), rng, Absolute())
    assert bool((GaussNewtonProduct(flat).apply(eye(flat)) == 0).all())
    assert bool((HessianProduct(flat).apply(eye(flat)) == 0).all())


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        return self.used(x)


def test_parameters_that_are_not_selected_or_not_used(rng):
    some = LAYERED_BY_NAME["mlp-categorical"].task(parameters=["0.weight", "2.bias"])
    for kind, dense in DENSE.items():
        exact.close(kind(some).apply(eye(some)), dense(some), 1e-11)
    task = make_task(Unused(), rng)
    alone = make_task(Unused(), torch.Generator().manual_seed(0), parameters=["used.*"])
    used = exact.index(task, "used.weight", None), exact.index(task, "used.bias", None)
    alone.module.load_state_dict(task.module.state_dict())
    found = GaussNewtonProduct(task).apply(eye(task))
    idle = exact.index(task, "idle.weight", "idle.bias")
    assert bool((found[idle] == 0).all())
    assert bool((found[:, idle] == 0).all())
    where = torch.cat(used)
    x, y = make_task(Unused(), torch.Generator().manual_seed(0)).train.batch()
    j = torch.cat([torch.kron(torch.eye(2).double(), row[None]) for row in x]).view(len(x), 2, 8)
    j = torch.cat([j, torch.eye(2).double().expand(len(x), 2, 2)], dim=2)
    p = task.outputs(task.params, (x, y)).softmax(1)
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    exact.close(found[where][:, where], torch.einsum("nka,nkl,nlb->ab", j, h, j) / len(x), 1e-11)


# ---------------------------------------------------------------- parts of the examples


@pytest.mark.parametrize("kind", DENSE, ids=lambda kind: kind.__name__)
def test_the_operator_on_some_examples(kind, rng):
    task = LAYERED_BY_NAME["mlp-categorical"].task()
    x, y = task.train.batch()
    index = torch.tensor([3, 0, 7, 7])
    expected = DENSE[kind](
        bi.Task(task.module, task.likelihood, train=(x[index], y[index]), query=(x, y),
                parameters=".*")
    )  # fmt: skip
    operator = kind(task, batch_size=3)
    part = operator.on(index)
    exact.close(part.apply(eye(task)), expected, 1e-11)
    assert part.n == 4
    assert operator.n == task.n
    halves = [operator.on(half).apply(eye(task)) for half in torch.arange(12).view(2, 6)]
    exact.close(sum(halves) / 2, operator.apply(eye(task)), 1e-11)


def test_products_and_passes_are_counted():
    task = LAYERED_BY_NAME["mlp-categorical"].task()
    costs = Costs()
    operator = GaussNewtonProduct(task, batch_size=5, costs=costs)
    operator.apply(eye(task)[:7])
    assert operator.products == pytest.approx(7)
    assert (costs.forward_examples, costs.backward_examples) == (12, 12 * (1 + 2 * 7))
    part = operator.on(torch.arange(3))
    part.apply(eye(task)[:2])
    assert operator.products == part.products == pytest.approx(7.5)
    costs = Costs()
    HessianProduct(task, costs=costs).apply(eye(task)[:7])
    assert (costs.forward_examples, costs.backward_examples) == (12, 12 * 8)


@pytest.mark.parametrize("kind", DENSE, ids=lambda kind: kind.__name__)
def test_passes_are_kept_as_far_as_there_is_room(kind):
    """12 examples in batches of 5, 5 and 2: no room, room for the first, room for all."""
    task = LAYERED_BY_NAME["mlp-categorical"].task()
    first = 3 * 5 * numbers_left(task) * 8 / 2**30  # what a batch of 5 takes, in GiB
    expected = DENSE[kind](task)
    for room, passes in ((0.0, 36), (1.1 * first, 12 + 7 + 7), (1.0, 12)):
        costs = Costs()
        operator = kind(task, batch_size=5, memory_limit=room, costs=costs)
        for _ in range(3):
            exact.close(operator.apply(eye(task)), expected, 1e-11)
        assert costs.forward_examples == passes
        operator.on(torch.arange(4)).apply(eye(task)[:1])
        assert costs.forward_examples == passes + 4


def test_memory_is_bounded_by_what_a_pass_leaves_behind():
    task = LAYERED_BY_NAME["mlp-categorical"].task()  # 4-6-5-3, tanh
    kept = 4 + 6 + 6 + 5 + 5 + 3  # inputs and outputs of every layer, at most
    assert 4 + 6 + 5 <= numbers_left(task) <= 2 * kept
    wide = LAYERED_BY_NAME["conv-valid"].task()
    assert numbers_left(wide) > 2 * numbers_left(task)
    assert examples_at_once(task, 7) == 7
    assert examples_at_once(task, 10**9) == _footprint._NUMBERS // numbers_left(task)


@pytest.mark.parametrize("kind", DENSE, ids=lambda kind: kind.__name__)
def test_few_examples_at_once_change_nothing(kind, monkeypatch, rng):
    """Room for 3 of the 12, and for none: one at a time. A minibatch of a posterior, too."""
    task = LAYERED_BY_NAME["mlp-categorical"].task()
    expected, some = DENSE[kind](task), torch.tensor([1, 2, 2, 7, 11])
    part = kind(task).on(some).apply(eye(task))
    potential = bi.LocalPosterior(task, n_beta=3.0, gamma=2.0).bind()
    v = torch.randn(1, task.dimension, generator=rng, dtype=torch.float64)
    potential.weights = torch.rand(12, generator=rng, dtype=torch.float64)
    products = potential.hvp(potential.center[None], v, some[None])
    for room, size in ((3 * numbers_left(task), 3), (1, 1)):
        monkeypatch.setattr(_footprint, "_NUMBERS", room)
        assert examples_at_once(task, 12) == size
        exact.close(kind(task).apply(eye(task)), expected, 1e-11)
        exact.close(kind(task).on(some).apply(eye(task)), part, 1e-11)
        exact.close(potential.hvp(potential.center[None], v, some[None]), products, 1e-11)
        exact.close(
            potential.hvp(potential.center[None], v), 2 * v + 3 * v @ exact.loss_hessian(task), 1e-9
        )


# ---------------------------------------------------------------- surroundings


def test_precision_is_the_tasks_and_the_caller_gets_its_own(rng):
    double = LAYERED_BY_NAME["mlp-categorical"].task()
    rows = torch.randn(3, double.dimension, generator=rng, dtype=torch.float64)
    expected = GaussNewtonProduct(double).apply(rows)
    single = GaussNewtonProduct(double).apply(rows.float())
    assert single.dtype == torch.float32
    exact.close(single, expected, 1e-6)
    reduced = GaussNewtonProduct(double.to(dtype=torch.float32))
    assert reduced.dtype == torch.float32
    assert reduced.device == torch.device("cpu")
    assert reduced.apply(rows).dtype == torch.float64
    exact.close(reduced.apply(rows), expected, 1e-5)


def test_nothing_of_the_task_changes(rng):
    task = LAYERED_BY_NAME["in-place"].task()
    before = task.fingerprint()
    rows = torch.randn(3, task.dimension, generator=rng, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        out = GaussNewtonProduct(task).apply(rows)
    assert not out.requires_grad
    assert task.fingerprint() == before
    assert all(p.grad is None and not p.requires_grad for p in task.module.parameters())
    assert all(not p.requires_grad for p in task.params.values())


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 2)

    def forward(self, x):
        return self.one(x), x


class First:
    def loss(self, outputs, target):
        return nn.functional.cross_entropy(outputs[0], target, reduction="none")


def test_errors_say_what_to_do(rng):
    task = LAYERED_BY_NAME["linear-gaussian"].task()
    operator = GaussNewtonProduct(task)
    with pytest.raises(ValueError, match=r"rows \(\.\.\., 5\); got \(5, 4\).*operator @ matrix"):
        operator.apply(torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"vector \(5,\) or a matrix \(5, k\)"):
        operator @ torch.zeros(4)
    with pytest.raises(ValueError, match="batch_size must be ≥ 1; got 0"):
        GaussNewtonProduct(task, batch_size=0)
    for limit in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="memory_limit, in GiB, must be ≥ 0"):
            HessianProduct(task, memory_limit=limit)
    with pytest.raises(ValueError, match=r"mask becomes positions"):
        operator.on(torch.ones(12, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"non-empty vector"):
        operator.on(torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"positions from 0 to 11; got values from 0 to 12"):
        operator.on(torch.tensor([0, 12]))
    with pytest.raises(ValueError, match=r"values from -1 to 3.*train\.positions"):
        operator.on(torch.tensor([-1, 3]))
    pair = make_task(Pair(), rng, First())
    with pytest.raises(TypeError, match=r"one tensor.*Pair returns a tuple.*HessianProduct"):
        GaussNewtonProduct(pair).apply(torch.zeros(10, dtype=torch.float64))
    exact.close(HessianProduct(pair).apply(eye(pair)), exact.loss_hessian(pair), 1e-11)
