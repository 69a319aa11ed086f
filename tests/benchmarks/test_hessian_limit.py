"""The low-temperature program on a problem small enough for a test."""

from __future__ import annotations

import pytest
import torch

from bayesinf import Categorical, LocalPosterior, Task
from benchmarks.hessian_limit import (
    Agreement,
    largest_curvature,
    main,
    objective_gradient,
    stationary_network,
)
from benchmarks.tasks import get_task


@pytest.fixture(scope="module")
def task() -> Task:
    (x, y), _ = get_task("digits-mlp").data()
    x, y = x[:30].double(), y[:30]
    return Task(stationary_network((x, y), 0.01), Categorical(), train=(x, y), query=(x[:3], y[:3]))


def test_training_ends_at_a_stationary_point(task: Task) -> None:
    posterior = LocalPosterior(task, n_beta=1e3, gamma=1.0, weight_decay=0.01)
    assert objective_gradient(posterior) < 1e-7


def test_power_iteration_finds_the_largest_eigenvalue(task: Task) -> None:
    def mean_loss(flat: torch.Tensor) -> torch.Tensor:
        return task.losses(task.unflatten(flat), task.train.batch()).mean()

    dense = torch.autograd.functional.hessian(mean_loss, task.flatten(task.params))
    exact = float(torch.linalg.eigvalsh(dense)[-1])
    assert largest_curvature(task, steps=200) == pytest.approx(exact, rel=1e-3)


def test_the_bar_counts_the_standard_error() -> None:
    assert Agreement(1.02, 0.01, 1.0).holds
    assert not Agreement(1.02, 0.02, 1.0).holds
    assert not Agreement(0.5, 0.0, 1.0).holds
    assert not Agreement(2.0, 0.0, 1.0).holds


def test_program_says_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--train", "20", "--query", "3", "--chains", "4", "--draws", "8", "--thin", "1"]
    status = main([*small, "--warmup", "2"])
    out = capsys.readouterr().out
    assert status in (0, 1)  # too few draws to tell
    assert ("MISSED" in out) == bool(status)
    assert "Gauss–Newton" in out


def test_damping_below_the_weight_decay() -> None:
    with pytest.raises(SystemExit):
        main(["--damping", "1e-3", "--weight-decay", "1e-2"])
