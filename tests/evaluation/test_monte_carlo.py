"""The Monte-Carlo error and the attenuation of an LDS against many runs of the same sampler."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from bayesinf._covariance import cross_covariance
from bayesinf._scores import make_scores
from bayesinf.evaluation import lds, lds_table, random_subsets
from bayesinf.evaluation._monte_carlo import jackknife_error

N, Q, FACTORS = 50, 20, 8
_rng = np.random.default_rng(0)
A, B = _rng.normal(size=(FACTORS, Q)), _rng.normal(size=(FACTORS, N))


def bank() -> xr.Dataset:
    """Outcomes are sums of the exact covariances, and noise."""
    subsets = random_subsets(N, count=60, seed=1)
    outcome = subsets.values @ -(A.T @ B).T
    noise = np.random.default_rng(9).normal(size=(60, 2, Q))
    dims = ("subset", "seed", "query")
    return xr.Dataset(
        {"loss": (dims, outcome[:, None] + 3 * noise), "subset_mask": subsets},
        coords={"seed": [0, 1], "query": np.arange(Q)},
    )


def make(influence: np.ndarray, **more: object) -> xr.Dataset:
    made = make_scores(
        influence, query=np.arange(Q), train=np.arange(N), method="bif", estimand="influence"
    )
    return made.assign(more)


def sampled(seed: int, draws: int = 100) -> xr.Dataset:
    """Scores from 4 chains of independent draws with much noise of their own."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(4, draws, FACTORS))
    x = z @ A + 6 * rng.normal(size=(4, draws, Q))
    y = z @ B + 6 * rng.normal(size=(4, draws, N))
    result = cross_covariance(x, y, replicates=True)
    pair = ("query", "train")
    return make(
        -result.value,
        influence_replicate=(("batch", *pair), -result.deleted),
        influence_half=(("half", *pair), -result.halves),
        batch_share=("batch", result.share),
    )


def test_error_and_attenuation_are_what_runs_show() -> None:
    """80 runs: their standard deviation has a relative standard error of 0.08, bounds are 4 of it.

    LDS over attenuation is to be that of the exact covariances within 0.04; without it is lower by
    more than 0.1. The mean over 80 runs has a standard error below 0.004.
    """
    truth = bank()
    runs = [lds(sampled(seed), truth) for seed in range(80)]
    values = np.array([float(run["lds"]) for run in runs])
    errors = np.array([float(run["mcse"]) for run in runs])
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(ddof=1), rel=0.32)
    exact = float(lds(make(-(A.T @ B)), truth)["lds"])
    assert values.mean() < exact - 0.1
    corrected = np.mean([float(run["lds"] / run["attenuation"]) for run in runs])
    assert corrected == pytest.approx(exact, abs=0.04)
    assert "apart from standard_error" in runs[0].attrs["monte_carlo"]


def test_reliability_rises_with_the_draws() -> None:
    truth = bank()
    few, many = (lds(sampled(1, draws), truth) for draws in (50, 800))
    assert 0 < float(few["reliability"]) < float(many["reliability"]) < 1
    assert float(many["mcse"]) < float(few["mcse"])
    assert float(few["attenuation"]) == pytest.approx(float(few["reliability"]) ** 0.5)


def test_jackknife_of_a_weighted_mean() -> None:
    """Of batch means of unequal batches it is the weighted variance of the mean, in expectation.

    40,000 runs of batches of 1, 1, 2, 4 draws; relative standard error of the variance 0.006.
    """
    length = np.array([1.0, 1.0, 2.0, 4.0])
    share = length / 8
    rng = np.random.default_rng(2)
    found = []
    for _ in range(40_000):
        means = rng.normal(size=4) / np.sqrt(length)
        value = share @ means
        deleted = (value - share * means) / (1 - share)
        found.append(jackknife_error(value, deleted, share) ** 2)
    assert np.mean(found) == pytest.approx(1 / 8, rel=0.03)


def test_scores_without_replicates_have_no_monte_carlo_error() -> None:
    truth = bank()
    plain, noisy = make(-(A.T @ B)), sampled(0)
    assert "mcse" not in lds(plain, truth)
    table = lds_table({"plain": plain, "noisy": noisy}, truth)
    assert np.isnan(table["mcse"].values).tolist() == [True, False]
    assert float(table["mcse"][1]) == float(lds(noisy, truth)["mcse"])
    turned = lds_table({"noisy": noisy, "plain": plain}, truth)
    assert np.isnan(turned["reliability"].values).tolist() == [False, True]
    assert "mcse" not in lds_table({"plain": plain}, truth)
