r"""A curvature that is block diagonal by layer, and its functions, as one kind of operator.

``C = ⊕_ℓ U_ℓ diag(Λ_ℓ) U_ℓᵀ``. Inverse, square root and any other function act on ``Λ`` alone:
``f(C) = ⊕_ℓ U_ℓ diag(f(Λ_ℓ)) U_ℓᵀ``, so that one eigendecomposition serves every damping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from bayesinf._task import Task
from bayesinf.curvature._bases import Basis, DenseBasis, KroneckerBasis, StandardBasis, precondition
from bayesinf.curvature._definite import NotPositiveDefiniteError
from bayesinf.curvature._layers import Layer
from bayesinf.curvature._operator import Factor, multiply
from bayesinf.curvature._rows import Rows

__all__ = ["Block", "Curvature", "Damping"]

Damping = float | Mapping[str, float]
"""λ, the same in every layer or by the layer's name."""


@dataclass(frozen=True)
class Block:
    """The curvature of one layer.

    Attributes
    ----------
    layer
        Its parameters.
    form
        ``"ekfac"``, ``"kfac"``, ``"diagonal"``, ``"dense"`` or ``"identity"``.
    basis
        ``U``.
    eigenvalues
        ``Λ`` ``(P, M)``, in units of the mean loss.
    """

    layer: Layer
    form: str
    basis: Basis
    eigenvalues: Tensor

    def trace(self) -> float:
        """Sum of the eigenvalues."""
        return float(self.eigenvalues.double().sum())

    def mean_eigenvalue(self) -> float:
        """Mean of ``Λ``, the unit of a relative damping."""
        return self.trace() / self.layer.size

    def dense(self) -> Tensor:
        """The curvature as a ``(P·M, P·M)`` matrix; for small layers."""
        eye = torch.eye(self.layer.size).to(self.eigenvalues)
        return self.apply(eye.view(-1, *self.layer.shape)).flatten(1)

    def apply(self, v: Tensor) -> Tensor:
        """Product with gradients ``(..., P, M)`` of this layer."""
        return self.basis.unrotate(self.basis.rotate(v) * self.eigenvalues)

    def precondition(self, rows: Rows) -> Rows:
        """Product with rows, which stay factored where that is possible."""
        return precondition(self.basis, self.eigenvalues, rows)

    def map(self, function: Callable[[Tensor], Tensor]) -> Block:
        """``f(C)``: the function applied to the eigenvalues."""
        return replace(self, eigenvalues=function(self.eigenvalues))


