"""A task in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from bayesinf._data import Examples
from bayesinf._task import Task

__all__ = ["in_double"]


def in_double(task: Task) -> Task:
    """Return the same task with weights, buffers and floating-point data in float64.

    Parameters
    ----------
    task
        Stays as it is.
    """
    if task.dtype == torch.float64:
        return task
    double = copy.copy(task)
    double.dtype = torch.float64
    double.module = copy.deepcopy(task.module).double()
    own = dict(double.module.named_parameters())
    double.params = {name: own[name].detach() for name in task.params}
    double.train, double.query = _examples(task.train), _examples(task.query)
    return double


def _examples(examples: Examples) -> Examples:
    double = copy.copy(examples)
    fetch, double.dtype = examples._fetch, torch.float64

    def cast(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.double() if floating else leaf

    double._fetch = lambda index: tree_map(cast, fetch(index))
    return double
