"""Influence along a training run whose local posteriors are Gaussian, and what is made of it."""

import warnings

import numpy as np
import pytest
import torch

import bayesinf as bi
from bayesinf._families import sample_each
from bayesinf.attribution._checkpoints import flips, influence_over_checkpoints, peaks, signs
from tests import quadratic

RATE, STEPS = 0.25, (0, 1, 3, 8, 24)
GROUPS = {"early": range(10), "middle": range(10, 20), "one": [7]}
PAIRS = {"early - middle": ("early", "middle")}
QUERIES = {"0 - 1": (0, 1), "2 - 5": (2, 5)}


def run_of_descent(case):
    """Weights of gradient descent from zero on the mean loss, by step."""
    x, y = case.task.train.batch()
    w, found = torch.zeros(4, dtype=torch.float64), {}
    for step in range(max(STEPS) + 1):
        if step in STEPS:
            found[step] = w.clone()
        w = w - RATE * x.T @ (x @ w - y[:, 0]) / len(x)
    return found


@pytest.fixture(scope="module")
def curves():
    """Traces at each checkpoint by independent draws, and the exact influence there."""
    case = quadratic.make(n_beta=60.0, gamma=6.0)
    weights = run_of_descent(case)
    tasks = {s: case.task.at({"weight": w[None]}) for s, w in weights.items()}
    traces = sample_each(
        tasks, bi.GaussNewtonLaplace(tolerance=1e-8), n_beta=60.0, gamma=6.0,
        draws=120, warmup=0, chains=8, progress=False,
    )  # fmt: skip
    exact = []
    for w in weights.values():
        at = quadratic.Quadratic(case.task, case.posterior, case.hessian, w, w)
        exact.append(at.influence(torch.linalg.inv(case.hessian)).numpy())
    return traces, np.stack(exact)


def sums(exact):
    return np.stack([exact[:, :, list(members)].sum(2) for members in GROUPS.values()], axis=2)


def test_curves_signs_and_peaks_against_the_exact_ones(curves):
    """90 numbers within 5.5 standard errors (0.2 %); signs and peaks of 18 curves (0.2 %)."""
    traces, exact = curves
    truth = sums(exact)
    result = influence_over_checkpoints(traces, GROUPS, confidence=0.9999)
    assert dict(result.sizes) == {"step": 5, "query": 6, "group": 3}
    error = np.abs(result["influence"].values - truth) / result["mcse"].values
    assert error.max() < 5.5
    assert np.sqrt(np.mean(error**2)) < 2  # the curves share their draws
    certain = result["sign"].values != 0
    assert certain.mean() > 0.4
    assert (np.sign(truth) == result["sign"].values)[certain].all()
    changes = (np.diff(np.sign(truth), axis=0) != 0).sum(axis=0)
    assert (result["flips"].values <= changes).all()
    assert (result["flips"].values == changes).mean() > 0.5
    assert result["flips"].values.max() >= 1  # the influence does change its sign
    place = np.abs(truth).argmax(axis=0)
    reached = np.take_along_axis(result["peak_set"].values, place[None], axis=0)
    assert reached.all()
    assert result["peak_set"].values.sum(axis=0).min() <= 3  # of 5 steps
    middle = list(GROUPS).index("middle")  # where the peak stands out
    np.testing.assert_array_equal(
        result["peak"].values[:, middle], np.array(STEPS)[place][:, middle]
    )


