"""Independent draws: exact covariances of networks of all likelihoods, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bayesinf as bi
from bayesinf.curvature import GaussNewtonProduct, deflate
from tests import exact
from tests.cases import BY_NAME
from tests.interrupted import curvature
from tests.layered_cases import LAYERED
from tests.samplers.laws import Script

NETWORKS = {
    "mlp-categorical": BY_NAME["mlp-categorical"],
    "mlp-gaussian": BY_NAME["mlp-gaussian"],
    "mlp-bernoulli": BY_NAME["mlp-bernoulli"],
    "cnn-no-bias": BY_NAME["cnn-no-bias"],
    **{case.name: case for case in LAYERED if case.name in ("segmentation", "idle", "sequence")},
}


def spread(kernel, posterior):
    """Covariance of a step's draws, from the linear map that takes its normals to them."""
    potential, d = posterior.bind(vectorize=False), posterior.task.dimension
    counter = Script(torch.zeros(1, 0))
    start = potential.center[None].clone()
    kernel.step(kernel.init(start, counter), potential, None, counter)
    noise = torch.eye(counter.used, dtype=torch.float64)
    state = kernel.init(start.expand(len(noise), -1), counter)
    moved, _ = kernel.step(state, potential, None, Script(noise))
    columns = moved["position"] - potential.center
    assert columns.shape == (len(noise), d)
    return columns.T @ columns


@pytest.mark.parametrize("name", NETWORKS)
def test_gauss_newton_draws_have_the_gauss_newton_covariance(name):
    task = NETWORKS[name].task()
    posterior = bi.LocalPosterior(task, n_beta=50.0, gamma=2.0, weight_decay=0.01)
    eye = torch.eye(task.dimension, dtype=torch.float64)
    precision = 50 * exact.gauss_newton(task) + posterior.prior_precision * eye
    kernel = bi.GaussNewtonLaplace(tolerance=1e-11, chunk_size=5)
    covariance = spread(kernel, posterior)
    torch.testing.assert_close(
        covariance, torch.linalg.inv(precision), rtol=1e-6, atol=1e-8 / posterior.prior_precision
    )


