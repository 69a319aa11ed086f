"""The steps from EK-FAC's score to a chain's, on a small task."""

import numpy as np
import pytest
import torch

import bayesinf as bi
from benchmarks.bif_gap import Plan, gradients, linear_draws, run, table_of
from benchmarks.tasks import get_task


def test_gradients_of_queries_then_of_train_examples(rng):
    x = torch.randn(5, 3, generator=rng, dtype=torch.float64)
    y = torch.randn(5, 1, generator=rng, dtype=torch.float64)
    net = torch.nn.Linear(3, 1, bias=False).double()
    task = bi.Task(net, bi.Gaussian(), train=(x[:3], y[:3]), query=(x[3:], y[3:]))
    residual = x @ net.weight[0].detach() - y[:, 0]
    expected = (x * residual[:, None])[[3, 4, 0, 1, 2]]
    torch.testing.assert_close(gradients(task), expected)


def test_linear_draws_have_the_covariance():
    """64,000 draws: a relative standard error of 0.6 % of a variance, the bound is eight of it."""
    a = np.random.default_rng(0).normal(size=(4, 4))
    values = linear_draws(a @ a.T, 64000, 8, 1)
    assert values.shape == (8, 8000, 4)
    found = np.cov(values.reshape(-1, 4).T)
    np.testing.assert_allclose(found, a @ a.T, atol=0.05 * np.diag(a @ a.T).max())


@pytest.mark.slow
def test_rows_come_with_their_limits():
    task = get_task("diabetes-mlp")
    bank = task.bank()
    plan = Plan(chains=4, draws=40, thin=2, warmup=8, many=(400, 40000))
    found = list(run(task, bank, plan))
    assert [row.draws for row in found] == [0, 400, 40000, 160, 160, 160, 160]
    exact, few, many, *sampled = (float(bi.lds(row.scores, bank)["lds"]) for row in found)
    assert few < exact - 0.02  # noise lowers it
    assert abs(many - exact) < 0.02
    limits = [float(line[4]) for line in table_of(found, bank)]
    assert limits[0] == round(exact, 3)
    assert all(
        limit > value for limit, value in zip(limits[1:], [few, many, *sampled], strict=True)
    )
