r"""Third cumulants and weighted means of draws, with errors by batch means: arrays only.

Shapes: φ ``x (C, T, Q)``, log-likelihoods ``y (C, T, N)``; results ``(Q, N)``. Errors are of the
linearised estimator: of each draw its influence on the estimate is summed over the batches of
:func:`bayesinf._covariance.batch_slices`, and the scatter of these sums is the squared error.
"""

from __future__ import annotations

import numpy as np

from bayesinf._covariance import batch_slices

__all__ = ["batch_error", "reweighted_shift", "third_cumulant"]

_COLUMNS = 1024


def third_cumulant(
    x: np.ndarray, y: np.ndarray, *, scale: float = 1.0, plus: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    r"""``scale·κ₃(x, y, y) + plus·Cov(x, y)``, ``κ₃ = E[(x − x̄)(y − ȳ)²]``, and its error.

    The linearisation of κ₃ is :math:`x_c y_c^2 - \mathrm{Var}(y)\,x_c - 2\,\mathrm{Cov}(x, y)\,y_c
    - \kappa_3`, centred draws with an index c.

    Parameters
    ----------
    x, y
        ``(C, T, Q)`` and ``(C, T, N)``.
    scale, plus
        Factors of the cumulant and of the covariance.

    Returns
    -------
    tuple of np.ndarray
        Value, free of bias for independent draws, and error ``(Q, N)``.
    """
    chains, draws = x.shape[:2]
    total = chains * draws
    xc, yc = (v - v.mean(axis=(0, 1), keepdims=True) for v in (x, y))
    value, error = np.empty((2, x.shape[2], y.shape[2]))
    third, second = scale * total**2 / ((total - 1) * (total - 2)), plus * total / (total - 1)
    where, lengths = _batches(chains, draws)
    for start in range(0, y.shape[2], _COLUMNS):
        columns = slice(start, min(start + _COLUMNS, y.shape[2]))
        yb = yc[:, :, columns]
        terms = third * (yb**2 - (yb**2).mean(axis=(0, 1))) + second * yb
        covariance = np.einsum("ctq,ctn->qn", xc, yb, optimize=True) / total
        sums = np.stack(
            [xc[b].T @ terms[b] - 2 * third * covariance * yb[b].sum(axis=0) for b in where]
        )
        value[:, columns] = sums.sum(axis=0) / total
        error[:, columns] = batch_error(sums, lengths)
    return value, error


def batch_error(sums: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Standard error of ``Σ_b sums_b / Σ_b lengths_b``, of ``sums (B, …)`` over batches."""
    total = lengths.sum()
    share = lengths.reshape(-1, *[1] * (sums.ndim - 1))
    deviation = ((sums - share * (sums.sum(axis=0) / total)) ** 2).sum(axis=0)
    error: np.ndarray = np.sqrt(deviation / (total**2 * (1 - ((lengths / total) ** 2).sum())))
    return error


def reweighted_shift(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``Σ_t w_t x_t − x̄`` of self-normalised weights, and its standard error.

    Parameters
    ----------
    x
        ``(C, T, Q)``.
    weights
        ``(C, T, N)``, each column with the sum 1.

    Returns
    -------
    tuple of np.ndarray
        Shift and error ``(Q, N)``. The error takes the weights' smoothing as given, so that it
        means something where Pareto's k is small only.
    """
    chains, draws = x.shape[:2]
    total = chains * draws
    xc = x - x.mean(axis=(0, 1), keepdims=True)
    shift = np.einsum("ctq,ctn->qn", xc, weights, optimize=True)
    where, lengths = _batches(chains, draws)
    sums = np.stack(
        [
            total * (xc[b].T @ weights[b] - shift * weights[b].sum(axis=0))
            - xc[b].sum(axis=0)[:, None]
            for b in where
        ]
    )
    return shift, batch_error(sums, lengths)


def _batches(chains: int, draws: int) -> tuple[list[tuple[int, slice]], np.ndarray]:
    """Where the batches are, chain by chain, and their lengths."""
    where = [(c, s) for c in range(chains) for s in batch_slices(chains, draws)]
    return where, np.array([s.stop - s.start for _, s in where], dtype=np.float64)
