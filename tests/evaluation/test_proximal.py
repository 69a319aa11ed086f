"""Objectives around a checkpoint, their curvature and their minima, against dense computations."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import bayesinf as bi
from bayesinf.evaluation._descent import minimise
from bayesinf.evaluation._proximal import (
    Metric,
    Neighbourhood,
    Objective,
    fit_metric,
    respond,
)
from tests import exact, quadratic
from tests.cases import BY_NAME

LINKS = ["mlp-categorical", "mlp-gaussian", "mlp-bernoulli"]


def owned(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def share(task: bi.Task) -> Tensor:
    return torch.full((task.n,), 1 / task.n, dtype=torch.float64)


def some_objective(task: bi.Task, rows: int = 3) -> Objective:
    g = owned()
    weights = torch.randn(rows, task.n, generator=g, dtype=torch.float64) / task.n
    both = torch.rand(2, rows, generator=g, dtype=torch.float64)
    return Objective(weights, share(task), both[0], both[1])


@pytest.mark.parametrize("name", [*LINKS, "cnn"])
def test_values_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the formula in the module, by autograd on each row, however the examples are cut."""
    monkeypatch.setattr("bayesinf.evaluation._proximal._ROW_EXAMPLES", 15)  # 3 chunks of 5, 5, 2
    task = BY_NAME[name].task()
    near, objective = Neighbourhood(task), some_objective(task)
    x, y = task.train.batch()
    reference = task.outputs(task.params, (x, y))
    position = near.center + 0.3 * torch.randn(3, task.dimension, generator=owned(1)).double()
    values, grads = near.value_and_grad(objective, position)
    for c in range(3):
        w = position[c].clone().requires_grad_()
        outputs = task.outputs(task.unflatten(w), (x, y))
        expected = (
            (objective.losses[c] * task.likelihood.loss(outputs, y)).sum()
            + task.likelihood.bregman(outputs, reference, y).mean()
            + 0.5 * objective.proximity[c] * (w - near.center).square().sum()
            + 0.5 * objective.decay[c] * w.square().sum()
        )
        torch.testing.assert_close(values[c], expected.detach(), rtol=1e-12, atol=0)
        (grad,) = torch.autograd.grad(expected, w)
        torch.testing.assert_close(grads[c], grad, rtol=0, atol=1e-13)
    assert near.forward_examples == near.backward_examples == 3 * task.n


@pytest.mark.parametrize("name", LINKS)
def test_curvature_is_the_gauss_newton_matrix(name: str) -> None:
    task = BY_NAME[name].task()
    near = Neighbourhood(task)
    eye = torch.eye(task.dimension, dtype=torch.float64)
    exact.close(near.curvature(share(task), eye), exact.gauss_newton(task), 1e-12)


def test_gradients_and_slopes() -> None:
    task = BY_NAME["mlp-categorical"].task()
    near = Neighbourhood(task)
    exact.close(
        near.loss_gradients(torch.eye(task.n, dtype=torch.float64)), exact.gradients(task), 1e-12
    )
    vectors = torch.randn(2, task.dimension, generator=owned(), dtype=torch.float64)
    expected = vectors @ exact.gradients(task, "query", "margin").T
    exact.close(near.slope("margin", vectors), expected, 1e-12)


def test_a_full_metric_is_exact_and_a_small_one_bounds_the_rest() -> None:
    task = BY_NAME["mlp-gaussian"].task()
    near, dense = Neighbourhood(task), exact.gauss_newton(task)
    spectrum = torch.linalg.eigvalsh(dense).flip(0)
    vectors = torch.randn(3, task.dimension, generator=owned(), dtype=torch.float64)
    damping = torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64)
    full = fit_metric(near, share(task), rank=1000, generator=owned())
    eye = torch.eye(task.dimension, dtype=torch.float64)
    expected = [torch.linalg.solve(dense + k * eye, v) for k, v in zip(damping, vectors)]  # noqa: B905
    exact.close(full.solve(vectors, damping), torch.stack(expected), 1e-9)
    small = fit_metric(near, share(task), rank=8, generator=owned())
    assert small.rest == float(small.values[-1]) > 0
    assert bool((small.values <= spectrum[:8] * (1 + 1e-9)).all())  # Nyström is from below
    assert small.largest > 0.9 * float(spectrum[0])
    exact.close(small.basis.T @ small.basis, torch.eye(8), 1e-9)


