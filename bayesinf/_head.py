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

_BLOCK, _ON_ACCELERATOR, _ROWS = 1 << 18, 1 << 24, 64
"""Logits that exist at a time, 1 MiB in float32 near a processor, 64 on an accelerator, which waits
for launches; but of so many tokens at least."""


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
        losses = []
        for block in _blocks(hidden, weight):
            f = _precise(F.linear(hidden[block], weight, bias))
            losses.append(F.cross_entropy(f, label[block], reduction="none"))
        return torch.cat(losses)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        hidden, weight, bias, label = ctx.saved_tensors
        wanted = tuple(ctx.needs_input_grad[:3])
        found = iter(_Derivatives.apply(hidden, weight, bias, label, outer, wanted))
        return *(next(found) if want else None for want in wanted), None


class _Derivatives(torch.autograd.Function):
    """``(h, W, c, y, g) → ∂(gᵀ losses)/∂(h, W, c)``, those that are wanted.

    A function of its own, because ``torch.func.grad`` records what a backward pass does, and would
    keep the logits of every block.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        label: Tensor,
        outer: Tensor,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor, ...]:
        return _derivatives(hidden, weight, bias, label, outer, wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:-1])
        ctx.wanted = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        """All logits at once: second derivatives are for few examples."""
        hidden, weight, bias, label, first = ctx.saved_tensors
        wanted = ctx.wanted

        def first_derivatives(h: Tensor, w: Tensor, c: Tensor | None, g: Tensor) -> Any:
            return _derivatives(h, w, c, label, g, wanted)

        if bias is None:
            pull = torch.func.vjp(
                lambda h, w, g: first_derivatives(h, w, None, g), hidden, weight, first
            )[1]
            d_hidden, d_weight, d_first = pull(outer)
            return d_hidden, d_weight, None, None, d_first, None
        pull = torch.func.vjp(first_derivatives, hidden, weight, bias, first)[1]
        d_hidden, d_weight, d_bias, d_first = pull(outer)
        return d_hidden, d_weight, d_bias, None, d_first, None


def _derivatives(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label: Tensor,
    outer: Tensor,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, ...]:
    """``d W``, ``dᵀ h`` and ``Σ d`` with ``d = g (softmax(f) − e_y)``, ``(N, V)``, by blocks."""
    rows: list[Tensor] = []
    sums: list[Tensor] = []
    for block in _blocks(hidden, weight):
        by, at = outer[block].unsqueeze(1), label[block]
        d = _precise(F.linear(hidden[block], weight, bias)).softmax(1) * by
        d = d.scatter_add_(1, at.unsqueeze(1), -by).to(hidden.dtype)
        if wanted[0]:
            rows.append(d @ weight)
        parts = [_precise(d.T @ hidden[block])] if wanted[1] else []
        parts += [_precise(d.sum(0))] if wanted[2] else []
        sums = [x + y for x, y in zip(sums, parts, strict=True)] if sums else parts
    whole = (torch.cat(rows),) if wanted[0] else ()
    return *whole, *(x.to(weight.dtype) for x in sums)


def _blocks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    numbers = _BLOCK if hidden.device.type == "cpu" else _ON_ACCELERATOR
    rows = max(_ROWS, numbers // weight.shape[0])
    for start in range(0, len(hidden), rows):
        yield slice(start, start + rows)


def _precise(x: Tensor) -> Tensor:
    """Half precision raised to float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
