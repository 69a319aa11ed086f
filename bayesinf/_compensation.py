r"""How far batches without replacement make up for their own noise.

Batches of one epoch differ in opposite directions: two of them have noise of correlation
``−B/(n − B)``, and what relaxes slower than an epoch feels their average, which has none. With
``h_t`` a kernel's response to one kick of the gradient, in a direction of given curvature, white
noise of variance ``v`` gives a position the variance ``v Σ_t h_t²``; noise of epochs of ``K``
batches gives it the share

    f = [R_0 − 2 B/(n − B) Σ_{0<l<K} (1 − l/K) R_l] / R_0,       R_l = Σ_t h_t h_{t+l}

of that, on average over the places of an epoch, since two steps ``l`` apart lie in one epoch with
probability ``1 − l/K``. The response is had by letting the kernel itself take steps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesinf._rng import BatchStream

__all__ = ["uncompensated_share"]

_EPOCHS = 20
_STEPS = 5000


@dataclass
class _Line:
    """A potential ``a z²/2`` in one dimension, for every curvature a chain; the gradient kicked."""

    curvature: Tensor
    kick: float = 0.0

    def grad(self, position: Tensor, batch: Tensor | None = None) -> Tensor:
        return self.curvature * position + self.kick

    def loss_grad(self, position: Tensor, batch: Tensor | None) -> Tensor:
        return self.grad(position)

    def assemble(self, position: Tensor, loss_grad: Tensor, batch: Tensor | None) -> Tensor:
        return loss_grad


class _Silence:
    """Randomness that is always 0."""

    def normal_like(self, position: Tensor) -> Tensor:
        return torch.zeros_like(position)


def response(sampler: Any, curvature: Tensor, steps: int) -> np.ndarray:
    """Positions ``(steps, J)`` after a unit kick of the gradient of one step, for ``J`` curvatures.

    In the kernel's own coordinates, in which it has no preconditioner.
    """
    plain = sampler
    if "preconditioner" in {f.name for f in fields(sampler)}:
        plain = replace(sampler, preconditioner=None)
    line: Any = _Line(curvature.double()[:, None])
    rng: Any = _Silence()
    zero = torch.zeros_like(line.curvature)
    state = plain.init(zero, rng)
    if "square" in state:  # a preconditioner that is frozen
        state = {"position": zero, "scale": torch.ones_like(zero)}
    state, _ = plain.step(state, line, None, rng)  # whatever it keeps for the next step
    rows = []
    for t in range(steps + 1):
        line.kick = float(t == 0)
        state, _ = plain.step(state, line, None, rng)
        rows.append(state["position"][:, 0])
    return torch.stack(rows).numpy()


def uncompensated_share(sampler: Any, stream: BatchStream, curvature: Tensor) -> Tensor:
    """``f (J,)`` in [0, 1] for directions of curvature ``ã (J,)``; 1 for weighted batches.

    A systematic sample compensates, too, but for what its counts are rounded by: it counts as
    white.
    """
    one = torch.ones(len(curvature), dtype=torch.float64)
    length = min(part.length for part in stream.parts)
    if length == 1 or stream.parts[0].cumulated is not None:
        return one
    opposed = min(part.count / (len(part.members) - part.count) for part in stream.parts)
    h = response(sampler, curvature, min(_EPOCHS * length, _STEPS))
    lags = np.arange(1, min(length, len(h)))
    products = np.stack([(h[l:] * h[:-l]).sum(0) for l in lags])  # noqa: E741
    total = (h**2).sum(0)
    share = 1 - 2 * opposed * ((1 - lags / length) @ products) / total
    return torch.from_numpy(share).clamp(0, 1)
