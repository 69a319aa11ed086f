"""NUTS on local posteriors: against a closed form, and against our own kernels."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import bayesinf as bi
from tests.quadratic import make

jax = pytest.importorskip("jax")
pytest.importorskip("numpyro")

from bayesinf.interop.numpyro import reference_posterior  # noqa: E402
from bayesinf.interop.numpyro._reference import _warn  # noqa: E402

OPTIONS = {"draws": 500, "warmup": 200, "chains": 8, "progress": False}


def test_influence_of_a_gaussian_posterior_is_the_closed_form() -> None:
    """A linear regression with weight decay, untilted: losses are quadratic, the law Gaussian.

    180 pairs, of which 5 % are allowed outside their 99.9 % intervals: as pairs are correlated, one
    false alarm in a few hundred choices of the seed, which is fixed. The mean of the losses' chains
    is held to 5 standard errors (one in a million).
    """
    q = make(potential="plain", weight_decay=0.05)
    traces = reference_posterior(q.posterior, seed=3, **OPTIONS)
    scores = bi.bif(traces, batches_per_chain=8)
    covariance = torch.linalg.inv(q.hessian)
    truth = q.influence(covariance).numpy()
    t = stats.t.ppf(0.9995, scores.attrs["mcse_df"])
    outside = np.abs(scores["influence"].values - truth) > t * scores["mcse"].values
    assert outside.mean() < 0.05
    assert float(np.median(scores["mcse"] / np.abs(truth))) < 0.2
    x, y = q.task.train.batch()
    mean = 0.5 * ((x @ q.center - y[:, 0]) ** 2 + ((x @ covariance) * x).sum(1))
    found = traces.values("train").astype(np.float64)
    error = found.std(("chain", "draw")) / 4000**0.5
    assert (np.abs(found.mean(("chain", "draw")) - mean.numpy()) < 5 * error).all()


def test_the_store_is_like_any_other_and_goes_on(tmp_path: Path) -> None:
    q = make(potential="plain", weight_decay=0.05)
    short = {**OPTIONS, "draws": 60, "thin": 2, "observe": {"train": [3, 1], "query": None}}
    whole = reference_posterior(q.posterior, seed=1, **short)
    path = tmp_path / "reference.zarr"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bi.ConvergenceWarning)  # of 25 draws
        reference_posterior(q.posterior, seed=1, store=path, **{**short, "draws": 25})
    resumed = reference_posterior(q.posterior, seed=1, store=path, **short)
    for group in ("train", "query"):
        np.testing.assert_array_equal(whole.read(group), resumed.read(group))
    again = bi.open_traces(path)
    assert again.ids("train").tolist() == [3, 1]
    assert again.draws == 60
    assert bi.diagnose(again).attrs["ok"] == 1
    data = again.to_arviz()
    for name in ("lp", "step_size", "acceptance_rate", "diverging"):
        assert np.isfinite(data["sample_stats"][name]).all()
    assert 0.6 < float(data["sample_stats"]["acceptance_rate"].mean()) < 0.98
    scores = bi.bif(again)
    assert scores.attrs["divergences"] == 0
    assert 0.99 < scores.attrs["rhat"] < 1.05
    with pytest.raises(bi.StoreError, match=r"target_accept_prob: store has 0\.8"):
        reference_posterior(q.posterior, seed=1, store=path, target_accept_prob=0.9, **short)


def logistic(rng: torch.Generator) -> bi.Task:
    x = torch.randn(30, 3, generator=rng, dtype=torch.float64)
    y = (x[:, 0] + 0.5 * torch.randn(30, generator=rng, dtype=torch.float64) > 0).long()
    model = nn.Linear(3, 2, dtype=torch.float64)
    return bi.Task(model, bi.Categorical(), train=(x[:20], y[:20]), query=(x[20:], y[20:]))


@pytest.mark.slow
def test_hmc_of_torch_and_nuts_agree(rng: torch.Generator) -> None:
    """A tilted logistic posterior far from Gaussian; both laws are exact.

    200 pairs, of which 5 % are allowed beyond 3.5 combined standard errors: one false alarm in a
    few hundred choices of seeds, which are fixed.
    """
    posterior = bi.LocalPosterior(logistic(rng), n_beta=20.0, gamma=1.0)
    truth = bi.bif(reference_posterior(posterior, **OPTIONS), batches_per_chain=8)
    traces = bi.sample(posterior, bi.HMC(0.15, 4), draws=500, warmup=50, chains=8, progress=False)
    assert 0.5 < float(traces.tree["sample_stats"]["acceptance_rate"].mean()) < 1
    scores = bi.bif(traces, batches_per_chain=8)
    error = np.hypot(scores["mcse"], truth["mcse"])
    off = np.abs(scores["influence"] - truth["influence"])
    assert float((off > 3.5 * error).mean()) < 0.05
    assert np.corrcoef(scores["influence"].values.ravel(), truth["influence"].values.ravel())[
        0, 1
    ] > 0.98  # fmt: skip


def test_chains_in_doubt_are_said_to_be(rng: torch.Generator) -> None:
    traces = bi.sample(
        bi.LocalPosterior(logistic(rng), 20.0, 1.0), bi.SGLD(0.01), draws=5, warmup=0, chains=2,
        progress=False,
    )  # fmt: skip
    words = (
        r"3 of 10 draws .* diverged: raise target_accept_prob.*R-hat of the losses reaches 1\.20"
    )
    with pytest.warns(bi.ConvergenceWarning, match=words):
        _warn({"divergences": 3, "rhat": 1.2}, traces)
    _warn({"divergences": 0}, traces)  # of fewer than 4 draws


def test_settings_are_checked(rng: torch.Generator) -> None:
    task = logistic(rng)
    posterior = bi.LocalPosterior(task, n_beta=20.0, gamma=1.0)
    for name, value in (("target_accept_prob", 1.0), ("max_tree_depth", 0), ("draws", 0)):
        with pytest.raises(ValueError, match=f"{name} must .* got {value}"):
            reference_posterior(posterior, **{**OPTIONS, name: value})
    with pytest.raises(ValueError, match="this posterior is flat"):
        reference_posterior(bi.LocalPosterior(task, 0.0, 0.0), **OPTIONS, jitter=0.0)
    with pytest.raises(ValueError, match=r"not finite where chains .* start.*jitter=5e\+299"):
        reference_posterior(posterior, **OPTIONS, jitter=1e300)
