r"""Kronecker algebra of one layer: plain tensor functions.

Shapes and conventions, used throughout the package's curvature code:

* a layer is a matrix of parameters ``(P, M)``, row-major when flattened (``p·M + m``);
* ``a`` ``(B, T, M)``: inputs of ``B`` examples at ``T`` positions, a constant 1 last where there is
  a bias; ``ds`` ``(B, T, P)``: derivatives of a per-example scalar in the layer's outputs;
* the gradient of example ``b`` is the matrix ``G_b = Σ_t ds_bt a_btᵀ``, ``(P, M)``;
* ``A = (1/n) Σ_b Σ_t a aᵀ`` ``(M, M)`` and ``S = (1/(nT)) Σ_b Σ_t ds dsᵀ`` ``(P, P)``;
  ``q_a``, ``q_s`` hold their eigenvectors in columns;
* the layer's curvature is ``S ⊗ A`` in the row-major order, in the eigenbasis the matrix ``Λ``
  ``(P, M)`` of eigenvalues: ``λ_S λ_Aᵀ`` for K-FAC, second moments of the rotated gradients for
  EK-FAC.

Sources: Martens & Grosse 2015 (K-FAC); Grosse & Martens 2016 (convolutions); George et al. 2018,
Eq. 7 (EK-FAC); Grosse et al. 2023, Eqs. 16-20 (damped inverse).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "covariance",
    "damped_inverse",
    "dense",
    "eigenbasis",
    "gradients",
    "rotate",
    "second_moment",
    "unrotate",
]

_CHUNK = 2**24
"""Most elements of explicit per-example gradients held at once."""


def covariance(x: Tensor) -> Tensor:
    """Sum of outer products ``Σ_b Σ_t x_bt x_btᵀ``, ``(M, M)``."""
    flat = x.flatten(0, 1)
    return flat.T @ flat


def eigenbasis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (not below 0, ascending) and eigenvectors of a covariance, in float64."""
    double = matrix.double()
    values, vectors = torch.linalg.eigh((double + double.T) / 2)
    return values.clamp_min(0), vectors


def gradients(a: Tensor, ds: Tensor) -> Tensor:
    """Per-example gradients ``Σ_t ds_t a_tᵀ``, ``(B, P, M)``."""
    if a.shape[1] == 1:
        return ds.transpose(1, 2) * a
    return ds.transpose(1, 2) @ a


def rotate(matrix: Tensor, q_a: Tensor, q_s: Tensor) -> Tensor:
    """``q_sᵀ V q_a``: a gradient ``(..., P, M)`` in the eigenbasis."""
    return q_s.T @ matrix @ q_a


def unrotate(matrix: Tensor, q_a: Tensor, q_s: Tensor) -> Tensor:
    """``q_s V q_aᵀ``: back from the eigenbasis."""
    return q_s @ matrix @ q_a.T


def second_moment(a: Tensor, ds: Tensor) -> Tensor:
    """Sum over examples of squared gradient entries, ``Σ_b (Σ_t ds_bt a_btᵀ)²``, ``(P, M)``.

    With ``a`` and ``ds`` rotated, ``a q_a`` and ``ds q_s``, this is ``n`` times the EK-FAC ``Λ``.
    At one position the square of an outer product is the outer product of squares, one GEMM.
    """
    if a.shape[1] == 1:
        return ds.squeeze(1).square().T @ a.squeeze(1).square()
    step = max(1, _CHUNK // (a.shape[2] * ds.shape[2]))
    total = a.new_zeros(ds.shape[2], a.shape[2])
    for start in range(0, len(a), step):
        part = slice(start, start + step)
        total += gradients(a[part], ds[part]).square().sum(0)
    return total


def damped_inverse(
    matrix: Tensor, q_a: Tensor, q_s: Tensor, eigenvalues: Tensor, damping: float
) -> Tensor:
    """``(C + λI)⁻¹`` times gradients ``(..., P, M)``: ``q_s [(q_sᵀ V q_a) ⊘ (Λ + λ)] q_aᵀ``."""
    return unrotate(rotate(matrix, q_a, q_s) / (eigenvalues + damping), q_a, q_s)


def dense(q_a: Tensor, q_s: Tensor, eigenvalues: Tensor) -> Tensor:
    """The layer's curvature as a matrix ``(P·M, P·M)``; for small layers."""
    basis = torch.kron(q_s.contiguous(), q_a.contiguous())
    return (basis * eigenvalues.flatten()) @ basis.T
