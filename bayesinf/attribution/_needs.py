"""What attribution methods need of a task, so that a table can say which run on it and why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayesinf._task import Task
from bayesinf.curvature._sources import token_grid

__all__ = [
    "CLASS_LABELS",
    "GAUSS_NEWTON_PRODUCTS",
    "GRADIENTS",
    "LINEAR_LAYER",
    "TOKEN_IDS",
    "Need",
    "dense_matrix",
    "likelihood_part",
]


@dataclass(frozen=True)
class Need:
    """One thing that a method needs.

    Attributes
    ----------
    what
        In a few words, as in a table.
    missing
        Of a task and the options of a call: why it is not there, or None.
    """

    what: str
    missing: Callable[[Task, Mapping[str, Any]], str | None]


def likelihood_part(part: str) -> Need:
    """Return the need of a method of the likelihood, such as ``"fisher_factor"``."""

    def missing(task: Task, options: Mapping[str, Any]) -> str | None:
        if hasattr(task.likelihood, part):
            return None
        return f"{type(task.likelihood).__name__} has no `{part}`"

    return Need(f"likelihood with {part}", missing)


def dense_matrix(copies: int, side: Callable[[Task], int]) -> Need:
    """Return the need of memory for matrices in float64; ``memory_limit=`` GiB is 8 by default."""

    def missing(task: Task, options: Mapping[str, Any]) -> str | None:
        gib = copies * side(task) ** 2 * 8 / 2**30
        limit = options.get("memory_limit", 8.0)
        if gib <= limit:
            return None
        return f"its matrices take {gib:,.0f} GiB, and memory_limit={limit:g}"

    return Need("memory for a dense matrix", missing)


def _half_precision(task: Task, options: Mapping[str, Any]) -> str | None:
    if task.module_dtype == task.dtype:
        return None
    return f"the network computes in {str(task.module_dtype).removeprefix('torch.')}"


def _masked(task: Task, options: Mapping[str, Any]) -> str | None:
    parts = [name for name, where in task._chosen().items() if where is not None]
    return f"masks select parts of {parts[:3]}" if parts else None


def _no_gauss_newton(task: Task, options: Mapping[str, Any]) -> str | None:
    if options.get("of", "gauss_newton") != "gauss_newton":
        return None
    outputs = _outputs(task)
    if isinstance(outputs, Tensor):
        return None
    return f"the network returns a {type(outputs).__name__}, no tensor"


def _no_token_ids(task: Task, options: Mapping[str, Any]) -> str | None:
    try:
        _, ids = token_grid(task.train.batch(slice(0, 1)))
    except ValueError:
        ids = None
    return None if ids is not None else "the inputs are no token ids"


def _no_classes(task: Task, options: Mapping[str, Any]) -> str | None:
    target = task.train.batch(slice(0, 1))[1]
    if isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point():
        return None
    kind = type(target).__name__
    if isinstance(target, Tensor):
        kind = f"{str(target.dtype).removeprefix('torch.')} {tuple(target.shape[1:])}"
    return f"targets are {kind} an example, not one integer that names a class"


def _no_linear_layer(task: Task, options: Mapping[str, Any]) -> str | None:
    if options.get("module") is not None:
        return None
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_: ran.append(""))
        for module in task.module.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        _outputs(task)
    finally:
        for handle in handles:
            handle.remove()
    return None if ran else "no linear layer runs; name a module: module='…'"


def _outputs(task: Task) -> Any:
    with torch.no_grad():
        return task.outputs(task.params, task.train.batch(slice(0, 1)))


GRADIENTS = (
    Need("full precision", _half_precision),
    Need("whole parameters", _masked),
)
"""Of every method that looks at gradients layer by layer."""

GAUSS_NEWTON_PRODUCTS = (*GRADIENTS, Need("outputs in one tensor", _no_gauss_newton))
"""Of methods that multiply by the Gauss–Newton matrix."""

TOKEN_IDS = Need("token ids as inputs", _no_token_ids)
CLASS_LABELS = Need("class labels", _no_classes)
LINEAR_LAYER = Need("a linear layer", _no_linear_layer)
