r"""Next-token losses from hidden states, a block of tokens at a time, without all the logits.

Shapes: ``N`` tokens, ``M`` features, ``V`` vocabulary. Logits are ``f = h Wᵀ + c``; the loss of a
token is ``log Σ_v exp(f_v − f_y)``. Forward and backward pass make the logits of a block and drop
them, so that memory is ``O(block · V)`` in place of ``O(N · V)``, for one product with ``W`` more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Head", "blockwise_losses"]

_BLOCK = 1 << 22
"""Logits that exist at a time: 16 MiB in float32."""


@dataclass(frozen=True, eq=False)
class Head:
    """What logits are made of.

    Attributes
    ----------
    hidden
        Last hidden states, ``(B, T, M)``.
    weight
        Output embedding, ``(V, M)``.
    bias
        ``(V,)`` or ``None``.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def all_logits(self) -> Tensor:
        """The logits ``(B, T, V)``."""
        return F.linear(self.hidden, self.weight, self.bias)


def blockwise_losses(head: Head, label: Tensor) -> Tensor:
    """Loss of each token, in float32 at least.

    Parameters
    ----------
    head
        With hidden states ``(..., M)``.
    label
        Ids ``(...)`` that the logits there predict.

    Returns
    -------
    Tensor
        Of the shape of ``label``.
    """
    hidden = head.hidden.flatten(0, -2)
    losses: Any = _Blockwise.apply(hidden, head.weight, head.bias, label.flatten())
    return losses.view(label.shape)


class _Blockwise(torch.autograd.Function):
    """``(h, W, c, y) → losses (N,)``, logits made again in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, label: Tensor) -> Tensor:
        losses = [
            _gaps(hidden[block], weight, bias, label[block]).logsumexp(1)
            for block in _blocks(hidden, weight)
        ]
        return torch.cat(losses)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        hidden, weight, bias, label, losses = ctx.saved_tensors
        to_hidden, to_weight, to_bias, _ = ctx.needs_input_grad
        d_hidden: list[Tensor] = []
        d_weight = d_bias = None
        for block in _blocks(hidden, weight):
            gaps = _gaps(hidden[block], weight, bias, label[block])
            by = outer[block].unsqueeze(1)
            p = (gaps - losses[block].unsqueeze(1)).exp()
            d = (p * by).scatter_add(1, label[block].unsqueeze(1), -by).to(hidden.dtype)
            if to_hidden:
                d_hidden.append(d @ weight)
            if to_weight:
                part = _precise(d.T @ hidden[block])
                d_weight = part if d_weight is None else d_weight + part
            if to_bias:
                part = _precise(d.sum(0))
                d_bias = part if d_bias is None else d_bias + part
        return (
            torch.cat(d_hidden) if to_hidden else None,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(weight.dtype),
            None,
        )


def _blocks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    rows = max(1, _BLOCK // weight.shape[0])
    for start in range(0, len(hidden), rows):
        yield slice(start, start + rows)


def _gaps(hidden: Tensor, weight: Tensor, bias: Tensor | None, label: Tensor) -> Tensor:
    """``f_v − f_y`` ``(n, V)``; half precision is raised to float32 after the product."""
    f = _precise(F.linear(hidden, weight, bias))
    return f - f.gather(1, label.unsqueeze(1))


def _precise(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
