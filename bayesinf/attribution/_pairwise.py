"""What the classical methods share: damping, score matrices in blocks, and their attributes.

Scores are ``(queries, train examples)``. A method *binds* the gradients of a block of queries,
which gives a function from gradients of train examples to inner products ``(queries, examples)``;
rows of gradients are as in :mod:`bayesinf.curvature._rows`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from bayesinf._data import Batch, Examples
from bayesinf._task import Measurement, Task
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._layers import Layer, find_layers
from bayesinf.curvature._rows import Rows
from bayesinf.curvature._sources import GradientSource

__all__ = [
    "Bind",
    "all_layers",
    "pairwise",
    "require_batch_size",
    "require_damping",
    "score_attrs",
]

Bind = Callable[[Sequence[Rows]], Callable[[Sequence[Rows]], Tensor]]

_QUERY_ELEMENTS, _TRAIN_ELEMENTS = 2**27, 2**25
"""Most elements of explicit gradients of a block of queries, of train examples."""


def require_damping(damping: Any, *, positive: bool = True) -> float:
    """Return the damping as a float, or say what it should be.

    Parameters
    ----------
    damping
        λ of the estimand.
    positive
        Whether 0 is refused.

    Raises
    ------
    ValueError
        If it is not a finite number, or negative, or 0 where that is refused.
    """
    number = isinstance(damping, (int, float)) and not isinstance(damping, bool)
    if not number or not math.isfinite(damping) or damping < 0 or (positive and damping == 0):
        wanted = "a positive number" if positive else "a number ≥ 0"
        raise ValueError(
            f"damping must be {wanted}; got {damping!r}. It is λ = γ/(nβ) + weight decay in units "
            f"of the mean loss (1e-3 … 1e-1 is usual for small networks); there is no default, "
            f"since it sets the answer."
        )
    return float(damping)


def all_layers(task: Task) -> tuple[Layer, ...] | None:
    """Layers if they cover every selected parameter, else ``None`` (gradients by torch.func)."""
    layers, untreated = find_layers(task)
    return None if untreated else layers


def pairwise(
    task: Task,
    source: GradientSource,
    bind: Bind,
    *,
    measurement: Measurement,
    batch_size: int,
    costs: Costs,
) -> np.ndarray:
    """Inner products of query and train gradients in blocks of bounded memory.

    Parameters
    ----------
    task
        Whose examples.
    source
        Open source of gradients.
    bind
        The method; see the module.
    measurement
        φ of the queries; train examples enter with their loss.
    batch_size
        Most train examples (and queries) at a time.
    costs
        Account to which seconds and passes are added.

    Returns
    -------
    np.ndarray
        ``(queries, train examples)`` in the dtype of the gradients.
    """
    with costs.stage("scores"):
        out: np.ndarray | None = None
        for q, queries in _blocks(task.query, _QUERY_ELEMENTS, source.width, None):
            product = bind(source.gradients("query", q, queries, measurement))
            for t, batch in _blocks(task.train, _TRAIN_ELEMENTS, source.width, batch_size):
                block = product(source.gradients("train", t, batch)).detach().cpu().numpy()
                if out is None:
                    out = np.empty((len(task.query), task.n), dtype=block.dtype)
                out[q, t] = block
        assert out is not None
    return out


def score_attrs(
    task: Task, costs: Costs, measurement: Measurement, batch_size: int, **more: Any
) -> dict[str, Any]:
    """Attributes that every classical method records.

    Parameters
    ----------
    task, costs, measurement, batch_size
        What was computed, and what it cost.
    **more
        The method's own.
    """
    named = measurement if isinstance(measurement, str) else _function_name(measurement)
    return {
        "checkpoint": task.fingerprint()["checkpoint"],
        "n": task.n,
        "parameters": task.dimension,
        "measurement": named,
        "batch_size": batch_size,
        **costs.attrs(),
        **more,
    }


def require_batch_size(batch_size: Any) -> None:
    """Raise ``ValueError`` unless a batch size is a positive integer."""
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer; got {batch_size!r}.")


def _function_name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _blocks(
    examples: Examples, elements: int, width: int, most: int | None
) -> Iterator[tuple[slice, Batch]]:
    size = max(1, elements // width)
    yield from examples.batches(size if most is None else min(size, most))
