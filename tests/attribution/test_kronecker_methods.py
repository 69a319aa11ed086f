"""``ekfac`` and ``kfac`` scores against dense block solves."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf import ekfac, fit_curvature, kfac
from bayesinf.attribution import _pairwise
from bayesinf.attribution._registry import METHODS
from bayesinf.curvature._accounting import Costs
from tests import exact
from tests.layered_cases import LAYERED, LAYERED_BY_NAME

METHOD = {"ekfac": ekfac, "kfac": kfac}


def block_influence(task, curvature, damping, measurement="loss", *, relative=False):
    """``−(1/n) Σ_ℓ ∇φᵀ (C_ℓ + λI)⁻¹ ∇ℓ`` by dense solves with independent gradients."""
    left, right = exact.gradients(task, "query", measurement), exact.gradients(task)
    total = 0.0
    for block in curvature.blocks:
        where, dense = exact.index(task, block.layer), block.dense()
        lam = damping * float(dense.trace()) / len(dense) if relative else damping
        damped = dense + lam * torch.eye(len(dense), dtype=dense.dtype)
        total = total - left[:, where] @ torch.linalg.solve(damped, right[:, where].T) / task.n
    return total.numpy()


@pytest.mark.parametrize("form", METHOD)
@pytest.mark.parametrize("case", LAYERED, ids=lambda c: c.name)
def test_influence_is_the_damped_block_solve(case, form):
    """In blocks that fit no layer: 4 training examples, 2 queries at a time."""
    task, fisher = case.task(), {"ekfac": "enumerated", "kfac": "empirical"}[form]
    curvature = fit_curvature(task, fisher=fisher, form=form, batch_size=4)
    options = {"damping": 0.03, "batch_size": 4, "query_batch_size": 2}
    scores = METHOD[form](task, fisher=fisher, **options)
    assert scores.influence.dims == ("query", "train")
    exact.close(scores.influence, block_influence(task, curvature, 0.03))


@pytest.mark.parametrize("case", LAYERED, ids=lambda c: c.name)
def test_with_one_block_for_all_parameters_of_a_layer(case):
    """Dense blocks against the dense Fisher, without anything that was fitted."""
    task, truth = case.task(), exact.fisher(case, "empirical")
    blocks = torch.zeros_like(truth)
    curvature = fit_curvature(task, fisher="empirical", form="dense")
    for layer in curvature.layers:
        where = exact.index(task, layer)
        blocks[where[:, None], where] = truth[where][:, where]
    scores = ekfac(task, curvature=curvature, damping=0.03)
    exact.close(scores.influence, exact.influence(task, blocks, 0.03))


@pytest.mark.parametrize("form", METHOD)
def test_relative_damping_is_a_multiple_of_each_layers_mean_eigenvalue(form):
    task = LAYERED_BY_NAME["cnn"].task()
    curvature = fit_curvature(task, fisher="enumerated", form=form)
    scores = METHOD[form](task, fisher="enumerated", relative_damping=0.1)
    exact.close(scores.influence, block_influence(task, curvature, 0.1, relative=True))
    assert json.loads(scores.attrs["damping"]) == pytest.approx(
        {b.layer.name: 0.1 * float(b.dense().trace()) / b.layer.size for b in curvature.blocks}
    )
    assert scores.attrs["relative_damping"] == 0.1


def test_damping_by_layer():
    task = LAYERED_BY_NAME["cnn"].task()
    lam = {"0": 0.01, "2": 0.1, "5": 1.0}
    scores = ekfac(task, fisher="enumerated", damping=lam, modules=True)
    for name, one in lam.items():
        alone = ekfac(task, fisher="enumerated", damping=one, modules=True)
        exact.close(
            scores.influence_by_module.sel(module=name), alone.influence_by_module.sel(module=name)
        )
    assert json.loads(scores.attrs["damping"]) == lam


def double_loss(task, params, batch):
    return 2 * task.losses(params, batch) + sum((p**2).sum() for p in params.values())


@pytest.mark.parametrize("measurement", ["margin", double_loss])
@pytest.mark.parametrize("name", ["mlp-categorical", "cnn", "sequence", "tied", "decoder-tied"])
def test_measurements_of_the_query(name, measurement):
    task = LAYERED_BY_NAME[name].task()
    scores = ekfac(task, fisher="empirical", damping=0.03, measurement=measurement)
    curvature = fit_curvature(task, fisher="empirical")
    exact.close(scores.influence, block_influence(task, curvature, 0.03, measurement))
    assert scores.attrs["measurement"] == getattr(measurement, "__name__", measurement)


# ---------------------------------------------------------------- a curvature of one's own


def test_a_sweep_of_dampings_costs_one_fit(monkeypatch):
    """Every run with the curvature passes train and query examples once, for their gradients."""
    task, costs = LAYERED_BY_NAME["mlp-categorical"].task(), Costs()
    curvature = fit_curvature(task, fisher="enumerated", costs=costs)
    assert costs.backward_examples == 12 + 12 * 3

    def again(*args, **options):
        raise AssertionError("fitted again")

    monkeypatch.setattr("bayesinf.attribution._kronecker_scores.fit_curvature", again)
    monkeypatch.setattr(torch.linalg, "eigh", again)
    for damping in (1e-3, 0.1, 2.0):
        scores = ekfac(task, curvature=curvature, damping=damping)
        exact.close(scores.influence, block_influence(task, curvature, damping))
        assert scores.attrs["forward_examples"] == scores.attrs["backward_examples"] == 12 + 5
        assert set(json.loads(scores.attrs["seconds"])) == {"scores"}


def test_forms_by_layer_through_a_curvature():
    task = LAYERED_BY_NAME["decoder-transposed"].task()
    forms = {"words": "diagonal", "block.*": "kfac", "head": "dense", "norm": "identity"}
    curvature = fit_curvature(task, fisher="empirical", form=forms, sequence="reduce")
    scores = ekfac(task, curvature=curvature, damping=0.05)
    exact.close(scores.influence, block_influence(task, curvature, 0.05))
    assert json.loads(scores.attrs["forms"])["words"] == "diagonal"
    assert scores.attrs["sequence"] == "reduce"


def test_a_curvature_of_sampled_labels():
    task = LAYERED_BY_NAME["cnn"].task()
    curvature = fit_curvature(task, fisher="sampled", seed=5, draws=3)
    scores = ekfac(task, curvature=curvature, damping=0.05)
    exact.close(scores.influence, block_influence(task, curvature, 0.05))
    assert (scores.attrs["seed"], scores.attrs["draws"]) == (5, 3)


# ---------------------------------------------------------------- exact cases


def test_where_the_blocks_are_exact_so_is_the_influence(rng):
    x = torch.randn(9, 4, generator=rng, dtype=torch.float64)
    y = torch.randn(9, 3, generator=rng, dtype=torch.float64)
    task = bi.Task(nn.Linear(4, 3).double(), bi.Gaussian(), train=(x, y), query=(x[:4], y[4:8]))
    expected = exact.influence(task, exact.gauss_newton(task), 0.02)
    for method in (ekfac, kfac):
        exact.close(method(task, fisher="enumerated", damping=0.02).influence, expected, 1e-10)


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


# ---------------------------------------------------------------- how it is computed


@pytest.mark.parametrize("name", ["mlp-categorical", "cnn", "sequence", "decoder-tied"])
def test_scores_do_not_depend_on_blocks(name, monkeypatch):
    task = LAYERED_BY_NAME[name].task()
    options = {"fisher": "sampled", "damping": 0.03, "seed": 5}
    whole = ekfac(task, **options).influence
    exact.close(ekfac(task, **options, batch_size=1, query_batch_size=1).influence, whole)
    monkeypatch.setattr(_pairwise, "_QUERY_ELEMENTS", 2 * task.dimension)
    monkeypatch.setattr(_pairwise, "_TRAIN_ELEMENTS", 5 * task.dimension)
    exact.close(ekfac(task, **options).influence, whole)


def test_float32_follows_float64():
    task = LAYERED_BY_NAME["cnn"].task()
    scores = ekfac(task.to(dtype=torch.float32), fisher="enumerated", damping=0.03)
    assert scores.influence.dtype == np.float32
    exact.close(scores.influence, ekfac(task, fisher="enumerated", damping=0.03).influence, 1e-5)


def test_attributes_say_what_was_done():
    task = LAYERED_BY_NAME["mlp-categorical"].task()
    attrs = ekfac(task, fisher="enumerated", damping=0.03, batch_size=7).attrs
    assert attrs["method"] == "ekfac"
    assert attrs["estimand"] == METHODS["ekfac"].estimand == "influence"
    assert (attrs["damping"], attrs["fisher"], attrs["measurement"]) == (0.03, "enumerated", "loss")
    assert attrs["checkpoint"] == task.fingerprint()["checkpoint"]
    assert (attrs["n"], attrs["parameters"], attrs["batch_size"]) == (12, task.dimension, 7)
    assert json.loads(attrs["forms"]) == {"0": "ekfac", "2": "ekfac", "4": "ekfac"}
    stages = {"covariance", "eigendecomposition", "eigenvalue correction", "scores"}
    assert set(json.loads(attrs["seconds"])) == stages
    check = 12 + 6  # forward: gradients are compared with autograd's, and half a batch alone
    assert attrs["forward_examples"] == check + 12 + 12 + 5
    assert attrs["backward_examples"] == 12 + 12 * 3 + 12 + 5
    assert "seed" not in attrs
    assert ekfac(task, fisher="sampled", damping=1.0, seed=3).attrs["seed"] == 3
    assert METHODS["kfac"].function is kfac


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of damping= and relative_damping=; got neither"),
        ({"damping": 1.0, "relative_damping": 0.1}, "got both"),
        ({"damping": 0.0}, r"damping must be a positive number; got 0\.0"),
        ({"damping": -1.0}, r"damping must be a positive number; got -1\.0"),
        ({"damping": float("nan")}, "damping must be a positive number; got nan"),
        ({"damping": "auto"}, "damping must be a positive number; got 'auto'"),
        ({"damping": {"head": 1.0}}, r"must name exactly the layers .* unknown: .*'head'"),
        ({"relative_damping": 0.0}, "relative_damping must be a positive number"),
        ({"relative_damping": "0.1"}, "relative_damping must be a positive number"),
        ({"damping": 1.0, "batch_size": 0}, "batch_size must be a positive integer; got 0"),
        ({"damping": 1.0, "fisher": "true"}, r"fisher must be one of .*got 'true'"),
        ({"damping": 1.0, "fisher": None}, "fisher= .* and curvature= .* got neither"),
    ],
)
@pytest.mark.parametrize("method", [ekfac, kfac])
def test_bad_arguments(method, options, message):
    task = LAYERED_BY_NAME["linear-gaussian"].task()
    with pytest.raises(ValueError, match=message):
        method(task, **{"fisher": "empirical", **options})


def test_a_curvature_and_a_fisher_exclude_each_other():
    task = LAYERED_BY_NAME["linear-gaussian"].task()
    curvature = fit_curvature(task, fisher="empirical")
    with pytest.raises(ValueError, match=r"fisher= .* and curvature= .* got both"):
        ekfac(task, fisher="empirical", curvature=curvature, damping=1.0)


def test_a_layer_without_curvature_needs_a_damping_of_its_own():
    task = LAYERED_BY_NAME["idle"].task()
    with pytest.raises(ValueError, match="layer 'idle' has zero curvature"):
        ekfac(task, fisher="empirical", relative_damping=0.1)
    scores = ekfac(task, fisher="empirical", damping=0.1)
    assert np.isfinite(scores.influence).all()
    curvature = fit_curvature(task, fisher="empirical")
    zero = dict.fromkeys((layer.name for layer in curvature.layers), 0.0)
    with pytest.raises(bi.NotPositiveDefiniteError, match=r"layer '\w+' \(\w+\): the smallest"):
        ekfac(task, curvature=curvature, damping=zero)


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
