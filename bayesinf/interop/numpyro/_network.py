"""Networks of PyTorch as functions of JAX: sequences of the usual layers, with the same values.

Shapes: inputs ``(B, …)`` with one row per example, as PyTorch has them (images are ``(B, C, H,
W)``). Weights are a dict by the names of ``named_parameters()``, so that tied weights come once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from torch import nn

__all__ = ["Network", "network"]

Network = Callable[[Mapping[str, Array], Array], Array]
"""Outputs from weights by name and a batch of inputs."""


def network(module: nn.Module) -> Network:
    """Return the same function of weights and inputs in JAX, in eval mode.

    Parameters
    ----------
    module
        A layer, or ``nn.Sequential`` of layers, nested at will: Linear, Conv2d, Flatten, Unflatten,
        pooling in two dimensions, Dropout, Identity and elementwise activations.

    Raises
    ------
    NotImplementedError
        Naming the module that has no counterpart, or the option of it.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    return _layer(module, "", names)


def _layer(module: nn.Module, path: str, names: Mapping[int, str]) -> Network:
    kind = type(module)
    if kind is nn.Sequential:
        parts = [_layer(m, f"{path}.{k}".lstrip("."), names) for k, m in module.named_children()]

        def chain(params: Mapping[str, Array], x: Array) -> Array:
            for part in parts:
                x = part(params, x)
            return x

        return chain
    for known, make in _ACTIVATIONS.items():
        if kind is known:
            function = make(module)
            return lambda params, x: function(x)
    for known, build in _LAYERS.items():
        if kind is known:
            return build(module, path, names)
    raise NotImplementedError(
        f"the module {path or 'itself'!r} is a {kind.__name__}, which has no counterpart in JAX "
        f"here: a reference posterior is for nn.Sequential of "
        f"{', '.join(k.__name__ for k in (*_LAYERS, *_ACTIVATIONS))}. Write a network of other "
        f"parts as such a sequence, or judge it by bi.HMC, whose law is exact, too."
    )


def _refuse(path: str, module: nn.Module, option: str) -> None:
    raise NotImplementedError(
        f"the module {path or 'itself'!r}, a {type(module).__name__}, has {option}, which is not "
        f"translated to JAX. Make the layer without it."
    )


# ------------------------------------------------------------------------------ with weights


def _linear(module: Any, path: str, names: Mapping[int, str]) -> Network:
    weight, bias = names[id(module.weight)], names.get(id(module.bias))

    def apply(params: Mapping[str, Array], x: Array) -> Array:
        out = x @ params[weight].T
        return out if bias is None else out + params[bias]

    return apply


def _conv2d(module: Any, path: str, names: Mapping[int, str]) -> Network:
    if module.padding_mode != "zeros":
        _refuse(path, module, f"padding_mode={module.padding_mode!r}")
    weight, bias = names[id(module.weight)], names.get(id(module.bias))
    options = {
        "window_strides": module.stride,
        "padding": _conv_padding(module),
        "rhs_dilation": module.dilation,
        "feature_group_count": module.groups,
        "dimension_numbers": ("NCHW", "OIHW", "NCHW"),
    }

    def apply(params: Mapping[str, Array], x: Array) -> Array:
        out = lax.conv_general_dilated(x, params[weight], **options)
        return out if bias is None else out + params[bias][:, None, None]

    return apply


def _conv_padding(module: Any) -> list[tuple[int, int]]:
    if module.padding == "valid":
        return [(0, 0), (0, 0)]
    if module.padding == "same":  # the odd one goes behind
        both = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in both]
    return [(p, p) for p in module.padding]


# ------------------------------------------------------------------------------ without


def _max_pool(module: Any, path: str, names: Mapping[int, str]) -> Network:
    if module.return_indices:
        _refuse(path, module, "return_indices=True")
    window = partial(_window, module, path, dilation=_pair(module.dilation))
    return lambda params, x: window(x, lax.max, -jnp.inf)


