"""``gauss_newton`` and ``hessian`` against direct solves, leave-one-out, and what they refuse."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf.attribution._gauss_newton import gauss_newton
from bayesinf.attribution._hessian import hessian
from bayesinf.curvature import (
    NotPositiveDefiniteError,
    _definite,
    _gauss_newton,
    _hessian,
    _inner,
    _rows,
    dense_hessian,
)
from tests import exact
from tests.layered_cases import LAYERED, LAYERED_BY_NAME

SOLVERS = ("dense", "woodbury")


def normed():
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 2)).double()


def any_task(rng, dtype=torch.float64):
    x = torch.randn(8, 4, generator=rng, dtype=dtype)
    y = torch.randint(2, (8,), generator=rng)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = normed().to(dtype)
    return bi.Task(model, bi.Categorical(), train=(x, y), query=(x[:3], y[3:6]))


@pytest.mark.parametrize("case", LAYERED, ids=lambda c: c.name)
def test_gauss_newton_either_way(case):
    task, curvature = case.task(), exact.fisher(case, "enumerated")
    expected = exact.influence(task, curvature, 0.02)
    low = float(torch.linalg.eigvalsh(curvature)[0]) + 0.02
    for solver in SOLVERS:
        scores = gauss_newton(task, damping=0.02, solver=solver, batch_size=5)
        exact.close(scores.influence, expected)
        assert scores.attrs["lambda_min"] == pytest.approx(low, rel=1e-9)
        assert scores.attrs["solver"] == solver


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("mlp-categorical", "woodbury"),  # 36 rows for 83 parameters
        ("softmax-regression", "dense"),  # 36 for 15
        ("decoder-tied", "woodbury"),  # 60 for 87
    ],
)
def test_the_smaller_system_is_solved(name, solver):
    task = LAYERED_BY_NAME[name].task()
    scores = gauss_newton(task, damping=0.02)
    assert scores.attrs["solver"] == solver
    exact.close(scores.influence, gauss_newton(task, damping=0.02, solver=solver).influence)


@pytest.mark.parametrize("case", LAYERED, ids=lambda c: c.name)
def test_hessian_matrix_and_influence(case):
    task = case.task()
    curvature = exact.loss_hessian(task)
    exact.close(dense_hessian(task, batch_size=5, rows=7), curvature, 1e-11)
    low = float(torch.linalg.eigvalsh(curvature)[0])
    damping = 0.05 - min(low, 0)
    scores = hessian(task, damping=damping)
    exact.close(scores.influence, exact.influence(task, curvature, damping))
    assert scores.attrs["lambda_min"] == pytest.approx(low + damping, rel=1e-8)


@pytest.mark.parametrize("solver", ["dense", "woodbury"])
def test_any_network_and_parameter_filter(solver, rng):
    task = any_task(rng)
    expected = exact.influence(task, exact.gauss_newton(task), 0.05, "margin")
    scores = gauss_newton(task, damping=0.05, solver=solver, measurement="margin", batch_size=3)
    exact.close(scores.influence, expected)
    some = LAYERED_BY_NAME["mlp-categorical"].task(parameters=["0.weight", "2.bias"])
    scores = gauss_newton(some, damping=0.05, solver=solver)
    exact.close(scores.influence, exact.influence(some, exact.gauss_newton(some), 0.05))
    scores = hessian(some, damping=0.5, measurement="margin")
    exact.close(scores.influence, exact.influence(some, exact.loss_hessian(some), 0.5, "margin"))


def test_float32_models_are_computed_in_float64(rng):
    single = any_task(rng, torch.float32)
    x, y = single.train.batch()
    qx, qy = single.query.batch()
    model = single.module
    for method, damping in ((gauss_newton, 1e-4), (hessian, 6.0)):
        scores = method(single, damping=damping)
        assert scores.influence.dtype == np.float64
        double = bi.Task(
            copy.deepcopy(model).double(), single.likelihood,
            train=(x.double(), y), query=(qx.double(), qy), parameters=".*",
        )  # fmt: skip
        exact.close(scores.influence, method(double, damping=damping).influence, 1e-10)
        assert scores.attrs["checkpoint"] == single.fingerprint()["checkpoint"]
    assert next(model.parameters()).dtype == torch.float32
    assert single.train.batch()[0].dtype == torch.float32


def test_blocks_do_not_change_scores(monkeypatch):
    for name in ("mlp-categorical", "cnn"):
        task = LAYERED_BY_NAME[name].task()
        expected = {s: gauss_newton(task, damping=0.1, solver=s).influence for s in SOLVERS}
        monkeypatch.setattr(_inner, "CHUNK", 700)
        monkeypatch.setattr(_rows._Rows.chunks, "__defaults__", (700,))
        monkeypatch.setattr(_gauss_newton, "_CHUNK", 700)
        for solver in SOLVERS:
            scores = gauss_newton(task, damping=0.1, solver=solver, batch_size=5)
            exact.close(scores.influence, expected[solver])


# ---------------------------------------------------------------- leave-one-out


def test_ridge_regression_leave_one_out(rng):
    """Removing example t changes a prediction by exactly −influence / (1 − leverage)."""
    n, wd = 15, 0.03
    x = torch.randn(n, 3, generator=rng, dtype=torch.float64)
    y = torch.randn(n, 1, generator=rng, dtype=torch.float64)
    z = torch.randn(4, 3, generator=rng, dtype=torch.float64)

    def fit(keep):
        gram = x[keep].T @ x[keep] + n * wd * torch.eye(3, dtype=x.dtype)
        return torch.linalg.solve(gram, x[keep].T @ y[keep])

    every = torch.arange(n)
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(fit(every).T)
    task = bi.Task(model, bi.Gaussian(), train=(x, y), query=(z, z[:, :1]))

    def prediction(task, params, batch):
        return task.outputs(params, batch).squeeze(1)

    inverse = torch.linalg.inv(x.T @ x + n * wd * torch.eye(3, dtype=x.dtype))
    leverage = torch.einsum("nd,de,ne->n", x, inverse, x)
    removed = torch.cat([z @ (fit(every[every != t]) - fit(every)) for t in range(n)], dim=1)
    for method in (hessian, gauss_newton):
        scores = method(task, damping=wd, measurement=prediction)
        exact.close(-scores.influence.values / (1 - leverage.numpy()), removed)


def test_up_weighting_logistic_regression(rng):
    """The derivative of the refitted loss in an example's weight, by central differences."""
    n, wd = 10, 0.05
    x = torch.randn(n, 2, generator=rng, dtype=torch.float64)
    y = torch.randint(2, (n, 1), generator=rng).double()
    z = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    target = torch.ones(1, 1, dtype=torch.float64)

    def fit(b):
        w = torch.zeros(2, 1, dtype=torch.float64)
        for _ in range(30):
            p = (x @ w).sigmoid()
            g = x.T @ (b * (p - y)) / n + wd * w
            h = x.T @ (b * p * (1 - p) * x) / n + wd * torch.eye(2, dtype=x.dtype)
            w = w - torch.linalg.solve(h, g)
        return w

    weights = torch.ones(n, 1, dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(fit(weights).T)
    task = bi.Task(model, bi.Bernoulli(), train=(x, y), query=(z, target))
    derivative, eps = [], 1e-4
    for t in range(n):
        shift = torch.zeros_like(weights)
        shift[t] = eps
        up, down = (bi.Bernoulli().loss(z @ fit(weights + s), target) for s in (shift, -shift))
        derivative.append(float(up - down) / (2 * eps))
    for method in (hessian, gauss_newton):
        exact.close(method(task, damping=wd).influence.values[0], derivative, 1e-6)


# ---------------------------------------------------------------- refusals


def test_an_indefinite_hessian_is_refused_with_the_damping_that_would_do():
    task = LAYERED_BY_NAME["mlp-categorical"].task()
    low = float(torch.linalg.eigvalsh(exact.loss_hessian(task))[0])
    assert low < -0.01
    with pytest.raises(NotPositiveDefiniteError, match="must exceed") as caught:
        hessian(task, damping=-low - 1e-3)
    assert isinstance(caught.value, ValueError)
    assert caught.value.lambda_min == pytest.approx(-1e-3, rel=1e-6)
    needed = float(str(caught.value).split("must exceed ")[1].split(",")[0])
    assert needed == pytest.approx(-low, rel=1e-3)
    scores = hessian(task, damping=-low + 1e-3)
    assert scores.attrs["lambda_min"] == pytest.approx(1e-3, rel=1e-6)


def test_a_singular_gauss_newton_matrix_is_refused(rng):
    x = torch.randn(2, 4, generator=rng, dtype=torch.float64)
    model = nn.Linear(4, 1).double()
    task = bi.Task(model, bi.Gaussian(), train=(x, x[:, :1]), query=(x, x[:, :1]))
    with pytest.raises(NotPositiveDefiniteError, match="the Gauss–Newton matrix plus damping"):
        gauss_newton(task, damping=0.0)


def test_zero_damping_where_the_matrix_is_definite():
    task = LAYERED_BY_NAME["linear-gaussian"].task()
    expected = exact.influence(task, exact.gauss_newton(task), 0.0)
    exact.close(gauss_newton(task, damping=0).influence, expected)
    exact.close(hessian(task, damping=0).influence, expected)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (gauss_newton, {"damping": -1.0}, r"damping must be a number ≥ 0; got -1\.0"),
        (hessian, {"damping": None}, "damping must be a number ≥ 0; got None"),
        (hessian, {"damping": 1.0, "batch_size": -1}, "batch_size must be a positive integer"),
        (gauss_newton, {"damping": 1.0, "solver": "qr"}, "solver must be one of .* got 'qr'"),
        (gauss_newton, {"damping": 0, "solver": "woodbury"}, "needs damping > 0"),
        (
            gauss_newton,
            {"damping": 1.0, "memory_limit": 1e-9},
            r"gauss_newton \(dense, d=5 parameters, n·K=12 rows\) needs about .* GiB",
        ),
        (hessian, {"damping": 1.0, "memory_limit": 1e-9}, r"hessian \(d=5 parameters\) needs"),
    ],
)
def test_bad_arguments(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(LAYERED_BY_NAME["linear-gaussian"].task(), **options)


def test_a_gradient_that_is_not_finite_is_named():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return (x @ self.w).abs().sqrt()[:, None]

    x = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    task = bi.Task(Root(), bi.Gaussian(), train=(x, x[:, :1] + 1), query=(x[:1], x[:1, :1]))
    with pytest.raises(ValueError, match="train example 1 is NaN"):
        gauss_newton(task, damping=1.0)


def test_a_matrix_that_rounding_leaves_singular_is_refused(monkeypatch):
    monkeypatch.setattr(_hessian, "smallest_eigenvalue", lambda factor: -1e-20)
    with pytest.raises(NotPositiveDefiniteError, match="= -1e-20 at damping=0"):
        hessian(LAYERED_BY_NAME["linear-gaussian"].task(), damping=0)


def test_the_smallest_eigenvalue_of_a_larger_matrix(rng, monkeypatch):
    a = torch.randn(60, 60, generator=rng, dtype=torch.float64)
    matrix = a @ a.T / 60 + 0.01 * torch.eye(60, dtype=a.dtype)
    expected = float(torch.linalg.eigvalsh(matrix)[0])
    factor = torch.linalg.cholesky(matrix)
    assert _definite.smallest_eigenvalue(factor) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(_definite, "_DIRECT", 10)
    for layout in (factor, factor.T.contiguous().T):
        assert _definite.smallest_eigenvalue(layout) == pytest.approx(expected, rel=1e-3)


def test_attributes():
    task = LAYERED_BY_NAME["linear-gaussian-2"].task()
    attrs = hessian(task, damping=0.5).attrs
    d = task.dimension
    assert (attrs["damping"], attrs["fisher"], attrs["estimand"]) == (0.5, "hessian", "influence")
    n, queries = 12, 5
    check = n + n // 2, n  # forward (also a half alone), backward
    assert attrs["forward_examples"] == check[0] + n + n + queries
    assert attrs["backward_examples"] == check[1] + n * (1 + d) + n + queries
    assert set(json.loads(attrs["seconds"])) == {"curvature", "factorization", "scores"}
    attrs = gauss_newton(task, damping=0.5).attrs
    assert attrs["method"] == "gauss_newton"
    assert attrs["checkpoint"] == task.fingerprint()["checkpoint"]
    assert attrs["backward_examples"] == check[1] + 2 + n * 2 + n + queries
