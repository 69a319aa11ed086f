"""Which parameters are layers, what is left to differentiation, and what no method can do."""

import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf.curvature import find_layers
from bayesinf.curvature._accounting import Costs
from tests import exact
from tests.layered_cases import LAYERED, LAYERED_BY_NAME, Conv1D, Tied


def task_of(model, *features, outputs=2, n=4, dtype=torch.float64, **options):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, *features, generator=g, dtype=dtype)
    y = torch.randn(n, outputs, generator=g, dtype=dtype)
    return bi.Task(model.to(dtype), bi.Gaussian(), train=(x, y), query=(x, y), **options)


@pytest.mark.parametrize("case", LAYERED, ids=lambda c: c.name)
def test_every_parameter_is_in_one_layer(case):
    task = case.task()
    layers = find_layers(task)
    assert [(layer.name, layer.kind) for layer in layers] == list(case.kinds.items())
    held = [name for layer in layers for name in layer.parameters]
    assert sorted(held) == sorted(task.params)
    assert sum(layer.size for layer in layers) == task.dimension
    for layer in layers:
        assert layer.shape[0] % layer.groups == 0


def test_layers_of_a_cnn():
    layers = find_layers(LAYERED_BY_NAME["cnn"].task())
    assert [(la.name, la.weight, la.bias, la.shape) for la in layers] == [
        ("0", "0.weight", "0.bias", (3, 19)),
        ("2", "2.weight", "2.bias", (4, 28)),
        ("5", "5.weight", "5.bias", (3, 37)),
    ]


def test_shapes_and_groups():
    def layer(case, name):
        return {la.name: la for la in find_layers(LAYERED_BY_NAME[case].task())}[name]

    assert (layer("conv-groups", "0").shape, layer("conv-groups", "0").groups) == ((4, 9), 2)
    assert (layer("conv-depthwise", "0").shape, layer("conv-depthwise", "0").groups) == ((4, 4), 4)
    norm = layer("layer-norm-planes", "1")
    assert (norm.shape, norm.groups, norm.weight_shape) == ((4, 2), 4, (2, 2))
    assert layer("stored-transposed", "0").shape == (4, 4)
    assert layer("stored-transposed", "0").transposed
    assert layer("words", "words").shape == (5, 3)
    assert [layer("raw", name).shape for name in ("scale", "shift", "cube")] == [
        (1, 1), (3, 1), (2, 6),
    ]  # fmt: skip
    tied = layer("decoder-tied", "words")
    assert (tied.sites, tied.parameters, tied.shape) == (
        ("words", "head"),
        ("words.weight",),
        (5, 3),
    )


def test_tied_weights_are_one_layer():
    layers = find_layers(LAYERED_BY_NAME["tied-with-bias"].task())
    assert [(la.name, la.sites, la.shape) for la in layers] == [
        ("one", ("one", "two"), (4, 5)),
        ("head", ("head",), (3, 5)),
    ]


def test_biases_of_their_own_are_layers_of_their_own():
    layers = find_layers(task_of(Tied(), 4, outputs=3))
    assert [(la.name, la.shape) for la in layers] == [
        ("one", (4, 4)),
        ("one.bias", (4, 1)),
        ("two.bias", (4, 1)),
        ("head", (3, 5)),
    ]


# ---------------------------------------------------------------- free parameters


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class ScaledConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class StandardizedConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Outside(nn.Module):
    """A weight used beside its module's forward."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x) + x @ self.fc.weight


class Shuffled(nn.Module):
    """Rows reach the layer in an order that depends on the data, but stay within an example."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.fc(x[order])[order.argsort()]


class Shared(nn.Module):
    """A layer of an input that the whole batch shares."""

    def __init__(self):
        super().__init__()
        self.fc, self.table = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x) + self.table(torch.ones(1, 3, dtype=x.dtype))


class Transposes(nn.Module):
    """One weight used as it is stored and as its transpose."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3, bias=False), Conv1D(3, 3)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


class TwoRoles(nn.Module):
    """A parameter that is a weight here and a bias there."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(3, bias=False), nn.Linear(3, 3)
        self.fc.bias = self.norm.weight

    def forward(self, x):
        return self.fc(self.norm(x))


class Renormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.fc = nn.Embedding(2, 3, max_norm=100.0), nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x + self.words((x[:, 0] > 0).long()))


class ManyGroups(nn.Module):
    """One weight in convolutions of unequal groups."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv1d(3, 3, 1, groups=3), nn.Conv1d(1, 3, 1)
        self.two.weight = self.one.weight

    def forward(self, x):
        h = self.one(x[:, :, None])
        return (h + self.two(h[:, :1])).squeeze(2)


@pytest.mark.parametrize(
    ("model", "features", "free"),
    [
        (lambda: nn.Sequential(ScaledLinear(3, 2)), (3,), {"0.weight", "0.bias"}),
        (lambda: nn.Sequential(ScaledConv(3, 2, 1), nn.Flatten()), (3, 1, 1),
         {"0.weight", "0.bias"}),
        (lambda: nn.Sequential(StandardizedConv(3, 2, 1), nn.Flatten()), (3, 1, 1),
         {"0.weight", "0.bias"}),
        (Outside, (3,), {"fc.weight", "fc.bias"}),
        (Shuffled, (3,), {"fc.weight", "fc.bias"}),
        (Shared, (3,), {"table.weight", "table.bias"}),
        (Transposes, (3,), {"one.weight"}),
        (TwoRoles, (3,), {"norm.weight"}),
        (Renormed, (3,), {"words.weight"}),
        (ManyGroups, (3,), {"one.weight"}),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_hooks_cannot_see_is_differentiated(model, features, free, dtype):
    outputs = 3 if isinstance(model, type) else 2
    layers = find_layers(task_of(model(), *features, outputs=outputs, dtype=dtype))
    assert {layer.name for layer in layers if layer.kind == "free"} == free


class Unsqueezed(nn.Module):
    """Positions without room for a batch; with one the network runs, and returns other outputs."""

    def __init__(self):
        super().__init__()
        self.places, self.fc = nn.Embedding(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        h = self.places(torch.arange(3)).unsqueeze(0)
        return self.fc(torch.tanh(x.unsqueeze(1) + h)).mean(-2)


def test_an_index_that_cannot_be_repeated():
    task = task_of(Unsqueezed(), 3, outputs=3)
    assert {la.name: la.kind for la in find_layers(task)} == {
        "places.weight": "free",
        "fc": "linear",
    }
    exact.close(
        bi.grad_dot(task).influence, -exact.gradients(task) @ exact.gradients(task).T, 1e-12
    )


class Cancelling(nn.Module):
    """A scale that the norm after it takes out: its gradient is rounding."""

    def __init__(self):
        super().__init__()
        self.fc, self.scale = nn.Linear(3, 3), nn.Parameter(torch.tensor(1.5))
        self.norm, self.head = nn.LayerNorm(3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.norm(self.fc(x) * self.scale))


class OnlySingle(Cancelling):
    def forward(self, x):
        if self.scale.dtype == torch.float64:
            raise TypeError("float32 only")
        return super().forward(x)


def test_gradients_that_cancel_are_checked_in_float64():
    """In float32 gradients of examples then differ from the batch's by more than the tolerance."""
    costs = Costs()
    task = task_of(Cancelling(), 3, dtype=torch.float32)
    kinds = [layer.kind for layer in find_layers(task, costs)]
    assert kinds == ["free", "linear", "affine", "linear"]
    assert costs.forward_examples > 3 * task.n  # looked at more than once
    with pytest.raises(ValueError, match="layer 'scale': gradients of single examples do not sum"):
        find_layers(task_of(OnlySingle(), 3, dtype=torch.float32))


def test_costs_are_counted():
    costs = Costs()
    find_layers(LAYERED_BY_NAME["mlp-categorical"].task(), costs)
    assert (costs.forward_examples, costs.backward_examples) == (12 + 6, 12)  # half alone


# ---------------------------------------------------------------- what is refused


class BatchStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = self.one(x)
        return self.two(torch.tanh(h - h.mean(0)))


class MeanLoss:
    """Not the loss of an example: divided by the size of its batch."""

    def loss(self, outputs, target):
        return (outputs - target).square().sum(1) / len(outputs)


