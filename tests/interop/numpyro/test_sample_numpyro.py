"""Influence in models of NumPyro, against a closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

import bayesinf as bi
from bayesinf.bayesian import case_influence
from tests.bayesian.closed_forms import normal_mean

jax = pytest.importorskip("jax")
numpyro = pytest.importorskip("numpyro")

import numpyro.distributions as dist  # noqa: E402
from arviz_base import from_numpyro  # noqa: E402
from numpyro.infer import MCMC, NUTS  # noqa: E402

from bayesinf.interop.numpyro import sample_numpyro  # noqa: E402

MODEL = normal_mean()  # y ~ N(mu, 1), mu ~ N(0, 2²)
NAMES = [f"case {i}" for i in range(len(MODEL.y))]


def conjugate(y: np.ndarray) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, MODEL.tau))
    with numpyro.plate("case", len(y)):
        numpyro.sample("y", dist.Normal(mu, MODEL.sigma), obs=y)


@pytest.fixture(scope="module")
def mcmc() -> Any:
    run = MCMC(
        NUTS(conjugate), num_warmup=300, num_samples=1000, num_chains=4, progress_bar=False,
        chain_method="vectorized",
    )  # fmt: skip
    run.run(jax.random.PRNGKey(0), MODEL.y)
    return run


def test_a_finished_mcmc_feeds_case_influence(mcmc: Any) -> None:
    """12 cases against the closed form, all within 99.9 % intervals: as the cases are functions of
    one mean, one false alarm in about 500 choices of the seed, which is fixed.
    """
    found = case_influence(from_numpyro(mcmc, log_likelihood=True))
    t = stats.t.ppf(0.9995, found.attrs["mcse_df"])
    off = np.abs(found["influence"].values - MODEL.influence())
    assert (off < t * found["mcse"].values).all()
    assert float(np.median(found["mcse"] / np.abs(MODEL.influence()))) < 0.2


def test_a_finished_mcmc_its_draws_and_a_model_say_the_same(mcmc: Any) -> None:
    data, found = sample_numpyro(mcmc, coords={"case": NAMES})
    expected = case_influence(from_numpyro(mcmc, log_likelihood=True))
    np.testing.assert_array_equal(found["influence"], expected["influence"])
    assert found["train"].values.tolist() == NAMES
    assert found["query"].values.tolist() == ["mu"]
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "case")
    np.testing.assert_allclose(data["observed_data"]["y"], MODEL.y)
    draws = mcmc.get_samples(group_by_chain=True)
    given = sample_numpyro(
        conjugate, None, MODEL.y, posterior_samples=draws,
        quantities={"square": lambda p: p["mu"] ** 2},
    ).influence  # fmt: skip
    np.testing.assert_allclose(
        given["influence"],
        case_influence(
            from_numpyro(mcmc, log_likelihood=True), quantities={"square": lambda p: p["mu"] ** 2}
        )["influence"],
    )
    assert given["query"].values.tolist() == ["square"]


def test_a_model_is_run() -> None:
    """As above: one false alarm in about 500 choices of the seed."""
    data, found = sample_numpyro(
        conjugate, 1, MODEL.y, num_warmup=300, num_samples=1000, coords={"case": NAMES}
    )
    assert data["posterior"]["mu"].shape == (4, 1000)
    assert float(data["sample_stats"]["acceptance_rate"].mean()) > 0.6
    t = stats.t.ppf(0.9995, found.attrs["mcse_df"])
    off = np.abs(found["influence"].values - MODEL.influence())
    assert (off < t * found["mcse"].values).all()


def nested(y: np.ndarray, z: np.ndarray) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, MODEL.tau))
    numpyro.sample("n", dist.Normal(mu, 1.0), obs=0.0)
    with numpyro.plate("school", y.shape[1], dim=-1):
        numpyro.sample("z", dist.Normal(mu, 1.0), obs=z)
        with numpyro.plate("pupil", y.shape[0], dim=-2):
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def test_examples_are_members_of_a_plate() -> None:
    """Log-likelihoods of a school add up over its pupils and its own observation."""
    y, z = MODEL.y.reshape(3, 4), MODEL.y[:4]
    mu = MODEL.draws(0)[..., 0]
    for plate, p in (
        ("school", -0.5 * ((z - mu[..., None]) ** 2 + ((y - mu[..., None, None]) ** 2).sum(2))),
        ("pupil", -0.5 * ((y - mu[..., None, None]) ** 2).sum(3)),
    ):
        with pytest.warns(UserWarning, match=r"sites \['n'\] are single numbers"):
            data, found = sample_numpyro(
                nested, None, y, z, posterior_samples={"mu": mu}, plate=plate
            )
        flat = p.reshape(-1, p.shape[2])
        truth = [np.cov(mu.ravel(), column)[0, 1] for column in flat.T]
        np.testing.assert_allclose(found["influence"][0], truth, rtol=1e-4, atol=1e-5)
        assert data["log_likelihood"].to_dataset().sizes[plate] == p.shape[2]
    with pytest.warns(UserWarning, match="single numbers"):
        every = sample_numpyro(nested, None, y, z, posterior_samples={"mu": mu}).influence
    assert every.sizes["train"] == 16
    with (
        pytest.raises(ValueError, match=r"no observed site is in the plate 'class'; there"),
        pytest.warns(UserWarning, match="single numbers"),
    ):
        sample_numpyro(nested, None, y, z, posterior_samples={"mu": mu}, plate="class")


def test_divergences_are_reported(mcmc: Any) -> None:
    from bayesinf.interop.numpyro._model import _warn_of_divergences

    data = sample_numpyro(mcmc).data
    _warn_of_divergences(data)
    data["sample_stats"]["diverging"][0, :3] = True
    with pytest.warns(bi.ConvergenceWarning, match="3 transitions diverged"):
        _warn_of_divergences(data)


def joint(y: np.ndarray) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(mu, 1).expand([len(y)]).to_event(1), obs=y)


def subsampled(y: np.ndarray) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("case", len(y), subsample_size=3):
        numpyro.sample("y", dist.Normal(mu, 1), obs=y[:3])


def test_errors_teach(mcmc: Any) -> None:
    y = MODEL.y
    with pytest.raises(ValueError, match=r"no observed site .* with numpyro\.plate"):
        sample_numpyro(joint, 0, y)
    with pytest.raises(ValueError, match=r"'y' is scaled by 4.*subsample_size"):
        sample_numpyro(subsampled, 0, y)
    with pytest.raises(ValueError, match=r"needs a key.*jax\.random\.key\(0\)"):
        sample_numpyro(conjugate)
    with pytest.raises(ValueError, match=r"has run .* sample_numpyro\(mcmc\)"):
        sample_numpyro(mcmc, 0)
    draws = mcmc.get_samples(group_by_chain=True)
    with pytest.raises(ValueError, match="give the model function and rng_key=None"):
        sample_numpyro(mcmc, posterior_samples=draws)
    with pytest.raises(ValueError, match=r"\(4000,\).*group_by_chain=True"):
        sample_numpyro(conjugate, None, y, posterior_samples=mcmc.get_samples())
