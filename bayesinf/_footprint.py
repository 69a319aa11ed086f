"""What an example leaves behind on its way through a network, and how many may go together."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from bayesinf._task import Task

__all__ = ["examples_at_once", "numbers_left"]

_NUMBERS = 2**22
"""Of a forward pass, at most, where second derivatives hold several times as many: what a
processor's caches make quick; more of GPT-NeoX at once take 1.4 times as long."""

_NUMBERS_ELSEWHERE = 2**24
"""The same on an accelerator: what memory wants."""

_KNOWN: WeakKeyDictionary[Task, int] = WeakKeyDictionary()


def examples_at_once(task: Task, asked: int) -> int:
    """As many as are asked for, or as few as memory wants: at least one."""
    room = _NUMBERS if task.device.type == "cpu" else _NUMBERS_ELSEWHERE
    return max(1, min(asked, room // numbers_left(task)))


def numbers_left(task: Task) -> int:
    """Numbers that a forward pass of one example leaves behind, without the parameters."""
    if task not in _KNOWN:
        params = {name: p.detach().requires_grad_() for name, p in task.params.items()}
        own = {p.untyped_storage().data_ptr() for p in task.module.parameters()}
        seen: dict[int, int] = {}

        def note(saved: Tensor) -> Tensor:
            if saved.untyped_storage().data_ptr() not in own:
                seen[saved.data_ptr()] = saved.numel()
            return saved

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved)
        with torch.enable_grad(), hooks:
            task.losses(params, task.train.batch(slice(0, 1)))
        _KNOWN[task] = max(1, sum(seen.values()))
    return _KNOWN[task]
