"""Hidden states of examples as vectors: what similarities in feature space compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bayesinf._data import Batch
from bayesinf._task import Task
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._sources import token_grid

__all__ = ["features"]


def features(
    task: Task, module: str | None, batch_size: int, costs: Costs
) -> tuple[Tensor, Tensor, str]:
    """Return hidden states of queries ``(Q, M)`` and training examples ``(n, M)`` in float64.

    Parameters
    ----------
    task
        Network and examples.
    module
        Whose output is taken; None: what the last linear layer reads.
    batch_size
        Examples at a time.
    costs
        Account to which passes are added.

    Returns
    -------
    query, train, name
        Hidden states, those of sequences ``(T, M)`` averaged over the tokens that are attended to,
        and whose they are.

    Raises
    ------
    ValueError
        If there is no such module, it does not run, or it does not return one row per example.
    """
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer; got {batch_size!r}.")
    name = module or _last_linear(task)
    found = []
    with torch.no_grad(), _recorded(task, name, module is None) as seen:
        for split in ("query", "train"):
            parts = []
            for _, batch in task.examples(split).batches(batch_size):
                seen.clear()
                outputs = task.outputs(task.params, batch)
                if module is None and hasattr(outputs, "hidden"):  # a head that is not applied
                    seen[:] = [outputs.hidden]
                parts.append(_pool(seen, batch, name))
                costs.forward_examples += len(parts[-1])
            found.append(torch.cat(parts))
    return found[0], found[1], module or f"{name or '(model)'} (input)"


@contextmanager
def _recorded(task: Task, name: str, reads: bool) -> Iterator[list[Any]]:
    """What a module returns, or what it reads, each time that it runs."""
    known = dict(task.module.named_modules())
    if name not in known:
        raise ValueError(
            f"there is no module {name!r}. Modules are "
            f"{sorted(k for k in known if k)[:12]}{' …' if len(known) > 13 else ''}; all are "
            f"listed by dict(model.named_modules())."
        )
    seen: list[Any] = []

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(args[0] if reads else output)

    handle = known[name].register_forward_hook(record)
    try:
        yield seen
    finally:
        handle.remove()


def _last_linear(task: Task) -> str:
    """Name of the linear layer that runs last."""
    called: list[str] = []
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: called.append(name))
        for name, module in task.module.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            task.outputs(task.params, task.query.batch(slice(0, 1)))
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        raise ValueError(
            f"{type(task.module).__name__} runs no linear layer whose input could be the last "
            f"hidden states. Name a module: module='…'."
        )
    return called[-1]


def _pool(seen: list[Any], batch: Batch, name: str) -> Tensor:
    """One vector an example, ``(B, M)``, in float64."""
    if not seen:
        raise ValueError(f"the module {name!r} does not run in the forward pass. Name another.")
    state = seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1]
    state = getattr(state, "last_hidden_state", state)
    size = len(batch[1])
    if not isinstance(state, Tensor) or state.ndim < 2 or len(state) != size:
        shape = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(
            f"the module {name!r} must return one row per example, ({size}, …) here; got {shape}. "
            f"Usual cause: a module that acts on parts of examples; name one further out."
        )
    state = state.double()
    mask = _attended(batch)
    if mask is None or state.ndim != 3 or state.shape[:2] != mask.shape:
        return state.flatten(1)
    weight = mask.double() / mask.sum(1, keepdim=True).clamp_min(1)
    return (state.masked_fill(~mask.unsqueeze(2), 0) * weight.unsqueeze(2)).sum(1)


def _attended(batch: Batch) -> Tensor | None:
    """Mask ``(B, T)`` of the tokens of inputs that are ids."""
    try:
        mask, ids = token_grid(batch)
    except ValueError:
        return None
    return None if ids is None else mask
