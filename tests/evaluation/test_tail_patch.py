"""One step on what was retrieved, against steps computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import bayesinf as bi
from bayesinf.evaluation import AdamWRecipe, SGDRecipe, tail_patch
from tests import language_task

SGD = SGDRecipe(epochs=1, batch_size=1, lr=0.1, weight_decay=0.05)


def regression() -> tuple[bi.Task, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x, y, qx, qy = (rng.standard_normal(s) for s in ((20, 3), (20, 1), (4, 3), (4, 1)))
    model = nn.Linear(3, 1, bias=False).double()
    tensors = [torch.from_numpy(a) for a in (x, y, qx, qy)]
    task = bi.Task(
        model, bi.Gaussian(), train=(tensors[0], tensors[1]), query=(tensors[2], tensors[3]),
        train_ids=[f"é{i}" for i in range(20)], query_ids=[10, 11, 12, 13],
    )  # fmt: skip
    return task, x, y, qx, qy, model.weight.detach().numpy()[0]


def scores(task: bi.Task, seed: int = 0) -> xr.Dataset:
    values = np.random.default_rng(seed).standard_normal((len(task.query), task.n))
    return bi.make_scores(
        values, query=task.query.ids, train=task.train.ids, method="m", estimand="similarity"
    )


def test_gain_of_a_step_on_linear_regression_by_hand() -> None:
    task, x, y, qx, qy, w = regression()
    own = scores(task)
    table = tail_patch({"m": own}, task, SGD, top_k=3, random=4, random_seed=7)

    def gain(members: np.ndarray, q: int) -> float:
        residual = y[members, 0] - x[members] @ w
        gradient = -(residual @ x[members]) / len(members) + 0.05 * w
        stepped = w - 0.1 * gradient
        before, after = (0.5 * (qy[q, 0] - qx[q] @ v) ** 2 for v in (w, stepped))
        return float(before - after)

    best = np.argsort(own["influence"].values, axis=1)[:, :3]
    expected = np.array([gain(best[q], q) for q in range(4)])
    np.testing.assert_allclose(table["gain_query"].sel(scorer="m"), expected, rtol=1e-10)
    assert float(table["gain"].sel(scorer="m")) == pytest.approx(expected.mean())
    error = expected.std(ddof=1) / 2
    assert float(table["gain_standard_error"].sel(scorer="m")) == pytest.approx(error)
    half = 3.1824463 * error  # t quantile, 3 degrees of freedom
    assert float(table["gain_upper"].sel(scorer="m")) == pytest.approx(expected.mean() + half)
    rng = np.random.default_rng(7)
    sets = [rng.permutation(20)[:3] for _ in range(4)]
    control = np.array([[gain(s, q) for q in range(4)] for s in sets])
    np.testing.assert_allclose(
        table["gain_query"].sel(scorer="random"), control.mean(axis=0), rtol=1e-10
    )
    excess = (expected - control.mean(axis=0)).mean()
    assert float(table["excess"].sel(scorer="m")) == pytest.approx(excess)
    assert float(table["excess"].sel(scorer="random")) == 0


def test_first_step_of_adamw_and_a_language_model() -> None:
    task = language_task.task()
    recipe = AdamWRecipe(epochs=1, batch_size=1, lr=0.01, weight_decay=0.1, eps=1e-3)
    own = scores(task)
    weights = {name: p.clone() for name, p in task.params.items()}
    table = tail_patch(own, task, recipe, top_k=2)
    for q in range(len(task.query)):
        best = np.argsort(own["influence"].values[q])[:2]
        model = language_task.Decoder().double()
        model.load_state_dict(task.module.state_dict())
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, eps=1e-3)

        def loss(split: str, where: torch.Tensor, model: nn.Module = model) -> torch.Tensor:
            inputs, target = task.examples(split).batch(where)
            return task.likelihood.loss(model(**inputs), target)

        before = loss("query", torch.tensor([q])).item()
        loss("train", torch.from_numpy(best)).mean().backward()
        optimiser.step()
        after = loss("query", torch.tensor([q])).item()
        assert float(table["gain_query"][0, q]) == pytest.approx(before - after, rel=1e-8)
    for name, p in task.params.items():
        assert torch.equal(p, weights[name])  # the task stays where it is


def test_unselected_parameters_and_entries_stay() -> None:
    task, x, y, qx, qy, w = regression()
    part = task.restrict({"weight": torch.tensor([[True, False, True]])})
    own = scores(task)
    table = tail_patch(own, part, SGD, top_k=3)
    best = np.argsort(own["influence"].values[0])[:3]
    gradient = -((y[best, 0] - x[best] @ w) @ x[best]) / 3 + 0.05 * w
    stepped = w - 0.1 * gradient * [1, 0, 1]
    expected = 0.5 * (qy[0, 0] - qx[0] @ w) ** 2 - 0.5 * (qy[0, 0] - qx[0] @ stepped) ** 2
    assert float(table["gain_query"][0, 0]) == pytest.approx(expected)


def test_exact_influence_beats_random_and_similarity_of_noise() -> None:
    """With φ the loss, GradDot retrieves the steps of largest first-order gain."""
    task = regression()[0]
    small = SGDRecipe(epochs=1, batch_size=1, lr=1e-3)
    table = tail_patch({"dot": bi.grad_dot(task), "noise": scores(task)}, task, small, top_k=3)
    assert (table["gain_query"].sel(scorer="dot") >= table["gain_query"].sel(scorer="noise")).all()
    assert float(table["excess"].sel(scorer="dot")) > 0
    assert float(table["seconds"].sel(scorer="dot")) > 0


def test_refusals() -> None:
    task = regression()[0]
    own = scores(task)
    with pytest.raises(ValueError, match="m holds 20 training examples"):
        tail_patch(own, task, SGD, top_k=21)
    with pytest.raises(ValueError, match="at least two random sets"):
        tail_patch(own, task, SGD, random=1)
    with pytest.raises(ValueError, match="b scores other queries"):
        tail_patch({"a": own, "b": own.isel(query=[0])}, task, SGD)
    with pytest.raises(KeyError, match="unknown query ids"):
        tail_patch(own.assign_coords(query=[1, 2, 3, 4]), task, SGD)
    with pytest.raises(ValueError, match=r"lower recipe\.lr"):
        tail_patch(own, task, SGDRecipe(epochs=1, batch_size=1, lr=1e200))
