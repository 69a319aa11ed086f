r"""EK-FAC deflated by the directions it misses.

With ``W = (P + λI)^{-1/2}``, ``P`` an approximate curvature, and eigenpairs ``(θ_i, u_i)`` of
``W (C + λI) W`` whose ``θ_i`` are farthest from 1,

    M = W [I + Σ_i (1/θ_i − 1) u_i u_iᵀ] W

has the exact inverse's value along these directions and EK-FAC's elsewhere: ``M (C + λI)`` has the
eigenvalue 1 for each of them, and the rest of the spectrum as it was. Large ``θ`` are directions
in which EK-FAC underestimates curvature, small ones those in which it overestimates it.

Source: Frangioni & Gentile 2001; Gower, Le Roux & Bach 2018, for preconditioners of this form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from bayesinf.curvature._definite import NotPositiveDefiniteError
from bayesinf.curvature._lanczos import Ends, top_eigenpairs
from bayesinf.curvature._operator import Factor, SymmetricOperator, multiply

__all__ = ["DeflatedInverse", "deflate"]


class _Root(SymmetricOperator, Protocol):
    """A positive definite operator with a symmetric root and a determinant."""

    def sqrt(self) -> _Root: ...

    def logdet(self) -> float: ...

    def tensors(self) -> dict[str, Tensor]: ...

    def to(self, device: torch.device | str) -> Self: ...


class Invertible(Protocol):
    """A curvature with damped inverses, such as :class:`Curvature`."""

    def inverse(self, damping: Any) -> _Root:
        """``(C + λI)⁻¹``."""
        ...


@dataclass(frozen=True)
class DeflatedInverse:
    """``W [I + Σ_i (1/θ_i − 1) u_i u_iᵀ] W``, an approximate ``(C + λI)⁻¹``.

    Attributes
    ----------
    root
        ``W = (P + λI)^{-1/2}``.
    vectors
        ``u_i``, orthonormal rows ``(r, d)``.
    values
        ``θ_i > 0``, float64, descending, ``(r,)``.
    root_logdet
        ``log det W²``.
    products
        Matrix–vector products that it took.
    """

    root: _Root
    vectors: Tensor
    values: Tensor
    root_logdet: float
    products: int

    @property
    def shape(self) -> tuple[int, int]:
        """``(d, d)``."""
        return self.root.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors."""
        return self.vectors.dtype

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self.vectors.device

    def apply(self, rows: Tensor) -> Tensor:
        """Product with every row of ``(..., d)``."""
        return self.root.apply(self._scale(self.root.apply(rows), 1 / self.values))

    def __matmul__(self, v: Tensor) -> Tensor:
        return multiply(self, v)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws from ``N(0, M)``, ``(count, d)``: ``W [I + Σ (θ_i^{-1/2} − 1) u_i u_iᵀ] ξ``.

        Parameters
        ----------
        count
            How many.
        generator
            On the operator's device.
        """
        noise = torch.randn(
            count, self.shape[0], generator=generator, dtype=self.dtype, device=self.device
        )
        return self.factor().apply(noise)

    def factor(self) -> Factor:
        """``F = W [I + Σ_i (θ_i^{-1/2} − 1) u_i u_iᵀ]``, with ``F Fᵀ = M``."""
        scales = self.values.rsqrt()
        return Factor(
            lambda rows: self.root.apply(self._scale(rows, scales)),
            lambda rows: self._scale(self.root.apply(rows), scales),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every number in it, by name."""
        root = {f"root.{name}": tensor for name, tensor in self.root.tensors().items()}
        return {**root, "vectors": self.vectors, "values": self.values}

    def to(self, device: torch.device | str) -> Self:
        """Return the operator on another device."""
        return replace(
            self,
            root=self.root.to(device),
            vectors=self.vectors.to(device),
            values=self.values.to(device),
        )

    def logdet(self) -> float:
        """Logarithm of the determinant, ``log det W² − Σ_i log θ_i``."""
        return self.root_logdet - float(self.values.log().sum())

    def _scale(self, rows: Tensor, factors: Tensor) -> Tensor:
        """``I + Σ_i (factor_i − 1) u_i u_iᵀ`` times rows."""
        return rows + ((rows @ self.vectors.T) * (factors - 1).to(rows)) @ self.vectors


def deflate(
    curvature: Invertible,
    operator: SymmetricOperator,
    *,
    damping: float,
    rank: int,
    which: Ends = "BE",
    tolerance: float = 0.1,
    iterations: int = 10,
    seed: int = 0,
) -> DeflatedInverse:
    """Correct the inverse of an approximate curvature along the directions it misses most.

    Parameters
    ----------
    curvature
        ``P``: :func:`bayesinf.fit_curvature` of the task.
    operator
        ``C``: :class:`GaussNewtonProduct` of the task.
    damping
        λ > 0.
    rank
        Number of directions at most, from 1 to ``d``. They take about four products each.
    which
        ``"BE"`` half from both ends of the spectrum, ``"LA"`` where curvature is underestimated
        alone, ``"SA"`` where it is overestimated alone.
    tolerance
        Relative accuracy of the ``θ_i``. Rough ones do: what is left of an error is small, and
        solvers see the true operator.
    iterations
        Restarts of the Lanczos iteration at most, each ``rank`` products or fewer. Directions that
        have converged by then are taken: where a spectrum ends in a crowd, none stands out.
    seed
        Of its start vector.

    Returns
    -------
    DeflatedInverse

    Raises
    ------
    ValueError
        If the rank, ``which`` or shapes cannot be.
    NotPositiveDefiniteError
        If ``P + λI`` or ``C + λI`` is not positive definite.
    RuntimeError
        If no direction converged.
    """
    inverse = curvature.inverse(damping)
    root = inverse.sqrt()
    pairs = top_eigenpairs(
        operator,
        rank,
        preconditioner_root=root,
        damping=damping,
        which=which,
        tolerance=tolerance,
        iterations=iterations,
        partial=True,
        seed=seed,
    )
    low = float(pairs.values[-1])
    if low <= 0:
        raise NotPositiveDefiniteError(
            f"the operator plus damping={damping:g} is not positive definite: preconditioned, it "
            f"has the eigenvalue {low:.4g}. Usual cause: a Hessian away from a minimum. Raise the "
            f"damping, or deflate by Gauss–Newton products.",
            low,
        )
    return DeflatedInverse(root, pairs.vectors, pairs.values, inverse.logdet(), pairs.products)
