"""LLC and WBIC against closed forms and quadrature.

An estimate must be within 5 % of the exact value, its 99.9 % t interval must cover it, and its 95 %
interval be no wider than ±5 %. Of other seeds each of the six estimates would be refused by the
interval with probability 0.1 %, and by the 5 % with probability below 5 % (two to three standard
errors).
"""

import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from scipy import integrate
from torch import nn

import bayesinf as bi
from bayesinf._covariance import cross_covariance
from bayesinf._learning_coefficient import llc, mean_with_error, wbic
from tests import quadratic


def draw(posterior, sampler, **options):
    settings = {"draws": 300, "warmup": 60, "chains": 32, "progress": False, **options}
    return bi.sample(posterior, sampler, **settings)


def agrees(result, name, exact, within=0.05):
    value, error = float(result[name]), float(result["mcse"])
    quantile = scipy.stats.t.ppf(0.9995, result.attrs["mcse_df"])
    assert abs(value - exact) <= within * abs(exact)
    assert abs(value - exact) <= quantile * error
    assert 2 * error <= within * abs(exact)  # or the interval says nothing
    np.testing.assert_allclose(result[f"{name}_chain"].mean(), value, rtol=1e-9)


def regression_losses(case, at):
    x, y = case.task.train.batch()
    return 0.5 * (x @ at - y[:, 0]).square().mean()


@pytest.mark.parametrize(("potential", "decay"), [("tilted", 0.0), ("tilted", 0.02), ("plain", 0)])
def test_a_regular_model(potential, decay):
    """``½ Σ h/(h + λ)``, and of the plain potential off its minimum the shift of its mean."""
    offset = 0.05 if potential == "plain" else 0.3
    case = quadratic.make(weight_decay=decay, potential=potential, offset=offset)
    result = llc(draw(case.posterior, bi.HMC(0.01, 4)))
    n_beta, eye = case.posterior.n_beta, torch.eye(4, dtype=torch.float64)
    loss_hessian = (case.hessian - case.posterior.prior_precision * eye) / n_beta
    values = torch.linalg.eigvalsh(loss_hessian)
    exact = 0.5 * float((values / (values + case.posterior.damping)).sum())
    if potential == "plain":
        shift = regression_losses(case, case.center) - regression_losses(case, case.w0)
        exact += n_beta * float(shift)
        assert abs(n_beta * float(shift)) > 0.05 * exact  # the shift shows
    agrees(result, "llc", exact)
    start = float(regression_losses(case, case.w0))
    assert result.attrs["loss"] == potential
    assert result.attrs["loss_at_checkpoint"] == pytest.approx(start, rel=1e-6)


def test_wbic_of_a_regular_model():
    case = quadratic.make(n_beta=30 / math.log(30), gamma=1.0)
    traces = draw(case.posterior, bi.HMC(0.05, 5))
    posterior = case.posterior
    identity = torch.eye(4, dtype=torch.float64)
    h = (case.hessian - posterior.prior_precision * identity) / posterior.n_beta
    excess = 0.5 * float(torch.trace(h @ torch.linalg.inv(case.hessian)))
    agrees(wbic(traces), "wbic", 30 * (float(regression_losses(case, case.w0)) + excess))
    other = draw(quadratic.make().posterior, bi.HMC(0.01, 4), draws=8, chains=2)
    with pytest.raises(ValueError, match=r"n_beta = n/log\(n\) = 8.82 .* ran at n_beta=60"):
        wbic(other)


# ---------------------------------------------------------------- singular models


class Square(nn.Module):
    """``f = w²``: the loss ½w⁴ has learning coefficient 1/4."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        return x * self.w**2


class Product(nn.Module):
    """``f = w₁w₂``: the loss ½(w₁w₂)² has learning coefficient 1/2, of multiplicity 2."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x):
        return x * self.w.prod()


def square_mean(n_beta, gamma):
    """``E[nβ L]`` under ``exp(−nβ w⁴/2 − γw²/2)``."""

    def density(w):
        return math.exp(-0.5 * n_beta * w**4 - 0.5 * gamma * w**2)

    total = integrate.quad(density, 0, 6, limit=400)[0]
    return integrate.quad(lambda w: 0.5 * n_beta * w**4 * density(w), 0, 6, limit=400)[0] / total


def product_mean(n_beta, gamma):
    """``E[nβ L]``: given ``w₁`` the other is Gaussian, of precision ``nβ w₁² + γ``."""

    def density(w):
        return math.exp(-0.5 * gamma * w**2) / math.sqrt(n_beta * w**2 + gamma)

    def energy(w):
        return 0.5 * n_beta * w**2 / (n_beta * w**2 + gamma) * density(w)

    options = {"limit": 400, "points": [1 / math.sqrt(n_beta)]}
    return integrate.quad(energy, 0, 9, **options)[0] / integrate.quad(density, 0, 9, **options)[0]


