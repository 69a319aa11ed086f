r"""Coordinates in which a local posterior is close to a standard normal law.

With the Gauss–Newton matrix ``G = (1/m) Σ J_iᵀ H_i J_i`` at the checkpoint and the precision ``P``
of the prior terms, ``nβ G + P I = P (I + U diag(s) Uᵀ)`` and

    w = w0 + S ξ        S = P^{-1/2} [I + U diag((1 + s)^{-1/2} − 1) Uᵀ]

``U (d, r)`` holds the directions with ``s`` above ½: what is left has a condition number of 1.5. A
fixed linear map does not change the law of ``w``, whatever the approximation; it saves NUTS the
steps that a wide spectrum costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bayesinf._posterior import LocalPosterior
from bayesinf.interop.numpyro._posterior import JaxTask

__all__ = ["Whitening"]

_ROWS, _SMALL, _FLOOR = 2048, 0.5, 1e-6


@dataclass(frozen=True)
class Whitening:
    """The map ``ξ -> w``.

    Attributes
    ----------
    center
        ``w0 (d,)``.
    directions
        ``U (d, r)``.
    shrink
        ``(1 + s)^{-1/2} − 1``, ``(r,)``.
    scale
        ``P^{-1/2}``.
    """

    center: np.ndarray
    directions: np.ndarray
    shrink: np.ndarray
    scale: float

    @classmethod
    def of(cls, posterior: LocalPosterior, task: JaxTask) -> Whitening:
        """From the curvature of evenly spaced train examples; call it in float64.

        Raises
        ------
        ValueError
            If neither prior nor loss has curvature.
        """
        values, vectors = _spectrum(_factors(task, posterior.n_beta))
        top = float(values.max(initial=0.0))
        floor = posterior.prior_precision or _FLOOR * top
        if not floor > 0:
            raise ValueError(
                "this posterior is flat: n_beta·loss has no curvature at the checkpoint and the "
                "prior terms have none. Give it gamma > 0."
            )
        kept = values > _SMALL * floor
        shrink = 1 / np.sqrt(1 + values[kept] / floor) - 1
        return cls(task.center, np.ascontiguousarray(vectors[:, kept]), shrink, floor**-0.5)

    def __call__(self, xi: Array) -> Array:
        """Weights ``(d,)`` of coordinates ``(d,)``."""
        bent = self.directions @ (self.shrink * (xi @ self.directions))
        return self.center + self.scale * (xi + bent)


def _factors(task: JaxTask, n_beta: float) -> np.ndarray:
    """Rows ``R (k, d)`` with ``RᵀR`` about ``nβ G``, of as many examples as make 2048 rows."""
    x, y = task.data["train"]
    center = jnp.asarray(task.center)
    outputs = task.outputs(center, jnp.asarray(x[:1])).size
    count = max(1, min(len(x), _ROWS // outputs))
    pick = np.linspace(0, len(x) - 1, count).round().astype(int)

    @jax.jit
    def of_example(xi: Array, yi: Array) -> Array:
        def run(w: Array) -> Array:
            return task.outputs(w, xi[None])

        f = run(center)
        jacobian = jax.jacrev(run)(center).reshape(outputs, -1)
        hessian = jax.hessian(lambda f: task.loss(f, yi[None])[0])(f).reshape(outputs, outputs)
        values, vectors = jnp.linalg.eigh(hessian)
        return jnp.sqrt(jnp.maximum(values, 0.0))[:, None] * (vectors.T @ jacobian)

    rows = np.concatenate([of_example(x[i], y[i]) for i in pick])
    return rows * np.sqrt(n_beta / count)


def _spectrum(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues ``(r,)`` and orthonormal eigenvectors ``(d, r)`` of ``RᵀR``."""
    if len(rows) >= rows.shape[1]:
        values, vectors = np.linalg.eigh(rows.T @ rows)
        return np.maximum(values, 0.0), vectors
    values, left = np.linalg.eigh(rows @ rows.T)
    kept = values > 1e-12 * values.max(initial=0.0)
    values, left = values[kept], left[:, kept]
    return values, rows.T @ (left / np.sqrt(values))
