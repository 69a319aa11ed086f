"""Captured gradients against autograd, and what a user's model goes through."""

import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf.curvature import find_layers
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._capture import Capture, each_example, require_finite
from bayesinf.curvature._rows import Factored, Indexed, mixed
from bayesinf.curvature._sources import GradientSource
from tests import exact
from tests.layered_cases import LAYERED, LAYERED_BY_NAME


def captured(task, where=slice(None)):
    layers = find_layers(task)
    with Capture(task, layers) as capture:
        batch = task.train.batch(where)
        record = capture.record(batch)
        total = task.likelihood.loss(record.outputs, batch[1]).sum()
        return layers, [rows.matrices().squeeze(1) for rows in record.pull(total)]


def compare(task, layers, matrices, truth):
    for layer, matrix in zip(layers, matrices, strict=True):
        expected = truth[:, exact.index(task, layer)]
        exact.close_or_zero(matrix.flatten(1), expected, 1e-12)


@pytest.mark.parametrize("case", LAYERED, ids=lambda c: c.name)
def test_gradients_of_each_example(case):
    """At every size of a batch: indices that a batch shares have lengths of their own."""
    task = case.task()
    truth = exact.gradients(task)
    for count in (1, 3, task.n):
        layers, matrices = captured(task, slice(0, count))
        assert {layer.name: layer.kind for layer in layers} == case.kinds
        compare(task, layers, matrices, truth[:count])


@pytest.mark.parametrize("select", [".*weight", ".*bias", r"2\..*", "2.bias"])
@pytest.mark.parametrize("name", ["mlp-categorical", "cnn"])
def test_parameter_filters(name, select):
    task = LAYERED_BY_NAME[name].task(parameters=select)
    layers, matrices = captured(task)
    assert sum(layer.size for layer in layers) == task.dimension
    compare(task, layers, matrices, exact.gradients(task))


FILTERED = {"conv-groups": "0.bias", "layer-norm-planes": "1.bias", "batch-norm-2d": "1.bias",
            "stored-transposed": ".*bias", "conv3d": ".*bias"}  # fmt: skip


@pytest.mark.parametrize("name", FILTERED)
def test_biases_alone(name):
    task = LAYERED_BY_NAME[name].task(parameters=FILTERED[name])
    layers, matrices = captured(task)
    assert {layer.kind for layer in layers} <= {"conv", "linear", "affine"}
    compare(task, layers, matrices, exact.gradients(task))


@pytest.mark.parametrize("name", ["positions-row", "positions-vector", "positions-unsqueezed"])
@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_a_shared_index_as_long_as_the_batch_is_not_taken_for_examples(name, size):
    """4 positions: batches of 4, or a last one of 4, must be no special case."""
    task = LAYERED_BY_NAME[name].task()
    truth, layers = exact.gradients(task), find_layers(task)
    with GradientSource(task, layers, Costs()) as source:
        for where, batch in task.train.batches(size):
            flat = source.flat(source.gradients("train", where, batch))
            exact.close(flat, truth[where], 1e-12)


@pytest.mark.parametrize("case", LAYERED, ids=lambda c: c.name)
def test_flat_rows_are_in_the_order_of_the_task(case, rng):
    task = case.task()
    with GradientSource(task, find_layers(task), Costs()) as source:
        rows = source.gradients("query", slice(0, 3), task.query.batch())
        exact.close(source.flat(rows), exact.gradients(task, "query"), 1e-12)
        v = torch.randn(2, task.dimension, generator=rng, dtype=torch.float64)
        assert torch.equal(source.flat(source.unflat(v)), v)


@pytest.mark.parametrize("case", LAYERED, ids=lambda c: c.name)
def test_rows_of_the_gauss_newton_matrix(case):
    task = case.task()
    with GradientSource(task, find_layers(task), Costs()) as source:
        rows = source.flat(source.curvature_rows(slice(0, task.n), task.train.batch()))
    exact.close(rows.T @ rows / task.n, exact.fisher(case, "enumerated"), 1e-10)


