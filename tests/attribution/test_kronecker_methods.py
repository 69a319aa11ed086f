"""``ekfac`` and ``kfac`` scores against dense block solves."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf.attribution import _pairwise
from bayesinf.attribution._ekfac import ekfac
from bayesinf.attribution._kfac import kfac
from bayesinf.attribution._scores import METHODS
from bayesinf.curvature import UntreatedParametersWarning, fit_factors
from tests import exact
from tests.layered_cases import LAYERED, LAYERED_BY_NAME

METHOD = {True: ekfac, False: kfac}


def block_influence(task, fisher, corrected, damping, measurement="loss", relative=False):
    """``−(1/n) Σ_ℓ ∇φᵀ (C_ℓ + λI)⁻¹ ∇ℓ`` by dense solves with independent gradients."""
    left, right = exact.gradients(task, "query", measurement), exact.gradients(task)
    total = 0.0
    for factor in fit_factors(task, fisher=fisher, corrected=corrected):
        where = exact.index(task, factor.layer.weight, factor.layer.bias)
        dense = factor.dense()
        lam = damping * float(dense.trace()) / len(dense) if relative else damping
        damped = dense + lam * torch.eye(len(dense), dtype=dense.dtype)
        total = total - left[:, where] @ torch.linalg.solve(damped, right[:, where].T) / task.n
    return total.numpy()


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("fisher", ["enumerated", "empirical"])
@pytest.mark.parametrize("case", LAYERED, ids=lambda c: c.name)
def test_influence_is_the_damped_block_solve(case, fisher, corrected):
    task = case.task()
    scores = METHOD[corrected](task, fisher=fisher, damping=0.03)
    exact.close(scores.influence, block_influence(task, fisher, corrected, 0.03))


@pytest.mark.parametrize("method", [ekfac, kfac])
def test_relative_damping_is_a_multiple_of_each_layers_mean_eigenvalue(method):
    task = LAYERED_BY_NAME["cnn"].task()
    scores = method(task, fisher="enumerated", relative_damping=0.1)
    expected = block_influence(task, "enumerated", method is ekfac, 0.1, relative=True)
    exact.close(scores.influence, expected)
    by_layer = json.loads(scores.attrs["damping"])
    factors = fit_factors(task, fisher="enumerated", corrected=method is ekfac)
    assert by_layer == pytest.approx(
        {f.layer.name: 0.1 * float(f.dense().trace()) / f.layer.size for f in factors}
    )
    assert scores.attrs["relative_damping"] == 0.1


def double_loss(task, params, batch):
    return 2 * task.losses(params, batch) + sum((p**2).sum() for p in params.values())


@pytest.mark.parametrize("measurement", ["margin", double_loss])
@pytest.mark.parametrize("name", ["mlp-categorical", "cnn", "sequence", "tied"])
def test_measurements_of_the_query(name, measurement):
    task = LAYERED_BY_NAME[name].task()
    scores = ekfac(task, fisher="empirical", damping=0.03, measurement=measurement)
    expected = block_influence(task, "empirical", True, 0.03, measurement)
    exact.close(scores.influence, expected)
    assert scores.attrs["measurement"] == getattr(measurement, "__name__", measurement)


def test_where_the_blocks_are_exact_so_is_the_influence(rng):
    x = torch.randn(9, 4, generator=rng, dtype=torch.float64)
    y = torch.randn(9, 3, generator=rng, dtype=torch.float64)
    task = bi.Task(nn.Linear(4, 3).double(), bi.Gaussian(), train=(x, y), query=(x[:4], y[4:8]))
    expected = exact.influence(task, exact.gauss_newton(task), 0.02)
    for method in (ekfac, kfac):
        exact.close(method(task, fisher="enumerated", damping=0.02).influence, expected)


def test_a_constant_spectrum_is_grad_dot(rng):
    """Inputs with covariance 1 and unit output curvature: score = −g·g / (n (1 + λ))."""
    x = torch.cat([torch.eye(3), -torch.eye(3)]).double() * 3**0.5
    y = torch.randn(6, 2, generator=rng, dtype=torch.float64)
    model = nn.Linear(3, 2, bias=False).double()
    task = bi.Task(model, bi.Gaussian(), train=(x, y), query=(x[:2] + 1, y[:2]))
    g = exact.gradients(task, "query") @ exact.gradients(task).T
    for method in (ekfac, kfac):
        scores = method(task, fisher="enumerated", damping=0.5)
        exact.close(scores.influence, (-g / (6 * 1.5)).numpy())


@pytest.mark.parametrize("name", ["mlp-categorical", "cnn", "sequence"])
def test_scores_do_not_depend_on_blocks(name, monkeypatch):
    task = LAYERED_BY_NAME[name].task()
    whole = ekfac(task, fisher="sampled", damping=0.03, seed=5).influence
    exact.close(ekfac(task, fisher="sampled", damping=0.03, seed=5, batch_size=1).influence, whole)
    monkeypatch.setattr(_pairwise, "_QUERY_ELEMENTS", 2 * task.dimension)
    monkeypatch.setattr(_pairwise, "_TRAIN_ELEMENTS", 5 * task.dimension)
    exact.close(ekfac(task, fisher="sampled", damping=0.03, seed=5).influence, whole)


def test_own_influence_is_helpful():
    """Up-weighting an example lowers its own loss."""
    task = LAYERED_BY_NAME["mlp-categorical"].task()
    same = bi.Task(
        task.module, task.likelihood, train=task.train.batch(), query=task.train.batch(),
        parameters=".*",
    )  # fmt: skip
    scores = ekfac(same, fisher="empirical", damping=0.1)
    assert (np.diag(scores.influence.values) < 0).all()


def test_float32_follows_float64():
    task = LAYERED_BY_NAME["cnn"].task()
    x, y = task.train.batch()
    query = task.query.batch()
    single = bi.Task(
        task.module.float(), task.likelihood, train=(x, y), query=query, parameters=".*"
    )
    scores = ekfac(single, fisher="enumerated", damping=0.03)
    assert scores.influence.dtype == np.float32
    double = ekfac(LAYERED_BY_NAME["cnn"].task(), fisher="enumerated", damping=0.03)
    exact.close(scores.influence, double.influence, 1e-5)


def test_attributes_say_what_was_done():
    task = LAYERED_BY_NAME["mlp-categorical"].task()
    attrs = ekfac(task, fisher="enumerated", damping=0.03, batch_size=7).attrs
    assert attrs["method"] == "ekfac"
    assert attrs["estimand"] == METHODS["ekfac"].estimand == "influence"
    assert attrs["damping"] == 0.03
    assert attrs["fisher"] == "enumerated"
    assert attrs["measurement"] == "loss"
    assert attrs["checkpoint"] == task.fingerprint()["checkpoint"]
    assert attrs["treated"] == attrs["parameters"] == task.dimension
    seconds = json.loads(attrs["seconds"])
    stages = {"covariance", "eigendecomposition", "eigenvalue correction", "scores"}
    assert set(seconds) == stages
    checks = 2 * 12  # captured gradients are compared with autograd's twice
    assert attrs["forward_examples"] == checks + 3 * 12 + 5
    assert attrs["backward_examples"] == checks + 2 * 12 * 3 + 12 + 5
    assert "seed" not in attrs
    assert ekfac(task, fisher="sampled", damping=1.0, seed=3).attrs["seed"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of damping= and relative_damping=; got neither"),
        ({"damping": 1.0, "relative_damping": 0.1}, "got both"),
        ({"damping": 0.0}, r"damping must be a positive number; got 0\.0"),
        ({"damping": -1.0}, r"damping must be a positive number; got -1\.0"),
        ({"damping": float("nan")}, "damping must be a positive number; got nan"),
        ({"damping": "auto"}, "damping must be a positive number; got 'auto'"),
        ({"relative_damping": 0.0}, "relative_damping must be a positive number"),
        ({"relative_damping": "0.1"}, "relative_damping must be a positive number"),
        ({"damping": 1.0, "batch_size": 0}, "batch_size must be a positive integer; got 0"),
    ],
)
@pytest.mark.parametrize("method", [ekfac, kfac])
def test_bad_arguments(method, options, message):
    task = LAYERED_BY_NAME["linear-gaussian"].task()
    with pytest.raises(ValueError, match=message):
        method(task, fisher="empirical", **options)


def test_relative_damping_of_a_flat_layer_is_refused():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    x = torch.eye(3)
    task = bi.Task(Unused(), bi.Gaussian(), train=(x, x[:, :2]), query=(x, x[:, :2]))
    with pytest.raises(ValueError, match="layer 'idle' has zero curvature"):
        ekfac(task, fisher="empirical", relative_damping=0.1)
    assert ekfac(task, fisher="empirical", damping=0.1).influence.shape == (3, 3)


def test_a_measurement_that_the_likelihood_lacks():
    task = LAYERED_BY_NAME["mlp-gaussian"].task()
    with pytest.raises(NotImplementedError, match="'margin' needs `margin`"):
        ekfac(task, fisher="empirical", damping=1.0, measurement="margin")


def test_a_query_whose_gradient_is_not_finite_is_named():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2, bias=False)

        def forward(self, x):
            return self.fc(x).abs().sqrt()

    x = torch.ones(4, 2)
    bad = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    task = bi.Task(
        Root(), bi.Gaussian(), train=(x, x), query=(bad, bad + 1), query_ids=["good", "bad"]
    )
    with pytest.raises(ValueError, match="layer 'fc': the gradient of query example 'bad' is NaN"):
        ekfac(task, fisher="empirical", damping=1.0)


def test_other_layers_are_warned_about_once_and_count_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    g = torch.Generator().manual_seed(2)
    x = torch.randn(6, 3, generator=g, dtype=torch.float64)
    data = {"train": (x, x[:, :2]), "query": (x[:2], x[:2, 1:])}
    task = bi.Task(model, bi.Gaussian(), **data)
    with pytest.warns(UntreatedParametersWarning, match=r"1\.weight \(LayerNorm\)") as seen:
        scores = ekfac(task, fisher="enumerated", damping=0.1)
    assert len(seen) == 1
    assert json.loads(scores.attrs["untreated"]) == ["1.weight", "1.bias"]
    alone = bi.Task(model, bi.Gaussian(), parameters=["0.*", "2.*"], **data)
    exact.close(scores.influence, ekfac(alone, fisher="enumerated", damping=0.1).influence)
