r"""What a segment of a training run does to gradients, by its mean curvature.

In a segment with curvature ``H`` and time ``s = Σ_t η_t``, gradient flow carries a displacement on
by ``S = exp(−s(PH + wI))`` and turns a steady force ``−Pg`` into the displacement ``−R g`` with
``R = (I − S)(PH + wI)⁻¹ P``. ``P = D²`` is the optimiser's diagonal preconditioner (1 for SGD) and
``w`` the decay of weights. With ``M = D H D``, symmetric, ``S = D exp(−s(M + w)) D⁻¹`` and
``R = D (1 − exp(−s(M + w)))/(M + w) D``: functions of ``M``, which is what is fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesinf.curvature._bases import StandardBasis, precondition
from bayesinf.curvature._curvature import Block
from bayesinf.curvature._rows import Rows

__all__ = ["Segment", "carried", "responded"]


def carried(eigenvalues: Tensor, time: float) -> Tensor:
    """``exp(−sσ)``: what is left of a displacement after the time ``s``."""
    return torch.exp(-time * eigenvalues)


def responded(eigenvalues: Tensor, time: float) -> Tensor:
    """``(1 − exp(−sσ))/σ``, ``s`` at σ = 0: displacement by a unit force over the time ``s``."""
    x = time * eigenvalues
    flat = x == 0
    return time * torch.where(flat, 1.0, -torch.expm1(-x) / torch.where(flat, 1.0, x))


@dataclass(frozen=True)
class Segment:
    """A segment of a run.

    Attributes
    ----------
    blocks
        ``M`` by layer.
    decays
        ``w`` by layer.
    roots
        ``D`` by layer, ``(P, M)``; None for SGD.
    time
        ``s``.
    shares
        ``(C,)``: of checkpoints in the segment's means; sums to 1.
    """

    blocks: tuple[Block, ...]
    decays: tuple[float, ...]
    roots: tuple[Tensor, ...] | None
    time: float
    shares: np.ndarray

    def back(self, rows: Sequence[Rows]) -> list[Rows]:
        """``Sᵀ``: what gradients at the end of the segment are at its beginning."""
        found = []
        for i, (block, own) in enumerate(zip(self.blocks, rows, strict=True)):
            factors = carried(block.eigenvalues + self.decays[i], self.time)
            root = None if self.roots is None else self.roots[i]
            own = precondition(block.basis, factors, _scaled(root, own))
            found.append(_scaled(None if root is None else 1 / root, own))
        return found

    def response(self, rows: Sequence[Rows]) -> list[Rows]:
        """``R``, which is symmetric: what gradients at the end make of forces in the segment."""
        found = []
        for i, (block, own) in enumerate(zip(self.blocks, rows, strict=True)):
            factors = responded(block.eigenvalues + self.decays[i], self.time)
            root = None if self.roots is None else self.roots[i]
            found.append(_scaled(root, precondition(block.basis, factors, _scaled(root, own))))
        return found


def _scaled(factors: Tensor | None, rows: Rows) -> Rows:
    return rows if factors is None else precondition(StandardBasis(), factors, rows)
