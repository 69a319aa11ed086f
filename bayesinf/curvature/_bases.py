r"""Orthonormal bases of a layer's parameters ``(P, M)``, in which a curvature is diagonal.

A curvature is ``U diag(Λ) Uᵀ`` with ``Λ`` ``(P, M)``. ``rotate`` is ``Uᵀ v`` and ``unrotate`` is
``U v``, for ``v`` ``(..., P, M)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from bayesinf.curvature._rows import Explicit, Factored, Indexed, Rows

__all__ = [
    "Basis",
    "DenseBasis",
    "KroneckerBasis",
    "StandardBasis",
    "precondition",
    "rotate_rows",
]


class Basis(Protocol):
    """An orthonormal basis of matrices ``(P, M)``."""

    def rotate(self, v: Tensor) -> Tensor:
        """``Uᵀ v``."""
        ...

    def unrotate(self, v: Tensor) -> Tensor:
        """``U v``."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What defines it, by name."""
        ...


@dataclass(frozen=True)
class StandardBasis:
    """The parameters themselves."""

    def rotate(self, v: Tensor) -> Tensor:
        """``v``."""
        return v

    def unrotate(self, v: Tensor) -> Tensor:
        """``v``."""
        return v

    def tensors(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class KroneckerBasis:
    """``U = Q_S ⊗ Q_A``, so that ``Uᵀ v`` is ``Q_Sᵀ V Q_A``.

    Attributes
    ----------
    q_s
        ``(P, P)``; with ``g`` groups ``(g, P/g, P/g)``; ``None`` for the identity.
    q_a
        ``(M, M)``; with ``g`` groups ``(g, M, M)``; ``None`` for the identity.
    """

    q_s: Tensor | None
    q_a: Tensor | None

    def rotate(self, v: Tensor) -> Tensor:
        """``Q_Sᵀ V Q_A``."""
        v, grouped = self._grouped(v)
        v = v if self.q_s is None else self.q_s.mT @ v
        v = v if self.q_a is None else v @ self.q_a
        return v.flatten(-3, -2) if grouped else v

    def unrotate(self, v: Tensor) -> Tensor:
        """``Q_S V Q_Aᵀ``."""
        v, grouped = self._grouped(v)
        v = v if self.q_s is None else self.q_s @ v
        v = v if self.q_a is None else v @ self.q_a.mT
        return v.flatten(-3, -2) if grouped else v

    def tensors(self) -> dict[str, Tensor]:
        """``q_s`` and ``q_a``, where they are not the identity."""
        both = {"q_s": self.q_s, "q_a": self.q_a}
        return {name: q for name, q in both.items() if q is not None}

    def _grouped(self, v: Tensor) -> tuple[Tensor, bool]:
        q = self.q_s if self.q_s is not None else self.q_a
        if q is None or q.ndim == 2:
            return v, False
        return v.unflatten(-2, (len(q), -1)), True


@dataclass(frozen=True)
class DenseBasis:
    """Any basis: ``vectors`` ``(P·M, P·M)`` in columns."""

    vectors: Tensor

    def rotate(self, v: Tensor) -> Tensor:
        """``Uᵀ v``."""
        return (v.flatten(-2) @ self.vectors).unflatten(-1, v.shape[-2:])

    def unrotate(self, v: Tensor) -> Tensor:
        """``U v``."""
        return (v.flatten(-2) @ self.vectors.mT).unflatten(-1, v.shape[-2:])

    def tensors(self) -> dict[str, Tensor]:
        """``vectors``."""
        return {"vectors": self.vectors}


def rotate_rows(basis: Basis, rows: Rows) -> Rows:
    """Rows in the coordinates of a basis, as factored as before where that is possible."""
    if isinstance(basis, StandardBasis):
        return rows
    if isinstance(basis, KroneckerBasis):
        q_s, q_a = basis.q_s, basis.q_a
        if isinstance(rows, Factored):
            values = rows.values if q_s is None else rows.values @ q_s
            return Factored(values, rows.a if q_a is None else rows.a @ q_a)
        if isinstance(rows, Indexed) and q_s is None:
            return replace(rows, values=rows.values if q_a is None else rows.values @ q_a)
    return Explicit(basis.rotate(rows.matrices()))


def precondition(basis: Basis, factors: Tensor, rows: Rows) -> Rows:
    """``U diag(f) Uᵀ`` times every row, ``f`` ``(P, M)``; rows of an embedding stay indexed."""
    if isinstance(rows, Indexed) and _keeps_index(basis):
        q_a = basis.q_a if isinstance(basis, KroneckerBasis) else None
        values = rows.values if q_a is None else rows.values @ q_a
        values = values * factors[rows.index].unsqueeze(1)
        return replace(rows, values=values if q_a is None else values @ q_a.mT)
    return Explicit(basis.unrotate(basis.rotate(rows.matrices()) * factors))


def _keeps_index(basis: Basis) -> bool:
    return isinstance(basis, StandardBasis) or (
        isinstance(basis, KroneckerBasis) and basis.q_s is None
    )
