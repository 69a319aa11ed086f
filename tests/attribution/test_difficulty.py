"""Difficulty of training examples against closed forms and PyTorch's own gradients."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bayesinf as bi
from bayesinf.attribution._difficulty import el2n, example_loss, grand, vog
from tests import language_task


def data(n: int = 30, classes: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64)
    return x, torch.randint(0, classes, (n,), generator=g)


def mlp(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def classifier(model: nn.Module | None = None) -> bi.Task:
    x, y = data()
    return bi.Task(
        model or mlp(0), bi.Categorical(), train=(x, y), query=(x[:2], y[:2]),
        train_ids=[f"é{i}" for i in range(len(x))],
    )  # fmt: skip


def test_linear_softmax_grand_is_el2n_times_the_length_of_the_input() -> None:
    x, y = data()
    linear = nn.Linear(4, 3, bias=False).double()
    task = classifier(linear)
    with torch.no_grad():
        error = linear(x).softmax(1) - nn.functional.one_hot(y, 3)
    expected = error.norm(dim=1).numpy()
    np.testing.assert_allclose(el2n(task)["value"], expected, rtol=1e-12)
    np.testing.assert_allclose(grand(task)["value"], expected * x.norm(dim=1).numpy(), rtol=1e-12)
    assert el2n(task)["train"].values.tolist() == [f"é{i}" for i in range(30)]


def test_gaussian_el2n_is_the_residual_in_either_shape() -> None:
    x, _ = data()
    target = x[:, :1] ** 2
    model = nn.Linear(4, 1).double()
    task = bi.Task(model, bi.Gaussian(), train=(x, target), query=(x, target))
    residual = (model(x) - target).detach().abs()[:, 0].numpy()
    np.testing.assert_allclose(el2n(task)["value"], residual, rtol=1e-12)
    flat = bi.Task(
        nn.Sequential(model, nn.Flatten(0)), bi.Gaussian(),
        train=(x, target[:, 0]), query=(x, target[:, 0]),
    )  # fmt: skip
    np.testing.assert_allclose(el2n(flat)["value"], residual, rtol=1e-12)


def test_means_over_checkpoints_are_of_norms_not_norms_of_means() -> None:
    models = [mlp(1), mlp(2), mlp(3)]
    x, y = data()
    norms, losses = [], []
    for model in models:
        each = []
        for i in range(len(x)):
            loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
            rows = torch.autograd.grad(loss, list(model.parameters()))
            each.append(float(torch.cat([g.flatten() for g in rows]).norm()))
            losses.append(float(loss.detach()))
        norms.append(each)
    task = classifier()
    found = grand(task, [m.state_dict() for m in models])
    np.testing.assert_allclose(found["value"], np.mean(norms, axis=0), rtol=1e-10)
    assert found.attrs["checkpoints"] == 3
    assert found.attrs["forward_examples"] >= found.attrs["backward_examples"] >= 90
    assert set(json.loads(found.attrs["seconds"])) == {"values"}
    plain = example_loss(task, models)
    np.testing.assert_allclose(plain["value"], np.reshape(losses, (3, -1)).mean(axis=0), rtol=1e-10)
    assert (plain.attrs["forward_examples"], plain.attrs["backward_examples"]) == (90, 0)


def test_vog_is_the_standardised_variance_of_input_gradients() -> None:
    models = [mlp(1), mlp(2), mlp(3), mlp(4)]
    x, y = data()
    gradients = np.empty((4, len(x), 4))
    for k, model in enumerate(models):
        for i in range(len(x)):
            one = x[i].clone().requires_grad_()
            gradients[k, i] = torch.autograd.grad(model(one)[y[i]], one)[0].numpy()
    raw = ((gradients - gradients.mean(axis=0)) ** 2).mean(axis=(0, 2))
    found = vog(classifier(), models)["value"].values
    for label in range(3):
        own = y.numpy() == label
        expected = (raw[own] - raw[own].mean()) / raw[own].std()
        np.testing.assert_allclose(found[own], expected, rtol=1e-9, atol=1e-12)


def test_losses_of_a_language_model_are_sums_over_tokens() -> None:
    task = language_task.task()
    expected = task.losses(task.params, task.train.batch()).detach().numpy()
    np.testing.assert_allclose(example_loss(task)["value"], expected, rtol=1e-10)
    assert (el2n(task)["value"] > 0).all()
    with pytest.raises(ValueError, match="Token ids have no gradient"):
        vog(task, [task.module, task.module])


def test_refusals() -> None:
    task = classifier()
    with pytest.raises(ValueError, match="at least two; got 1"):
        vog(task, [mlp(1)])
    with pytest.raises(ValueError, match="equal checkpoints"):
        vog(classifier(nn.Linear(4, 3).double()), [nn.Linear(4, 3).double()] * 2)
    with pytest.raises(ValueError, match="holds none"):
        grand(task, [])
    x, _ = data()
    regression = bi.Task(
        nn.Linear(4, 1).double(), bi.Gaussian(), train=(x, x[:, :1]), query=(x, x[:, :1])
    )
    with pytest.raises(ValueError, match="needs a classifier"):
        vog(regression, [regression.module] * 2)
    broken = classifier()
    broken.params["0.weight"].fill_(float("nan"))
    with pytest.raises(ValueError, match="loss is not finite for 30 of 30"):
        example_loss(broken)