def test_no_curvature_at_all() -> None:
    """Zero inputs without a bias: the network does not see its weights."""
    x, y = torch.zeros(4, 3).double(), torch.ones(4, 1).double()
    task = bi.Task(nn.Linear(3, 1, bias=False).double(), bi.Gaussian(), train=(x, y), query=(x, y))
    metric = fit_metric(Neighbourhood(task), share(task), rank=2, generator=owned())
    vector = torch.ones(1, 3, dtype=torch.float64)
    torch.testing.assert_close(metric.solve(vector, vector[:, 0] * 0.5), 2 * vector)


@pytest.mark.parametrize("rank", [4, 1000])
def test_linear_response_is_the_dense_solve(rank: int) -> None:
    task = BY_NAME["mlp-categorical"].task()
    near = Neighbourhood(task)
    metric = fit_metric(near, share(task), rank=rank, generator=owned())
    gradients = torch.cat([exact.gradients(task), torch.zeros(1, task.dimension).double()])
    v, residual = respond(
        near, metric, share(task), 0.01, gradients, tolerance=1e-12, max_iterations=200
    )
    dense = exact.gauss_newton(task) + 0.01 * torch.eye(task.dimension, dtype=torch.float64)
    exact.close(v, -torch.linalg.solve(dense, gradients.T).T, 1e-10)
    assert float(residual.max()) <= 1e-12
    _, early = respond(near, metric, share(task), 0.01, gradients[:1], tolerance=1e-15,
                       max_iterations=1)  # fmt: skip
    assert float(early) > 1e-15


@pytest.mark.parametrize("offset", [0.0, 0.7])
def test_linear_regression_responds_by_its_leverage(offset: float) -> None:
    """w(ε) − ws = −ε (G+λI)⁻¹∇ℓ / (1 + εh), h = xᵀ(G+λI)⁻¹x, wherever training stopped."""
    case = quadratic.make(offset=offset)
    task, damping = case.task, 0.05
    x, _ = task.train.batch()
    near = Neighbourhood(task)
    metric = fit_metric(near, share(task), rank=2, generator=owned())  # half of the directions
    steps = torch.tensor([0.2, -0.03, 1e-5], dtype=torch.float64)
    rows = torch.zeros(3, task.n, dtype=torch.float64)
    rows[:, 7] = steps
    zero = torch.zeros(3, dtype=torch.float64)
    gradient = case.gradients("train", case.w0)[0][7]
    end = minimise(
        near, Objective(rows, share(task), zero + damping, zero), metric,
        steps.abs() * gradient.norm(), tolerance=1e-12, max_iterations=50,
    )  # fmt: skip
    dense = x.T @ x / task.n + damping * torch.eye(4, dtype=torch.float64)
    leverage = x[7] @ torch.linalg.solve(dense, x[7])
    linear = -steps[:, None] * torch.linalg.solve(dense, gradient)
    exact.close(end.position - near.center, linear / (1 + steps * leverage)[:, None], 1e-9)
    assert float(end.residual.max()) <= 1e-12


def test_loss_minimised_to_the_stationary_point_of_dense_newton() -> None:
    """No divergence: ridge-penalised softmax regression, from far away."""
    task = BY_NAME["softmax-regression"].task()
    near = Neighbourhood(task)
    metric = fit_metric(near, share(task), rank=5, generator=owned())
    decay = torch.tensor([0.1, 1e-4], dtype=torch.float64)
    objective = Objective(share(task).repeat(2, 1), None, torch.zeros(2).double(), decay)
    scale = torch.ones(2, dtype=torch.float64)
    end = minimise(near, objective, metric, scale, tolerance=1e-10, max_iterations=300)
    assert float(end.residual.max()) <= 1e-10
    for c in range(2):

        def total(w: Tensor, c: int = c) -> Tensor:
            mean = task.losses(task.unflatten(w), task.train.batch()).mean()
            return mean + 0.5 * decay[c] * w.square().sum()

        w = end.position[c].clone()
        for _ in range(3):
            hessian = torch.autograd.functional.hessian(total, w)
            w = w - torch.linalg.solve(hessian, torch.autograd.functional.jacobian(total, w))
        torch.testing.assert_close(end.position[c], w, rtol=0, atol=1e-5)
    assert int(end.iterations[1]) > int(end.iterations[0])


