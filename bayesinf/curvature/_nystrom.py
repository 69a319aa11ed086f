r"""The inverse of a damped positive semidefinite matrix from products with a few random vectors.

With ``Ω`` ``(k, d)`` random orthonormal rows and ``Y = Ω C``, Nyström's approximation
``Ĉ = Yᵀ (Ω Yᵀ)⁺ Y`` is the largest matrix of its rank below ``C`` that has the same products with
``Ω``. From ``Ĉ = U diag(Λ) Uᵀ`` follows ``(Ĉ + λI)⁻¹ = I/λ − U diag(Λ/(λ(Λ + λ))) Uᵀ``.

Sources: Hataya & Yamada 2023, "Nyström method for accurate and scalable implicit differentiation";
Frangella, Tropp & Udell 2023, "Randomized Nyström preconditioning".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesinf.curvature._lanczos import placement
from bayesinf.curvature._operator import SymmetricOperator

__all__ = ["NystromApproximation", "nystrom_approximation"]


_ROUNDING = 10
"""Directions whose curvature is below that times rounding have none."""


@dataclass(frozen=True)
class NystromApproximation:
    """``Ĉ = Vᵀ diag(Λ) V``.

    Attributes
    ----------
    values
        ``Λ > 0``, descending: ``k``, or as many as are no rounding.
    vectors
        ``V``, as many orthonormal rows.
    """

    values: Tensor
    vectors: Tensor

    def solve(self, rows: Tensor, damping: float) -> Tensor:
        """``(Ĉ + λI)⁻¹`` times every row of ``(q, d)``."""
        share = self.values / (self.values + damping)
        return (rows - ((rows @ self.vectors.T) * share) @ self.vectors) / damping


def nystrom_approximation(
    operator: SymmetricOperator, k: int, *, seed: int = 0
) -> NystromApproximation:
    """Approximate a positive semidefinite operator by ``k`` products.

    Parameters
    ----------
    operator
        ``C`` ``(d, d)``; vectors are handed to it in its dtype and on its device.
    k
        Rank, ``1 ≤ k ≤ d``. ``Ω``, ``Y`` and ``V`` take ``k·d`` numbers each.
    seed
        Of ``Ω``.

    Raises
    ------
    ValueError
        If the rank cannot be, or a product is not finite.
    """
    d = operator.shape[0]
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= d:
        raise ValueError(
            f"rank must be an integer from 1 to the {d} parameters; got {k!r}. Each is one product "
            f"with the curvature."
        )
    dtype, device = placement(operator)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(d, k, generator=generator, dtype=torch.float64)
    test = torch.linalg.qr(drawn)[0].T.to(device, dtype)
    image = operator.apply(test)
    if not bool(torch.isfinite(image).all()):
        raise ValueError(
            "a product with the operator is not finite. Usual causes: NaN in the weights or the "
            "inputs, or numbers beyond the range of the dtype."
        )
    core = (test @ image.T).double()
    spectrum, mixing = torch.linalg.eigh((core + core.T) / 2)
    kept = spectrum > _ROUNDING * k * torch.finfo(dtype).eps * spectrum[-1]
    half = (mixing[:, kept] / spectrum[kept].sqrt()).T @ image.double()
    _, singular, vectors = torch.linalg.svd(half, full_matrices=False)
    return NystromApproximation(singular.square().to(dtype), vectors.to(dtype))
