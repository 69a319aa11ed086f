"""Symmetric linear operators on flat parameters: one interface for all curvatures and inverses.

Vectors are flat in the order of :meth:`Task.flatten`. :meth:`SymmetricOperator.apply` takes them as
rows ``(..., d)``; ``operator @ v`` as the columns of a matrix, ``(d,)`` or ``(d, k)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Factor", "SymmetricOperator", "multiply"]


@runtime_checkable
class SymmetricOperator(Protocol):
    """A symmetric ``(d, d)`` matrix known by its products."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(d, d)``."""
        ...

    def apply(self, rows: Tensor) -> Tensor:
        """Product with every row of ``(..., d)``."""
        ...

    def __matmul__(self, v: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Factor:
    """A matrix ``F`` with ``F Fᵀ`` a given operator: what draws and changes of coordinates need.

    Attributes
    ----------
    apply
        ``F`` times every row of ``(..., d)``.
    apply_transpose
        ``Fᵀ`` times every row.
    """

    apply: Callable[[Tensor], Tensor]
    apply_transpose: Callable[[Tensor], Tensor]


def multiply(operator: SymmetricOperator, v: Tensor) -> Tensor:
    """``operator @ v`` for ``v`` ``(d,)`` or ``(d, k)``, by the operator's ``apply``.

    Raises
    ------
    ValueError
        If the shape does not fit.
    """
    if v.ndim not in (1, 2) or len(v) != operator.shape[0]:
        raise ValueError(
            f"expected a vector ({operator.shape[0]},) or a matrix ({operator.shape[0]}, k); got "
            f"{tuple(v.shape)}. Rows of vectors (k, d) go through .apply(rows); named parameters "
            f"become a vector by task.flatten(named)."
        )
    return operator.apply(v) if v.ndim == 1 else operator.apply(v.T).T
