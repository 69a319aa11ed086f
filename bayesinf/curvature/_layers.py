"""Which parameters sit in layers whose gradients factor into inputs and output gradients.

A layer is a matrix of parameters ``(P, M)``: ``P`` outputs, ``M`` inputs, the bias (if it is
selected) as the last column, the one that multiplies a constant input 1. A convolution's weight
``(P, C, kh, kw)`` is the matrix ``(P, C·kh·kw)``. Flattened, a layer is row-major: ``p·M + m``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesinf._task import Task

__all__ = ["Layer", "UntreatedParametersWarning", "find_layers", "require_layers"]


class UntreatedParametersWarning(UserWarning):
    """Selected parameters that a layer-wise curvature leaves out."""


@dataclass(frozen=True)
class Layer:
    """A weight and its bias, or one of them, with every module that uses them.

    Attributes
    ----------
    name
        The module's name, or the parameter's where a bias stands alone.
    weight, bias
        Names of the parameters; ``None`` where absent or not selected.
    sites
        Names of the modules that hold the parameters: more than one when weights are tied.
    shape
        ``(P, M)``, the bias column included.
    weight_shape
        Shape of the weight parameter, ``()`` for a bias alone.
    """

    name: str
    weight: str | None
    bias: str | None
    sites: tuple[str, ...]
    shape: tuple[int, int]
    weight_shape: tuple[int, ...] = ()

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
            parts.append(named[self.weight].flatten(1 - len(self.weight_shape)))
        if self.bias is not None:
            parts.append(named[self.bias].unsqueeze(-1))
        return torch.cat(parts, dim=-1)

    def unpack(self, matrix: Tensor) -> dict[str, Tensor]:
        """Inverse of :meth:`pack`."""
        named = {}
        if self.weight is not None:
            inputs = matrix[..., :-1] if self.bias is not None else matrix
            named[self.weight] = inputs.reshape(*matrix.shape[:-2], *self.weight_shape)
        if self.bias is not None:
            named[self.bias] = matrix[..., -1]
        return named


def find_layers(task: Task) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """Group the selected parameters into layers.

    Covered are weights and biases that only ``nn.Linear`` and ``nn.Conv2d`` (``groups == 1``)
    modules hold; several modules may hold the same one (tied weights), which is one layer. Weight
    and bias share a layer when the same modules hold both, and are two layers otherwise.

    Parameters
    ----------
    task
        The network and its selected parameters.

    Returns
    -------
    layers : tuple[Layer, ...]
        In the order of the parameters.
    untreated : tuple[str, ...]
        Selected parameters that no layer covers.
    """
    canonical = {id(p): name for name, p in task.module.named_parameters()}
    holders: dict[str, list[tuple[str, str, nn.Module]]] = {name: [] for name in task.params}
    for site, module in task.module.named_modules():
        for role, p in module.named_parameters(recurse=False, remove_duplicate=False):
            if canonical[id(p)] in holders:
                holders[canonical[id(p)]].append((site, role, module))
    covered = {
        name: (held[0][1], tuple(site for site, _, _ in held))
        for name, held in holders.items()
        if all(_supported(module, role) for _, role, module in held)
    }
    layers, merged = [], set()
    for name, (role, sites) in covered.items():
        if role == "weight":
            partner = [b for b, place in covered.items() if place == ("bias", sites)]
            merged.update(partner)
            layers.append(_layer(task, name, partner[0] if partner else None, sites))
        elif ("weight", sites) not in covered.values():
            layers.append(_layer(task, None, name, sites))
    return tuple(layers), tuple(name for name in task.params if name not in covered)


def require_layers(task: Task) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """Find the layers and warn once about selected parameters that none covers.

    Parameters
    ----------
    task
        The network and its selected parameters.

    Returns
    -------
    tuple
        As :func:`find_layers`.

    Raises
    ------
    ValueError
        If no selected parameter is in a layer.

    Warns
    -----
    UntreatedParametersWarning
        If some are not: their names and their share of the parameters.
    """
    layers, untreated = find_layers(task)
    if not untreated:
        return layers, untreated
    share = sum(task.params[name].numel() for name in untreated) / task.dimension
    listed = _listed(task, untreated)
    if not layers:
        raise ValueError(
            f"none of the selected parameters is the weight or bias of an nn.Linear or an "
            f"nn.Conv2d with groups=1; got {listed}. Kronecker factors exist only for these "
            f"layers: select some with Task(..., parameters=…), or use grad_dot, gauss_newton or "
            f"hessian, which take any parameter."
        )
    warnings.warn(
        f"{share:.1%} of the selected parameters are not treated: {listed}. Scores count only "
        f"nn.Linear and nn.Conv2d (groups=1) layers. Leave the others out with "
        f"Task(..., parameters=…), or use grad_dot, gauss_newton or hessian.",
        UntreatedParametersWarning,
        stacklevel=3,
    )
    return layers, untreated


def _supported(module: nn.Module, role: str) -> bool:
    if role not in ("weight", "bias"):
        return False
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    if isinstance(module, nn.Conv2d):
        plain = type(module).forward is nn.Conv2d.forward
        return (
            plain and type(module)._conv_forward is nn.Conv2d._conv_forward and module.groups == 1
        )
    return False


def _layer(task: Task, weight: str | None, bias: str | None, sites: tuple[str, ...]) -> Layer:
    shape = tuple(task.params[weight].shape) if weight is not None else ()
    rows = len(task.params[weight or bias])  # type: ignore[index]
    columns = task.params[weight].numel() // rows if weight is not None else 0
    name = (sites[0] or "(model)") if weight is not None else str(bias)
    return Layer(name, weight, bias, sites, (rows, columns + (bias is not None)), shape)


def _listed(task: Task, names: Sequence[str]) -> str:
    kinds = {
        (f"{site}.{role}" if site else role): type(module).__name__
        for site, module in task.module.named_modules()
        for role, _ in module.named_parameters(recurse=False, remove_duplicate=False)
    }
    shown = [f"{name} ({kinds[name]})" for name in names[:8]]
    return ", ".join(shown) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