@dataclass(frozen=True)
class Curvature:
    """A block-diagonal symmetric operator on the selected parameters of a task.

    Made by :func:`bayesinf.fit_curvature`; ``inverse``, ``sqrt`` and ``map`` give further ones.
    Vectors are flat in the order of :meth:`Task.flatten`.

    Attributes
    ----------
    blocks
        One a layer.
    shapes
        Shapes of all parameters by name, in the flat order.
    info
        How it was made: ``fisher``, ``draws``, ``seed``, ``checkpoint``, …

    Examples
    --------
    >>> import torch, bayesinf as bi
    >>> x, y = torch.randn(20, 3), torch.randn(20, 1)
    >>> task = bi.Task(torch.nn.Linear(3, 1), bi.Gaussian(), train=(x, y), query=(x[:5], y[:5]))
    >>> curvature = bi.fit_curvature(task, fisher="enumerated")
    >>> v = torch.randn(task.dimension)
    >>> u = curvature.inverse(damping=0.01) @ v
    >>> bool(torch.allclose(curvature @ u + 0.01 * u, v, atol=1e-4))
    True
    """

    blocks: tuple[Block, ...]
    shapes: dict[str, tuple[int, ...]]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """``(d, d)``."""
        d = sum(math.prod(shape) for shape in self.shapes.values())
        return d, d

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, in the order of the blocks."""
        return tuple(block.layer for block in self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """Of the eigenvalues."""
        return self.blocks[0].eigenvalues.dtype

    @property
    def device(self) -> torch.device:
        """Where the eigenvalues are."""
        return self.blocks[0].eigenvalues.device

    def __getitem__(self, name: str) -> Block:
        for block in self.blocks:
            if block.layer.name == name:
                return block
        names = [block.layer.name for block in self.blocks]
        raise KeyError(f"no layer {name!r}; layers are {names}.")

    def apply(self, rows: Tensor) -> Tensor:
        """Product with every row of ``(..., d)``."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        lead = rows.shape[:-1]
        named = {
            name: part.reshape((*lead, *shape))
            for (name, shape), part in zip(
                self.shapes.items(), rows.split(sizes, dim=-1), strict=True
            )
        }
        out: dict[str, Tensor] = {}
        for block in self.blocks:
            out |= block.layer.unpack(block.apply(block.layer.pack(named)))
        return torch.cat([out[name].reshape(*lead, -1) for name in self.shapes], dim=-1)

    def __matmul__(self, v: Tensor) -> Tensor:
        return multiply(self, v)

    def precondition(self, rows: list[Rows]) -> list[Rows]:
        """Product with rows, one entry a layer; the entries of the list are replaced in turn."""
        for i, block in enumerate(self.blocks):
            rows[i] = block.precondition(rows[i])
        return rows

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """``f(C)``: a function applied to the eigenvalues of every block."""
        return replace(self, blocks=tuple(block.map(function) for block in self.blocks))

    def damped(self, damping: Damping) -> Self:
        """``C + λI``."""
        lam = self.dampings(damping)
        blocks = (b.map(partial(torch.add, other=lam[b.layer.name])) for b in self.blocks)
        return replace(self, blocks=tuple(blocks))

    def inverse(self, damping: Damping) -> Self:
        """``(C + λI)⁻¹``.

        Raises
        ------
        NotPositiveDefiniteError
            If ``C + λI`` is singular or indefinite in a layer, which it names.
        ValueError
            If a damping is negative, or dampings by layer do not name all layers.
        """
        damped = self.damped(damping)
        damped._require_positive()
        return damped.map(torch.reciprocal)

    def sqrt(self) -> Self:
        """The symmetric square root ``C^{1/2}``.

        Raises
        ------
        NotPositiveDefiniteError
            If an eigenvalue is negative.
        """
        self._require_positive(strictly=False)
        return self.map(torch.sqrt)

    def trace(self) -> float:
        """Sum of all eigenvalues."""
        return sum(block.trace() for block in self.blocks)

    def logdet(self) -> float:
        """Logarithm of the determinant.

        Raises
        ------
        NotPositiveDefiniteError
            If an eigenvalue is not positive: damp first, ``curvature.damped(λ).logdet()``.
        """
        self._require_positive()
        return sum(float(block.eigenvalues.double().log().sum()) for block in self.blocks)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws from ``N(0, C)``, ``(count, d)``.

        Laplace draws around a checkpoint, from ``N(0, (nβ (C + λI))⁻¹)``, are
        ``curvature.inverse(λ).sample(count, generator) / n_beta ** 0.5``.

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
        """``F`` with ``F Fᵀ = C``: the symmetric root.

        Raises
        ------
        NotPositiveDefiniteError
            If an eigenvalue is negative.
        """
        root = self.sqrt()
        return Factor(root.apply, root.apply)

    def tensors(self) -> dict[str, Tensor]:
        """Every number in it, by block and name."""
        return {
            f"{i}.{name}": tensor
            for i, block in enumerate(self.blocks)
            for name, tensor in {
                "eigenvalues": block.eigenvalues,
                **block.basis.tensors(),
            }.items()
        }

    def dense(self) -> Tensor:
        """The matrix ``(d, d)``; for small networks."""
        eye = torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        return self.apply(eye)

    def dampings(self, damping: Damping) -> dict[str, float]:
        """λ of every layer by name.

        Raises
        ------
        ValueError
            If a damping is negative or not finite, or a layer has none.
        """
        names = [block.layer.name for block in self.blocks]
        if isinstance(damping, Mapping):
            missing = sorted(set(names) ^ set(damping))
            if missing:
                raise ValueError(
                    f"a damping by layer must name exactly the layers {names}; missing or unknown: "
                    f"{missing}. `curvature.relative_damping(0.1)` makes one for all layers."
                )
            found = {name: float(damping[name]) for name in names}
        else:
            found = dict.fromkeys(names, float(damping))
        for name, lam in found.items():
            if not 0 <= lam < math.inf:
                raise ValueError(f"damping must be a finite number ≥ 0; got {lam} ({name}).")
        return found

    def relative_damping(self, fraction: float) -> dict[str, float]:
        """λ of every layer as a multiple of the mean of its ``Λ``, by name.

        The usual multiple is 0.1 (Grosse et al. 2023).

        Raises
        ------
        ValueError
            If the fraction is not positive, or a layer has zero curvature.
        """
        if not isinstance(fraction, (int, float)) or not 0 < fraction < math.inf:
            raise ValueError(
                f"relative_damping must be a positive number, a multiple of each layer's mean "
                f"eigenvalue such as 0.1; got {fraction!r}."
            )
        found = {block.layer.name: fraction * block.mean_eigenvalue() for block in self.blocks}
        for name, lam in found.items():
            if lam <= 0:
                raise ValueError(
                    f"layer {name!r} has zero curvature on the training set, so that "
                    f"relative_damping gives λ = 0 there. Usual causes: a layer that is never "
                    f"used, dead units, a saturated loss. Use damping= (absolute), or leave the "
                    f"layer out with Task(..., parameters=…)."
                )
        return found

    def require_task(self, task: Task) -> None:
        """Raise ``ValueError`` unless the curvature is of this task's parameters."""
        task.require_whole_parameters("a curvature")
        expected = {name: tuple(p.shape) for name, p in task.params.items()}
        if expected != self.shapes:
            odd = sorted(set(expected.items()) ^ set(self.shapes.items()))[:4]
            raise ValueError(
                f"this curvature belongs to other parameters than the task's: {odd} differ. Fit "
                f"one for this task: bi.fit_curvature(task, …)."
            )
        checkpoint = task.fingerprint()["checkpoint"]
        if self.info.get("checkpoint", checkpoint) != checkpoint:
            raise ValueError(
                f"this curvature was fitted at checkpoint {self.info['checkpoint']} and the task "
                f"is at {checkpoint}. Fit one for this task: bi.fit_curvature(task, …)."
            )

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Return the operator on another device or in another precision."""

        def move(block: Block) -> Block:
            tensors = {k: v.to(device, dtype) for k, v in block.basis.tensors().items()}
            values = block.eigenvalues.to(device, dtype)
            return replace(block, basis=make_basis(block.basis, tensors), eigenvalues=values)

        return replace(self, blocks=tuple(move(block) for block in self.blocks))

    def _require_positive(self, *, strictly: bool = True) -> None:
        for block in self.blocks:
            low = float(block.eigenvalues.min())
            if low < 0 or (strictly and low <= 0) or math.isnan(low):
                raise NotPositiveDefiniteError(
                    f"layer {block.layer.name!r} ({block.form}): the smallest eigenvalue is "
                    f"{low:.4g}, and it must be positive. Directions without curvature are usual "
                    f"(dead units, constant inputs, more parameters than examples): add damping, "
                    f"curvature.inverse(damping=λ) or curvature.damped(λ), λ > 0.",
                    low,
                )


def make_basis(like: Basis, tensors: Mapping[str, Tensor]) -> Basis:
    """Return a basis of the same kind from its tensors."""
    if isinstance(like, StandardBasis):
        return like
    if isinstance(like, DenseBasis):
        return DenseBasis(tensors["vectors"])
    return KroneckerBasis(tensors.get("q_s"), tensors.get("q_a"))
