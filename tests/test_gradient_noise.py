"""Covariances of stochastic gradients, and what they do to stationary laws, in closed form."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from torch import nn

import bayesinf as bi
from bayesinf._batching import Batching, normalise
from bayesinf._compensation import response, uncompensated_share
from bayesinf._gradient_noise import _NUMBERS, excess_temperature, gradient_noise
from bayesinf._rng import BatchStream, ChainGenerators
from tests import quadratic

CPU = torch.device("cpu")


def exact_noise(problem, w, size):
    """Covariance of the gradient of uniform batches without replacement, at one position."""
    n = problem.task.n
    g, _ = problem.gradients("train", w)
    if problem.posterior.potential == "tilted":
        g = g - problem.gradients("train", problem.w0)[0]
    g = g - g.mean(0)
    return problem.posterior.n_beta**2 * g.T @ g / n * (n - size) / (n - 1) / size


@pytest.mark.parametrize("potential", ["tilted", "plain"])
def test_measured_noise_is_the_exact_covariance(potential):
    """z-scores over 40 seeds of two moments, at 5 standard errors: false alarm below 1e-5."""
    problem = quadratic.make(potential=potential)
    g = torch.Generator().manual_seed(1)
    w = problem.w0 + 0.4 * torch.randn(3, 4, generator=g, dtype=torch.float64)
    exact = torch.stack([exact_noise(problem, row, 5) for row in w]).mean(0)
    found = [
        gradient_noise(problem.posterior, w, 5, draws=8, seed=seed, vectorize=False)
        for seed in range(40)
    ]
    assert {noise.draws for noise in found} == {8}
    moments = np.array([(f.mean * 4, f.mean * 4 * f.typical, f.largest) for f in found])
    error = moments.std(0, ddof=1) / 40**0.5
    truth = [float(exact.trace()), float((exact @ exact).trace())]
    assert np.abs((moments.mean(0)[:2] - truth) / error[:2]).max() < 5
    top = float(torch.linalg.eigvalsh(exact)[-1])
    assert 0.8 * top < moments[:, 2].mean() < top + 5 * error[2]


def test_noise_is_measured_in_the_kernels_coordinates():
    problem = quadratic.make()
    w = problem.w0 + torch.ones(4, 4, dtype=torch.float64)
    curvature = bi.fit_curvature(problem.task, fisher="enumerated")
    preconditioner = bi.Preconditioner(curvature.inverse(0.1), n_beta=60.0)
    root = preconditioner.apply(torch.eye(4, dtype=torch.float64)).T
    exact = root.T @ exact_noise(problem, w[0], 5) @ root
    noise = gradient_noise(
        problem.posterior, w, 5, preconditioner=preconditioner, draws=200, vectorize=False
    )
    assert noise.mean * 4 == pytest.approx(float(exact.trace()), rel=0.35)  # 7 % a standard error


def test_fewer_gradients_are_drawn_of_large_networks(monkeypatch):
    problem = quadratic.make()
    w = problem.w0.expand(4, -1) + 0.1
    for numbers, draws in ((16 * 10, 10), (16, 4), (_NUMBERS, 32)):
        monkeypatch.setattr("bayesinf._gradient_noise._NUMBERS", numbers)
        assert gradient_noise(problem.posterior, w, 5, vectorize=False).draws == draws


def test_of_the_largest_networks_fewer_chains_are_measured(monkeypatch):
    """Those that are measured are the first healthy ones, weights and scales alike."""
    problem = quadratic.make()
    g = torch.Generator().manual_seed(3)
    w = problem.w0 + torch.randn(4, 4, generator=g, dtype=torch.float64)
    state = {"position": w, "scale": 1 + torch.rand(4, 4, generator=g, dtype=torch.float64)}
    potential = problem.posterior.bind(vectorize=False)
    batching = Batching(normalise(5, problem.posterior), potential, 0, 4)
    batching.at(0, w)
    monkeypatch.setattr("bayesinf._gradient_noise._NUMBERS", 16)

    def excess(alive):
        return excess_temperature(bi.RMSpropSGLD(1e-4), batching, state, alive)

    with torch.no_grad():
        few = excess([1, 2, 3])
        assert few == excess([1])
        assert few != excess([2, 3])
        state["position"][0] += 1.0
        state["scale"][0] *= 9.0
        assert few == excess([1, 2, 3])  # a failed chain has no part in it


# ---------------------------------------------------------------- what noise does


def lyapunov(kernel, a, v):
    """Stationary variance of a position, force ``a z + η``, ``η ~ N(0, v)`` at every step."""
    eps = kernel.step_size
    if isinstance(kernel, bi.SGLD):
        return (eps + eps**2 * v / 4) / (1 - (1 - eps * a / 2) ** 2)
    h, c = eps**0.5, math.exp(-kernel.friction * eps**0.5)
    # z, u before the two kicks that share a gradient; then A O A
    kick = np.array([[1.0, 0.0], [-h * a, 1.0]])
    drift = np.array([[1.0, h / 2], [0.0, 1.0]])
    refresh = np.diag([1.0, c])
    step = drift @ refresh @ drift @ kick
    eta = drift @ refresh @ drift @ np.array([0.0, h])
    xi = drift @ np.array([0.0, (1 - c**2) ** 0.5])
    noise = v * np.outer(eta, eta) + np.outer(xi, xi)
    return solve_discrete_lyapunov(step, noise)[0, 0]


@pytest.mark.parametrize("v", [0.1, 7.0])
@pytest.mark.parametrize("a", [0.01, 1.0, 3.0])
@pytest.mark.parametrize(
    "kernel",
    [bi.SGLD(0.5), bi.SGLD(1e-3), bi.Underdamped(0.5, 0.3), bi.Underdamped(1e-3, 4.0)],
    ids=repr,
)
def test_excess_solves_the_discrete_lyapunov_equation(kernel, a, v):
    stiff = 1 if isinstance(kernel, bi.SGLD) else 1 - kernel.step_size * a / 4
    got = float(kernel.excess(torch.tensor(v, dtype=torch.float64))) / stiff
    assert got == pytest.approx(lyapunov(kernel, a, v) / lyapunov(kernel, a, 0.0) - 1, rel=1e-8)


def test_rmsprops_excess_is_that_of_sgld():
    v = torch.tensor([0.3, 5.0])
    assert torch.equal(bi.RMSpropSGLD(0.2).excess(v), bi.SGLD(0.2).excess(v))


def means(n_beta=40.0, gamma=10.0, n=24):
    """``ℓ_i = ½‖y_i − w‖²``: every batch has the same curvature, so that noise is additive."""
    g = torch.Generator().manual_seed(3)
    y = torch.randn(n, 2, generator=g, dtype=torch.float64)
    model = nn.Linear(1, 2, bias=False, dtype=torch.float64)
    model.weight.data = y.mean(0)[:, None].clone()
    x = torch.ones(n, 1, dtype=torch.float64)
    task = bi.Task(model, bi.Gaussian(), train=(x, y), query=(x, y))
    return bi.LocalPosterior(task, n_beta, gamma), (y - y.mean(0)).T @ (y - y.mean(0)) / n


def stationary_variances(posterior, kernel, batches, chains=192, steps=500, burn_in=100):
    """Mean square of every coordinate in every chain, ``(C, 2)``."""
    potential, rng = posterior.bind(vectorize=True), ChainGenerators(7, chains, CPU)
    potential = potential.estimated(None, None)  # anchored, this problem has no noise at all
    state, total = kernel.init(potential.center.repeat(chains, 1), rng), 0.0
    for step in range(burn_in + steps):
        state, _ = kernel.step(state, potential, batches(step), rng)
        if step >= burn_in:
            total = total + (state["position"] - potential.center).square()
    return total / steps


@pytest.mark.parametrize("kernel", [bi.SGLD(0.012), bi.Underdamped(0.006, 8.0)], ids=repr)
def test_measured_excess_is_the_inflation_of_the_stationary_variance(kernel):
    """White batches: 2 z-scores at 5 standard errors, false alarm below 1.2e-6 a kernel."""
    posterior, second = means()
    chains, a = 192, 50.0
    g = torch.Generator().manual_seed(0)
    found = stationary_variances(
        posterior, kernel, lambda _: torch.randint(24, (chains, 3), generator=g)
    )
    noise = 40.0**2 * second.diag() / 3  # with replacement
    factor = 1 + kernel.excess(noise) / (
        1 if isinstance(kernel, bi.SGLD) else 1 - kernel.step_size * a / 4
    )
    thermal = lyapunov(kernel, a, 0.0)
    z = (found.mean(0) - thermal * factor) / (found.std(0) / chains**0.5)
    assert z.abs().max() < 5
    assert factor.min() > 1.3  # without it the check fails by far
    assert ((found.mean(0) - thermal) / (found.std(0) / chains**0.5)).min() > 20
    # and gradient_noise sees it: epochs draw without replacement, (n − B)/(n − 1) of the noise
    batches = bi.Batches(3, anchor="none")
    w = posterior.bind().center.expand(8, -1)
    seen = gradient_noise(posterior, w, batches, draws=64, vectorize=False)
    assert seen.mean == pytest.approx(float(noise.mean()) * 21 / 23, rel=0.25)  # 4 standard errors


@pytest.mark.parametrize("kernel", [bi.SGLD(0.002), bi.Underdamped(0.002, 8.0)], ids=repr)
def test_epochs_heat_by_the_share_that_is_not_compensated(kernel):
    """2 z-scores at 5 standard errors, against white noise beyond 5; an epoch has 8 steps."""
    posterior, second = means()
    stream, chains, a = BatchStream(0, 192, 24, 3), 192, torch.tensor([50.0])
    found = stationary_variances(posterior, kernel, stream.at)
    noise = 40.0**2 * second.diag() / 3 * 21 / 23
    share = uncompensated_share(kernel, stream, a)
    assert 0 < float(share) < 0.6
    excess = kernel.excess(noise) / (1 if isinstance(kernel, bi.SGLD) else 1 - 0.002 * 50 / 4)
    thermal, error = lyapunov(kernel, 50.0, 0.0), found.std(0) / chains**0.5
    assert ((found.mean(0) - thermal * (1 + share * excess)) / error).abs().max() < 5
    assert ((found.mean(0) - thermal * (1 + excess)) / error).max() < -5


@pytest.mark.parametrize(
    "kernel", [bi.SGLD(0.3), bi.Underdamped(0.3, 0.5), bi.RMSpropSGLD(0.3)], ids=repr
)
def test_responses_add_up_to_the_white_excess(kernel):
    """``Σ h²`` against the closed form."""
    a = torch.tensor([0.2, 1.0, 2.0], dtype=torch.float64)
    total = (response(kernel, a, 4000) ** 2).sum(0)
    stiff = 1 - 0.3 * a / 4  # of SGLD's own law, or of what BAOAB's excess leaves out
    exact = kernel.excess(torch.ones(3, dtype=torch.float64)) / (a * stiff)
    np.testing.assert_allclose(total, exact.numpy(), rtol=1e-9)


def test_which_batches_compensate():
    a = torch.tensor([1e-4, 1.0])
    p = np.full(24, 1 / 24)
    assert uncompensated_share(bi.SGLD(0.1), BatchStream(0, 1, 24, 3, None, p), a).tolist() == [
        1,
        1,
    ]
    assert uncompensated_share(bi.SGLD(0.1), BatchStream(0, 1, 24, 20), a).tolist() == [1, 1]
    strata = [(np.arange(12), 2), (np.arange(12, 24), 2)]
    slow, fast = uncompensated_share(bi.SGLD(0.1), BatchStream(0, 1, 24, 4, strata), a).tolist()
    assert slow < 0.05 < fast < 1


# ---------------------------------------------------------------- in a run


def run(batch_size, kernel=None, **options):
    problem = quadratic.make(offset=1.0)
    kernel = bi.SGLD(0.004) if kernel is None else kernel
    return bi.sample(
        problem.posterior, kernel, draws=20, warmup=20, batch_size=batch_size, vectorize=False,
        progress=False, **options,
    )  # fmt: skip


def test_small_batches_warn_and_scores_carry_the_number():
    with pytest.warns(bi.GradientNoiseWarning, match=r"by \d+%.*max_excess=0\.05.*Lower the step"):
        traces = run(4)
    excess = traces.commit_facts["checks"]["excess_temperature"]
    assert excess["largest"] >= excess["typical"] > 0.05
    with pytest.warns(bi.ConvergenceWarning):
        assert json.loads(bi.bif(traces).attrs["excess_temperature"]) == excess
    with pytest.warns(bi.GradientNoiseWarning):  # and again for those who resume it
        bi.sample(
            quadratic.make(offset=1.0).posterior, bi.SGLD(0.004), draws=21, warmup=20,
            batch_size=4, vectorize=False, progress=False, store=traces,
        )  # fmt: skip
    assert traces.commit_facts["checks"]["excess_temperature"] == excess


def test_the_bound_is_an_argument():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(4, max_excess=50.0)
    with pytest.warns(bi.GradientNoiseWarning, match="max_excess=1e-06"):
        run(20, max_excess=1e-6)


@pytest.mark.parametrize("kernel", [bi.SGLD(0.004), bi.Underdamped(0.01, 2.0)], ids=repr)
def test_the_full_batch_never_warns(kernel):
    traces = run(None, kernel, max_excess=0.0)
    assert traces.commit_facts["checks"]["excess_temperature"] is None


def test_errors():
    problem = quadratic.make()
    w = problem.w0.expand(3, -1)
    with pytest.raises(ValueError, match="all 30 training examples has no noise"):
        gradient_noise(problem.posterior, w, 30)
    with pytest.raises(ValueError, match="draws must be at least 4; got 3"):
        gradient_noise(problem.posterior, w, 5, draws=3)