class Contrastive:
    def loss(self, outputs, target):
        return (outputs @ outputs.T).logsumexp(1)


DEPENDS = "The loss of an example depends on the other examples of its batch. Usual causes: batch"


@pytest.mark.parametrize("parameters", [None, "two.*"])
def test_outputs_that_depend_on_the_batch(parameters):
    task = task_of(BatchStatistics(), 3, parameters=parameters)
    with pytest.raises(ValueError, match=f"outputs of 2 examples change with the batch. {DEPENDS}"):
        find_layers(task)


@pytest.mark.parametrize("likelihood", [MeanLoss(), Contrastive()])
def test_losses_that_depend_on_the_batch(likelihood):
    x = torch.arange(12.0).view(4, 3) / 10
    task = bi.Task(nn.Linear(3, 2), likelihood, train=(x, x[:, :2]), query=(x, x[:, :2]))
    with pytest.raises(ValueError, match=f"losses of 2 examples change with the batch. {DEPENDS}"):
        find_layers(task)


def test_gradients_that_depend_on_the_batch():
    """Values alike, gradients not."""

    class Leaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            h = self.fc(x)
            mean = h.mean(0)
            return h + mean - mean.detach()

    message = f"layer 'fc.weight': gradients of single examples do not sum to .* {DEPENDS}"
    with pytest.raises(ValueError, match=message):
        find_layers(task_of(Leaky(), 3))


def test_outputs_without_a_batch_dimension_of_their_own():
    class Squeezed(nn.Linear):
        def forward(self, x):
            return super().forward(x).squeeze(0)

    task = task_of(Squeezed(3, 2), 3, n=3)
    with pytest.raises(ValueError, match="outputs of 1 examples change with the batch"):
        find_layers(task)


def test_a_single_example_has_no_batch_to_depend_on():
    assert len(find_layers(task_of(BatchStatistics(), 3, n=1))) == 2


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(x).detach()


def test_a_loss_without_gradients():
    with pytest.raises(ValueError, match="does not depend on any selected parameter"):
        find_layers(task_of(Detached(), 3))


def test_a_model_that_fails_fails_as_it_is():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.calls = nn.Linear(3, 2), []

        def forward(self, x):
            self.calls.append(len(x))
            if len(self.calls) > 4:  # after the checks of the task
                raise RuntimeError("out of luck")
            return self.fc(x)

    with pytest.raises(RuntimeError, match="out of luck"):
        find_layers(task_of(Broken(), 3))


def test_rows_that_cannot_be_told_apart_are_named():
    """With one example there is nothing to notice; a larger batch tells."""
    x = torch.randn(3, 3, dtype=torch.float64)
    task = bi.Task(Shared().double(), bi.Gaussian(), train=(x[:1], x[:1]), query=(x, x))
    with pytest.raises(ValueError, match="layer 'table': its input has 1 rows for 3 examples"):
        bi.grad_dot(task)


def test_a_non_deterministic_model_is_refused():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.randn(2)

    with pytest.raises(ValueError, match="random even in eval mode"):
        task_of(Noisy(3, 2), 3, dtype=torch.float32)


def test_an_empty_query_set_is_refused():
    x = torch.ones(3, 2)
    with pytest.raises(ValueError, match="query= holds no examples"):
        bi.Task(nn.Linear(2, 2), bi.Gaussian(), train=(x, x), query=(x[:0], x[:0]))


class Root(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.fc, self.inside = nn.Linear(2, 2, bias=False), inside

    def forward(self, x):
        return (self.fc(x) if self.inside else x @ self.fc.weight.T).abs().sqrt()


@pytest.mark.parametrize(("inside", "name"), [(True, "fc"), (False, "fc.weight")])
def test_a_gradient_that_is_not_finite_is_named(inside, name):
    x = torch.ones(4, 2)
    x[3] = 0.0
    data = {"train": (x, x), "query": (x, x), "train_ids": list("abcd")}
    task = bi.Task(Root(inside), bi.Gaussian(), **data)
    with pytest.raises(ValueError, match=f"layer '{name}': the gradient of train example 'd' is"):
        find_layers(task)
