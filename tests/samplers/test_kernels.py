"""What all kernels share apart from their laws: settings, refusals, decisions, ways to run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bayesinf as bi
from bayesinf.samplers import _metropolis
from tests import interrupted, quadratic
from tests.interrupted import run
from tests.samplers.laws import Generator, Script
from tests.samplers.test_stationary import misfit

EXACT = {"MALA", "HMC", "EKFACLaplace", "GaussNewtonLaplace"}


# ---------------------------------------------------------------- the same however they are run


@pytest.mark.parametrize("kernel", interrupted.KERNELS)
def test_draws_depend_on_the_seed_and_not_on_how_chains_are_run(kernel):
    options = {"draws": 3, "warmup": 2}
    looped = run(None, kernel, **options).values("train").values
    again = run(None, kernel, **options).values("train").values
    vectorized = run(None, kernel, vectorize=True, **options).values("train").values
    other = run(None, kernel, seed=1, **options).values("train").values
    np.testing.assert_array_equal(again, looped)
    np.testing.assert_allclose(vectorized, looped, rtol=1e-5)
    assert (np.abs(other - looped) > 1e-6).all()


@pytest.mark.parametrize("kernel", interrupted.KERNELS)
def test_minibatches_are_refused_where_they_would_be_wrong(kernel):
    if kernel in EXACT:
        with pytest.raises(ValueError, match=rf"{kernel} takes no minibatches; got batch_size=4"):
            run(None, kernel, batch_size=4)
    else:
        assert run(None, kernel, batch_size=4, draws=2, warmup=2).draws == 2
    # all examples are no minibatch
    assert run(None, kernel, batch_size=12, draws=1, warmup=1, chains=1).draws == 1


def test_the_identity_of_a_run_knows_the_numbers_of_a_curvature():
    config = run(None, "EKFACLaplace", draws=1).config["sampler"]
    assert config["kernel"] == "EKFACLaplace"
    assert config["curvature"]["kind"] == "Curvature"
    assert len(config["curvature"]["digest"]) == 16
    assert config == run(None, "EKFACLaplace", draws=1).config["sampler"]
    solved = run(None, "GaussNewtonLaplace", draws=1).config["sampler"]
    assert solved["tolerance"] == 1e-3
    assert solved["preconditioner"]["digest"] != config["curvature"]["digest"]


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bi.SGLD(0.0), "step_size must be > 0; got 0.0"),
        (lambda: bi.SGLD(-1.0), "step_size must be > 0; got -1.0"),
        (lambda: bi.SGLD(float("nan")), "step_size must be > 0; got nan"),
        (lambda: bi.MALA(0.0), "step_size must be > 0; got 0.0"),
        (lambda: bi.RMSpropSGLD(0), "need step_size > 0"),
        (lambda: bi.RMSpropSGLD(1e-3, alpha=1.0), "alpha=1.0"),
        (lambda: bi.RMSpropSGLD(1e-3, eps=0.0), "eps=0.0"),
        (lambda: bi.Underdamped(0.0, 1.0), "need step_size > 0 and friction > 0"),
        (lambda: bi.Underdamped(1.0, 0.0), "need step_size > 0 and friction > 0"),
        (lambda: bi.SGHMC(0.0, 1.0), "need step_size > 0 and 0 ≤ noise_correction < friction"),
        (lambda: bi.SGHMC(0.1, 0.0), "friction=0.0"),
        (lambda: bi.SGHMC(0.1, 1.0, 1.0), "gradient noise alone heats more"),
        (lambda: bi.SGHMC(0.1, 1.0, -0.1), "noise_correction=-0.1"),
        (lambda: bi.SGHMC(0.25, 2.1), "at most 1; got 1.05.*SGLD with twice the step"),
        (lambda: bi.SGNHT(0.0, 1.0), "need step_size > 0, friction > 0 and inertia > 0"),
        (lambda: bi.SGNHT(0.1, 0.0), "friction=0.0"),
        (lambda: bi.SGNHT(0.1, 1.0, 0.0), "inertia=0.0"),
        (lambda: bi.HMC(0.0, 3), "need step_size > 0, steps ≥ 1 and 0 ≤ jitter < 1"),
        (lambda: bi.HMC(0.1, 0), "steps=0"),
        (lambda: bi.HMC(0.1, 3, 1.0), "jitter=1.0"),
        (lambda: bi.HMC(0.1, 3, -0.1), "jitter=-0.1"),
        (lambda: bi.GaussNewtonLaplace(tolerance=0.0), "need 0 < tolerance < 1"),
        (lambda: bi.GaussNewtonLaplace(iterations=0), "iterations=0"),
        (lambda: bi.GaussNewtonLaplace(chunk_size=0), "chunk_size=0"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sghmc_without_momentum_is_sgld_with_twice_the_step():
    problem, rng = quadratic.make(), Generator(3)
    noise = rng.normal_like(torch.zeros(2, 12, dtype=torch.float64))
    potential, start = problem.posterior.bind(), problem.w0.expand(2, -1).clone()
    h, states = 0.05, []
    for kernel, first in ((bi.SGHMC(h**2, 1 / h), noise), (bi.SGLD(2 * h**2), noise[:, 4:])):
        script = Script(first)
        state = kernel.init(start, script)
        if "momentum" in state:  # a first move from the start, which SGLD does not make
            state["momentum"] = torch.zeros_like(start)
        for _ in range(2):
            state, _ = kernel.step(state, potential, None, script)
        states.append(state)
    late = states[0]["position"] + h * states[0]["momentum"]
    torch.testing.assert_close(late, states[1]["position"])


# ---------------------------------------------------------------- RMSprop's warm-up


def test_rmsprop_adapts_in_warm_up_only():
    problem = quadratic.make()
    potential, rng = problem.posterior.bind(), Generator(0)
    sampler = bi.RMSpropSGLD(1e-4, alpha=0.9, eps=0.1)
    state = sampler.init(problem.w0.expand(2, -1).clone(), rng)
    squares = torch.zeros(2, 4, dtype=torch.float64)
    for step in range(7):
        gradient = potential.loss_grad(state["position"], None)
        squares = 0.9 * squares + 0.1 * gradient**2
        state, _ = sampler.step(state, potential, None, rng)
        expected = 1 / ((squares / (1 - 0.9 ** (step + 1))).sqrt() + 0.1)
    frozen = sampler.freeze(state)
    torch.testing.assert_close(frozen["scale"], expected)
    later, _ = sampler.step(frozen, potential, None, rng)
    assert torch.equal(later["scale"], frozen["scale"])
    assert not torch.equal(later["position"], frozen["position"])


def test_rmsprop_refuses_to_sample_without_warm_up():
    problem = quadratic.make()
    sampler = bi.RMSpropSGLD(1e-4)
    state = sampler.init(problem.w0[None], Generator(0))
    with pytest.raises(ValueError, match="had none"):
        sampler.freeze(state)


# ---------------------------------------------------------------- decisions


@pytest.mark.parametrize("preconditioned", [False, True])
def test_mala_decides_by_the_densities_of_its_proposals(preconditioned):
    """Against ``q`` written out, on a potential that is not quadratic."""
    task = interrupted.BY_NAME["softmax-regression"].task()
    potential = bi.LocalPosterior(task, n_beta=200.0, gamma=5.0).bind()
    p = interrupted.preconditioner(task) if preconditioned else None
    step_size, rng = (0.8 if preconditioned else 0.05), Generator(2)
    kernel, d = bi.MALA(step_size, p), task.dimension
    noise = rng.normal_like(torch.zeros(6, d, dtype=torch.float64))
    w = potential.center + 0.2 * rng.normal_like(noise)
    eye = torch.eye(d, dtype=torch.float64)
    s = eye if p is None else p.apply_transpose(eye)
    matrix = s @ s.T

    def ahead(at):
        return at - 0.5 * step_size * potential.grad(at) @ matrix

    proposal = ahead(w) + step_size**0.5 * noise @ s.T

    def log_q(to, at):
        away = torch.linalg.solve(s, (to - ahead(at)).T)
        return -away.square().sum(0) / (2 * step_size)

    gain = potential.value(w) - potential.value(proposal)
    expected = (gain + log_q(w, proposal) - log_q(proposal, w)).clamp(max=0).exp()
    state, info = kernel.step(kernel.init(w, rng), potential, None, Script(noise))
    torch.testing.assert_close(info["acceptance"], expected, rtol=1e-8, atol=1e-8)
    assert expected.min() < 0.9
    # the scripted uniform is Φ(0) = 1/2
    torch.testing.assert_close(state["position"][expected > 0.5], proposal[expected > 0.5])
    assert torch.equal(state["position"][expected <= 0.5], w[expected <= 0.5])
    again = _metropolis.evaluate(state["position"], potential, p)
    for name in ("value", "force"):
        torch.testing.assert_close(state[name], again[name])


@pytest.mark.parametrize("preconditioned", [False, True])
def test_trajectories_go_back_where_they_came_from(preconditioned):
    problem = quadratic.make()
    potential, rng = problem.posterior.bind(), Generator(4)
    p = misfit(problem) if preconditioned else None
    start = _metropolis.evaluate(problem.w0 + rng.normal_like(torch.zeros(3, 4)), potential, p)
    momentum = rng.normal_like(start["position"])
    h = torch.tensor([[0.03], [0.05], [0.08]], dtype=torch.float64) * (8 if preconditioned else 1)
    end, late = _metropolis.leapfrog(start, momentum, h, 4, potential, p)
    assert (end["position"] - start["position"]).norm(dim=1).min() > 0.1
    back, early = _metropolis.leapfrog(end, -late, h, 4, potential, p)
    torch.testing.assert_close(back["position"], start["position"])
    torch.testing.assert_close(-early, momentum)


def test_jitter_spreads_the_steps_of_trajectories(monkeypatch):
    seen = []
    original = _metropolis.leapfrog

    def spy(start, momentum, h, *rest):
        seen.append(h)
        return original(start, momentum, h, *rest)

    monkeypatch.setattr("bayesinf.samplers._hmc.leapfrog", spy)
    problem, rng = quadratic.make(), Generator(1)
    potential, start = problem.posterior.bind(), problem.w0.expand(4000, -1).clone()
    for jitter in (0.3, 0.0):
        kernel = bi.HMC(0.0004, 1, jitter)
        kernel.step(kernel.init(start, rng), potential, None, rng)
    assert seen[1] == pytest.approx(0.02)
    relative = seen[0][:, 0] / 0.02
    # uniform on (0.7, 1.3): mean and variance within 5 standard errors, 1e-6
    assert abs(float(relative.mean()) - 1) < 5 * 0.3 / 12e3**0.5
    assert abs(float(relative.var()) - 0.03) < 5 * 0.03 * (0.8 / 4000) ** 0.5
    assert 0.7 <= float(relative.min()) < 0.71
    assert 1.29 < float(relative.max()) <= 1.3


@pytest.mark.parametrize(
    ("value", "force"),
    [(float("nan"), 0.0), (float("inf"), 0.0), (float("-inf"), 0.0), (0.0, float("nan"))],
)
def test_a_proposal_that_is_not_finite_is_rejected(value, force):
    def state(value, force):
        column = torch.ones(1, 2, dtype=torch.float64)
        values = torch.tensor([value], dtype=torch.float64)
        return {"position": column * value, "value": values, "force": column * force}

    still = torch.zeros(1, 2, dtype=torch.float64)
    start, end = state(5.0, 1.0), state(value, force)
    after, info = _metropolis.choose(start, end, still, still, Generator(0))
    assert info["acceptance"].tolist() == [0.0]
    assert all(torch.equal(after[name], start[name]) for name in start)
    # out of a place that has no density every finite one is welcome
    after, info = _metropolis.choose(state(float("inf"), 1.0), start, still, still, Generator(0))
    assert info["acceptance"].tolist() == [1.0]
    assert torch.equal(after["position"], start["position"])


def test_energies_of_float32_networks_are_summed_in_float64():
    """At ``U`` of 1e6, where one float32 number is 0.06 from the next."""
    problem = quadratic.make(n_beta=3e6, gamma=3e5)
    small = 1e-4 * Generator(1).normal_like(torch.zeros(64, 4, dtype=torch.float64))
    values = {}
    for dtype in (torch.float32, torch.float64):
        task = problem.task.to(dtype=dtype)
        potential = bi.LocalPosterior(task, n_beta=3e6, gamma=3e5).bind()
        state = _metropolis.evaluate((problem.w0 + small).to(dtype), potential, None)
        assert state["value"].dtype == torch.float64
        values[dtype] = (
            state["value"]
            - _metropolis.evaluate(problem.w0[None].to(dtype), potential, None)["value"]
        )
    level = 3e6 * float(problem.task.losses(problem.task.params, problem.task.train.batch()).mean())
    error = (values[torch.float32] - values[torch.float64]).abs().max()
    assert error < 1e-7 * level


def test_acceptance_is_recorded_per_draw():
    rate = {
        thin: run(None, "MALA", draws=12 // thin, thin=thin, warmup=2).tree["sample_stats"]
        for thin in (1, 3)
    }
    every, third = (np.asarray(rate[thin].acceptance_rate) for thin in (1, 3))
    assert every.shape == (4, 12)
    assert 0 < every.min() < every.max() <= 1
    assert every.min() < 0.95
    np.testing.assert_allclose(third, every.reshape(4, 4, 3).mean(2))
    assert np.isnan(run(None, "SGLD", draws=2).tree["sample_stats"].acceptance_rate).all()
