"""The JAX potential against torch's, number by number in float64, and BlackJAX's own step."""

import numpy as np
import pytest
import torch

jax = pytest.importorskip("jax")

import bayesinf as bi  # noqa: E402
from bayesinf._batching import Batches, Batching  # noqa: E402
from bayesinf._gradient_noise import excess_temperature  # noqa: E402
from bayesinf._plan import Plan  # noqa: E402
from bayesinf.interop.jax import sample_jax  # noqa: E402
from bayesinf.interop.jax._chains import JaxChains  # noqa: E402
from bayesinf.interop.jax._kernels import KERNELS  # noqa: E402
from bayesinf.interop.jax._potential import JaxPotential  # noqa: E402
from bayesinf.interop.jax._programs import ForTorch, density  # noqa: E402
from bayesinf.interop.jax._task import JaxTask  # noqa: E402
from tests.interop.jax import small  # noqa: E402
from tests.samplers.jax_kernels import Given  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def plan_of(task, potential, batch_size=4, kernel=None):
    p = bi.LocalPosterior(task, small.N_BETA, small.GAMMA, small.DECAY, potential)
    kernel = kernel or bi.SGLD(0.01)
    return Plan.make(p, kernel, 1, 1, 4, 1, batch_size, 0, None, 1.0, None, {})


def both(potential, batch_size=4, chunk=1000, kernel=None):
    """Our chains, and torch's potential with its batches, of the same problem."""
    ours = JaxTask(small.loss, small.params("float64"), small.data("train"), small.data("query"))
    theirs = small.posterior(potential).bind(vectorize=False)
    batches = None if batch_size is None else Batches(batch_size)
    batching = Batching(batches, theirs, 0, 4)
    return JaxChains(plan_of(ours, potential, batch_size, kernel), chunk), batching


def positions(count=4):
    g = torch.Generator().manual_seed(5)
    center = small.torch_task()
    flat = center.flatten(center.params)
    return flat + 0.3 * torch.randn(count, len(flat), generator=g, dtype=torch.float64)


@pytest.mark.parametrize(("potential", "chunk"), [("tilted", 5), ("plain", 4)])
def test_the_potential_is_that_of_torch(potential, chunk):
    """Gradients over all examples in chunks that fit and do not, and from batches; values."""
    chains, batching = both(potential, chunk=chunk)
    where, theirs = positions(), batching.potential
    ours = ForTorch(chains.program, chains.problem, chains.plan.posterior)
    batch = batching.stream.at(0)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(ours.grad(where), theirs.grad(where), **close)
    torch.testing.assert_close(ours.grad(where, batch), theirs.grad(where, batch), **close)
    value, slope = density(chains.program, chains.problem, where.numpy())
    expected = -theirs.value(where).numpy()
    np.testing.assert_allclose(value - value[0], expected - expected[0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(slope, -theirs.grad(where).numpy(), rtol=1e-9, atol=1e-9)


def test_gradient_noise_is_what_torch_measures():
    """The same batches at the same positions, and the same curvature along the noise."""
    kernel = "RMSpropSGLD"
    chains, batching = both("plain", kernel=small.KERNELS[kernel])
    state = {"position": positions()}
    state["scale"] = torch.linspace(0.5, 2, state["position"].numel()).view(4, -1).double()
    theirs = excess_temperature(small.KERNELS[kernel], batching, state, [0, 2, 3])
    chains.state = {name: value.numpy() for name, value in state.items()}
    ours = chains.checks([0, 2, 3])["excess_temperature"]
    assert ours == pytest.approx(theirs, rel=1e-7)
    assert theirs["typical"] > 0


def test_starts_and_batches_are_those_of_torch():
    chains, batching = both("tilted")
    chains.start()
    posterior, kernel = small.posterior(), bi.SGLD(1e-20)
    theirs = bi.sample(
        posterior, kernel, draws=1, warmup=0, progress=False, measurements=["margin"]
    )

    mine = sample_jax(
        small.loss, small.params("float64"), small.data("train"), small.data("query"), kernel,
        n_beta=small.N_BETA, gamma=small.GAMMA, weight_decay=small.DECAY, draws=1, warmup=0,
        measurements={"margin": small.margin}, progress=False,
    )  # fmt: skip
    ours, theirs = mine.tree.load(), theirs.tree.load()
    for group in ("train", "query", "sample_stats"):
        for name, expected in theirs[group].data_vars.items():
            np.testing.assert_allclose(ours[group][name], expected, rtol=1e-6, atol=1e-6)
    assert (ours["train"].loss.std("chain") > 0.01).any()
    rows = chains._batches(7)
    for step in range(7):
        np.testing.assert_array_equal(rows[step], batching.stream.at(step).numpy())


@pytest.mark.parametrize("potential", ["tilted", "plain"])
def test_log_density_and_distance_after_a_step(potential):
    chains, batching = both(potential)
    where = positions()
    chains.state = {"position": where.numpy()}
    loss = chains.observe()["train/loss"].mean(1, dtype=np.float64)
    found = chains.statistics(loss)
    theirs = batching.potential
    expected = -theirs.value_of_loss(where, torch.from_numpy(loss)).numpy()
    np.testing.assert_allclose(found["lp"], expected, rtol=1e-10)
    np.testing.assert_allclose(found["distance"], (where - theirs.center).norm(dim=1), rtol=1e-10)
    assert np.isnan(found["acceptance_rate"]).all()
    assert np.isnan(chains.statistics(None)["lp"]).all()


def test_sgld_is_blackjaxs_step_at_half_the_size():
    diffusions = pytest.importorskip("blackjax.sgmcmc.diffusions")
    chains, _ = both("tilted", batch_size=None)
    potential = JaxPotential(chains.program, chains.problem, None)
    position, key = positions(1).numpy(), jax.random.key(3)
    noise = diffusions.generate_gaussian_noise(key, position)
    ours, _ = KERNELS[bi.SGLD].step(
        {"step_size": 0.02}, {"position": position}, potential, Given(noise, None)
    )
    slope = -potential.grad(position)
    theirs = diffusions.overdamped_langevin()(key, position, slope, 0.01)
    np.testing.assert_allclose(ours["position"], theirs, rtol=1e-13)
