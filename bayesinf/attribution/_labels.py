"""Labels of the rows and columns of a score matrix: examples, or tokens of examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesinf._likelihoods import require
from bayesinf._scores import text_labels
from bayesinf._task import Task
from bayesinf.curvature._sources import Tokens, token_grid

__all__ = ["Labels", "make_labels"]


@dataclass(frozen=True)
class Labels:
    """One axis of a score matrix.

    Attributes
    ----------
    split
        ``"train"`` or ``"query"``.
    ids
        Example of each entry.
    masks
        Tokens of each example that count; ``None``: entries are examples.
    starts
        Entry at which each example begins, and the total.
    position, token_id
        Of each entry.
    """

    split: str
    ids: np.ndarray
    starts: np.ndarray
    masks: list[np.ndarray] | None = None
    position: np.ndarray | None = None
    token_id: np.ndarray | None = None

    @property
    def dim(self) -> str:
        """Name of the dimension."""
        return self.split if self.masks is None else f"{self.split}_token"

    @property
    def size(self) -> int:
        """Number of entries."""
        return int(self.starts[-1])

    def entries(self, where: slice) -> slice:
        """Entries of a slice of examples."""
        return slice(int(self.starts[where.start]), int(self.starts[where.stop]))

    def keep(self, where: slice, device: torch.device) -> Tensor | None:
        """Mask ``(B·T,)`` of tokens that count, the examples padded to one length."""
        if self.masks is None:
            return None
        return torch.from_numpy(np.concatenate(self.masks[where])).to(device)

    def coords(self) -> dict[str, Any]:
        """Coordinates of the dimension; ids as Zarr has a specification for them."""
        ids = text_labels(self.ids)
        if self.masks is None:
            return {self.split: ids}
        found = {self.split: (self.dim, ids), f"{self.split}_position": (self.dim, self.position)}
        if self.token_id is not None:
            found[f"{self.split}_token_id"] = (self.dim, self.token_id)
        return found


def make_labels(task: Task, split: str, tokens: Tokens | None, batch_size: int) -> Labels:
    """Label the examples of a split, or their tokens.

    Raises
    ------
    ValueError
        If the inputs have no tokens.
    NotImplementedError
        If the likelihood has no token losses.
    """
    data = task.examples(split)
    if tokens is None:
        return Labels(split, data.ids, np.arange(len(data) + 1))
    masks: list[np.ndarray] = []
    ids: list[np.ndarray] = []
    found: Tensor | None
    for _, batch in data.batches(batch_size):
        if tokens == "loss":
            mask = require(task.likelihood, "token_mask", "tokens='loss'")(batch[1])
            _require_tokens(mask)
            mask, found = mask.flatten(1), batch[1].flatten(1)
        else:
            mask, found = token_grid(batch)
        mask = mask.cpu().numpy().astype(bool)
        masks.extend(mask)
        if found is not None and not found.is_floating_point():
            ids.append(found.cpu().numpy()[mask])
    counts = np.array([mask.sum() for mask in masks])
    return Labels(
        split,
        np.repeat(data.ids, counts),
        np.concatenate([[0], counts.cumsum()]),
        masks,
        np.concatenate([np.flatnonzero(mask) for mask in masks]),
        np.concatenate(ids) if ids else None,
    )


def _require_tokens(mask: Tensor) -> None:
    if mask.ndim < 2:
        raise ValueError(
            f"tokens by 'loss' need one loss a token, (B, T, …); targets here are "
            f"{tuple(mask.shape)}, one an example. Leave train_tokens= and query_tokens= out."
        )
