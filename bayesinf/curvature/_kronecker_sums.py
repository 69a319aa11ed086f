r"""Kronecker factors of one layer: running sums of ``A`` and ``S``, and their eigenbases.

``A = (1/n) Σ_b Σ_t a aᵀ`` ``(M, M)`` and ``S = (1/N) Σ_b Σ_t ds dsᵀ`` ``(P, P)``, ``N`` positions
in all, so that ``S ⊗ A`` estimates the layer's curvature. By kind of rows:

* factored: as above (grouped: in every group);
* indexed: the roles are exchanged, since what varies with the label is the row of the token:
  ``S`` is the diagonal of token frequencies, ``A`` the covariance of derivatives;
* matrices: ``A = Σ GᵀG``, ``S = Σ GGᵀ``, scaled to the right trace.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesinf._task import Task
from bayesinf.curvature._bases import KroneckerBasis
from bayesinf.curvature._kronecker import eigenbasis
from bayesinf.curvature._layers import Layer
from bayesinf.curvature._rows import Factored, Grouped, Indexed, Rows

__all__ = ["KroneckerSums"]

_BLOCK = 128
"""Columns at a time of a symmetric product."""


@dataclass
class _Side:
    """Sum of a factor's outer products, or of its diagonal."""

    size: int
    diagonal: bool
    groups: int
    like: Tensor

    def __post_init__(self) -> None:
        lead = (self.groups,) if self.groups > 1 else ()
        shape = (*lead, self.size) if self.diagonal else (*lead, self.size, self.size)
        self.total = self.like.new_zeros(shape)

    def add(self, x: Tensor, weight: float = 1.0) -> None:
        """Add ``Σ x xᵀ`` over the rows of ``(N, size)``, or of ``(N, g, size)``."""
        if self.diagonal:
            self.total += weight * x.square().sum(0)
        elif x.ndim == 3:
            self.total += weight * torch.einsum("ngi,ngj->gij", x, x)
        else:
            self.total += weight * _gram(x)

    def decompose(self) -> tuple[Tensor, Tensor | None]:
        """Eigenvalues and eigenvectors (``None``: the identity)."""
        return (self.total, None) if self.diagonal else eigenbasis(self.total)


def _gram(x: Tensor) -> Tensor:
    """``xᵀ x``: the upper triangle by blocks of columns, then mirrored."""
    size = x.shape[1]
    out = x.new_empty(size, size)
    for start in range(0, size, _BLOCK):
        where = slice(start, start + _BLOCK)
        torch.mm(x[:, where].T, x[:, start:], out=out[where, start:])
    return out.triu() + out.triu(1).T


