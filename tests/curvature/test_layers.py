"""Which parameters are layers, and what is said about the others."""

import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf.curvature import UntreatedParametersWarning, find_layers
from bayesinf.curvature._layers import require_layers
from tests.layered_cases import LAYERED_BY_NAME, Tied


def task_of(model, *features, outputs=2, **options):
    x = torch.zeros(3, *features)
    y = torch.zeros(3, outputs)
    return bi.Task(model, bi.Gaussian(), train=(x, y), query=(x, y), **options)


def test_layers_of_a_cnn():
    layers, untreated = find_layers(LAYERED_BY_NAME["cnn"].task())
    assert untreated == ()
    assert [(la.name, la.weight, la.bias, la.shape) for la in layers] == [
        ("0", "0.weight", "0.bias", (3, 19)),
        ("2", "2.weight", "2.bias", (4, 28)),
        ("5", "5.weight", "5.bias", (3, 37)),
    ]


def test_tied_weights_are_one_layer():
    task = LAYERED_BY_NAME["tied-with-bias"].task()
    layers, _ = find_layers(task)
    assert [(la.name, la.sites, la.shape) for la in layers] == [
        ("one", ("one", "two"), (4, 5)),
        ("head", ("head",), (3, 5)),
    ]
    assert sum(layer.size for layer in layers) == task.dimension


def test_biases_of_their_own_are_layers_of_their_own():
    layers, _ = find_layers(task_of(Tied(), 4, outputs=3))
    assert [(la.name, la.shape) for la in layers] == [
        ("one", (4, 4)),
        ("one.bias", (4, 1)),
        ("two.bias", (4, 1)),
        ("head", (3, 5)),
    ]


def mixed():
    return nn.Sequential(
        nn.Conv2d(2, 4, 1, groups=2), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 2)
    )


def test_one_warning_names_what_is_left_out_with_its_share():
    task = task_of(mixed(), 2, 1, 1)
    message = (
        r"61\.5% of the selected parameters are not treated: 0\.weight \(Conv2d\), "
        r"0\.bias \(Conv2d\), 2\.weight \(LayerNorm\), 2\.bias \(LayerNorm\)\."
    )
    with pytest.warns(UntreatedParametersWarning, match=message) as seen:
        layers, untreated = require_layers(task)
    assert len(seen) == 1
    assert [layer.name for layer in layers] == ["3"]
    assert len(untreated) == 4


def test_nothing_to_treat_is_an_error():
    task = task_of(mixed(), 2, 1, 1, parameters=["0.weight", "2.*"])
    with pytest.raises(ValueError, match=r"none of the selected parameters .* 0\.weight \(Conv2d"):
        require_layers(task)


def test_a_weight_tied_to_another_kind_of_module_is_left_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    x, y = torch.arange(3), torch.zeros(3, 5)
    task = bi.Task(Model(), bi.Gaussian(), train=(x, y), query=(x, y))
    layers, untreated = find_layers(task)
    assert untreated == ("embed.weight",)
    assert [layer.name for layer in layers] == ["head.bias"]


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class ScaledConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class StandardizedConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


@pytest.mark.parametrize(
    ("layer", "features"),
    [
        (ScaledLinear(3, 2), (3,)),
        (ScaledConv(3, 2, 1), (3, 1, 1)),
        (StandardizedConv(3, 2, 1), (3, 1, 1)),
    ],
)
def test_a_subclass_with_its_own_forward_is_not_trusted(layer, features):
    model = nn.Sequential(layer, nn.Flatten())
    layers, untreated = find_layers(task_of(model, *features))
    assert layers == ()
    assert untreated == ("0.weight", "0.bias")


def test_the_list_of_names_is_cut():
    model = nn.Sequential(*[nn.LayerNorm(2) for _ in range(6)], nn.Linear(2, 2))
    with pytest.warns(UntreatedParametersWarning, match="and 4 more"):
        require_layers(task_of(model, 2))
