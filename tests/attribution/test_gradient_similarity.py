"""``grad_dot`` and ``grad_cos`` against explicit gradients, for any network."""

import numpy as np
import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf.attribution._grad_cos import grad_cos
from bayesinf.attribution._grad_dot import grad_dot
from bayesinf.attribution._registry import METHODS
from tests import exact
from tests.layered_cases import LAYERED, LAYERED_BY_NAME


def dot(task, measurement="loss"):
    return -(exact.gradients(task, "query", measurement) @ exact.gradients(task).T).numpy()


def cosine(task, measurement="loss"):
    left, right = exact.gradients(task, "query", measurement), exact.gradients(task)
    return -(nn.functional.normalize(left) @ nn.functional.normalize(right).T).numpy()


@pytest.mark.parametrize("case", LAYERED, ids=lambda c: c.name)
def test_every_case(case):
    task = case.task()
    exact.close(grad_dot(task).influence, dot(task), 1e-12)
    exact.close(grad_cos(task, batch_size=5).influence, cosine(task), 1e-12)


class Branching(nn.Module):
    """Vectorisation refuses the branch; the loop does not."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, x):
        rows = [self.fc(row) * (self.scale if row.sum() > 0 else 1.0) for row in x]
        return torch.stack(rows)


def normed():
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2))


@pytest.mark.parametrize("model", [normed, Branching])
def test_any_network(model, rng):
    x = torch.randn(7, 4, generator=rng, dtype=torch.float64)
    y = torch.randn(7, 2, generator=rng, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        task = bi.Task(model().double(), bi.Gaussian(), train=(x, y), query=(x[:3], y[3:6]))
    rows = {}
    for split in ("train", "query"):
        data, rows[split] = task.examples(split), []
        for i in range(len(data)):
            params = {k: p.clone().requires_grad_() for k, p in task.params.items()}
            loss = task.losses(params, data.batch(slice(i, i + 1))).sum()
            found = torch.autograd.grad(
                loss, list(params.values()), allow_unused=True, materialize_grads=True
            )
            rows[split].append(torch.cat([g.flatten() for g in found]))
    left, right = torch.stack(rows["query"]), torch.stack(rows["train"])
    exact.close(grad_dot(task).influence, -(left @ right.T), 1e-12)
    norms = left.norm(dim=1)[:, None] * right.norm(dim=1)
    exact.close(grad_cos(task).influence, -(left @ right.T) / norms, 1e-12)


def weighted_norm(task, params, batch):
    return task.losses(params, batch) * 3 + sum(p.sin().sum() for p in params.values())


@pytest.mark.parametrize("measurement", ["margin", weighted_norm])
def test_measurements(measurement):
    task = LAYERED_BY_NAME["cnn"].task()
    scores = grad_dot(task, measurement=measurement, batch_size=5)
    exact.close(scores.influence, dot(task, measurement), 1e-12)
    scores = grad_cos(task, measurement=measurement, batch_size=5)
    exact.close(scores.influence, cosine(task, measurement), 1e-12)


def test_a_zero_gradient_is_similar_to_nothing():
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 1.0]], dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False).double()
    task = bi.Task(model, bi.Gaussian(), train=(x, x[:, :1] + 5), query=(x, x[:, :1] - 5))
    scores = grad_cos(task).influence.values
    assert (scores[0] == 0).all()
    assert (scores[:, 0] == 0).all()
    assert np.abs(scores[1:, 1:]).min() > 0.1


def test_they_are_registered_as_similarities():
    task = LAYERED_BY_NAME["logistic"].task()
    for name, method in (("grad_dot", grad_dot), ("grad_cos", grad_cos)):
        scores = method(task)
        assert METHODS[name].function is method
        assert scores.attrs["estimand"] == METHODS[name].estimand == "similarity"
        assert scores.attrs["method"] == name
        assert scores.attrs["forward_examples"] == 12 + 6 + 12 + 5  # half of the check alone
        assert scores.attrs["backward_examples"] == 12 + 12 + 5


def test_the_large_damping_limit_of_influence():
    from bayesinf.attribution._ekfac import ekfac

    task = LAYERED_BY_NAME["cnn"].task()
    lam = 1e9
    scaled = ekfac(task, fisher="enumerated", damping=lam).influence * task.n * lam
    exact.close(scaled, grad_dot(task).influence, 1e-6)


@pytest.mark.parametrize("method", [grad_dot, grad_cos])
def test_bad_batch_size(method):
    with pytest.raises(ValueError, match=r"batch_size must be a positive integer; got 2\.5"):
        method(LAYERED_BY_NAME["logistic"].task(), batch_size=2.5)