def test_gauss_newton_draws_of_a_network_that_cannot_be_vectorised(monkeypatch):
    task = BY_NAME["mlp-categorical"].task()
    posterior = bi.LocalPosterior(task, n_beta=50.0, gamma=2.0)
    kernel = bi.GaussNewtonLaplace(tolerance=1e-11)
    together = spread(kernel, posterior)
    original = torch.autograd.grad

    def one_by_one(*args, is_grads_batched=False, **options):
        if is_grads_batched:
            raise RuntimeError("no batching rule")
        return original(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", one_by_one)
    torch.testing.assert_close(spread(kernel, posterior), together)


@pytest.mark.parametrize("n_beta", [30.0, 0.0])
@pytest.mark.parametrize("name", ["mlp-categorical", "cnn"])
def test_ekfac_draws_have_the_covariance_of_the_curvature(name, n_beta):
    task = BY_NAME[name].task()
    posterior = bi.LocalPosterior(task, n_beta, gamma=2.0, weight_decay=0.1)
    c = curvature(task)
    eye = torch.eye(task.dimension, dtype=torch.float64)
    precision = n_beta * c.dense() + posterior.prior_precision * eye
    covariance = spread(bi.EKFACLaplace(c), posterior)
    torch.testing.assert_close(covariance, torch.linalg.inv(precision))


def test_at_n_beta_0_gauss_newton_draws_are_the_prior():
    task = BY_NAME["mlp-categorical"].task()
    covariance = spread(bi.GaussNewtonLaplace(), bi.LocalPosterior(task, n_beta=0, gamma=4.0))
    torch.testing.assert_close(covariance, torch.eye(task.dimension, dtype=torch.float64) / 4)


def test_one_kernel_serves_posteriors_of_other_temperature():
    task = BY_NAME["softmax-regression"].task()
    kernel = bi.EKFACLaplace(curvature(task))
    cold, warm = (spread(kernel, bi.LocalPosterior(task, nb, nb * 0.1)) for nb in (100.0, 10.0))
    torch.testing.assert_close(10 * cold, warm)


def test_draws_are_independent():
    """Lag-1 correlations of 5 weights over 400 draws of 4 chains; a false alarm in 3e5 runs."""
    task = BY_NAME["softmax-regression"].task()

    def keep(task, params, batch):
        return task.flatten(params)[: len(batch[1])]

    posterior = bi.LocalPosterior(task, n_beta=100.0, gamma=5.0)
    traces = bi.sample(
        posterior, bi.EKFACLaplace(curvature(task)), draws=400, warmup=0, chains=4,
        measurements={"weights": keep}, vectorize=False, progress=False,
    )  # fmt: skip
    weights = traces.values("query", "weights").values
    z = (weights - weights.mean(1, keepdims=True)) / weights.std(1, keepdims=True)
    lag = (z[:, 1:] * z[:, :-1]).mean((0, 1)) * (4 * 399) ** 0.5
    assert np.abs(lag).max() < 5


# ---------------------------------------------------------------- what is refused


def draw(kernel, posterior):
    return bi.sample(posterior, kernel, draws=1, warmup=0, chains=1, jitter=0, progress=False)


def kernels(task):
    return bi.EKFACLaplace(curvature(task)), bi.GaussNewtonLaplace()


def test_the_plain_potential_is_refused():
    task = BY_NAME["softmax-regression"].task()
    for kernel in kernels(task):
        with pytest.raises(ValueError, match=r"around w0, and w0 is not the mode of the plain"):
            draw(kernel, bi.LocalPosterior(task, 10.0, 5.0, potential="plain"))


def test_a_posterior_without_damping_is_refused():
    task = BY_NAME["softmax-regression"].task()
    for kernel in kernels(task):
        with pytest.raises(ValueError, match="needs damping"):
            draw(kernel, bi.LocalPosterior(task, 10.0, gamma=0.0))


def test_a_curvature_of_another_task_is_refused():
    task, other = BY_NAME["softmax-regression"].task(), BY_NAME["logistic"].task()
    posterior = bi.LocalPosterior(task, 10.0, 5.0)
    with pytest.raises(ValueError, match="belongs to other parameters"):
        draw(bi.EKFACLaplace(curvature(other)), posterior)
    deflated = deflate(curvature(other), GaussNewtonProduct(other), damping=0.5, rank=1)
    with pytest.raises(ValueError, match="covariance of no posterior of 15 parameters"):
        draw(bi.EKFACLaplace(deflated), posterior)
    fitting = deflate(curvature(task), GaussNewtonProduct(task), damping=0.5, rank=1)
    with pytest.raises(ValueError, match="give the curvature itself"):
        draw(bi.EKFACLaplace(fitting), bi.LocalPosterior(task, 0.0, 5.0))


def test_a_solution_that_misses_its_tolerance_raises():
    task = BY_NAME["mlp-categorical"].task()
    posterior = bi.LocalPosterior(task, n_beta=1e4, gamma=1.0)
    with pytest.raises(RuntimeError, match=r"would not have their law.*missed the tolerance 1e-08"):
        draw(bi.GaussNewtonLaplace(tolerance=1e-8, iterations=2), posterior)


def test_a_likelihood_without_factors_says_so():
    class Absolute:
        def loss(self, outputs, target):
            return (outputs - target).abs().sum(1)

    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    task = bi.Task(torch.nn.Linear(3, 1), Absolute(), train=(x, x[:, :1]), query=(x, x[:, :1]))
    with pytest.raises(NotImplementedError, match="GaussNewtonLaplace needs `fisher_factor`"):
        draw(bi.GaussNewtonLaplace(), bi.LocalPosterior(task, 10.0, 1.0))
