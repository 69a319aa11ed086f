"""The tokens of a task that have a loss of their own, and these losses at some parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesinf._axes import Axis
from bayesinf._data import Batch
from bayesinf._likelihoods import require
from bayesinf._task import Task

__all__ = ["counted_tokens", "token_losses"]

_BATCH = 1024


def token_losses(task: Task, params: dict[str, Tensor], batch: Batch) -> Tensor:
    """Losses of all tokens of a batch, ``(B·T,)``, 0 where a token does not count."""
    part = require(task.likelihood, "token_losses", "losses of tokens")
    losses: Tensor = part(task.outputs(params, batch, head=True), batch[1])
    return losses.flatten()


def counted_tokens(
    task: Task, split: str, positions: np.ndarray | None = None, batch_size: int = _BATCH
) -> tuple[Axis, list[np.ndarray]]:
    """The axis of the tokens that count, and the mask of each example's.

    Parameters
    ----------
    task
        The task.
    split
        ``"train"`` or ``"query"``.
    positions
        Of the examples; None for all.
    batch_size
        Examples to read at a time.

    Raises
    ------
    ValueError
        If targets are not one a token, or an example has no token that counts.
    NotImplementedError
        If the likelihood has no token losses.
    """
    mask_of = require(task.likelihood, "token_mask", "tokens='loss'")
    data = task.examples(split)
    chosen = np.arange(len(data)) if positions is None else positions
    masks: list[np.ndarray] = []
    ids: list[np.ndarray] = []
    for index in torch.from_numpy(chosen).split(batch_size):
        target = data.batch(index)[1]
        mask = mask_of(target)
        _require_tokens(mask)
        mask = mask.flatten(1).cpu().numpy().astype(bool)
        masks.extend(mask)
        if not target.is_floating_point():
            ids.append(target.flatten(1).cpu().numpy()[mask])
    counts = np.array([mask.sum() for mask in masks])
    examples = data.ids[chosen]
    if not counts.all():
        raise ValueError(
            f"{int((counts == 0).sum())} {split} examples have no token that counts, the first is "
            f"{examples[counts == 0].tolist()[0]!r}. Their loss is 0 whatever the weights: drop "
            f"them, or check the target's masked positions."
        )
    axis = Axis(
        split,
        examples,
        np.concatenate([[0], counts.cumsum()]),
        np.concatenate([np.flatnonzero(mask) for mask in masks]),
        np.concatenate(ids) if ids else None,
    )
    return axis, masks


def _require_tokens(mask: Any) -> None:
    if mask.ndim < 2:
        raise ValueError(
            f"tokens by 'loss' need one loss a token, (B, T, …); targets here are "
            f"{tuple(mask.shape)}, one an example. Leave tokens=, train_tokens= and query_tokens= "
            f"out."
        )
