"""Every kernel against its exact stationary law on a Gaussian, at a large step, torch's and JAX's.

Linear kernels three times over: the law that one step implies (``laws.discrete_law``) equals the
documented closed form to rounding, and the moments of a run agree with it. The others, whose law is
the posterior itself, by the moments alone.

Moments are z-scores over 512 independent chains, refused beyond 5.5 standard errors: with 14
numbers a run (4 means, 10 second moments) and 24 runs the false-alarm rate of this file is 2e-5.
Each check has teeth: at ``ε·ã_max = 1.2`` the laws of SGLD and of the posterior differ by up to
43 %, and every run must also refuse, by more than 8 standard errors, the law of a kernel with twice
the noise variance, with twice the drift, and of the next best kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import bayesinf as bi
from bayesinf.curvature import GaussNewtonProduct, deflate
from bayesinf.samplers import Sampler, State, _hmc, _mala
from tests import quadratic
from tests.samplers.laws import Moments, Prepare, discrete_law

EYE = torch.eye(4, dtype=torch.float64)
SCALE = torch.tensor([0.5, 1.0, 2.0, 0.7], dtype=torch.float64)
LIMIT, TEETH = 5.5, 8.0

Law = Callable[[Tensor, float], Tensor]
"""Covariance in ``z`` from the Hessian there and the step size."""


def _frozen(state: State) -> State:
    return {"position": state["position"], "scale": SCALE.expand(len(state["position"]), -1)}


def _posterior(a: Tensor, step_size: float) -> Tensor:
    return torch.linalg.inv(a)


def _sgld(a: Tensor, step_size: float) -> Tensor:
    return torch.linalg.inv(a @ (EYE - step_size * a / 4))


def _sghmc(a: Tensor, step_size: float) -> Tensor:
    """With ``α = Γ√ε = 0.5`` and ``β̂ = 0.3α``."""
    return 0.7 * torch.linalg.inv(a @ (EYE - step_size * a / (4 - 2 * 0.5)))


@dataclass(frozen=True)
class Row:
    make: Callable[..., Sampler]
    law: Law
    rival: Law  # of another kernel, or of this one with its discretisation forgotten
    prepare: Prepare = lambda state: state
    scale: Tensor | None = None
    preconditioned: bool = True
    linear: bool = True
    stiffest: float = 1.2  # ε·ã_max
    jax: bool = True


ROWS = {
    "sgld": Row(lambda eps, p: bi.SGLD(eps, p), _sgld, _posterior),
    "rmsprop": Row(
        lambda eps, p: bi.RMSpropSGLD(eps), _sgld, _posterior, _frozen, SCALE, preconditioned=False
    ),
    "underdamped": Row(lambda eps, p: bi.Underdamped(eps, 0.3 * eps**-0.5, p), _posterior, _sgld),
    "sghmc": Row(
        lambda eps, p: bi.SGHMC(eps, 0.5 * eps**-0.5, 0.15 * eps**-0.5, p),
        _sghmc,
        lambda a, eps: 0.7 * _sgld(a, eps),
    ),
    "sgnht": Row(
        lambda eps, p: bi.SGNHT(eps, 0.3 * eps**-0.5, 4.0, p), _posterior, _sgld, linear=False
    ),
    "mala": Row(lambda eps, p: bi.MALA(eps, p), _posterior, _sgld, linear=False, stiffest=2.4),
    "hmc": Row(
        lambda eps, p: bi.HMC(eps, 3, 0.2, p),
        _posterior,
        _sgld,
        linear=False,
        stiffest=3,
        jax=False,
    ),
}
TORCH = [
    (name, "preconditioned" if preconditioned else "plain")
    for name, row in ROWS.items()
    for preconditioned in ((False, True) if row.preconditioned else (False,))
]
JAX = [(name, "jax") for name, row in ROWS.items() if row.jax]
LINEAR = [
    (*case, potential)
    for potential, cases in (("tilted", [*TORCH, *JAX]), ("plain", TORCH))
    for case in cases
    if ROWS[case[0]].linear
]
SAMPLED = [*TORCH, *(case for case in JAX if not ROWS[case[0]].linear)]
"""Kernels, and where they run: torch with or without a preconditioner, or JAX, which has none.

