"""Methods that solve a system for every query, against the dense ones."""

import json
import warnings

import numpy as np
import pytest
import torch

import bayesinf as bi
from bayesinf.curvature import NotPositiveDefiniteError, SolverWarning
from tests import exact
from tests.cases import BY_NAME
from tests.layered_cases import LAYERED_BY_NAME

DAMPING = 0.05
SOLVERS = {
    "conjugate_gradient": lambda task, **more: bi.conjugate_gradient(
        task, damping=DAMPING, fisher="enumerated", tolerance=1e-10, **more
    ),
    "astra": lambda task, **more: bi.astra(
        task,
        damping=DAMPING,
        fisher="enumerated",
        deflate=4,
        tolerance=1e-10,
        iterations=400,
        **more,
    ),
    "lissa": lambda task, **more: bi.lissa(
        task, damping=DAMPING, tolerance=1e-10, iterations=20000, **more
    ),
}
CASES = ["mlp-categorical", "mlp-gaussian", "mlp-bernoulli", "cnn"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_equal_the_dense_gauss_newton_influence(name, solver):
    task = BY_NAME[name].task()
    scores = SOLVERS[solver](task)
    expected = exact.influence(task, exact.gauss_newton(task), DAMPING)
    exact.close(scores.influence.values, expected, 1e-8)
    assert scores.attrs["estimand"] == "influence"
    assert scores.attrs["damping"] == DAMPING
    assert scores.attrs["unconverged"] == 0
    assert 0 < scores.attrs["worst_residual"] <= 1e-10
    assert scores.attrs["products"] >= 5
    assert "solves" in json.loads(scores.attrs["seconds"])


@pytest.mark.parametrize("solver", SOLVERS)
def test_they_solve_in_the_hessian_too(solver):
    task = BY_NAME["softmax-regression"].task()  # convex: the Hessian is Gauss–Newton's matrix
    scores = SOLVERS[solver](task, of="hessian")
    expected = exact.influence(task, exact.loss_hessian(task), DAMPING)
    exact.close(scores.influence.values, expected, 1e-8)


def test_a_hessian_with_negative_curvature_is_refused():
    task = BY_NAME["mlp-categorical"].task()
    lowest = float(torch.linalg.eigvalsh(exact.loss_hessian(task))[0])
    assert lowest < -0.02
    with pytest.raises(NotPositiveDefiniteError, match="not positive definite"):
        bi.conjugate_gradient(task, damping=-lowest / 4, of="hessian", fisher="enumerated")


def test_deflation_of_every_direction_is_exact_and_of_some_is_nearer():
    task = BY_NAME["mlp-gaussian"].task()
    truth = exact.influence(task, exact.gauss_newton(task), DAMPING)

    def error(scores):
        return np.linalg.norm(scores.influence.values - truth) / np.linalg.norm(truth)

    options = {"damping": DAMPING, "fisher": "enumerated"}
    plain = error(bi.ekfac(task, **options))
    deflated = bi.deflated_ekfac(task, deflate=8, **options)
    solved = bi.conjugate_gradient(task, deflate=8, tolerance=1e-10, **options)
    assert 8 <= deflated.attrs["products"] < solved.attrs["products"]
    some = error(bi.deflated_ekfac(task, deflate=8, **options))
    every = error(bi.deflated_ekfac(task, deflate=task.dimension, **options))
    assert plain > 0.05
    assert some < plain / 2
    assert every < 1e-6


@pytest.mark.parametrize("solver", ["conjugate_gradient", "astra"])
def test_options_of_the_engine_hold(solver, tmp_path):
    task = LAYERED_BY_NAME["sequence"].task()
    whole = SOLVERS[solver](task).influence
    by_module = SOLVERS[solver](task, modules=True)
    exact.close(by_module.influence_by_module.sum("module"), whole, 1e-8)
    tokens = SOLVERS[solver](task, train_tokens="position", query_batch_size=2)
    exact.close(tokens.influence.groupby("train").sum(), whole, 1e-7)
    stored = SOLVERS[solver](task, store=tmp_path / "scores", batch_size=5)
    exact.close(stored.influence.values, whole, 1e-8)
    own = SOLVERS[solver](task, pairs="self")
    task_self = bi.Task(
        task.module,
        task.likelihood,
        train=task.train.batch(),
        query=task.train.batch(),
        parameters=".*",
    )
    expected = exact.influence(task_self, exact.gauss_newton(task_self), DAMPING)
    exact.close(own.influence.values, expected.diagonal(), 1e-7)


def test_a_fitted_curvature_preconditions():
    task = BY_NAME["mlp-categorical"].task()
    curvature = bi.fit_curvature(task, fisher="enumerated")
    given = bi.conjugate_gradient(task, damping=DAMPING, curvature=curvature, tolerance=1e-10)
    exact.close(given.influence, SOLVERS["conjugate_gradient"](task).influence, 1e-8)
    with pytest.raises(ValueError, match=r"exactly one of fisher= .* and curvature="):
        bi.conjugate_gradient(task, damping=DAMPING)


def test_minibatches_come_near_and_repeat_by_seed():
    task = BY_NAME["mlp-gaussian"].task()
    truth = exact.influence(task, exact.gauss_newton(task), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolverWarning)
        one, two, other = (
            bi.astra(
                task, damping=0.5, fisher="enumerated", deflate=0, minibatch=4, iterations=300,
                tolerance=1e-6, seed=seed,
            ).influence.values
            for seed in (1, 1, 2)
        )  # fmt: skip
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
    exact.close(one, truth, 0.05)


def test_a_missed_tolerance_warns_and_is_recorded():
    task = BY_NAME["mlp-categorical"].task()
    with pytest.warns(SolverWarning, match="missed the tolerance"):
        scores = bi.lissa(task, damping=1e-3, iterations=3)
    assert scores.attrs["unconverged"] == 5
    assert scores.attrs["worst_residual"] > 1e-2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: bi.lissa(t, damping=0.0), "damping must be a positive number"),
        (lambda t: bi.lissa(t, damping=0.1, of="fisher"), "of must be one of"),
        (
            lambda t: bi.astra(t, damping=0.1, fisher="enumerated", deflate=-1),
            "deflate must be a number of directions",
        ),
        (
            lambda t: bi.deflated_ekfac(t, damping=0.1, fisher="enumerated", deflate=0),
            r"without any it is bi\.ekfac",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(BY_NAME["mlp-gaussian"].task())
