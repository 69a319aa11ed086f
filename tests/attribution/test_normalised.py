"""Scores relative to what examples do, per nat, centred, and summed over groups."""

import numpy as np
import pytest
import torch
import xarray as xr

import bayesinf as bi
from bayesinf.attribution._group_scores import group_scores
from bayesinf.attribution._normalised import center, per_nat
from tests import exact
from tests.layered_cases import LAYERED_BY_NAME
from tests.method_cases import labelled


def damped(task, damping):
    curvature = exact.gauss_newton(task)
    return curvature + damping * torch.eye(len(curvature), dtype=curvature.dtype)


# ---------------------------------------------------------------- RelatIF


@pytest.mark.parametrize("name", ["mlp-categorical", "cnn", "decoder-left"])
def test_relative_scores(name, tmp_path):
    """Barshan et al. 2020: influence over √(gᵀM g), or over ‖M g‖, of the training example."""
    task = LAYERED_BY_NAME[name].task()
    g = exact.gradients(task)
    moved = torch.linalg.solve(damped(task, 0.1), g.T).T
    size = {
        "loss": (g * moved).sum(1).sqrt().numpy(),
        "parameters": moved.norm(dim=1).numpy(),
    }
    whole = bi.gauss_newton(task, damping=0.1).influence.values
    for kind, length in size.items():
        scores = bi.gauss_newton(task, damping=0.1, relative=kind, batch_size=4)
        exact.close(scores.influence, whole / length, 1e-9)
        assert (scores.attrs["relative"], scores.attrs["estimand"]) == (kind, "similarity")
    stored = bi.gauss_newton(task, damping=0.1, relative="loss", store=tmp_path / "s")
    exact.close(stored.influence, whole / size["loss"], 1e-9)
    with pytest.raises(ValueError, match="relative"):
        bi.gauss_newton(task, damping=0.1, store=tmp_path / "s")


def test_relative_to_the_loss_is_the_cosine_in_the_curvature():
    """Over the root of both self-influences it is a cosine; n times the own score is its root."""
    task = labelled("mlp-categorical")
    same = bi.Task(
        task.module, task.likelihood, parameters=list(task.params),
        train=task.train.batch(), query=task.train.batch(),
    )  # fmt: skip
    options = {"fisher": "enumerated", "damping": 0.1}
    own = bi.ekfac(same, **options, pairs="self").influence.values
    scores = bi.ekfac(same, **options, relative="loss").influence.values
    cosine = scores / np.sqrt(-own * same.n)[:, None]
    np.testing.assert_allclose(np.diag(cosine) * same.n, -1, rtol=1e-9)
    assert np.abs(cosine).max() * same.n <= 1 + 1e-9
    by_module = bi.ekfac(same, **options, relative="loss", modules=True)
    exact.close(by_module.influence_by_module.sum("module"), scores, 1e-9)


def test_an_example_without_gradient_has_no_relative_score(rng):
    x = torch.randn(4, 2, generator=rng, dtype=torch.float64)
    x[1] = 0
    model = torch.nn.Linear(2, 1, bias=False).double()
    task = bi.Task(model, bi.Gaussian(), train=(x, x[:, :1]), query=(x[2:], x[:2, :1] + 1))
    scores = bi.gauss_newton(task, damping=0.1, relative="parameters").influence.values
    assert (scores[:, 1] == 0).all()
    assert np.abs(scores[:, 0]).min() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relative": "l"}, "relative must be None, 'loss' or 'parameters'; got 'l'"),
        ({"relative": "loss", "pairs": "self"}, r"pairs='self' .* drop \['relative'\]"),
        ({"relative": "loss", "train_tokens": "position"}, "of whole training examples; drop"),
    ],
)
def test_relative_scores_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        bi.grad_dot(LAYERED_BY_NAME["decoder-left"].task(), **options)


def test_a_cosine_is_relative_already():
    with pytest.raises(ValueError, match="relative to both gradients already"):
        bi.grad_cos(labelled("logistic"), relative="loss")


def test_a_self_influence_of_the_wrong_sign_is_named(monkeypatch):
    from bayesinf.attribution import _pairwise

    task = labelled("logistic")
    real = _pairwise.inner
    monkeypatch.setattr(_pairwise, "inner", lambda a, b: real(a, b) * torch.tensor([1, -1] * 6))
    with pytest.raises(ValueError, match="self-influence, and that of train example 't1' has"):
        bi.grad_dot(task, relative="loss")


# ---------------------------------------------------------------- per nat


def test_per_nat_of_the_query():
    task = labelled("softmax-regression")
    scores = bi.grad_dot(task)
    with torch.no_grad():
        losses = task.losses(task.params, task.query.batch()).numpy()
    found = per_nat(scores.isel(query=[2, 0]), task)
    exact.close(found.influence, scores.influence.values[[2, 0]] / losses[[2, 0], None], 1e-12)
    np.testing.assert_allclose(found["loss"], losses[[2, 0]])
    assert found.attrs["normalised"] == "per nat"
    assert found.influence.dims == ("query", "train")


def test_per_nat_needs_positive_losses_of_known_queries():
    task = labelled("softmax-regression")
    scores = bi.grad_dot(task)
    with pytest.raises(ValueError, match="query 'zz' of the scores is no query of the task"):
        per_nat(scores.assign_coords(query=["zz", *scores["query"].values[1:].tolist()]), task)
    with pytest.raises(ValueError, match="per_nat needs scores by query"):
        per_nat(bi.grad_dot(task, pairs="self"), task)
    x = torch.ones(3, 2, dtype=torch.float64)
    model = torch.nn.Linear(2, 1).double()
    fit = model(x).detach()
    perfect = bi.Task(model, bi.Gaussian(), train=(x, fit + 1), query=(x, fit), query_ids=[7, 8, 9])
    with pytest.raises(ValueError, match="the loss of query 7 is 0, and nats must be positive"):
        per_nat(bi.grad_dot(perfect), perfect)