JAX's kernels have the normals of these tests, so that of linear ones a run says no more than a step
does.
"""


def fitted(task: bi.Task) -> bi.Curvature:
    return bi.fit_curvature(task, fisher="enumerated")


def other_curvature(problem: quadratic.Quadratic) -> bi.Curvature:
    """The same network with a few of the examples only: another curvature, other directions."""
    x, y = problem.task.train.batch(slice(0, 5))
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    model.weight.data = problem.w0[None].clone()
    task = bi.Task(model, bi.Gaussian(), train=(x, y), query=(x, y))
    return fitted(task)


def misfit(problem: quadratic.Quadratic) -> bi.Preconditioner:
    """A preconditioner that is far from the inverse Hessian, with a factor that is no root."""
    operator = GaussNewtonProduct(problem.task)
    inverse = deflate(other_curvature(problem), operator, damping=0.5, rank=1, which="LA")
    return bi.Preconditioner(inverse, problem.posterior.n_beta)


def setting(name: str, where: str, potential: str = "tilted"):
    """Problem, kernel at a large step, ``S``, ``Ã`` and the step size."""
    row, problem = ROWS[name], quadratic.make(potential=potential)
    preconditioner = misfit(problem) if where == "preconditioned" else None
    root = EYE if preconditioner is None else preconditioner.apply_transpose(EYE)
    root = root if row.scale is None else row.scale.sqrt().diag()
    inner = root.T @ problem.hessian @ root
    step_size = float(row.stiffest / torch.linalg.eigvalsh(inner)[-1])
    kernel = row.make(step_size, preconditioner)
    if where == "jax":
        pytest.importorskip("blackjax" if name == "mala" else "jax")
        from tests.samplers.jax_kernels import JaxKernel

        kernel = JaxKernel(kernel, problem)
    return problem, kernel, root, inner, step_size


def test_the_preconditioner_of_these_tests_fits_badly() -> None:
    problem, _, root, inner, _ = setting("sgld", "preconditioned")
    values = torch.linalg.eigvalsh(inner)
    assert values[-1] > 3 * values[0]
    assert (root - root.T).norm() > 0.05 * root.norm()
    commutator = root @ root.T @ problem.hessian
    assert (commutator - commutator.T).norm() > 0.1 * commutator.norm()


@pytest.mark.parametrize(("name", "where", "potential"), LINEAR)
def test_the_documented_law_is_that_of_a_step(name, where, potential) -> None:
    row = ROWS[name]
    problem, kernel, root, inner, step_size = setting(name, where, potential)
    mean, covariance = discrete_law(kernel, problem, row.prepare)
    torch.testing.assert_close(mean, problem.center, rtol=1e-8, atol=1e-8)
    documented = root @ row.law(inner, step_size) @ root.T
    torch.testing.assert_close(covariance, documented, rtol=1e-8, atol=1e-10)
    rival = root @ row.rival(inner, step_size) @ root.T
    assert (covariance - rival).norm() > 0.01 * covariance.norm()


@pytest.mark.parametrize(("name", "where"), SAMPLED)
def test_stationary_law_on_a_gaussian(name, where) -> None:
    row = ROWS[name]
    problem, kernel, root, inner, step_size = setting(name, where)
    run = Moments(kernel, problem, prepare=row.prepare)
    exact = root @ row.law(inner, step_size) @ root.T
    assert run.off(exact) < LIMIT
    assert run.shifted() < LIMIT
    for hessian, law, factor in (
        (inner, row.law, 2),  # of the noise
        (1.6 * inner, row.law, 1),  # of the drift
        (inner, row.rival, 1),
    ):
        assert run.off(factor * root @ law(hessian, step_size) @ root.T) > TEETH


@pytest.mark.parametrize("where", ["plain", "preconditioned"])
@pytest.mark.parametrize("name", ["mala", "hmc"])
def test_the_decision_is_what_makes_the_law_exact(name, where, monkeypatch) -> None:
    """A large share is refused, and with everything accepted the law is that of leapfrog steps."""
    problem, kernel, *_ = setting(name, where)
    posterior = torch.linalg.inv(problem.hessian)
    assert Moments(kernel, problem, chains=64, steps=50).acceptance < 0.85
    for module in (_mala, _hmc):
        monkeypatch.setattr(module, "choose", lambda start, end, *_: (end, {}))
    assert Moments(kernel, problem, steps=200, burn_in=100).off(posterior) > TEETH


def test_the_thermostat_takes_the_heat_of_noisy_gradients() -> None:
    """Noise worth half the friction: positions keep their law, and with ``ζ`` at rest they do not.

    The step is smaller here, because the correction is of first order in ``ζh``.
    """
    problem = quadratic.make()
    posterior = torch.linalg.inv(problem.hessian)
    step_size = float(0.3 / torch.linalg.eigvalsh(problem.hessian)[-1])
    friction = 0.15 * step_size**-0.5
    noise = (friction / step_size**0.5) ** 0.5  # hV/2 = Γ/2
    runs = {
        inertia: Moments(
            bi.SGNHT(step_size, friction, inertia), problem, noise=noise, steps=600, burn_in=200
        )
        for inertia in (2.0, 1e9)
    }
    assert runs[2.0].off(posterior) < LIMIT
    assert runs[1e9].off(posterior) > TEETH
    assert runs[1e9].off(1.5 * posterior) < runs[1e9].off(posterior) / 4
    settled = runs[2.0].state["thermostat"].mean() / friction
    assert 1.45 < settled < 1.6
    sghmc = bi.SGHMC(step_size, friction)
    corrected = bi.SGHMC(step_size, friction, 0.5 * friction)
    hot, cool = (
        Moments(k, problem, noise=noise, steps=600, burn_in=200) for k in (sghmc, corrected)
    )
    _, law = discrete_law(sghmc, problem)
    assert cool.off(law) < LIMIT
    assert hot.off(law) > TEETH
    variance = torch.tensor(noise**2, dtype=torch.float64)
    assert hot.off((1 + sghmc.excess(variance)) * law) < LIMIT
    assert float(corrected.excess(variance)) == pytest.approx(0, abs=1e-12)
    assert float(sghmc.excess(variance)) == pytest.approx(0.5)
    assert float(bi.SGNHT(step_size, friction).excess(variance)) == pytest.approx(0.5)


LAPLACE = {
    "ekfac": lambda problem: (bi.EKFACLaplace(fitted(problem.task)), problem.hessian),
    "ekfac of other data": lambda problem: (
        bi.EKFACLaplace(other_curvature(problem)),
        problem.posterior.n_beta * other_curvature(problem).dense()
        + problem.posterior.prior_precision * EYE,
    ),
    "deflated": lambda problem: (
        bi.EKFACLaplace(misfit(problem).inverse),
        problem.posterior.n_beta * torch.linalg.inv(misfit(problem).inverse @ EYE),
    ),
    "gauss-newton": lambda problem: (bi.GaussNewtonLaplace(tolerance=1e-10), problem.hessian),
    "gauss-newton, preconditioned": lambda problem: (
        bi.GaussNewtonLaplace(misfit(problem), tolerance=1e-10, chunk_size=7),
        problem.hessian,
    ),
}


@pytest.mark.parametrize("name", LAPLACE)
def test_independent_draws_have_their_law(name) -> None:
    problem = quadratic.make(weight_decay=0.05)
    kernel, precision = LAPLACE[name](problem)
    exact = torch.linalg.inv(precision)
    mean, covariance = discrete_law(kernel, problem)
    torch.testing.assert_close(mean, problem.w0, rtol=0, atol=1e-9)
    torch.testing.assert_close(covariance, exact, rtol=1e-7, atol=1e-10)
    run = Moments(kernel, problem, steps=20, burn_in=0)
    assert run.off(exact) < LIMIT
    assert run.shifted() < LIMIT
    for wrong in (2 * exact, exact / 1.6, torch.linalg.inv(precision + 20 * EYE)):
        assert run.off(wrong) > TEETH
