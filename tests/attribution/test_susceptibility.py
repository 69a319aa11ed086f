"""Susceptibilities of parts of a regression, whose restricted posteriors are Gaussian."""

import warnings

import numpy as np
import pytest
import scipy.stats
import torch

import bayesinf as bi
from bayesinf._covariance import cross_covariance
from bayesinf._families import sample_each
from bayesinf.attribution._susceptibility import susceptibility
from tests import language_task, quadratic

PARTS = {"first": [0], "rest": [1, 2, 3], "all": [0, 1, 2, 3]}
N_BETA, GAMMA, DECAY = 40.0, 8.0, 0.01
SETTING = {"n_beta": N_BETA, "gamma": GAMMA, "weight_decay": DECAY}


def masked(task, entries):
    mask = torch.zeros(1, 4, dtype=torch.bool)
    mask[0, entries] = True
    return task.restrict({"weight": mask})


def exact(case, entries, potential):
    """``−nβ Cov(L, ℓ_i − L)``: linear and quadratic terms of a Gaussian, in the entries."""
    (x, y), w0 = case.task.train.batch(), case.w0
    n, z = len(x), x[:, entries]
    hessian = z.T @ z / n
    precision = GAMMA + N_BETA * DECAY
    eye = torch.eye(len(entries), dtype=torch.float64)
    covariance = torch.linalg.inv(N_BETA * hessian + precision * eye)
    shift = torch.zeros(len(entries), dtype=torch.float64)
    if potential == "plain":
        slope = N_BETA * (z.T @ (x @ w0 - y[:, 0]) / n + DECAY * w0[entries])
        shift = -covariance @ slope
    residual = x @ w0 - y[:, 0] + z @ shift
    slopes = residual[:, None] * z
    mean = slopes.mean(0)
    linear = (slopes - mean) @ covariance @ mean
    spread = covariance @ hessian @ covariance
    square = 0.5 * (torch.einsum("ni,ij,nj->n", z, spread, z) - (spread * hessian).sum())
    return -N_BETA * (linear + square).numpy()


@pytest.mark.parametrize("potential", [pytest.param("tilted", marks=pytest.mark.slow), "plain"])
def test_parts_of_a_regression(potential):
    """180 comparisons within 5.5 standard errors of 23 degrees of freedom: false alarms 0.3 %."""
    case = quadratic.make()
    tasks = {name: masked(case.task, entries) for name, entries in PARTS.items()}
    traces = sample_each(
        tasks, bi.HMC(0.015, 5), **SETTING, potential=potential,
        draws=250, warmup=40, chains=16, progress=False,
    )  # fmt: skip
    result = susceptibility(traces)
    assert dict(result.sizes) == {"component": 3, "train": 30}
    for name, entries in PARTS.items():
        row, truth = result.sel(component=name), exact(case, entries, potential)
        error = row["mcse"].values
        assert (np.abs(row["susceptibility"].values - truth) <= 5.5 * error).all()
        assert np.median(error) < 0.1 * truth.std()
        assert np.corrcoef(row["susceptibility"], truth)[0, 1] > 0.99
        np.testing.assert_allclose(row["susceptibility"].sum(), 0, atol=1e-9 * np.abs(truth).sum())
    score = np.abs(result["susceptibility"].sel(component="rest") - exact(case, [0], potential))
    assert (score > 8 * result["mcse"].sel(component="rest")).any()  # parts differ
    assert set(result["center"].values.tolist()) == {"grand"}
    quantile = scipy.stats.t.ppf(0.975, result["mcse_df"])
    assert (quantile > 1.96).all()


def test_it_is_the_derivative_of_the_expected_loss():
    """Against a finite difference of the exact mean under a loss with one example weighted up."""
    case = quadratic.make()
    x, y = case.task.train.batch()
    weights = torch.full((30,), 1 / 30, dtype=torch.float64)
    found = []
    for h in (1e-5, -1e-5):
        w = (1 - h) * weights
        w[3] += h
        hessian = x.T @ (w[:, None] * x)
        linear = (x.T @ (w * (x @ case.w0 - y[:, 0]))) - x.T @ (weights * (x @ case.w0 - y[:, 0]))
        a = N_BETA * hessian + (GAMMA + N_BETA * DECAY) * torch.eye(4, dtype=torch.float64)
        center = case.w0 - torch.linalg.solve(a, N_BETA * linear)
        residual = x @ center - y[:, 0]
        spread = torch.einsum("ni,ij,nj->n", x, torch.linalg.inv(a), x)
        found.append(float(0.5 * (residual**2 + spread).mean()))
    assert (found[0] - found[1]) / 2e-5 == pytest.approx(
        exact(case, [0, 1, 2, 3], "tilted")[3], rel=1e-6
    )


# ---------------------------------------------------------------- many tasks at one setting


