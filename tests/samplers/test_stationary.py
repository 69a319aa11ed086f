"""Every kernel against its exact stationary law on a Gaussian.

Each check is a z-score over independent chains, refused beyond 5 standard errors: with 10 numbers
a kernel (4 variances, 6 covariances) the false-alarm rate is about 6e-6 a kernel. The step is large
(ε·a_max = 1.2), so that the exact law differs from A⁻¹ by up to 43 % and a factor of 2 in the noise
or in the drift is off by dozens of standard errors.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bayesinf import SGLD, RMSpropSGLD
from bayesinf._rng import ChainGenerators
from bayesinf.samplers import Sampler, State
from tests import quadratic

CHAINS, STEPS, BURN_IN, THIN = 256, 1500, 300, 4


def _moments(
    sampler: Sampler, problem: quadratic.Quadratic, prepare: Callable[[State], State]
) -> tuple[Tensor, Tensor]:
    """Per-chain means (C, d) and second moments (C, d, d) about the exact centre."""
    potential = problem.posterior.bind(vectorize=True)
    rng = ChainGenerators(5, CHAINS, torch.device("cpu"))
    state = prepare(sampler.init(problem.w0.expand(CHAINS, -1).clone(), rng))
    first, second, kept = 0.0, 0.0, 0
    for step in range(STEPS):
        state, _ = sampler.step(state, potential, None, rng)
        if step >= BURN_IN and step % THIN == 0:
            delta = state["position"] - problem.center
            first, second, kept = (
                first + delta,
                second + delta[:, :, None] * delta[:, None, :],
                kept + 1,
            )
    return first / kept, second / kept


def _z(values: Tensor, expected: Tensor) -> Tensor:
    error = values.mean(0) - expected
    return error / (values.std(0) / CHAINS**0.5)


SCALE = torch.tensor([0.5, 1.0, 2.0, 0.7], dtype=torch.float64)


def _frozen(state: State) -> State:
    return {"position": state["position"], "scale": SCALE.expand(CHAINS, -1)}


KERNELS = {
    "sgld": (lambda eps: SGLD(eps), lambda state: state, torch.ones(4, dtype=torch.float64)),
    "rmsprop": (lambda eps: RMSpropSGLD(eps), _frozen, SCALE),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("potential", ["tilted", "plain"])
def test_stationary_law_on_a_gaussian(kernel: str, potential: str) -> None:
    make, prepare, scale = KERNELS[kernel]
    problem = quadratic.make(potential=potential)
    root = scale.sqrt().diag()
    inner = root @ problem.hessian @ root
    step_size = float(1.2 / torch.linalg.eigvalsh(inner)[-1])
    eye = torch.eye(4, dtype=torch.float64)
    exact = root @ torch.linalg.inv(inner) @ torch.linalg.inv(eye - step_size * inner / 4) @ root
    means, squares = _moments(make(step_size), problem, prepare)
    rows, columns = torch.triu_indices(4, 4)
    assert _z(squares[:, rows, columns], exact[rows, columns]).abs().max() < 5
    assert _z(means, torch.zeros(4, dtype=torch.float64)).abs().max() < 5
    # the check has teeth: without the discretisation term it fails by far
    naive = torch.linalg.inv(problem.hessian)
    assert _z(squares[:, rows, columns], naive[rows, columns]).abs().max() > 8


def test_the_plain_posterior_leaves_the_checkpoint_and_the_tilted_one_does_not() -> None:
    means = {}
    for potential in ("tilted", "plain"):
        problem = quadratic.make(potential=potential)
        step_size = float(0.5 / torch.linalg.eigvalsh(problem.hessian)[-1])
        first, _ = _moments(SGLD(step_size), problem, lambda state: state)
        means[potential] = first + problem.center - problem.w0
    zero = torch.zeros(4, dtype=torch.float64)
    assert _z(means["tilted"], zero).abs().max() < 5
    assert _z(means["plain"], zero).abs().max() > 20


def test_rmsprop_adapts_in_warm_up_only() -> None:
    problem = quadratic.make()
    potential = problem.posterior.bind()
    rng = ChainGenerators(0, 2, torch.device("cpu"))
    sampler = RMSpropSGLD(1e-4, alpha=0.9, eps=0.1)
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


def test_rmsprop_refuses_to_sample_without_warm_up() -> None:
    problem = quadratic.make()
    sampler = RMSpropSGLD(1e-4)
    state = sampler.init(problem.w0[None], ChainGenerators(0, 1, torch.device("cpu")))
    with pytest.raises(ValueError, match="had none"):
        sampler.freeze(state)


@pytest.mark.parametrize("make", [lambda: SGLD(0.0), lambda: SGLD(-1.0)])
def test_sgld_refuses_a_step_that_is_not_positive(make: Callable[[], Sampler]) -> None:
    with pytest.raises(ValueError, match="step_size must be > 0"):
        make()


@pytest.mark.parametrize("options", [{"step_size": 0}, {"alpha": 1.0}, {"eps": 0.0}])
def test_rmsprop_refuses_settings_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="need step_size > 0"):
        RMSpropSGLD(**{"step_size": 1e-3, **options})
