"""Baselines that know little: nearest neighbours, random numbers, losses, cosines by layer."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf.attribution._grad_cos import grad_cos
from bayesinf.attribution._knn_shapley import knn_shapley
from bayesinf.attribution._random_scores import random_scores, same_class_random
from bayesinf.attribution._train_loss import train_loss
from bayesinf.curvature._find import find_layers
from tests import exact
from tests.layered_cases import LAYERED_BY_NAME
from tests.method_cases import labelled, rebuilt


def shapley(distance, match, k):
    """By definition: mean marginal contribution over all coalitions, weighted by their size."""
    n = len(distance)

    def share(members):
        near = sorted(members, key=lambda i: distance[i])[:k]
        return sum(match[i] for i in near) / k

    values = np.zeros(n)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        for size in range(n):
            weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            for members in itertools.combinations(others, size):
                values[i] += weight * (share((*members, i)) - share(members))
    return values


@pytest.mark.parametrize("k", [1, 3, 7])
def test_knn_shapley_by_definition(k, rng):
    x = torch.randn(7, 2, generator=rng, dtype=torch.float64)
    y, z = torch.tensor([0, 1, 0, 1, 1, 0, 1]), torch.randn(3, 2, generator=rng).double()
    t = torch.tensor([0, 1, 1])
    task = bi.Task(nn.Linear(2, 2).double(), bi.Categorical(), train=(x, y), query=(z, t))
    scores = knn_shapley(task, k=k, batch_size=2)
    distance = torch.cdist(z, x).numpy()
    match = (t[:, None] == y).numpy()
    expected = [shapley(d, m, k) for d, m in zip(distance, match, strict=True)]
    exact.close(-scores.influence, np.stack(expected), 1e-12)
    assert (scores.attrs["k"], scores.attrs["module"]) == (k, "(model) (input)")
    nearest = np.argsort(distance, axis=1)[:, :k]
    share = np.take_along_axis(match, nearest, axis=1).mean(1)
    np.testing.assert_allclose(-scores.influence.sum("train"), share, atol=1e-12)


@pytest.mark.parametrize("k", [0, 13, 2.0, True])
def test_neighbours_that_cannot_be(k):
    with pytest.raises(ValueError, match="k must lie between 1 and the 12 training examples; got"):
        knn_shapley(labelled("softmax-regression"), k=k)


@pytest.mark.parametrize("method", [knn_shapley, same_class_random])
@pytest.mark.parametrize("case", ["linear-gaussian", "logistic", "decoder-left"])
def test_classes_are_wanted(method, case):
    with pytest.raises(ValueError, match=r"classes are wanted, and targets are (float|int)64 "):
        method(labelled(case))


def test_random_scores_are_uniform_and_of_their_seed():
    """800 numbers; a Kolmogorov distance of 0.06 is exceeded with probability 0.6 %."""
    x = torch.randn(80, 2)
    task = bi.Task(nn.Linear(2, 1), bi.Gaussian(), train=(x, x[:, :1]), query=(x[:10], x[:10, :1]))
    one = random_scores(task, seed=3)
    values = np.sort(one.influence.values.ravel())
    assert np.abs((values + 1) / 2 - (np.arange(800) + 0.5) / 800).max() < 0.06
    exact.same(one.influence, random_scores(task, seed=3).influence)
    assert np.abs(one.influence - random_scores(task, seed=4).influence).min() > 0
    assert one.attrs["seed"] == 3


def test_same_class_random_puts_the_class_first():
    task = labelled("softmax-regression")
    values = same_class_random(task, seed=1).influence.values
    same = (task.query.batch()[1][:, None] == task.train.batch()[1]).numpy()
    assert same.any()
    assert (values[same] <= 0).all()
    assert (values[~same] >= 0).all()
    assert len(np.unique(values)) == values.size
    mixed = rebuilt(task, train=torch.arange(task.n).flip(0))
    other = same_class_random(mixed, seed=1).influence.sel(train=task.train.ids)
    exact.same(other, values)


def test_train_loss_is_the_loss_for_every_query():
    task = labelled("mlp-categorical")
    scores = train_loss(task)
    losses = task.losses(task.params, task.train.batch()).detach().numpy()
    exact.close(scores.influence, -np.tile(losses, (5, 1)), 1e-14)
    assert scores.attrs["forward_examples"] == 12


# ---------------------------------------------------------------- cosines by layer


def layer_cosines(task):
    left, right = exact.gradients(task, "query"), exact.gradients(task)
    parts = []
    for layer in find_layers(task):
        where = exact.index(task, layer)
        unit = [nn.functional.normalize(rows[:, where]) for rows in (left, right)]
        parts.append(-(unit[0] @ unit[1].T).numpy())
    return np.stack(parts)


@pytest.mark.parametrize("name", ["mlp-categorical", "cnn", "tied", "decoder-left"])
def test_cosines_of_each_layer(name):
    task = LAYERED_BY_NAME[name].task()
    expected = layer_cosines(task)
    scores = grad_cos(task, per_layer=True, batch_size=4)
    exact.close(scores.influence, expected.mean(0), 1e-12)
    by_module = grad_cos(task, per_layer=True, modules=True).influence_by_module
    exact.close(by_module, expected / len(expected), 1e-12)
    assert scores.attrs["per_layer"] == "true"
    self_scores = grad_cos(task, per_layer=True, pairs="self").influence
    np.testing.assert_allclose(self_scores, -1, rtol=1e-12)


def test_a_layer_without_gradient_counts_nothing():
    task = LAYERED_BY_NAME["idle"].task()
    layers = len(find_layers(task))
    scores = grad_cos(task, per_layer=True)
    assert np.abs(scores.influence).max() <= 1 / layers + 1e-12  # one layer is used
    np.testing.assert_allclose(
        grad_cos(task, per_layer=True, pairs="self").influence, -1 / layers, rtol=1e-12
    )