@pytest.mark.parametrize("case", LAYERED, ids=lambda c: c.name)
def test_pack_and_unpack_are_inverse(case, rng):
    task = case.task()
    flat = torch.randn(2, task.dimension, generator=rng, dtype=torch.float64)
    named = task.unflatten(flat)
    for layer in find_layers(task):
        matrix = layer.pack(named)
        assert matrix.shape == (2, *layer.shape)
        assert torch.equal(matrix.flatten(1), flat[:, exact.index(task, layer)])
        back = layer.unpack(matrix)
        assert set(back) == set(layer.parameters)
        assert all(torch.equal(back[name], named[name]) for name in back)


# ---------------------------------------------------------------- the user's model


def test_the_module_is_left_as_it_was():
    for name in ("cnn", "positions-vector"):
        task = LAYERED_BY_NAME[name].task()
        before = {name: p.clone() for name, p in task.module.state_dict().items()}
        layers = find_layers(task)
        with pytest.raises(KeyError), Capture(task, layers):
            raise KeyError
        captured(task)
        modules = list(task.module.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
        assert not any(p.requires_grad or p.grad is not None for p in task.module.parameters())
        assert not any(p.requires_grad for p in task.params.values())
        assert all(torch.equal(p, before[name]) for name, p in task.module.state_dict().items())


def test_it_works_under_no_grad():
    task = LAYERED_BY_NAME["mlp-gaussian"].task()
    with torch.no_grad(), Capture(task, find_layers(task)) as capture:
        assert capture.record(task.train.batch()).outputs.requires_grad


def test_costs_of_a_record():
    costs, task = Costs(), LAYERED_BY_NAME["raw"].task()
    layers = find_layers(task)
    with Capture(task, layers, costs) as capture:
        record = capture.record(task.train.batch())
        assert (costs.forward_examples, costs.backward_examples) == (6, 0)
        record.pull(record.outputs.sum())
        assert (costs.forward_examples, costs.backward_examples) == (12, 12)  # again, one by one


# ---------------------------------------------------------------- parts


def test_each_example_loops_where_vectorising_fails():
    def branching(x):
        return {"y": 2 * x if float(x.sum()) > 0 else -x}

    x = torch.tensor([[1.0, 2.0], [-3.0, 1.0]])
    assert torch.equal(each_example(branching, x)["y"], torch.tensor([[2.0, 4.0], [3.0, -1.0]]))

    def broken(x):
        raise RuntimeError("what is wrong with it")

    with pytest.raises(RuntimeError, match="what is wrong with it"):
        each_example(broken, x)


def test_the_first_example_that_is_not_finite_is_named():
    ids = torch.arange(10, 13).numpy()
    fine = torch.ones(3, 1, 2, 4)
    for bad in (float("nan"), float("inf")):
        values, a = fine.clone(), torch.ones(3, 2, 5)
        values[1, 0, 1, 2] = bad
        message = r"layer 'fc': the gradient of query example 11 is NaN or infinite \(1 of 3"
        with pytest.raises(ValueError, match=message):
            require_finite(Factored(values, a), "fc", ids, "query")
        a[2, 0, 0] = bad
        with pytest.raises(ValueError, match=r"example 12 .* \(1 of 3 examples"):
            require_finite(Factored(fine, a), "fc", ids, "query")
        indexed = Indexed(torch.ones(3, 1, 2, 5), torch.zeros(3, 2, dtype=torch.long), 4)
        with pytest.raises(ValueError, match=r"example 12 .* \(1 of 3 examples"):
            require_finite(mixed([indexed, Factored(fine, a)]), "fc", ids, "query")


def test_finite_gradients_whose_sum_overflows_are_no_error():
    values = torch.full((3, 1, 2, 4), 3e38)
    require_finite(Factored(values, torch.ones(3, 2, 5)), "fc", torch.arange(3).numpy(), "train")


class Root(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2, bias=False)

    def forward(self, x):
        return self.fc(x).abs().sqrt()


@pytest.mark.parametrize("measurement", ["loss", lambda task, p, batch: task.losses(p, batch)])
def test_gradients_that_are_not_finite_name_layer_and_example(measurement):
    x = torch.ones(3, 2)
    bad = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    task = bi.Task(
        Root(), bi.Gaussian(), train=(x, x), query=(bad, bad + 1), query_ids=["good", "bad"]
    )
    with (
        GradientSource(task, find_layers(task), Costs()) as source,
        pytest.raises(ValueError, match="layer 'fc': the gradient of query example 'bad' is NaN"),
    ):
        source.gradients("query", slice(0, 2), task.query.batch(), measurement)
