"""Which parameters belong together, as layers whose gradients have a known structure.

A layer is a matrix of parameters ``(P, M)``: for a linear map ``P`` outputs and ``M`` inputs, the
bias (if it is selected) as the last column, the one that multiplies a constant input 1. Flattened,
a layer is row-major: ``p·M + m``. By kind:

* ``linear``: ``nn.Linear``, Hugging Face ``Conv1D`` (whose weight is stored transposed);
* ``conv``: ``nn.Conv1d/2d/3d``; the weight ``(P, C/groups, *kernel)`` is ``(P, C/groups·kernel)``,
  and with ``groups`` the rows fall into that many blocks with inputs of their own;
* ``embedding``: ``nn.Embedding``, ``(vocabulary, width)``;
* ``affine``: weight and bias of normalisation layers, one row a channel, as many groups as rows;
* ``tied``: one weight held by an embedding and linear layers;
* ``free``: any other parameter, alone; ``(first dimension, the others)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesinf._task import Task

__all__ = ["Layer", "free_layer", "group_parameters"]

_NORMS = (
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLVING = ("forward", "_conv_forward")


@dataclass(frozen=True)
class Layer:
    """A weight and its bias, or one of them, with every module that uses them.

    Attributes
    ----------
    name
        The module's name, or the parameter's where it stands alone.
    kind
        See the module.
    weight, bias
        Names of the parameters; ``None`` where absent or not selected.
    sites
        Names of the modules that hold the parameters: more than one when weights are tied.
    shape
        ``(P, M)``, the bias column included.
    weight_shape, bias_shape
        Shapes of the parameters.
    groups
        Blocks of ``P/groups`` rows that see different inputs.
    transposed
        Whether the weight is stored as ``(M, P)``.
    """

    name: str
    kind: str
    weight: str | None
    bias: str | None
    sites: tuple[str, ...]
    shape: tuple[int, int]
    weight_shape: tuple[int, ...] = ()
    bias_shape: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False

    @property
    def size(self) -> int:
        """Number of parameters, ``P·M``."""
        return self.shape[0] * self.shape[1]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the layer's parameters."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    def pack(self, named: Mapping[str, Tensor]) -> Tensor:
        """Named parameters with leading dimensions ``(..., *shape)`` as ``(..., P, M)``."""
        parts = []
        if self.weight is not None:
            weight = named[self.weight]
            lead = weight.shape[: weight.ndim - len(self.weight_shape)]
            if self.transposed:
                weight = weight.transpose(-1, -2)
            parts.append(weight.reshape(*lead, self.shape[0], -1))
        if self.bias is not None:
            bias = named[self.bias]
            lead = bias.shape[: bias.ndim - len(self.bias_shape)]
            parts.append(bias.reshape(*lead, self.shape[0], 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def unpack(self, matrix: Tensor) -> dict[str, Tensor]:
        """Inverse of :meth:`pack`."""
        named, lead = {}, matrix.shape[:-2]
        if self.weight is not None:
            inputs = matrix[..., :-1] if self.bias is not None else matrix
            if self.transposed:
                inputs = inputs.transpose(-1, -2)
            named[self.weight] = inputs.reshape((*lead, *self.weight_shape))
        if self.bias is not None:
            named[self.bias] = matrix[..., -1].reshape((*lead, *self.bias_shape))
        return named


def group_parameters(task: Task) -> tuple[Layer, ...]:
    """Group the selected parameters into layers by the modules that hold them.

    Weight and bias share a layer when the same modules hold both, and are two layers otherwise.
    Every selected parameter is in exactly one layer. The grouping looks at classes only; whether
    gradients really have the structure is for :func:`~bayesinf.curvature.find_layers` to check.

    Parameters
    ----------
    task
        The network and its selected parameters.

    Returns
    -------
    tuple[Layer, ...]
        In the order of the parameters.

    Raises
    ------
    TypeError
        If the network computes in half precision.
    ValueError
        If a mask selects a part of a parameter.
    """
    task.require_full_precision("a curvature or a classical method")
    task.require_whole_parameters("a curvature or a classical method")
    holders = _holders(task)
    modules = dict(task.module.named_modules())
    kinds = {
        name: _kind([(modules[s], role) for s, role in held]) for name, held in holders.items()
    }
    places = {name: (held[0][1], tuple(site for site, _ in held)) for name, held in holders.items()}
    layers: list[Layer] = []
    merged: set[str] = set()
    for name, (role, sites) in places.items():
        kind = kinds[name]
        if name in merged:
            continue
        if kind == "free":
            layers.append(free_layer(task, name))
            continue
        partner = _partner(name, places, kinds)
        merged.add(partner or name)
        weight, bias = (name, partner) if role == "weight" else (partner, name)
        layers.append(_layer(task, kind, weight, bias, sites, modules[sites[0]]))
    return tuple(layers)


def _partner(
    name: str, places: Mapping[str, tuple[str, tuple[str, ...]]], kinds: Mapping[str, str]
) -> str | None:
    """Return the bias of a weight, or the weight of a bias, where the same modules hold both."""
    role, sites = places[name]
    wanted = ("bias" if role == "weight" else "weight", sites)
    found = [n for n, place in places.items() if place == wanted and kinds[n] == kinds[name]]
    return found[0] if found else None


def free_layer(task: Task, name: str) -> Layer:
    """Return the layer of a parameter on its own."""
    shape = tuple(task.params[name].shape)
    rows = shape[0] if shape else 1
    return Layer(name, "free", name, None, (), (rows, math.prod(shape[1:])), shape)


def _holders(task: Task) -> dict[str, list[tuple[str, str]]]:
    """Every selected parameter with the modules that hold it and its role there."""
    canonical = {id(p): name for name, p in task.module.named_parameters()}
    holders: dict[str, list[tuple[str, str]]] = {name: [] for name in task.params}
    for site, module in task.module.named_modules():
        for role, p in module.named_parameters(recurse=False, remove_duplicate=False):
            if canonical[id(p)] in holders:
                holders[canonical[id(p)]].append((site, role))
    return holders


def _kind(held: list[tuple[nn.Module, str]]) -> str:
    kinds = {
        _module_kind(module) if role in ("weight", "bias") else "free" for module, role in held
    }
    if len({role for _, role in held}) > 1:
        return "free"
    if kinds == {"linear", "embedding"}:
        stored = {_is_transposed(module) for module, _ in held}
        return "tied" if stored == {False} else "free"
    if kinds == {"conv"}:
        return "conv" if len({module.groups for module, _ in held}) == 1 else "free"
    return kinds.pop() if len(kinds) == 1 else "free"


def _module_kind(module: nn.Module) -> str:
    kind = type(module)
    if isinstance(module, nn.Linear):
        return "linear" if kind.forward is nn.Linear.forward else "free"
    if _is_transposed(module):
        return "linear"
    for base in _CONVOLUTIONS:
        if isinstance(module, base):
            own = [getattr(kind, name) is getattr(base, name) for name in _CONVOLVING]
            return "conv" if all(own) else "free"
    if isinstance(module, nn.Embedding):
        plain = kind.forward is nn.Embedding.forward and module.max_norm is None
        return "embedding" if plain and not module.scale_grad_by_freq else "free"
    named = kind.__name__.endswith(("RMSNorm", "LayerNorm"))
    return "affine" if isinstance(module, _NORMS) or named else "free"


def _is_transposed(module: nn.Module) -> bool:
    """Whether it is a Hugging Face ``Conv1D``, a linear layer with weight ``(inputs, outputs)``."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def _layer(
    task: Task,
    kind: str,
    weight: str | None,
    bias: str | None,
    sites: tuple[str, ...],
    module: nn.Module,
) -> Layer:
    weight_shape = tuple(task.params[weight].shape) if weight is not None else ()
    bias_shape = tuple(task.params[bias].shape) if bias is not None else ()
    transposed = weight is not None and _is_transposed(module)
    if kind == "affine":
        rows = math.prod(weight_shape or bias_shape)
    else:
        rows = weight_shape[-1 if transposed else 0] if weight_shape else bias_shape[0]
    columns = math.prod(weight_shape) // rows if weight is not None else 0
    groups = 1
    if kind == "affine":
        groups = rows
    elif kind == "conv" and weight is not None:
        groups = int(module.groups)  # type: ignore[arg-type]
    return Layer(
        (sites[0] or "(model)") if weight is not None else str(bias),
        kind,
        weight,
        bias,
        sites,
        (rows, columns + (bias is not None)),
        weight_shape,
        bias_shape,
        groups,
        transposed,
    )