def test_contrasts_within_a_checkpoint(curves):
    """60 numbers within 5.5 standard errors, by the error of the difference itself: 0.2 %."""
    traces, exact = curves
    truth = sums(exact)
    result = influence_over_checkpoints(
        traces, GROUPS, contrasts=PAIRS, query_contrasts=QUERIES, center="grand"
    )
    for name, expected in (
        ("contrast", truth[:, :, :1] - truth[:, :, 1:2]),
        ("query_contrast", truth[:, [0, 2]] - truth[:, [1, 5]]),
    ):
        value, error = result[f"{name}_influence"].values, result[f"{name}_mcse"].values
        assert value.shape == expected.shape
        assert (np.abs(value - expected) <= 5.5 * error).all()
    of_groups = result["influence"].diff("group").isel(group=0)
    np.testing.assert_allclose(
        result["contrast_influence"].sel(contrast="early - middle"), -of_groups, rtol=1e-8
    )
    a, b = (result["mcse"].sel(group=g) for g in ("early", "middle"))
    ratio = result["contrast_mcse"].sel(contrast="early - middle") / np.hypot(a, b)
    assert float(np.abs(ratio - 1).max()) > 0.1  # the same draws: not two independent errors
    single = bi.group_influence(traces[0], GROUPS, center="grand")
    np.testing.assert_array_equal(result["influence"].sel(step=0), single["influence"])
    np.testing.assert_array_equal(result["mcse"].sel(step=0), single["mcse"])
    assert result["mcse_df"].values.tolist() == [single.attrs["mcse_df"]] * 5


def test_signs_flips_and_peaks_by_hand():
    value = np.array([[-3.0, 1.0], [-0.5, 2.0], [2.0, -1.0], [0.2, 4.0], [-2.0, 3.5]])
    half = np.ones_like(value)
    expected = [[-1, 0], [0, 1], [1, 0], [0, 1], [-1, 1]]
    np.testing.assert_array_equal(signs(value, half), expected)
    np.testing.assert_array_equal(flips(signs(value, half)), [2, 0])
    expected = [[True, False], [False, True], [True, False], [False, True], [True, True]]
    expected[1] = [False, False]
    expected[1][1] = bool(2.0 + 1.0 >= 4.0 - 1.0)
    np.testing.assert_array_equal(peaks(value, half), expected)


def test_streams_have_curves_too():
    case = quadratic.make()
    options = {"draws": 30, "warmup": 2, "chains": 4, "progress": False}
    tasks = [case.task, case.task.at({"weight": torch.ones(1, 4, dtype=torch.float64)})]
    stores = [{}, {}]
    for step, task in enumerate(tasks):
        posterior = bi.LocalPosterior(task, 60.0, 6.0)
        for kind, store in enumerate((None, bi.StreamingCovariance())):
            stores[kind][step] = bi.sample(posterior, bi.SGLD(0.005), store=store, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bi.ConvergenceWarning)
        found = [
            influence_over_checkpoints(s, GROUPS, contrasts=PAIRS, center="grand") for s in stores
        ]
        for name in ("influence", "mcse", "contrast_influence", "contrast_mcse"):
            np.testing.assert_allclose(found[1][name], found[0][name], rtol=1e-6)
        with pytest.raises(TypeError, match="query_contrasts need traces"):
            influence_over_checkpoints(stores[1], GROUPS, query_contrasts=QUERIES)
    with pytest.warns(bi.ConvergenceWarning, match=r"step 1: these scores come from chains"):
        influence_over_checkpoints({1: stores[0][1]}, GROUPS)


def test_refusals(curves):
    traces, _ = curves
    case = quadratic.make()
    odd = sample_each(
        {64: case.task}, bi.GaussNewtonLaplace(), n_beta=50.0, gamma=6.0,
        draws=8, warmup=0, chains=8, progress=False,
    )  # fmt: skip
    for given, options, words in (
        ({}, {}, "there is no checkpoint"),
        (traces, {"confidence": 1.0}, "confidence must lie between 0 and 1"),
        (traces, {"contrasts": {"c": ("early", "late")}}, "contrast 'c' must be of two groups"),
        (traces, {"contrasts": {"c": ("early", "early")}}, "contrast 'c' must be of two groups"),
        ({**traces, **odd}, {}, r"step 64 was sampled at another setting than 0: posterior.n_beta"),
    ):
        with pytest.raises(ValueError, match=words):
            influence_over_checkpoints(given, GROUPS, **options)
    with pytest.raises(KeyError, match="query contrast 'q' names 99"):
        influence_over_checkpoints(traces, GROUPS, query_contrasts={"q": (0, 99)})
