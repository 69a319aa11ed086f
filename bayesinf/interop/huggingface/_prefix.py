"""Networks whose first blocks do not change: what they compute is computed once.

Where a posterior is restricted to later blocks, the hidden states that enter the first of them are
the same at every draw, step and checkpoint product: constants of the example, ``(T, width)`` each.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bayesinf._data import Examples
from bayesinf._task import Task
from bayesinf.interop._components import block_paths

__all__ = ["reuse_prefix", "starting_from"]


class _Given(nn.Module):
    """Stands for a block: returns the states that it was given, or what comes in."""

    def __init__(self, block: nn.Module, in_tuple: bool) -> None:
        super().__init__()
        self.in_tuple = in_tuple
        self.states: Tensor | None = None
        if hasattr(block, "attention_type"):
            self.attention_type = block.attention_type

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        """States instead of the block's output."""
        states = hidden if self.states is None else self.states
        return (states,) if self.in_tuple else states


@contextmanager
def starting_from(model: nn.Module, states: Tensor | None) -> Iterator[None]:
    """Run a network that :func:`reuse_prefix` cut from hidden states ``(B, T, width)``.

    Raises
    ------
    ValueError
        If states are given to a whole network, or a cut one has none.
    """
    given = [module for module in model.modules() if isinstance(module, _Given)]
    if (states is None) != (not given):
        raise ValueError(
            f"prefix= {'is missing' if states is None else 'was given'}, and the first "
            f"{len(given)} blocks of this network were left out. Its data come with it: "
            f"reuse_prefix(task) makes both."
        )
    if given:
        given[-1].states = states
    try:
        yield
    finally:
        if given:
            given[-1].states = None


def reuse_prefix(task: Task, *, batch_size: int = 32) -> Task:
    """Return the same task with the blocks before the first selected parameter computed once.

    Sampling, observing and curvature of the last blocks then cost what the last blocks cost; losses
    are the same. The hidden states of all examples, ``n·T·width`` numbers, are held in memory as
    one more input.

    Parameters
    ----------
    task
        Of a :class:`LanguageModel` or :class:`SequenceClassifier` with ``parameters=`` of later
        blocks, or of what comes after them; examples are a dict of tensors, or a dataset of dicts.
    batch_size
        Examples at a time while the states are computed.

    Returns
    -------
    Task
        Without the parameters of the blocks that were left out.

    Raises
    ------
    ValueError
        If a selected parameter is part of, or comes before, the first block.
    TypeError
        If the inputs are no dict.

    Examples
    --------
    >>> task = bi.Task(model, bi.CausalLM(), train=train, query=query,
    ...                parameters=r".*layers[.](28|29)[.]mlp[.].*")  # doctest: +SKIP
    >>> task = reuse_prefix(task)  # doctest: +SKIP
    """
    paths = block_paths(task.module)
    first = _first_selected(task, paths)
    module = copy.deepcopy(task.module)
    last = module.get_submodule(paths[first - 1])
    kept: list[Any] = []
    handle = last.register_forward_hook(lambda block, args, output: kept.append(output))
    train, query = (_with_states(task, module, split, kept, batch_size) for split in _SPLITS)
    handle.remove()
    in_tuple = isinstance(kept.pop(), tuple)
    for path in paths[:first]:
        parent, _, name = path.rpartition(".")
        block = module.get_submodule(path)
        module.get_submodule(parent)._modules[name] = _Given(block, in_tuple)
    return task.of(module, train=train, query=query)


_SPLITS = ("train", "query")


def _first_selected(task: Task, paths: list[str]) -> int:
    """First block that a selected parameter is in; their number where all come after them."""
    owners: list[int] = []
    embedding = {id(p) for p in _embeddings(task.module)}
    for name, parameter in task.module.named_parameters():
        if name in task.params:
            inside = [k for k, path in enumerate(paths) if name.startswith(f"{path}.")]
            owners.append(inside[0] if inside else 0 if id(parameter) in embedding else len(paths))
    if min(owners) == 0:
        raise ValueError(
            "a selected parameter is in the first block or in the embedding (perhaps as the output "
            "embedding that is tied to it), so that nothing before it stays the same. "
            "reuse_prefix is for Task(parameters=…) of later blocks."
        )
    return min(owners)


def _embeddings(module: nn.Module) -> Iterator[nn.Parameter]:
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            yield from part.parameters()


@torch.no_grad()
def _with_states(
    task: Task, module: nn.Module, split: str, kept: list[Any], batch_size: int
) -> Examples:
    """Examples of a split with their hidden states as one more input."""
    examples = task.examples(split)
    parts = []
    for _, (inputs, _) in examples.batches(batch_size):
        if not isinstance(inputs, dict):
            raise TypeError(
                f"{split}= must come as a dict with input_ids; got {type(inputs).__name__}. "
                f"tokenize(texts, tokenizer) makes one."
            )
        kept.clear()
        module(**inputs)
        states = kept[-1][0] if isinstance(kept[-1], tuple) else kept[-1]
        parts.append(states.to(task.dtype))
    inputs, target = examples.batch()
    return examples.replaced(({**inputs, "prefix": torch.cat(parts)}, target))
