"""Networks in half precision: float32 weights, rounded in the forward pass alone."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf._precision import swallowed
from bayesinf._rng import ChainGenerators
from tests import quadratic
from tests.cases import BY_NAME

HALVES = [torch.bfloat16, torch.float16]


def halved(case, dtype):
    task = BY_NAME[case].task()
    return task.to(dtype=dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", ["mlp-categorical", "cnn", "mlp-gaussian"])
def test_weights_gradients_and_losses_are_float32(case, dtype, rng):
    task = halved(case, dtype)
    batch = task.train.batch()
    assert {p.dtype for p in task.module.parameters()} == {dtype}
    assert {p.dtype for p in task.params.values()} == {torch.float32}
    assert (task.dtype, task.module_dtype) == (torch.float32, dtype)
    assert task.outputs(task.params, batch).dtype == torch.float32
    # the network sees rounded weights, the likelihood its outputs unrounded from there on
    direct = task.module(batch[0].to(dtype)).float()
    assert torch.equal(task.losses(task.params, batch), task.likelihood.loss(direct, batch[1]))
    center = task.flatten(task.params)
    w = center + 0.1 * torch.randn(3, len(center), generator=rng)
    looped, vectorised = (
        bi.LocalPosterior(task, 10.0, 1.0).bind(vectorize=v).grad(w) for v in (False, True)
    )
    assert looped.dtype == vectorised.dtype == torch.float32
    exact = bi.LocalPosterior(BY_NAME[case].task(), 10.0, 1.0).bind().grad(w.double())
    rounding = 16 * torch.finfo(dtype).eps * float(exact.abs().max())
    assert float((looped - exact).abs().max()) < rounding
    assert float((vectorised - exact).abs().max()) < rounding
    assert float((looped - exact).abs().max()) > 1e-6  # it did compute in half precision


def test_it_is_the_same_task_made_directly():
    model = nn.Linear(3, 2)
    x, y = torch.randn(8, 3), torch.tensor([0, 1] * 4)
    make = lambda m: bi.Task(m, bi.Categorical(), train=(x, y), query=(x, y))  # noqa: E731
    made = make(copy.deepcopy(model).bfloat16())
    moved = make(model).to(dtype=torch.bfloat16)
    assert made.fingerprint() == moved.fingerprint()
    assert made.fingerprint()["dtype"] == "torch.bfloat16"
    assert made.to(dtype=torch.bfloat16) is made
    back = made.to(dtype=torch.float32)
    assert back.module_dtype == back.dtype == torch.float32
    assert back.fingerprint() != make(model).fingerprint()  # what was rounded stays rounded


def sgld_variances(task, exact_task, step_size, position):
    posterior = bi.LocalPosterior(task, 60.0, 6.0)
    potential, kernel = posterior.bind(vectorize=True), bi.SGLD(step_size)
    rng, chains = ChainGenerators(3, 128, torch.device("cpu")), 128
    state, total = {"position": potential.center.repeat(chains, 1).to(position)}, 0.0
    for step in range(900):
        state, _ = kernel.step(state, potential, None, rng)
        if step >= 100:
            total = total + (state["position"].double() - exact_task.w0).square()
    return total / 800


def test_the_stationary_variance_is_right_with_float32_weights():
    """z-scores of 4 variances at 5 standard errors plus the forward's rounding, 2^-8 of itself."""
    problem = quadratic.make()
    task = problem.task.to(dtype=torch.bfloat16)
    rounded = task.flatten(task.params).double()
    step_size = 0.004
    centred = type(problem)(problem.task, problem.posterior, problem.hessian, rounded, rounded)
    found = sgld_variances(task, centred, step_size, torch.float32)
    exact = problem.covariance(step_size).diag()
    error = found.std(0) / 128**0.5
    excess = (found.mean(0) - exact).abs() - 2**-8 * exact
    assert (excess / error).max() < 5
    assert (error / exact).max() < 0.05


def test_bfloat16_weights_would_lose_the_noise():
    """The same chain with its positions rounded after every step stands still."""
    task = quadratic.make().task.to(dtype=torch.bfloat16)
    potential, kernel = bi.LocalPosterior(task, 60.0, 6.0).bind(vectorize=False), bi.SGLD(1e-9)
    spread = []
    for dtype in (torch.float32, torch.bfloat16):
        rng = ChainGenerators(0, 16, torch.device("cpu"))
        state = {"position": potential.center.repeat(16, 1)}
        for _ in range(20):
            state, _ = kernel.step(state, potential, None, rng)
            state = {"position": state["position"].to(dtype).float()}
        spread.append((state["position"] - potential.center).square().mean(0))
    assert 0.5 < float(spread[0].mean()) / (20 * 1e-9) < 2
    assert bool((spread[1] < 0.1 * spread[0]).all())


# ---------------------------------------------------------------- in a run


def run(task, n_beta, gamma, **options):
    step_size = 0.2 / (10 * n_beta + gamma)
    return bi.sample(
        bi.LocalPosterior(task, n_beta, gamma), bi.SGLD(step_size), draws=6, warmup=4,
        vectorize=False, progress=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("batch_size", [None, 4])
def test_sampling_resumes_bitwise(dtype, batch_size):
    task = halved("softmax-regression", dtype)
    options = {"batch_size": batch_size, "max_excess": 9.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = run(task, 20.0, 2.0, **options)
    parts = bi.sample(
        bi.LocalPosterior(task, 20.0, 2.0), bi.SGLD(0.2 / 202), draws=2, warmup=4,
        vectorize=False, progress=False, **options,
    )  # fmt: skip
    run(task, 20.0, 2.0, store=parts, **options)
    assert np.array_equal(whole.values("train").values, parts.values("train").values)
    assert 0 <= whole.commit_facts["checks"]["swallowed_perturbations"] < 0.5


def test_swallowed_perturbations_warn():
    task = halved("softmax-regression", torch.bfloat16)
    with pytest.warns(bi.PrecisionWarning, match=r"\d+% of the perturbed .*bfloat16.*model.float"):
        traces = run(task, 1e6, 1e7)
    share = traces.commit_facts["checks"]["swallowed_perturbations"]
    assert 0.5 < share <= 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = run(task.to(dtype=torch.float32), 1e6, 1e7)
    assert full.commit_facts["checks"]["swallowed_perturbations"] is None


def test_the_share_is_counted():
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.ones(1, 4)
    x, y = torch.randn(3, 4), torch.randn(3, 1)
    task = bi.Task(model.bfloat16(), bi.Gaussian(), train=(x, y), query=(x, y))
    steps = torch.tensor([[0.0, 1e-4, 3e-3, 1e-2], [-1e-3, -1e-2, 1e-2, 0.1]])  # 2^-8 up, 2^-9 down
    assert swallowed(task, 1 + steps) == pytest.approx(4 / 8)


def test_classical_methods_refuse_half_precision():
    task = halved("mlp-categorical", torch.bfloat16)
    for method in (bi.grad_dot, bi.ekfac, bi.gauss_newton, bi.hessian, bi.conjugate_gradient):
        options = {} if method is bi.grad_dot else {"damping": 0.1}
        if method is bi.ekfac:
            options["fisher"] = "enumerated"
        with pytest.raises(
            TypeError, match=r"float32 or float64; .*computes in bfloat16.*task\.to"
        ):
            method(task, **options)
    with pytest.raises(TypeError, match="needs a network in float32 or float64"):
        bi.fit_curvature(task, fisher="enumerated")
