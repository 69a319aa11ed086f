"""The potential of a local posterior in JAX, against that of PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bayesinf as bi
from tests.cases import BY_NAME, Case

jax = pytest.importorskip("jax")
pytest.importorskip("numpyro")

from bayesinf.interop.numpyro import potential_fn  # noqa: E402
from bayesinf.interop.numpyro._network import network  # noqa: E402

POOLED = Case(
    "pooled",
    lambda: nn.Sequential(
        nn.Unflatten(1, (2, 6, 6)),
        nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(1, 0), groups=2),
        nn.GELU(),
        nn.AvgPool2d(2, stride=1, padding=1, count_include_pad=False),
        nn.Conv2d(4, 3, 2, padding="same", dilation=2, bias=False),
        nn.Dropout(0.5),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(24, 3),
    ),
    bi.Categorical(),
    (72,),
    3,
)
GRID = [
    (BY_NAME["linear-gaussian-2"], "plain", None),
    (BY_NAME["softmax-regression"], "tilted", None),
    (BY_NAME["mlp-bernoulli"], "plain", "0.weight"),
    (BY_NAME["mlp-gaussian"], "tilted", {"0.weight": torch.arange(20).reshape(5, 4) % 3 == 0}),
    (POOLED, "tilted", None),
]


@pytest.mark.parametrize(
    ("case", "kind", "parameters"), GRID, ids=[f"{c.name}-{kind}" for c, kind, _ in GRID]
)
def test_value_and_gradient_equal_those_of_torch(
    case: Case, kind: Any, parameters: Any, rng: torch.Generator
) -> None:
    task = case.task(parameters=parameters)
    posterior = bi.LocalPosterior(task, 50.0, 5.0, 0.01, kind)
    potential = posterior.bind(vectorize=False)
    noise = torch.randn(2, task.dimension, generator=rng, dtype=torch.float64)
    w = potential.center + 0.3 * noise
    value, gradient = potential.value_and_grad(w)
    function = jax.jit(jax.vmap(jax.value_and_grad(potential_fn(posterior))))
    with jax.enable_x64(True):
        ours, slopes = (np.asarray(x) for x in function(w.numpy()))
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, value, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(slopes, gradient, rtol=1e-10, atol=1e-10)


def test_a_float32_network_has_the_potential_of_its_weights_in_float64() -> None:
    case = BY_NAME["linear-gaussian"]
    wide = case.task().to(dtype=torch.float32)
    narrow = wide.to(dtype=torch.float64)
    w = narrow.flatten(narrow.params) + 0.1
    with jax.enable_x64(True):
        found = [
            float(jax.jit(potential_fn(bi.LocalPosterior(task, 50.0, 5.0)))(w.numpy()))
            for task in (wide, narrow)
        ]
    assert found[0] == pytest.approx(found[1], rel=1e-12)


LAYERS = [
    nn.ReLU(), nn.LeakyReLU(0.2), nn.ELU(0.7), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(),
    nn.Sigmoid(), nn.Softplus(2.0, 5.0), nn.Tanh(), nn.Identity(), nn.Flatten(0),
    nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(2, divisor_override=3), nn.MaxPool2d(2, dilation=2),
]  # fmt: skip


def test_layers_without_weights_equal_those_of_torch(rng: torch.Generator) -> None:
    x = 10 * torch.randn(2, 3, 6, 6, generator=rng, dtype=torch.float64)
    layers = [network(layer) for layer in LAYERS]
    with jax.enable_x64(True):
        found = jax.jit(lambda x: [layer({}, x) for layer in layers])(x.numpy())
    for layer, ours in zip(LAYERS, found, strict=True):
        np.testing.assert_allclose(
            np.asarray(ours), layer(x), rtol=1e-12, atol=1e-12, err_msg=str(layer)
        )


def task_of(model: nn.Module, likelihood: Any = None, features: tuple[int, ...] = (4,)) -> bi.Task:
    x, y = torch.randn(6, *features, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    return bi.Task(model.double(), likelihood or bi.Categorical(), train=(x, y), query=(x, y))


class Other:
    def loss(self, outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return bi.Categorical().loss(outputs, target)


REFUSED = [
    (nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.LayerNorm(3))), (4,),
     r"module '1\.0' is a LayerNorm.*bi\.HMC"),
    (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.Flatten(),
                   nn.Linear(32, 3)), (1, 4, 4), "module '0', a Conv2d, has padding_mode='circ"),
    (nn.Sequential(nn.MaxPool2d(3, ceil_mode=True), nn.Flatten(), nn.Linear(4, 3)), (1, 4, 4),
     "module '0', a MaxPool2d, has ceil_mode=True"),
    (nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 3)), (1, 4, 4),
     r"output_size=2 \(only 1 is\)"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "features", "words"), REFUSED, ids=range(len(REFUSED)))
def test_modules_that_have_no_counterpart_are_named(
    model: nn.Module, features: tuple[int, ...], words: str
) -> None:
    with pytest.raises(NotImplementedError, match=words):
        potential_fn(bi.LocalPosterior(task_of(model, features=features), 6.0, 1.0))


def test_what_differs_from_torch_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="likelihood Other has no counterpart"):
        potential_fn(bi.LocalPosterior(task_of(nn.Linear(4, 3), Other()), 6.0, 1.0))
    hooked = nn.Linear(4, 3)
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match=r"in PyTorch and .* in JAX.*hooks"):
        potential_fn(bi.LocalPosterior(task_of(hooked), 6.0, 1.0))
    half = task_of(nn.Linear(4, 3)).to(dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"task\.to\(dtype=torch\.float32\)"):
        potential_fn(bi.LocalPosterior(half, 6.0, 1.0))
    x, y = {"input": torch.randn(6, 4)}, torch.tensor([0, 1, 2, 0, 1, 2])
    named = bi.Task(nn.Linear(4, 3), bi.Categorical(), train={**x, "y": y}, query={**x, "y": y})
    with pytest.raises(TypeError, match=r"train=\(x, y\)"):
        potential_fn(bi.LocalPosterior(named, 6.0, 1.0))


def test_float32_is_refused() -> None:
    potential = potential_fn(bi.LocalPosterior(task_of(nn.Linear(4, 3)), 6.0, 1.0))
    with pytest.raises(RuntimeError, match=r"with jax\.enable_x64\(True\)"):
        potential(np.zeros(15))
