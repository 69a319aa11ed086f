"""How draws are observed: in chunks of bounded memory, by length, a number an example or a token.

Shapes: positions ``(C, d)``; what is observed of a group ``(C, N)``, ``N`` examples or tokens.

**Length buckets.** Of right-padded sequences (a dict of inputs with an ``attention_mask (B, T)`` of
ones and then zeros) the padding is cut off: sequences are observed sorted by length, in chunks as
long as their longest, rounded up to one of eight lengths, so that computations recorded for a shape
are few. Whether padding can be cut off without effect is measured once, on the shortest sequence.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bayesinf._data import Batch, trimmed
from bayesinf._gradients import ChainFunctions
from bayesinf._head import Head
from bayesinf._plan import Plan
from bayesinf._task import Measurement, Task
from bayesinf._tokens import token_losses

__all__ = ["Observer", "PaddingWarning", "fitting"]

_NEAR_VALUES, _DEVICE_VALUES = 1 << 22, 1 << 27
_STATES = 16
_LENGTHS = 8
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


class PaddingWarning(UserWarning):
    """Padding changes the losses of a network."""


@dataclass(frozen=True)
class Chunk:
    """Examples that go forward together.

    ``where``: their positions; ``length``: what they are cut to, or None; ``keep``: which of their
    tokens count, in the flat ``B·T``, or None for a number an example.
    """

    where: Tensor | slice
    length: int | None
    keep: Tensor | None


class Observer:
    """Observes the examples of a group.

    Parameters
    ----------
    plan
        What is observed.
    group
        ``"train"`` or ``"query"``.
    limit
        Examples at a time, at most.

    Attributes
    ----------
    whole
        Whether it observes all losses of a split in their order, a number an example.

    Warns
    -----
    PaddingWarning
        If padding changes the loss of a sequence, so that it cannot be cut off.
    """

    def __init__(self, plan: Plan, group: str, limit: int) -> None:
        self.group, self.task = group, plan.posterior.task
        self.axis = plan.axis(group)
        self.measurements = plan.measurements[group]
        self.by_token = group in plan.token_masks
        lengths = _rounded_lengths(self.task, group, plan.observed[group])
        self._order = None if lengths is None else np.argsort(lengths, kind="stable")
        self.chunks = (
            self._plain(plan, limit) if lengths is None else self._sorted(plan, limit, lengths)
        )
        self.whole = not self.by_token and isinstance(self.chunks[0].where, slice)

    def __call__(self, functions: ChainFunctions, position: Tensor) -> dict[str, np.ndarray]:
        """Values ``(C, N)`` of each measurement at each position, by their names in a store."""
        wanted: list[Measurement] = [
            token_losses if self._of_tokens(name) else measurement
            for name, measurement in self.measurements.items()
        ]
        parts: dict[str, list[Tensor]] = {name: [] for name in self.measurements}
        for chunk in self.chunks:
            batch = trimmed(self.task.examples(self.group).batch(chunk.where), chunk.length)
            found = functions.observe(position, batch, wanted)
            for name, values in zip(self.measurements, found, strict=True):
                keep = chunk.keep if self._of_tokens(name) else None
                parts[name].append(values if keep is None else values[:, keep])
        return {
            f"{self.axis.dim if self._of_tokens(name) else self.group}/{name}": self._restored(
                torch.cat(values, dim=1).float().cpu().numpy(), self._of_tokens(name)
            )
            for name, values in parts.items()
        }

    def _of_tokens(self, name: str) -> bool:
        return self.by_token and name == "loss"

    def _restored(self, values: np.ndarray, tokens: bool) -> np.ndarray:
        """Put what was observed by length back in order."""
        if self._order is None:
            return values
        out = np.empty_like(values)
        out[:, self.axis.tokens(self._order) if tokens else self._order] = values
        return out

    def _plain(self, plan: Plan, limit: int) -> list[Chunk]:
        chunks, done, n = [], 0, len(plan.observed[self.group])
        for where in plan.chunks(self.group, limit):
            size = len(range(n)[where]) if isinstance(where, slice) else len(where)
            chunks.append(Chunk(where, None, self._keep(plan, np.arange(done, done + size), None)))
            done += size
        return chunks

    def _sorted(self, plan: Plan, limit: int, lengths: np.ndarray) -> list[Chunk]:
        assert self._order is not None
        observed, chunks = plan.observed[self.group], []
        for start in range(0, len(observed), limit):
            own = self._order[start : start + limit]
            length = int(lengths[own].max())
            keep = self._keep(plan, own, length)
            chunks.append(Chunk(torch.from_numpy(observed[own]), length, keep))
        return chunks

    def _keep(self, plan: Plan, own: np.ndarray, length: int | None) -> Tensor | None:
        """Which of the tokens of some observed examples count."""
        if not self.by_token:
            return None
        masks = np.stack([plan.token_masks[self.group][i][:length] for i in own])
        return torch.from_numpy(np.flatnonzero(masks)).to(self.task.device)


def fitting(task: Task, limit: int, chains: int) -> int:
    """Examples, up to ``limit``, whose outputs of all chains at once stay near the processor.

    An accelerator takes as many as half a gigabyte holds: there, small chunks cost their launches.
    A language model's logits are most of what it computes in bytes; read again from memory for
    the losses, they cost more than the products that they come from. Where logits are never made,
    it is what layers compute on their way, a few tens of times the hidden states.
    """
    with torch.no_grad():
        outputs = task.outputs(task.params, task.train.batch(slice(0, 1)), head=True)
    if isinstance(outputs, Head):
        values = _STATES * outputs.hidden.numel()
    else:
        values = sum(leaf.numel() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
    most = _NEAR_VALUES if task.device.type == "cpu" else _DEVICE_VALUES
    return max(1, min(limit, most // max(1, values * chains)))


def _rounded_lengths(task: Task, group: str, observed: np.ndarray) -> np.ndarray | None:
    """Length that each sequence can be cut to, one of a few; None where nothing is to be cut."""
    longest, found = 0, []
    for index in torch.from_numpy(observed).split(1024):
        batch = task.examples(group).batch(index)
        lengths = _lengths(task, batch)
        if lengths is None:
            return None
        longest = batch[0]["attention_mask"].shape[1]
        found.append(lengths)
    step = -(-longest // _LENGTHS)
    lengths = np.minimum(longest, -(-np.concatenate(found) // step) * step)
    if lengths.min() == longest:
        return None
    return lengths if _can_be_cut(task, group, observed, lengths) else None


def _lengths(task: Task, batch: Batch) -> np.ndarray | None:
    """Positions of each sequence up to the last that is attended to or counts."""
    inputs, target = batch
    mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not isinstance(target, Tensor):
        return None
    there = mask != 0
    lengths = there.sum(1)
    place = torch.arange(mask.shape[1], device=mask.device)
    if not torch.equal(there, place < lengths[:, None]):
        return None
    if target.ndim > 1:
        counted = getattr(task.likelihood, "token_mask", None)
        if counted is None or target.shape != mask.shape or target.is_floating_point():
            return None
        lengths = torch.maximum(lengths, (counted(target) * (place + 1)).amax(1))
    result: np.ndarray = lengths.clamp_min(1).cpu().numpy()
    return result


def _can_be_cut(task: Task, group: str, observed: np.ndarray, lengths: np.ndarray) -> bool:
    """Whether the shortest sequence has the same loss without its padding; warns if not."""
    shortest = int(lengths.argmin())
    batch = task.examples(group).batch(torch.from_numpy(observed[shortest : shortest + 1]))
    with torch.no_grad():
        whole = float(task.losses(task.params, batch)[0])
        cut = float(task.losses(task.params, trimmed(batch, int(lengths[shortest])))[0])
    if abs(cut - whole) <= _TOLERANCE.get(task.module_dtype, 0.05) * max(1.0, abs(whole)):
        return True
    example = task.examples(group).ids[observed[shortest : shortest + 1]].tolist()[0]
    warnings.warn(
        f"the loss of {group} example {example!r} is {whole:.6g}, and {cut:.6g} without its "
        f"padding: the network does not take attention_mask into account, and what it computes "
        f"depends on how far a batch is padded. Padding is kept as it is given.",
        PaddingWarning,
        stacklevel=2,
    )
    return False
