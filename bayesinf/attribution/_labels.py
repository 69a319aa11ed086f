"""Rows and columns of a score matrix of a task: examples, or tokens of examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesinf._axes import Axis
from bayesinf._task import Task
from bayesinf._tokens import counted_tokens
from bayesinf.curvature._sources import Tokens, token_grid

__all__ = ["Labels", "make_labels"]


@dataclass(frozen=True)
class Labels:
    """One axis of a score matrix, and where its tokens are in a batch.

    Attributes
    ----------
    axis
        Ids, positions and token ids.
    masks
        Tokens of each example that count; ``None``: entries are examples.
    """

    axis: Axis
    masks: list[np.ndarray] | None = None

    def entries(self, where: slice) -> slice:
        """Entries of a slice of examples."""
        return self.axis.entries(where)

    def keep(self, where: slice, device: torch.device) -> Tensor | None:
        """Mask ``(B·T,)`` of tokens that count, the examples padded to one length."""
        if self.masks is None:
            return None
        return torch.from_numpy(np.concatenate(self.masks[where])).to(device)


def make_labels(task: Task, split: str, tokens: Tokens | None, batch_size: int) -> Labels:
    """Label the examples of a split, or their tokens.

    Raises
    ------
    ValueError
        If the inputs have no tokens, or an example has no token that counts.
    NotImplementedError
        If the likelihood has no token losses.
    """
    data = task.examples(split)
    if tokens is None:
        return Labels(Axis(split, data.ids))
    if tokens == "loss":
        return Labels(*counted_tokens(task, split, batch_size=batch_size))
    masks: list[np.ndarray] = []
    ids: list[np.ndarray] = []
    for _, batch in data.batches(batch_size):
        grid, found = token_grid(batch)
        mask = grid.cpu().numpy().astype(bool)
        masks.extend(mask)
        if found is not None:
            ids.append(found.cpu().numpy()[mask])
    counts = np.array([mask.sum() for mask in masks])
    axis = Axis(
        split,
        data.ids,
        np.concatenate([[0], counts.cumsum()]),
        np.concatenate([np.flatnonzero(mask) for mask in masks]),
        np.concatenate(ids) if ids else None,
    )
    return Labels(axis, masks)
