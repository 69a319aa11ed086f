"""The exact response of a run, against retrainings with other weights of examples."""

import numpy as np
import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf.training import CheckpointRecorder, open_checkpoints, unrolled_response
from tests.recorded_runs import (
    ADAM,
    ADAMW,
    NESTEROV,
    SGD,
    N,
    Tied,
    numbers,
    recorded,
    tokens,
    train,
)

EPS = 1e-4


def grouped(parameters):
    """Vectors do not decay, and learn at another rate."""
    held = list(parameters)
    return torch.optim.AdamW(
        [
            {"params": [p for p in held if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in held if p.ndim == 1], "weight_decay": 0.0, "lr": 0.05},
        ],
        0.02,
        betas=(0.8, 0.95),
    )


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (SGD, {"scale": 0.25}),
        (NESTEROV, {}),
        (ADAM, {"scale": 0.25}),
        (ADAMW, {"make": Tied}),
        (grouped, {}),
    ],
    ids=["sgd", "nesterov", "adam", "adamw-tied", "groups"],
)
def test_response_is_that_of_retraining(optimizer, options, tmp_path):
    task, run = recorded(optimizer, tmp_path, **options)
    found = unrolled_response(task, run)
    assert found.attrs["replay_error"] < 1e-13
    options["data"] = tokens(N, 1) if "make" in options else numbers(N, 1)
    x, y = task.query.batch()
    for i in (0, 7):
        ends = []
        for sign in (1, -1):
            weights = torch.ones(N, dtype=torch.float64)
            weights[i] += sign * EPS
            outputs = train(optimizer, weights=weights, **options)(x)
            ends.append(nn.functional.cross_entropy(outputs, y, reduction="none").detach())
        expected = ((ends[0] - ends[1]) / (2 * EPS)).numpy()
        assert np.abs(found.influence.values[:, i] - expected).max() < 1e-6 * np.abs(expected).max()


def test_examples_that_were_left_out_have_no_influence(tmp_path):
    """And those that a batch holds twice count twice: two steps of descent by hand."""
    x = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([[1.0], [2.0], [0.5]], dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with CheckpointRecorder(tmp_path, model, optimizer, every=1) as recorder:
        for ids in ([0, 0, 1], [1, 0]):
            optimizer.zero_grad()
            (0.5 * (model(x[ids]) - y[ids]).square().mean()).backward()
            optimizer.step()
            recorder.step(ids)
    task = bi.Task(model, bi.Gaussian(), train=(x, y), query=(x, y))
    found = unrolled_response(task, open_checkpoints(tmp_path)).influence.values
    first = -y * x  # gradients at 0
    w = -0.1 * (2 * first[0] + first[1]) / 3
    second = (x @ w - y[:, 0])[:, None] * x
    hessian = (x[1:2].T @ x[1:2] + x[:1].T @ x[:1]) / 2
    step = torch.eye(2, dtype=torch.float64) - 0.1 * hessian
    response = torch.stack([2 * first[0], first[1]]) * (-0.1 / 3) @ step
    response = response - 0.1 * second[:2] / 2
    end = model.weight.detach()[0]
    expected = ((x @ end - y[:, 0])[:, None] * x) @ response.T
    np.testing.assert_allclose(found[:, :2], expected, rtol=1e-12)
    np.testing.assert_array_equal(found[:, 2], 0)


def test_a_run_that_was_something_else_is_refused(tmp_path):
    task, run = recorded(SGD, tmp_path / "clipped", clip=0.05)
    with pytest.raises(ValueError, match=r"replayed, does not end .* clipped gradients"):
        unrolled_response(task, run)
    task, run = recorded(SGD, tmp_path / "run")
    with pytest.raises(ValueError, match=r"the task leaves out \['0.weight'"):
        unrolled_response(task.restrict("2.*"), run)
    x, y = numbers(N, 1)
    fewer = bi.Task(task.module, task.likelihood, train=(x[:6], y[:6]), query=(x, y),
                    parameters=".*")  # fmt: skip
    with pytest.raises(ValueError, match="batch of step 0 holds examples that the task does not"):
        unrolled_response(fewer, run)