class Rectified(nn.Module):
    """``f = relu(w)``, whatever the input."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.w).expand(len(x), 1)


def test_minimum_on_a_kink() -> None:
    """Pushed down by the loss right of 0, up by the proximity left of it: the minimum is 0."""
    x, y = torch.zeros(1, 1).double(), torch.full((1, 1), -10.0).double()
    near = Neighbourhood(bi.Task(Rectified(), bi.Gaussian(), train=(x, y), query=(x, y)))
    one = torch.ones(1, dtype=torch.float64)
    end = minimise(
        near, Objective(0.1 * one[None], one, 0.1 * one, 0 * one),
        fit_metric(near, one, rank=1, generator=owned()),
        one, tolerance=1e-4, max_iterations=100,
    )  # fmt: skip
    assert abs(float(end.position)) < 1e-4
    assert float(end.residual) <= 1e-4
    assert int(end.iterations) < 60
    gradient = near.value_and_grad(
        Objective(0.1 * one[None], one, 0.1 * one, 0 * one), end.position
    )[1]
    assert float(gradient.abs()) > 0.04  # it does not vanish on either side


def test_rows_do_not_depend_on_the_others() -> None:
    """Easy rows leave early, and what is left of the block goes on as it would alone."""
    task = BY_NAME["mlp-categorical"].task()
    near = Neighbourhood(task)
    metric = fit_metric(near, share(task), rank=10, generator=owned())
    objective = some_objective(task, 5)
    objective = replace(objective, proximity=torch.logspace(-4, 1, 5, dtype=torch.float64))
    scale = torch.ones(5, dtype=torch.float64)
    options = {"tolerance": 1e-9, "max_iterations": 400}
    together = minimise(near, objective, metric, scale, **options)
    assert len(set(together.iterations.tolist())) > 2
    for c in range(5):
        own = slice(c, c + 1)
        alone = minimise(near, objective.rows(own), metric, scale[own], **options)
        torch.testing.assert_close(alone.position[0], together.position[c], rtol=0, atol=1e-6)


def test_a_wrong_metric_costs_steps_only() -> None:
    task = BY_NAME["mlp-gaussian"].task()
    near, objective = Neighbourhood(task), some_objective(task, 2)
    scale = torch.ones(2, dtype=torch.float64)
    good = fit_metric(near, share(task), rank=1000, generator=owned())
    basis = torch.linalg.qr(torch.randn(task.dimension, 3, generator=owned()).double()).Q
    bad = Metric(basis, torch.tensor([90.0, 50.0, 1e-6], dtype=torch.float64), 30.0)
    a, b = (
        minimise(near, objective, m, scale, tolerance=1e-9, max_iterations=500) for m in (good, bad)
    )
    torch.testing.assert_close(a.position, b.position, rtol=0, atol=1e-7)
    assert int(b.iterations.min()) > int(a.iterations.max())


class Branching(nn.Module):
    """Looks at the value of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if float(self.linear.bias.detach().sum()) < 1e9 else x


def test_networks_that_cannot_be_vectorised_are_looped() -> None:
    case = BY_NAME["softmax-regression"].task()
    model = Branching()
    model.linear.load_state_dict(case.module.state_dict())
    batch = case.train.batch()
    task = bi.Task(model, bi.Categorical(), train=batch, query=batch)
    near, objective = Neighbourhood(task), some_objective(task)
    position = near.center + torch.zeros(3, 1).double()
    with pytest.warns(bi.VectorizationWarning, match="one after another, because Branching"):
        looped = near.value_and_grad(objective, position)
    plain = Neighbourhood(case).value_and_grad(objective, position)
    for a, b in zip(looped, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        near.curvature(share(task), position), Neighbourhood(case).curvature(share(task), position)
    )  # and warns no second time
