r"""The likelihood of causal language models: every token predicts the next one.

Shapes, used throughout this module (``B`` sequences, ``T`` positions, ``V`` vocabulary):

* outputs ``(B, T, V)``: logits as a causal language model returns them, those at ``t − 1``
  predicting token ``t``;
* targets ``(B, T)``: the ids of the sequence itself (the ``labels`` of Hugging Face), **not**
  shifted; what does not count (padding, the prompt of a response) holds ``ignore_index``;
* a token is **counted** when it has a predecessor (``t ≥ 1``) and is not ignored. Token losses
  stand at the position of the token that is predicted: entry ``t`` is ``−log p(y_t | y_<t)``, and
  0 where ``t`` is not counted.

In place of logits, a :class:`~bayesinf._head.Head` is taken too; of it, losses are computed a block
of tokens at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesinf._head import Head, blockwise_losses

__all__ = ["CausalLM"]


@dataclass(frozen=True)
class CausalLM:
    r"""Next-token cross-entropy, ``ℓ = −Σ_t log softmax(f_{t−1})_{y_t}`` over counted tokens.

    The shift happens inside: outputs and targets belong to the same input ids. The loss is the
    **sum** over tokens, not the mean that Hugging Face models return, so that it is the negative
    log-likelihood of the sequence and its Hessian in the logits the Fisher information.

    Parameters
    ----------
    ignore_index
        Value in the target of tokens that do not count. It never reaches the loss, and neither do
        the logits before it, finite or not.

    Examples
    --------
    >>> import torch, bayesinf as bi
    >>> likelihood = bi.CausalLM()
    >>> ids = torch.tensor([[5, 1, 4, -100]])
    >>> likelihood.token_mask(ids)
    tensor([[False,  True,  True, False]])
    >>> likelihood.loss(torch.zeros(1, 4, 8), ids) / torch.tensor(8.0).log()
    tensor([2.])
    """

    ignore_index: int = -100

    def check(self, outputs: Tensor | Head, target: Tensor) -> None:
        """Raise ``ValueError`` if outputs and target do not fit this likelihood."""
        outputs = _logits(outputs)
        if outputs.ndim != 3 or target.shape != outputs.shape[:2] or _is_not_integer(target):
            raise ValueError(
                f"CausalLM expects logits (B, T, V) and integer targets (B, T); got outputs "
                f"{tuple(outputs.shape)} and a {target.dtype} target {tuple(target.shape)}. Usual "
                f"causes: targets that were already shifted (T−1 of them: give the input ids "
                f"themselves, the shift happens inside), float ids (use `ids.long()`), or one "
                f"label per sequence (use Categorical())."
            )
        vocabulary = outputs.shape[2]
        counted = self.token_mask(target)
        ids = target.masked_fill(target == self.ignore_index, 0)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"CausalLM got token ids from {low} to {high} for a vocabulary of {vocabulary}. "
                f"Ids must lie in [0, V−1] or be ignore_index={self.ignore_index}; where padding "
                f"is marked by another number, name it: "
                f"CausalLM(ignore_index={low if low < 0 else high})."
            )
        empty = (~counted.any(1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"CausalLM: {len(empty)} of {len(target)} examples have no counted token, the "
                f"first is number {empty[0]}. A token counts when it is not ignore_index="
                f"{self.ignore_index} and has a token before it. Usual causes: a prompt that "
                f"fills the whole window, or sequences of one token; drop these examples."
            )

    def token_mask(self, target: Tensor) -> Tensor:
        """Which tokens count, ``(B, T)``; never the first of a sequence."""
        mask = target != self.ignore_index
        mask[:, 0] = False
        return mask

    def token_losses(self, outputs: Tensor | Head, target: Tensor) -> Tensor:
        """Loss of each token ``(B, T)``, 0 where it is not counted.

        Written as ``log Σ_v exp(f_v − f_y)``, which keeps the relative precision of small losses
        and of their gradients; where no gradient is taken, by one fused cross-entropy, which reads
        the logits once. Half precision is raised to float32 first.
        """
        if isinstance(outputs, Head):
            counted = self.token_mask(target)[:, 1:]
            hidden = outputs.hidden[:, :-1].masked_fill(~counted.unsqueeze(2), 0)
            head = Head(hidden, outputs.weight, outputs.bias)
            losses = blockwise_losses(head, target[:, 1:].masked_fill(~counted, 0))
            return F.pad(losses.masked_fill(~counted, 0), (1, 0))
        if not torch.is_grad_enabled():
            return self._fused(outputs, target)
        f, label, counted = self._predictions(outputs, target)
        gap = (f - f.gather(2, label)).masked_fill_(~counted.unsqueeze(2), 0)
        return F.pad(gap.logsumexp(2).masked_fill(~counted, 0), (1, 0))

    def loss(self, outputs: Tensor | Head, target: Tensor) -> Tensor:
        """Loss of each sequence ``(B,)``, summed over its counted tokens.

        By one fused cross-entropy over all positions, the last of which predicts nothing.
        """
        if isinstance(outputs, Head):
            return self.token_losses(outputs, target).sum(1)
        if not torch.is_grad_enabled():
            return self._fused(outputs, target).sum(1)
        counted = F.pad(self.token_mask(target)[:, 1:], (0, 1))
        label = F.pad(target[:, 1:], (0, 1)).masked_fill(~counted, -100)
        f = _precise(outputs).masked_fill(~counted.unsqueeze(2), 0)
        losses = F.cross_entropy(f.flatten(0, 1), label.flatten(), reduction="none")
        return losses.view(target.shape).sum(1)

    def _fused(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Token losses without a copy of the logits: those that are ignored may be NaN."""
        counted = F.pad(self.token_mask(target)[:, 1:], (0, 1))
        label = F.pad(target[:, 1:], (0, 1)).masked_fill(~counted, -100)
        f = _precise(outputs).flatten(0, 1)
        losses = F.cross_entropy(f, label.flatten(), reduction="none").view(target.shape)
        return F.pad(losses[:, :-1], (1, 0))

    def margin(self, outputs: Tensor | Head, target: Tensor) -> Tensor:
        """Log-odds of the tokens, ``log p/(1−p)``, summed over counted ones (TRAK, Park 2023)."""
        f, label, counted = self._predictions(outputs, target)
        f = f.masked_fill(~counted.unsqueeze(2), 0)
        others = f.scatter(2, label, float("-inf")).logsumexp(2)
        odds = f.gather(2, label).squeeze(2) - others
        return odds.masked_fill(~counted, 0).sum(1)

    def sample(self, outputs: Tensor | Head, target: Tensor, generator: torch.Generator) -> Tensor:
        """Draw counted tokens, each given the **true** tokens before it; the others stay.

        Random numbers are used for counted tokens only: padding does not change what is drawn.
        """
        counted, outputs = self.token_mask(target), _logits(outputs)
        probs = _precise(outputs[:, :-1])[counted[:, 1:]].softmax(-1)
        drawn = target.clone()
        drawn[counted] = torch.multinomial(probs, 1, generator=generator).squeeze(1)
        return drawn

    def fisher_factor(self, outputs: Tensor | Head, target: Tensor) -> Tensor:
        r"""Rows ``√p_v (e_v − p)`` ``(K, B, T, V)``, one per vocabulary entry and position.

        ``K = V ·`` the number of positions that count in any of the sequences, so that only small
        models can afford it; rows of a sequence that does not count a position are 0.
        """
        counted, outputs = self.token_mask(target)[:, 1:], _logits(outputs)
        p = _precise(outputs[:, :-1]).softmax(2)
        vocabulary, positions = p.shape[2], counted.any(0).nonzero().flatten().tolist()
        eye = torch.eye(vocabulary, dtype=p.dtype, device=p.device)
        rows = p.new_zeros(len(positions), vocabulary, *outputs.shape)
        for k, t in enumerate(positions):
            root = p[:, t].sqrt() * counted[:, t, None]  # (B, V)
            rows[k, :, :, t] = root.T.unsqueeze(2) * (eye.unsqueeze(1) - p[:, t])
        return rows.flatten(0, 1).to(outputs.dtype)

    def bregman(self, outputs: Tensor | Head, reference: Tensor | Head, target: Tensor) -> Tensor:
        """Bregman divergence in the outputs: Σ over counted tokens of KL(p_reference ‖ p)."""
        f, _, counted = self._predictions(outputs, target)
        r, _, _ = self._predictions(reference, target)
        ignored = ~counted.unsqueeze(2)
        log_p = f.masked_fill(ignored, 0).log_softmax(2)
        log_r = r.masked_fill(ignored, 0).log_softmax(2)
        return (log_r.exp() * (log_r - log_p)).sum((1, 2))

    def _predictions(self, outputs: Tensor | Head, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``(B, T−1, V)``, the ids ``(B, T−1, 1)`` they predict, and which of them count."""
        counted = self.token_mask(target)[:, 1:]
        label = target[:, 1:].masked_fill(~counted, 0)
        return _precise(_logits(outputs)[:, :-1]), label.unsqueeze(2), counted


def _is_not_integer(target: Tensor) -> bool:
    return target.is_floating_point() or target.is_complex() or target.dtype == torch.bool


def _logits(outputs: Tensor | Head) -> Tensor:
    return outputs.all_logits() if isinstance(outputs, Head) else outputs


def _precise(outputs: Tensor) -> Tensor:
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
