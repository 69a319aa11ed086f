r"""Objectives around one checkpoint, many at once, and the curvature that they share.

Row ``c`` of ``C`` is a function of the ``d`` selected parameters,

    F_c(w) = Σ_i a_ci ℓ_i(w) + Σ_i b_i D_i(w) + (λ_c/2)‖w − ws‖² + (κ_c/2)‖w‖²

with ``ws`` the checkpoint and ``D_i(w) = D(h(w, x_i), h(ws, x_i))`` the Bregman divergence of the
loss in the outputs. Everything is in float64 and deterministic: a row does not depend on which
others are computed beside it, and the examples of the divergence are the same for all rows.

All rows stay near one point, so that one approximation of the curvature serves them all: a
randomised Nyström approximation ``U Λ Uᵀ`` of the Gauss–Newton matrix
``G = Σ_i b_i J_iᵀ (∇²_f ℓ_i) J_i``, which is the Hessian of the divergence at ``ws`` (Frangella,
Tropp & Udell 2021, "Randomized Nyström preconditioning"). It is the metric of the descent
(:mod:`bayesinf.evaluation._descent`) and preconditions the linear response.

Shapes: positions, gradients and vectors ``(C, d)``; weights of losses ``(C, B)`` over the ``B``
examples in use; values ``(C,)``; measurements ``(C, Q)`` of all queries.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from bayesinf._data import Batch
from bayesinf._gradients import VectorizationWarning
from bayesinf._likelihoods import require
from bayesinf._task import Measurement, Task

__all__ = ["MOST_ROWS", "Metric", "Neighbourhood", "Objective", "fit_metric", "respond"]

MOST_ROWS = 64
"""Rows that are computed together."""

_VECTORISED_PARAMETERS = 1_000_000
_ROW_EXAMPLES = 2**14  # rows × examples of a pass: large matrix products that still fit the cache
_QUERIES = 1000


@dataclass(frozen=True)
class Objective:
    """Coefficients of ``C`` objectives; see the module.

    Attributes
    ----------
    losses
        ``a``, ``(C, B)``.
    divergence
        ``b``, ``(B,)``; None where there is no divergence.
    proximity, decay
        ``λ`` and ``κ``, ``(C,)``.
    """

    losses: Tensor
    divergence: Tensor | None
    proximity: Tensor
    decay: Tensor

    def __len__(self) -> int:
        return len(self.losses)

    def rows(self, index: Tensor | slice) -> Objective:
        """Return some of the objectives."""
        return Objective(
            self.losses[index], self.divergence, self.proximity[index], self.decay[index]
        )


class Neighbourhood:
    """A checkpoint in float64 with the examples in use: values, gradients, curvature around it.

    Parameters
    ----------
    task
        The task; converted to float64.
    positions
        Positions of the training examples in use; all by default.

    Attributes
    ----------
    center : Tensor
        ``ws``, ``(d,)``.
    forward_examples, backward_examples : int
        Examples passed through the network so far. A product with the curvature counts twice.

    Raises
    ------
    NotImplementedError
        If the likelihood has no ``bregman``.
    """

    def __init__(self, task: Task, positions: Tensor | None = None) -> None:
        self._bregman = require(task.likelihood, "bregman", "a proximal Bregman response")
        self.task = task.to(dtype=torch.float64)
        self.center = self.task.flatten(self.task.params)
        self.positions = torch.arange(task.n) if positions is None else positions
        self.forward_examples = self.backward_examples = 0
        self._vectorised = task.dimension <= _VECTORISED_PARAMETERS
        with torch.no_grad():
            self._reference = torch.cat(
                [self.task.outputs(self.task.params, self._batch(w)) for w in self._chunks(1)]
            )

    def value_and_grad(self, objective: Objective, position: Tensor) -> tuple[Tensor, Tensor]:
        """Values ``(C,)`` and gradients ``(C, d)``."""
        grads, values = torch.zeros_like(position), position.new_zeros(len(position))
        for where in self._chunks(len(position)):
            divergence = self._divergence(objective.divergence, where)
            batch = self._batch(where)

            def one(
                w: Tensor,
                a: Tensor,
                batch: Batch = batch,
                divergence: Callable[[Tensor, Batch], Tensor] = divergence,
            ) -> Tensor:
                outputs = self.task.outputs(self.task.unflatten(w), batch)
                loss = self.task.likelihood.loss(outputs, batch[1])
                return a @ loss + divergence(outputs, batch)

            g, v = self._each(grad_and_value(one), position, objective.losses[:, where])
            grads += g
            values += v
        self._count(len(position))
        offset = position - self.center
        values += 0.5 * objective.proximity * offset.square().sum(1)
        values += 0.5 * objective.decay * position.square().sum(1)
        grads += objective.proximity[:, None] * offset + objective.decay[:, None] * position
        return values, grads

    def loss_gradients(self, weights: Tensor) -> Tensor:
        """Return ``Σ_i a_ci ∇ℓ_i(ws)``, ``(C, d)``, for weights ``(C, B)``.

        Raises
        ------
        ValueError
            If the gradient of an example is not finite, which it names.
        """
        rows = []
        for part in weights.split(MOST_ROWS):
            none = part.new_zeros(len(part))
            at = self.center.expand(len(part), -1)
            rows.append(self.value_and_grad(Objective(part, None, none, none), at)[1])
        found = torch.cat(rows)
        if not bool(torch.isfinite(found).all()):
            self._name_the_example()
        return found

    def curvature(self, divergence: Tensor, vectors: Tensor) -> Tensor:
        """Products ``G v`` ``(C, d)`` with the Gauss–Newton matrix at the checkpoint."""
        products = torch.zeros_like(vectors)
        for where in self._chunks(len(vectors)):
            part, batch = self._divergence(divergence, where), self._batch(where)

            def total(
                w: Tensor,
                batch: Batch = batch,
                part: Callable[[Tensor, Batch], Tensor] = part,
            ) -> Tensor:
                return part(self.task.outputs(self.task.unflatten(w), batch), batch)

            def product(v: Tensor, total: Callable[[Tensor], Tensor] = total) -> Tensor:
                return grad(lambda w: grad(total)(w) @ v)(self.center)

            with sdpa_kernel(SDPBackend.MATH):  # fused attention has first derivatives only
                products += self._each(product, vectors)
        self._count(2 * len(vectors))
        return products

    def measure(self, measurement: Measurement, position: Tensor) -> Tensor:
        """Values ``(C, Q)`` of a measurement of all queries."""
        with torch.no_grad():
            return torch.stack([self._queries(measurement, w) for w in position])

    def slope(self, measurement: Measurement, vectors: Tensor) -> Tensor:
        """Directional derivatives ``∇φ_qᵀ v`` ``(C, Q)`` at the checkpoint.

        By differentiating the (linear) pull-back, which needs reverse mode only.
        """
        with sdpa_kernel(SDPBackend.MATH):
            values, pull = vjp(lambda w: self._queries(measurement, w), self.center)[:2]
            zero = torch.zeros_like(values)
            return torch.stack([grad(lambda u, v=v: pull(u)[0] @ v)(zero) for v in vectors])

    # ------------------------------------------------------------------ chunks and rows

    def _name_the_example(self) -> None:
        """Raise for the first example whose gradient is not finite; all rows are spoilt by it."""
        for place, position in enumerate(self.positions.tolist()):
            batch = self._batch(slice(place, place + 1))

            def loss(w: Tensor, batch: Batch = batch) -> Tensor:
                return self.task.losses(self.task.unflatten(w), batch).sum()

            if not bool(torch.isfinite(grad(loss)(self.center)).all()):
                raise ValueError(
                    f"the gradient of the loss of training example "
                    f"{self.task.train.ids.tolist()[position]!r} is not finite at the checkpoint. "
                    f"Check its inputs, and functions whose slope is infinite (a root or a norm "
                    f"at 0)."
                )

    def _batch(self, where: slice) -> Batch:
        return self.task.train.batch(self.positions[where])

    def _chunks(self, rows: int) -> Iterator[slice]:
        count, rows = len(self.positions), rows if self._vectorised else 1
        size = max(1, _ROW_EXAMPLES // rows)
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))

    def _divergence(
        self, weights: Tensor | None, where: slice
    ) -> Callable[[Tensor, Batch], Tensor]:
        if weights is None:
            return lambda outputs, batch: outputs.new_zeros(())
        part, reference = weights[where], self._reference[where]
        return lambda outputs, batch: part @ self._bregman(outputs, reference, batch[1])

    def _queries(self, measurement: Measurement, w: Tensor) -> Tensor:
        params = self.task.unflatten(w)
        parts = [
            self.task.measure(measurement, params, batch)
            for _, batch in self.task.query.batches(_QUERIES)
        ]
        values = torch.cat(parts)
        if tuple(values.shape) != (len(self.task.query),):
            raise ValueError(
                f"a measurement must return one value per query, shape ({len(self.task.query)},) "
                f"here; got {tuple(values.shape)}. Usual cause: a mean or sum over the batch."
            )
        return values

    def _each(self, function: Callable[..., Any], *rows: Tensor) -> Any:
        """Apply a function to each row, at once where the network can be vectorised."""
        with torch.no_grad():
            if self._vectorised:
                try:
                    return vmap(function)(*rows)
                except Exception as error:
                    self._vectorised = False
                    reason = str(error).strip().split("\n")[0][:300]
                    warnings.warn(
                        f"responses are computed one after another, because "
                        f"{type(self.task.module).__name__} cannot be vectorised: "
                        f"{type(error).__name__}: {reason}. Results are the same, only slower.",
                        VectorizationWarning,
                        stacklevel=2,
                    )
            found = [function(*row) for row in zip(*rows, strict=True)]
            if isinstance(found[0], Tensor):
                return torch.stack(found)
            return tuple(torch.stack(parts) for parts in zip(*found, strict=True))

    def _count(self, rows: int) -> None:
        self.forward_examples += rows * len(self.positions)
        self.backward_examples += rows * len(self.positions)


@dataclass(frozen=True)
class Metric:
    """Approximation ``U Λ Uᵀ`` of a curvature, and ``rest`` in all directions orthogonal to ``U``.

    Attributes
    ----------
    basis
        ``U``, ``(d, r)`` with orthonormal columns.
    values
        ``Λ``, ``(r,)``, descending.
    rest
        The smallest of ``Λ``, about the largest curvature outside; 0 where ``U`` holds all of it.
    """

    basis: Tensor
    values: Tensor
    rest: float

    @property
    def largest(self) -> float:
        """Largest eigenvalue."""
        return float(self.values[0])

    def solve(self, vectors: Tensor, damping: Tensor) -> Tensor:
        """Apply the inverse, damped by ``(C,)``, to rows ``(C, d)``."""
        floor = damping.clamp(min=max(1e-8 * self.largest, 1e-12))[:, None]
        outside = 1 / (self.rest + floor)
        inside = vectors @ self.basis
        return vectors * outside + (inside * (1 / (self.values + floor) - outside)) @ self.basis.T


def fit_metric(
    near: Neighbourhood, divergence: Tensor, *, rank: int, generator: torch.Generator
) -> Metric:
    """Approximate the Gauss–Newton matrix at the checkpoint.

    Parameters
    ----------
    near
        Where.
    divergence
        ``b``, ``(B,)``.
    rank
        Products with the matrix, and most directions kept; exact from ``d`` on.
    generator
        Of the random directions.
    """
    d = len(near.center)
    rank = min(rank, d)
    draw = torch.empty(d, rank, dtype=torch.float64).normal_(generator=generator)
    directions = torch.linalg.qr(draw.to(near.center.device)).Q
    parts = [near.curvature(divergence, part) for part in directions.T.split(MOST_ROWS)]
    products = torch.cat(parts).T
    core = directions.T @ products
    eigenvalues, vectors = torch.linalg.eigh((core + core.T) / 2)
    keep = eigenvalues > 1e-12 * eigenvalues[-1].clamp(min=1e-300)
    if not bool(keep.any()):
        return Metric(directions[:, :1], eigenvalues.new_zeros(1), 0.0)
    root = products @ (vectors[:, keep] / eigenvalues[keep].sqrt())
    basis, singular, _ = torch.linalg.svd(root, full_matrices=False)
    values = singular.square()
    whole = rank == d or not bool(keep.all())
    return Metric(basis, values, 0.0 if whole else float(values[-1]))


def respond(
    near: Neighbourhood,
    metric: Metric,
    divergence: Tensor,
    damping: float,
    gradients: Tensor,
    *,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor]:
    """Solve ``(G + λI) v = −g`` for rows ``g`` ``(C, d)`` by preconditioned conjugate gradients.

    Parameters
    ----------
    near, metric, divergence, damping
        ``G``, its preconditioner and ``λ``.
    gradients
        ``g``.
    tolerance
        Of the residual, relative to ``‖g‖``.
    max_iterations
        Most products of a row.

    Returns
    -------
    solution, residual
        ``v`` ``(C, d)`` and its relative residual ``(C,)``.
    """
    solutions, residuals = [], []
    for g in gradients.split(MOST_ROWS):
        damp, scale = g.new_full((len(g),), damping), g.norm(dim=1)
        v, r = torch.zeros_like(g), -g
        z = metric.solve(r, damp)
        s, rz = z.clone(), (r * z).sum(1)
        for _ in range(max_iterations):
            k = (r.norm(dim=1) > tolerance * scale).nonzero()[:, 0]
            if not len(k):
                break
            product = near.curvature(divergence, s[k]) + damping * s[k]
            step = (rz[k] / (s[k] * product).sum(1))[:, None]
            v[k] += step * s[k]
            r[k] -= step * product
            z = metric.solve(r[k], damp[k])
            following = (r[k] * z).sum(1)
            s[k] = z + (following / rz[k])[:, None] * s[k]
            rz[k] = following
        solutions.append(v)
        residuals.append(r.norm(dim=1) / torch.where(scale > 0, scale, 1.0))
    return torch.cat(solutions), torch.cat(residuals)
