r"""A change of coordinates that makes the directions of a posterior alike.

A kernel with a preconditioner ``P = S Sᵀ`` runs in the coordinates ``z``, ``w = w0 + S z``: its
drift is ``P ∇U`` and its noise ``S ξ``, with ``ξ ~ N(0, I)``. Where ``P`` is the inverse Hessian of
the potential, every direction of ``z`` has curvature 1 and steps of order 1 are right. The
stationary law is that of the kernel with the potential's Hessian ``A`` replaced by ``Sᵀ A S``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from bayesinf._task import Task
from bayesinf.curvature import Curvature, DeflatedInverse
from bayesinf.curvature._operator import Factor

__all__ = ["Preconditioner", "pull", "push", "summary"]


@dataclass(frozen=True)
class Preconditioner:
    r"""``P = M / nβ``, with ``M ≈ (C + λI)⁻¹`` an inverse curvature of the **mean** loss.

    Parameters
    ----------
    inverse
        ``M``: ``curvature.inverse(λ)``, or :func:`bayesinf.curvature.deflate`'s, which also knows
        the directions that EK-FAC misses and so allows longer steps.
    n_beta
        ``nβ`` of the posterior, whose Hessian is ``nβ (C + λI)``.

    Raises
    ------
    ValueError
        If ``n_beta`` is not positive.
    NotPositiveDefiniteError
        If the inverse is not positive definite.

    Examples
    --------
    >>> import torch, bayesinf as bi
    >>> x, y = torch.randn(20, 3), torch.randn(20, 1)
    >>> task = bi.Task(torch.nn.Linear(3, 1), bi.Gaussian(), train=(x, y), query=(x[:5], y[:5]))
    >>> curvature = bi.fit_curvature(task, fisher="enumerated")
    >>> kernel = bi.SGLD(0.2, preconditioner=bi.Preconditioner(curvature.inverse(0.01), n_beta=20))
    """

    inverse: Curvature | DeflatedInverse = field(repr=False)
    n_beta: float

    def __post_init__(self) -> None:
        if not 0 < self.n_beta < float("inf"):
            raise ValueError(
                f"n_beta must be positive and finite; got {self.n_beta}. At n_beta = 0 there is no "
                f"curvature to precondition with: leave the preconditioner out."
            )
        _ = self._factor

    @cached_property
    def _factor(self) -> Factor:
        return self.inverse.factor()

    def apply(self, rows: Tensor) -> Tensor:
        """``S`` times every row of ``(..., d)``."""
        return self._factor.apply(rows) * self.n_beta**-0.5

    def apply_transpose(self, rows: Tensor) -> Tensor:
        """``Sᵀ`` times every row of ``(..., d)``."""
        return self._factor.apply_transpose(rows) * self.n_beta**-0.5

    def require_task(self, task: Task) -> None:
        """Raise ``ValueError`` unless it is of this task's parameters."""
        if self.inverse.shape[0] != task.dimension:
            raise ValueError(
                f"the preconditioner is of {self.inverse.shape[0]} parameters and the task selects "
                f"{task.dimension}. Usual cause: a curvature of another network, or of other "
                f"parameters of it. Fit one for this task: bi.fit_curvature(task, …)."
            )
        if isinstance(self.inverse, Curvature):
            self.inverse.require_task(task)

    def to(self, device: torch.device | str) -> Self:
        """Return the preconditioner on another device."""
        if torch.device(device) == self.inverse.device:
            return self
        return type(self)(self.inverse.to(device), self.n_beta)

    def config(self) -> dict[str, Any]:
        """What identifies it: a digest of every number in it."""
        kind, digest = summary(self.inverse).values()
        return {"inverse": kind, "digest": digest, "n_beta": float(self.n_beta)}


def summary(operator: Curvature | DeflatedInverse) -> dict[str, str]:
    """Kind of an operator, and a digest of every number in it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(operator.tensors().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().data)
    return {"kind": type(operator).__name__, "digest": digest.hexdigest()[:16]}


def push(preconditioner: Preconditioner | None, rows: Tensor) -> Tensor:
    """``S`` times rows: a displacement in ``z`` as one of the weights."""
    return rows if preconditioner is None else preconditioner.apply(rows)


def pull(preconditioner: Preconditioner | None, rows: Tensor) -> Tensor:
    """``Sᵀ`` times rows: a gradient in the weights as one in ``z``."""
    return rows if preconditioner is None else preconditioner.apply_transpose(rows)