# ---------------------------------------------------------------- centred


def test_centred_on_all_and_by_class():
    task = labelled("softmax-regression")
    scores = bi.ekfac(task, fisher="enumerated", damping=0.1, modules=True)
    values = scores.influence.values
    exact.close(center(scores).influence, values - values.mean(1, keepdims=True), 1e-12)
    labels = task.train.batch()[1].numpy()
    expected = values.copy()
    for label in np.unique(labels):
        expected[:, labels == label] -= values[:, labels == label].mean(1, keepdims=True)
    backwards = scores.isel(train=slice(None, None, -1))
    found = center(backwards, task)
    exact.close(found.influence.sel(train=task.train.ids), expected, 1e-12)
    exact.close(found.influence_by_module.sum("module"), found.influence, 1e-12)
    assert found.attrs["normalised"] == "centred by class"
    assert (found.attrs["method"], found.attrs["damping"]) == ("ekfac", 0.1)


def test_errors_do_not_survive_differences():
    ids = np.arange(3)
    scores = bi.make_scores(
        np.array([[1.0, 2.0, 6.0]]), query=ids[:1], train=ids, method="bif", estimand="influence",
        mcse=np.ones((1, 3)), attrs={"mcse_df": 9.0},
    )  # fmt: skip
    found = center(scores)
    assert set(found.data_vars) == {"influence"}
    assert "mcse_df" not in found.attrs
    np.testing.assert_allclose(found.influence, [[-2, -1, 3]])


def test_centring_needs_classes_and_known_examples():
    task = labelled("logistic")
    with pytest.raises(ValueError, match="classes are wanted"):
        center(bi.grad_dot(task), task)
    task = labelled("softmax-regression")
    other = bi.grad_dot(LAYERED_BY_NAME["softmax-regression"].task())
    with pytest.raises(ValueError, match="train 0 of the scores is no example of the task"):
        center(other, task)
    with pytest.raises(ValueError, match="center needs scores by train"):
        center(bi.grad_dot(task, top_k=2), task)


# ---------------------------------------------------------------- groups


def test_groups_of_examples():
    task = labelled("softmax-regression")
    scores = bi.grad_dot(task)
    values = scores.influence.values
    found = group_scores(scores, {"a": ["t0", "t3"], "b": ["t5"]})
    assert found.influence.dims == ("query", "group")
    exact.close(found.influence, np.stack([values[:, [0, 3]].sum(1), values[:, 5]], 1), 1e-12)
    assert found["group"].values.tolist() == ["a", "b"]
    assert found["query"].values.tolist() == task.query.ids.tolist()
    assert found.attrs["method"] == "grad_dot"
    masks = bi.random_subsets(task.train.ids, count=4, seed=0)
    summed = group_scores(scores, masks)
    kept = masks.sel(train=task.train.ids).transpose("subset", "train").values
    exact.close(summed.influence, values @ kept.T, 1e-12)
    assert summed.influence.dims == ("query", "subset")
    both = group_scores(scores, {"a": ["t0", "t3"]}, query_groups={"q": ["q1", "q2"]})
    assert both.influence.item() == pytest.approx(values[1:3][:, [0, 3]].sum())
    assert both.influence.dims == ("query_group", "group")


def test_groups_of_tokens():
    task = LAYERED_BY_NAME["decoder-left"].task()
    scores = bi.grad_dot(task, train_tokens="position")
    whole = bi.grad_dot(task).influence.values
    kinds = scores["train"] % 2
    found = group_scores(
        scores, xr.DataArray(kinds.values, dims="train_token", coords=scores.train.coords)
    )
    expected = np.stack([whole[:, 0::2].sum(1), whole[:, 1::2].sum(1)], axis=1)
    exact.close(found.influence, expected, 1e-10)


def test_it_agrees_with_groups_of_traces():
    x = torch.randn(20, 2, dtype=torch.float64)
    net = torch.nn.Linear(2, 1).double()
    task = bi.Task(net, bi.Gaussian(), train=(x, x[:, :1]), query=(x[:3], x[:3, :1]))
    posterior = bi.LocalPosterior(task, n_beta=20.0, gamma=5.0)
    traces = bi.sample(posterior, bi.SGLD(0.02), draws=150, warmup=20, chains=4, progress=False)
    groups = {"first": range(5), "rest": range(5, 20)}
    groups = {name: list(ids) for name, ids in groups.items()}
    with pytest.warns(bi.ConvergenceWarning):
        one, other = bi.group_influence(traces, groups), group_scores(bi.bif(traces), groups)
    exact.close(other.influence, one.influence, 1e-6)
    assert "mcse_df" not in other.attrs


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": ["t0", "zz"]}, "holds 1 train examples that were not observed, first 'zz'"),
        ({"a": []}, "group 'a' is empty"),
        ({}, "groups is empty"),
    ],
)
def test_groups_that_cannot_be(groups, message):
    with pytest.raises(ValueError, match=message):
        group_scores(bi.grad_dot(labelled("softmax-regression")), groups)


def test_what_has_no_sums():
    task = labelled("softmax-regression")
    for scores in (bi.grad_dot(task, pairs="self"), bi.grad_dot(task, top_k=2)):
        with pytest.raises(ValueError, match="groups along 'train' need scores influence"):
            group_scores(scores, {"a": ["t0"]})
