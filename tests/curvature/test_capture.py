"""Captured gradients against autograd, and what a user's model goes through."""

import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf.curvature import _kronecker as kron
from bayesinf.curvature._capture import Capture
from bayesinf.curvature._layers import find_layers
from tests import exact
from tests.layered_cases import LAYERED, LAYERED_BY_NAME


def captured(task, count=None):
    layers, untreated = find_layers(task)
    assert not untreated
    with Capture(task, layers) as capture:
        batch = task.train.batch(slice(0, count))
        record = capture.record(batch)
        ds = record.pull(task.likelihood.loss(record.outputs, batch[1]).sum())
        return layers, [kron.gradients(a, d) for a, d in zip(record.inputs, ds, strict=True)]


@pytest.mark.parametrize("case", LAYERED, ids=lambda c: c.name)
@pytest.mark.parametrize("count", [1, 12])
def test_gradients_of_each_example(case, count):
    task = case.task()
    layers, matrices = captured(task, count)
    truth = exact.gradients(task)[:count]
    for layer, matrix in zip(layers, matrices, strict=True):
        expected = truth[:, exact.index(task, layer.weight, layer.bias)]
        exact.close(matrix.flatten(1), expected, 1e-12)


@pytest.mark.parametrize("select", [".*weight", ".*bias", r"2\..*", "2.bias"])
def test_parameter_filters(select):
    for name in ("mlp-categorical", "cnn"):
        task = LAYERED_BY_NAME[name].task(parameters=select)
        layers, matrices = captured(task)
        assert sum(layer.size for layer in layers) == task.dimension
        truth = exact.gradients(task)
        for layer, matrix in zip(layers, matrices, strict=True):
            expected = truth[:, exact.index(task, layer.weight, layer.bias)]
            exact.close(matrix.flatten(1), expected, 1e-12)


def test_pack_and_unpack_are_inverse(rng):
    task = LAYERED_BY_NAME["cnn"].task()
    flat = torch.randn(2, task.dimension, generator=rng, dtype=torch.float64)
    named = task.unflatten(flat)
    for layer in find_layers(task)[0]:
        matrix = layer.pack(named)
        assert torch.equal(matrix.flatten(1), flat[:, exact.index(task, layer.weight, layer.bias)])
        back = layer.unpack(matrix)
        assert all(torch.equal(back[name], named[name]) for name in layer.parameters)


def test_a_dead_layer_has_gradient_zero():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.cut = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            self.cut(x)
            return self.used(x)

    x = torch.eye(3)
    task = bi.Task(Idle(), bi.Gaussian(), train=(x, x[:, :2]), query=(x, x[:, :2]))
    _, (used, idle, cut) = captured(task)
    assert used.abs().sum() > 0
    assert idle.shape == cut.shape == (3, 2, 4)
    assert idle.abs().sum() == cut.abs().sum() == 0


def test_the_module_is_left_as_it_was():
    task = LAYERED_BY_NAME["cnn"].task()
    before = {name: p.clone() for name, p in task.module.state_dict().items()}
    layers, _ = find_layers(task)
    with pytest.raises(KeyError), Capture(task, layers):
        raise KeyError
    captured(task)
    assert not any(m._forward_hooks for m in task.module.modules())
    assert not any(p.requires_grad or p.grad is not None for p in task.module.parameters())
    assert not any(p.requires_grad for p in task.params.values())
    assert all(torch.equal(p, before[name]) for name, p in task.module.state_dict().items())


def test_it_works_under_no_grad():
    task = LAYERED_BY_NAME["mlp-gaussian"].task()
    with torch.no_grad():
        layers, _ = find_layers(task)
        with Capture(task, layers) as capture:
            assert capture.record(task.train.batch()).outputs.requires_grad


def test_recording_outside_the_block_is_refused():
    task = LAYERED_BY_NAME["mlp-gaussian"].task()
    with pytest.raises(RuntimeError, match="inside its with block"):
        Capture(task, find_layers(task)[0]).record(task.train.batch())


class Outside(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x) + x @ self.fc.weight


class Shuffled(nn.Module):
    """Rows reach the layer in another order than examples."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x.flip(0)).flip(0)


class PositionTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.table = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x) + self.table(torch.ones(1, 3, dtype=x.dtype))


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x).detach()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Outside, "layer 'fc': gradients from its inputs and outputs differ from autograd's"),
        (Shuffled, "layer 'fc': gradients from its inputs and outputs differ from autograd's"),
        (PositionTable, "layer 'table': its input has 1 rows for 4 examples"),
        (Detached, "does not depend on any selected parameter"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_capture_cannot_see_is_an_error(model, message, dtype, rng):
    x = torch.randn(4, 3, generator=rng, dtype=dtype)
    task = bi.Task(model().to(dtype), bi.Gaussian(), train=(x, 2 * x), query=(x, x))
    with (
        pytest.raises(ValueError, match=message),
        Capture(task, find_layers(task)[0]),
    ):
        pass
    assert not any(m._forward_hooks for m in task.module.modules())