def quick(tasks, **options):
    settings = {"draws": 12, "warmup": 2, "chains": 2, "progress": False, **SETTING, **options}
    return sample_each(tasks, bi.SGLD(0.01), **settings)


def test_numbers_are_common_and_stores_go_on(tmp_path):
    case = quadratic.make()
    other = case.task.at({"weight": torch.ones(1, 4, dtype=torch.float64)})
    made = []

    def late():
        made.append(1)
        return other

    traces = quick({0: case.task, "late": late}, folder=tmp_path / "runs")
    assert list(traces) == [0, "late"]
    assert made == [1]
    distances = [t.tree["sample_stats"]["distance"].values for t in traces.values()]
    # A tilted quadratic has the same dynamics around any checkpoint.
    np.testing.assert_allclose(distances[0], distances[1], rtol=1e-4)
    assert (tmp_path / "runs" / "late.zarr").exists()
    more = quick({0: case.task, "late": late}, folder=tmp_path / "runs", draws=20)
    np.testing.assert_array_equal(
        more["late"].values("query").values[:, :12], traces["late"].values("query").values[:, :12]
    )


def test_refusals_of_families(tmp_path):
    case = quadratic.make()
    for tasks, options, words in (
        ({}, {}, "there is no task"),
        ({1: case.task}, {"store": "x"}, "give folder=, not store="),
        ({"a/b": case.task}, {"folder": tmp_path}, "'a/b' makes no file name"),
        ({1: case.task, "1": case.task}, {"folder": tmp_path}, "labels must differ as text"),
    ):
        with pytest.raises(ValueError, match=words):
            quick(tasks, **options)
    with pytest.raises(bi.DivergenceError) as caught:
        quick({"hot": case.task}, divergence_bound=1e-9)
    assert caught.value.__notes__ == ["while sampling 'hot'"]


def test_refusals():
    case = quadratic.make()
    one, other = masked(case.task, [0]), masked(case.task, [1])
    good = quick({"a": one, "b": other})
    with pytest.raises(ValueError, match="there is no component"):
        susceptibility({})
    with pytest.raises(TypeError, match="component 'a' is a StreamingCovariance"):
        susceptibility({"a": bi.StreamingCovariance()})
    hotter = quick({"b": other}, gamma=9.0)
    with pytest.raises(
        ValueError, match=r"'b' was sampled .* than 'a': posterior.gamma is 8.0 and"
    ):
        susceptibility({"a": good["a"], **hotter})
    part = quick({"a": one}, observe={"train": range(9)})
    with pytest.raises(ValueError, match="'a': 9 of the 30 train examples were observed"):
        susceptibility(part)
    with pytest.warns(bi.ConvergenceWarning, match="component 'a' has chains in doubt"):
        result = susceptibility({"a": good["a"]})
    assert result["center"].values.tolist() == ["chain"]
    np.testing.assert_array_equal(result["susceptibility"], result["susceptibility_within"])


def test_many_examples_are_taken_in_blocks(monkeypatch):
    case = quadratic.make()
    traces = quick({"a": masked(case.task, [0, 2])})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bi.ConvergenceWarning)
        whole = susceptibility(traces)
        monkeypatch.setattr("bayesinf.attribution._susceptibility._BLOCK", 7)
        blocks = susceptibility(traces)
    for name in ("susceptibility", "mcse", "susceptibility_within"):
        np.testing.assert_allclose(blocks[name], whole[name], rtol=1e-12)


@pytest.mark.filterwarnings("ignore::bayesinf.ConvergenceWarning")
def test_tokens_sum_to_their_sequences():
    traces = {"all": language_task.run(tokens="both")}
    by_token, whole = susceptibility(traces, tokens=True), susceptibility(traces)
    assert by_token["susceptibility"].dims == ("component", "train_token")
    summed = by_token["susceptibility"].groupby("train").sum().sel(train=whole["train"].values)
    np.testing.assert_allclose(
        summed.transpose("component", "train"), whole["susceptibility"], rtol=1e-8, atol=1e-12
    )
    values = traces["all"].values("train", tokens=True)
    ids = values["train"].values.tolist()
    mean = traces["all"].values("train").values.mean(axis=2, keepdims=True)
    one = values.values[:, :, 4:5] - mean / ids.count(ids[4])
    exact = cross_covariance(mean, one, center="chain", batches_per_chain=3)
    n_beta = traces["all"].config["posterior"]["n_beta"]
    row = by_token.isel(component=0, train_token=4)
    assert by_token["center"].values.tolist() == ["chain"]
    np.testing.assert_allclose(row["susceptibility"], -n_beta * exact.value[0, 0], rtol=1e-8)
    np.testing.assert_allclose(row["mcse"], n_beta * exact.mcse[0, 0], rtol=1e-8)
    with pytest.raises(KeyError, match="token"):
        susceptibility({"all": language_task.run()}, tokens=True)