def _average_pool(module: Any, path: str, names: Mapping[int, str]) -> Network:
    divisor = module.divisor_override or math.prod(_pair(module.kernel_size))
    inside = not (module.count_include_pad or module.divisor_override)

    def apply(params: Mapping[str, Array], x: Array) -> Array:
        total = _window(module, path, x, lax.add, 0.0)
        count = _window(module, path, jnp.ones_like(x), lax.add, 0.0) if inside else divisor
        return total / count

    return apply


def _window(
    module: Any, path: str, x: Array, reduce: Any, start: float, dilation: Any = (1, 1)
) -> Array:
    """Reduce windows over the last two axes."""
    if module.ceil_mode:
        _refuse(path, module, "ceil_mode=True")
    ones = (1,) * (x.ndim - 2)
    padding = [(0, 0)] * (x.ndim - 2) + [(p, p) for p in _pair(module.padding)]
    size, stride = _pair(module.kernel_size), _pair(module.stride)
    options = {"window_dilation": (*ones, *dilation), "padding": padding}
    return lax.reduce_window(
        x, np.asarray(start, x.dtype), reduce, (*ones, *size), (*ones, *stride), **options
    )


def _adaptive_average(module: Any, path: str, names: Mapping[int, str]) -> Network:
    if _pair(module.output_size) != (1, 1):
        _refuse(path, module, f"output_size={module.output_size} (only 1 is)")
    return lambda params, x: x.mean((-2, -1), keepdims=True)


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, tuple) else (value, value)
    return int(first), int(second)


def _flatten(module: Any, path: str, names: Mapping[int, str]) -> Network:
    def apply(params: Mapping[str, Array], x: Array) -> Array:
        first, last = (axis % x.ndim for axis in (module.start_dim, module.end_dim))
        return x.reshape(*x.shape[:first], -1, *x.shape[last + 1 :])

    return apply


def _unflatten(module: Any, path: str, names: Mapping[int, str]) -> Network:
    if not isinstance(module.dim, int):
        _refuse(path, module, "named dimensions")

    def apply(params: Mapping[str, Array], x: Array) -> Array:
        axis = module.dim % x.ndim
        return x.reshape(*x.shape[:axis], *module.unflattened_size, *x.shape[axis + 1 :])

    return apply


def _identity(module: Any, path: str, names: Mapping[int, str]) -> Network:
    return lambda params, x: x


_LAYERS: dict[type[nn.Module], Callable[[Any, str, Mapping[int, str]], Network]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.Flatten: _flatten,
    nn.Unflatten: _unflatten,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _average_pool,
    nn.AdaptiveAvgPool2d: _adaptive_average,
    nn.Identity: _identity,
    nn.Dropout: _identity,
}


def _softplus(module: Any) -> Callable[[Array], Array]:
    beta, threshold = module.beta, module.threshold

    def apply(x: Array) -> Array:
        scaled = beta * x
        small = jnp.where(scaled > threshold, 0.0, scaled)  # no overflow in what is not chosen
        return jnp.where(scaled > threshold, x, jnp.log1p(jnp.exp(small)) / beta)

    return apply


def _gelu(module: Any) -> Callable[[Array], Array]:
    return partial(jax.nn.gelu, approximate=module.approximate == "tanh")


_ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Callable[[Array], Array]]] = {
    nn.ReLU: lambda m: jax.nn.relu,
    nn.LeakyReLU: lambda m: partial(jax.nn.leaky_relu, negative_slope=m.negative_slope),
    nn.ELU: lambda m: partial(jax.nn.elu, alpha=m.alpha),
    nn.GELU: _gelu,
    nn.SiLU: lambda m: jax.nn.silu,
    nn.Sigmoid: lambda m: jax.nn.sigmoid,
    nn.Softplus: _softplus,
    nn.Tanh: lambda m: jnp.tanh,
}