@pytest.mark.parametrize(
    ("model", "mean", "n_beta", "gamma", "kernel", "limit"),
    [
        (Square, square_mean, 1e4, 1.0, (1e-4, 12), 0.25),
        (Product, product_mean, 100.0, 4.0, (0.004, 12), 0.5),
    ],
)
def test_a_singular_model(model, mean, n_beta, gamma, kernel, limit):
    x = torch.ones(5, 1, dtype=torch.float64)
    zero = torch.zeros_like(x)
    task = bi.Task(model(), bi.Gaussian(), train=(x, zero), query=(x[:2], zero[:2]))
    posterior = bi.LocalPosterior(task, n_beta=n_beta, gamma=gamma, potential="plain")
    result = llc(draw(posterior, bi.HMC(*kernel), draws=400, chains=64, jitter=0.2))
    exact = mean(n_beta, gamma)
    agrees(result, "llc", exact)
    regular = 0.5 * task.dimension
    assert exact < 0.8 * regular
    if model is Square:  # the correction is small here; of a product it falls with log(nβ)
        assert abs(exact - limit) < 0.01 * limit
    else:
        gaps = [limit - mean(b, gamma) for b in (1e4, 1e8, 1e16)]
        rates = [g * math.log(b) for g, b in zip(gaps, (1e4, 1e8, 1e16), strict=True)]
        assert gaps[0] > gaps[1] > gaps[2] > 0
        assert rates[2] == pytest.approx(1.0, abs=0.15)


# ---------------------------------------------------------------- errors and doubts


def test_the_error_of_a_mean():
    """Batch means; of independent draws the usual error, of an autoregression the exact one.

    The ratio is of 24 batches' worth of freedom: beyond ±60 % with probability under 1e-4.
    """
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((4, 6000))
    slow = np.zeros_like(noise)
    for t in range(1, 6000):
        slow[:, t] = 0.9 * slow[:, t - 1] + noise[:, t]
    for values, sd in ((noise, 1.0), (slow, 10.0)):
        found = mean_with_error(values)
        assert found.value == pytest.approx(values.mean())
        assert 0.4 < found.mcse / (sd / math.sqrt(values.size)) < 1.6
    short = noise[:, :100]
    twin = cross_covariance(short[:, :, None], np.ones_like(short)[:, :, None])
    assert mean_with_error(short).freedom == pytest.approx(twin.freedom)
    by_hand = short[:, :96].reshape(4, 3, 32).sum(2)  # three batches of 32, the last takes 4 more
    by_hand[:, 2] += short[:, 96:].sum(1)
    length = np.array([32, 32, 36])
    squares = ((by_hand - length * short.mean()) ** 2).sum()
    expected = math.sqrt(squares / (400**2 - 4 * (length**2).sum()))
    assert mean_with_error(short).mcse == pytest.approx(expected)


def test_doubtful_chains_are_said_to_be():
    case = quadratic.make()
    traces = draw(case.posterior, bi.SGLD(1e-4), draws=40, warmup=0, chains=4)
    with pytest.warns(bi.ConvergenceWarning, match=r"R-hat of the mean train loss"):
        llc(traces)


def test_refusals():
    case = quadratic.make()
    options = {"draws": 8, "chains": 2, "warmup": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bi.ConvergenceWarning)
        part = draw(case.posterior, bi.HMC(0.01, 2), observe={"train": range(20)}, **options)
        with pytest.raises(ValueError, match="20 of the 30 train examples were observed"):
            llc(part)
        stream = draw(case.posterior, bi.HMC(0.01, 2), store=bi.StreamingCovariance(), **options)
        with pytest.raises(TypeError, match=r"got StreamingCovariance.*keeps traces"):
            llc(stream)
        control = draw(quadratic.make(n_beta=0.0).posterior, bi.HMC(0.01, 2), **options)
        with pytest.raises(ValueError, match="n_beta = 0 samples the prior alone"):
            llc(control)
        old = draw(case.posterior, bi.HMC(0.01, 2), **options)
        old._facts = {**old._facts, "checks": {}}
        with pytest.raises(bi.StoreError, match="written by an earlier version"):
            llc(old)


def test_failed_chains_are_left_out():
    case = quadratic.make()
    traces = draw(case.posterior, bi.HMC(0.01, 4), chains=4)
    traces._facts = {**traces._facts, "failed": {"1": "lost"}}
    with pytest.warns(bi.FailedChainsWarning, match="3 of 4 chains remain"):
        result = llc(traces)
    assert result["chain"].values.tolist() == [0, 2, 3]
