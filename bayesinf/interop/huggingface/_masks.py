"""Which token attends to which: padding, packed documents, causality, windows.

Shapes: ``B`` sequences of ``T`` positions; ``attends[b, t, s]`` says whether position ``t`` reads
position ``s``. Every position reads at least itself, padding too, so that no row of a softmax is
empty; nothing else reads padding. No shape and no branch depends on the values.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["additive", "attends", "within_window"]


def attends(real: Tensor, segments: Tensor | None = None, *, causal: bool = True) -> Tensor:
    """Which position reads which, ``(B, T, T)``.

    Parameters
    ----------
    real
        ``(B, T)``, true where a token is no padding.
    segments
        ``(B, T)``, equal for the tokens of one document.
    causal
        Whether tokens read only what stands before them.

    Examples
    --------
    >>> import torch
    >>> attends(torch.tensor([[False, True, True]])).int()
    tensor([[[1, 0, 0],
             [0, 1, 0],
             [0, 1, 1]]], dtype=torch.int32)
    """
    both = real.unsqueeze(2) & real.unsqueeze(1)
    if segments is not None:
        both = both & (segments.unsqueeze(2) == segments.unsqueeze(1))
    if causal:
        both = both & (_distance(real) >= 0)
    return both | (_distance(real) == 0)


def within_window(attends: Tensor, window: int) -> Tensor:
    """Leave out what lies ``window`` positions back, or more."""
    return attends & (_distance(attends) < window)


def additive(attends: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, 1, T, T)``, added to attention scores: 0, or the most negative finite number."""
    mask = torch.zeros(attends.shape, dtype=dtype, device=attends.device)
    return mask.masked_fill(~attends, torch.finfo(dtype).min).unsqueeze(1)


def _distance(like: Tensor) -> Tensor:
    """``t − s``, ``(T, T)``."""
    at = torch.arange(like.shape[-1], device=like.device)
    return at.unsqueeze(1) - at