class KroneckerSums:
    """Sums for the Kronecker factors of one layer."""

    def __init__(self, layer: Layer, sequence: str, max_factor: int, task: Task) -> None:
        rows, columns = layer.shape[0] // layer.groups, layer.shape[1]
        like = torch.zeros((), dtype=torch.float64, device=task.device)
        index = layer.kind == "embedding"
        module = task.module.get_submodule(layer.sites[0]) if index else None
        self.padding = getattr(module, "padding_idx", None)
        self.layer, self.sequence = layer, sequence
        self.a = _Side(columns, columns > max_factor, layer.groups, like)
        self.s = _Side(rows, index or rows > max_factor, layer.groups, like)
        self.dtype, self.positions = task.dtype, 0.0
        self.squares = like.new_zeros(layer.groups)
        self.matrices = False

    def add(
        self, rows: Rows, mask: Tensor | None, weight: float, first: bool, share: float = 1.0
    ) -> None:
        """Add the rows ``(B, 1)`` of a backward pass; inputs count in the first of a batch.

        ``share`` is how much the batch itself counts, ``weight`` its share and that of the pass.
        """
        if isinstance(rows, Indexed):
            self._add_indexed(rows, mask, weight, first, share)
        elif isinstance(rows, (Factored, Grouped)):
            self._add_factored(rows, mask, weight, first, share)
        else:
            self._add_matrices(rows, weight)

    def decompose(self, n: int) -> tuple[KroneckerBasis, Tensor]:
        """Return the basis and the eigenvalues ``λ_S λ_Aᵀ`` ``(P, M)`` of K-FAC."""
        values_a, q_a = self.a.decompose()
        values_s, q_s = self.s.decompose()
        values = values_s.unsqueeze(-1) * values_a.unsqueeze(-2)  # (P, M) or (g, P/g, M)
        values = values.reshape(self.layer.groups, -1, self.layer.shape[1])
        scale = self.squares if self.matrices else torch.full_like(self.squares, self.positions)
        scale = n * torch.where(scale > 0, scale, 1.0)
        q_s, q_a = (None if q is None else q.to(self.dtype).contiguous() for q in (q_s, q_a))
        basis = KroneckerBasis(q_s, q_a)
        return basis, (values / scale.view(-1, 1, 1)).reshape(self.layer.shape)

    def _add_factored(
        self,
        rows: Factored | Grouped,
        mask: Tensor | None,
        weight: float,
        first: bool,
        share: float,
    ) -> None:
        a, ds = rows.a, rows.values.squeeze(1)  # (B, T, …)
        keep = _of_calls(mask, a.shape[:2])
        count = a.shape[0] * a.shape[1] if keep is None else int(keep.sum())
        if self.sequence == "reduce":
            count, ds = a.shape[0], ds.sum(1, keepdim=True)
            a = _mean(a, keep) if first else a
        elif keep is not None:
            a, ds = (a[keep].unsqueeze(0) if first else a), ds[keep].unsqueeze(0)
        if first:
            self.positions += share * count
            self.a.add(a.flatten(0, 1), share)
        self.s.add(ds.flatten(0, 1), weight)

    def _add_indexed(
        self, rows: Indexed, mask: Tensor | None, weight: float, first: bool, share: float
    ) -> None:
        index, ds = rows.index, rows.values.squeeze(1)
        keep = _of_calls(mask, index.shape)
        if self.padding is not None:
            words = index != self.padding
            keep = words if keep is None else keep & words
        if keep is not None:
            index, ds = index[keep], ds[keep]
        if first:
            self.positions += share * index.numel()
            self.s.total += share * torch.bincount(index.flatten(), minlength=rows.size)
        self.a.add(ds.reshape(-1, ds.shape[-1]), weight)

    def _add_matrices(self, rows: Rows, weight: float) -> None:
        self.matrices = True
        for _, part in rows.chunks():
            g = part.matrices().squeeze(1).unflatten(1, (self.layer.groups, -1))  # (B, g, P/g, M)
            self.squares += weight * g.double().square().sum((0, 2, 3))
            self.a.add(self._rows(g.permute(0, 2, 1, 3)), weight)
            self.s.add(self._rows(g.permute(0, 3, 1, 2)), weight)

    def _rows(self, x: Tensor) -> Tensor:
        """``(B, N, g, size)`` as ``(B·N, g, size)``, without ``g`` where there is one group."""
        x = x.flatten(0, 1)
        return x.squeeze(1) if self.layer.groups == 1 else x


def _of_calls(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The mask of positions ``(B, c·T)`` of ``c`` calls; ``None`` if they are others."""
    if mask is None or mask.shape[0] != shape[0] or shape[1] % mask.shape[1]:
        return None
    return mask.repeat(1, shape[1] // mask.shape[1])


def _mean(a: Tensor, keep: Tensor | None) -> Tensor:
    """Mean over the positions that count, ``(B, 1, …)``."""
    if keep is None:
        return a.mean(1, keepdim=True)
    weights = keep.to(a) / keep.sum(1, keepdim=True).clamp_min(1)
    return (a * weights.view(*weights.shape, *[1] * (a.ndim - 2))).sum(1, keepdim=True)
