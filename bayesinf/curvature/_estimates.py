"""Running sums from which the curvature of one layer is estimated."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bayesinf._task import Task
from bayesinf.curvature._bases import Basis, DenseBasis, StandardBasis, rotate_rows
from bayesinf.curvature._curvature import Block
from bayesinf.curvature._inner import squared_norms
from bayesinf.curvature._kronecker import outer_moment, second_moment
from bayesinf.curvature._kronecker_sums import KroneckerSums
from bayesinf.curvature._layers import Layer
from bayesinf.curvature._rows import Rows

__all__ = ["Estimate", "Form", "Sequence"]

Form = Literal["ekfac", "kfac", "diagonal", "dense", "identity"]
Sequence = Literal["expand", "reduce"]


class Estimate:
    """Sums of one layer's block over backward passes: first ``add``, then ``decompose``.

    A block of the form ``"ekfac"`` takes a second iteration, by ``correct``, for its eigenvalues.
    """

    def __init__(
        self, task: Task, layer: Layer, form: Form, sequence: Sequence, max_factor: int
    ) -> None:
        self.task, self.layer, self.form = task, layer, form
        self.factors: KroneckerSums | None = None
        if form in ("ekfac", "kfac"):
            self.factors = KroneckerSums(layer, sequence, max_factor, task)
        elif form == "dense":
            self.total = self._zeros(layer.size, layer.size)
        else:
            self.total = self._zeros(*layer.shape) if form == "diagonal" else self._zeros(1)

    def add(
        self, rows: Rows, mask: Tensor | None, weight: float, first: bool, share: float = 1.0
    ) -> None:
        """Add the rows ``(B, 1)`` of a backward pass.

        Parameters
        ----------
        rows, mask
            What layers saw, and the positions that count.
        weight
            Of the pass among those of the example.
        first
            Whether it is the first of its batch.
        share
            Of the checkpoint, where the mean over several is taken.
        """
        weight = weight * share
        if self.factors is not None:
            self.factors.add(rows, mask, weight, first, share)
        elif self.form == "dense":
            self.total += weight * outer_moment(rows)
        elif self.form == "diagonal":
            self.total += weight * second_moment(rows)
        else:
            self.total += weight * squared_norms([rows]).double().sum()

    def decompose(self) -> None:
        """Turn the sums into a basis and eigenvalues."""
        layer, n, dtype = self.layer, self.task.n, self.task.dtype
        self.basis: Basis = StandardBasis()
        if self.factors is not None:
            self.basis, values = self.factors.decompose(n)
        else:
            values = self.total / n
        self._require_finite(values)
        if self.form == "dense":
            values, vectors = torch.linalg.eigh((values + values.T) / 2)
            values = values.clamp_min(0).view(layer.shape)
            self.basis = DenseBasis(vectors.to(dtype).contiguous())
        if self.form == "identity":
            values = (values / layer.size).expand(layer.shape).contiguous()
        self.values = values.to(dtype)
        if self.form == "ekfac":
            self.factors, self.moment = None, self._zeros(*layer.shape)

    def correct(self, rows: Rows, weight: float, share: float = 1.0) -> None:
        """Add rows to the second moments in the basis, which replace K-FAC's eigenvalues."""
        self.moment += weight * share * second_moment(rotate_rows(self.basis, rows))

    def block(self) -> Block:
        """Return the estimate."""
        if self.form == "ekfac":
            self._require_finite(self.moment)
            self.values = (self.moment / self.task.n).to(self.task.dtype)
        return Block(self.layer, self.form, self.basis, self.values)

    def _require_finite(self, total: Tensor) -> None:
        if not bool(torch.isfinite(total).all()):
            raise ValueError(
                f"layer {self.layer.name!r}: gradients are finite, but their products overflow "
                f"{self.task.dtype}. Use a float64 model: model.double()."
            )

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.task.device)
