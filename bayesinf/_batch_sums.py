r"""From sums over batches to covariances and their errors: arrays only, one block of columns.

For a batch ``b`` of ``L_b`` draws of values ``x (Q)`` and ``y (n)``, **less any constants** (the
nearer to the means, the less is lost to rounding), the sums ``S^x_b``, ``S^y_b``, ``S^{xy}_b`` are
enough. Centred on means ``μ`` that are known only at the end (of all draws, or of the chain),

.. math:: P_b = S^{xy}_b - S^x_b \mu_y^\top - \mu_x (S^y_b - L_b \mu_y)^\top,

the covariance is ``V = Σ_b P_b / Σ_b L_b`` and its error comes from ``P_b − L_b V``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["BatchSums", "Estimates", "degrees_of_freedom", "estimate", "require_varying"]


@dataclass(frozen=True)
class BatchSums:
    """Sums over ``B`` batches, ordered by chain and time.

    ``length (B,)``, ``chain (B,)``, ``x`` and its squares ``x_square (B, Q)``, ``y`` and ``y_square
    (B, n)``, ``product (B, Q, n)``, which :func:`estimate` overwrites.
    """

    length: np.ndarray
    chain: np.ndarray
    x: np.ndarray
    y: np.ndarray
    x_square: np.ndarray
    y_square: np.ndarray
    product: np.ndarray


@dataclass(frozen=True)
class Estimates:
    """What :class:`~bayesinf._covariance.CrossCovariance` holds, of one block of columns."""

    value: np.ndarray
    mcse: np.ndarray
    within: np.ndarray
    deleted: np.ndarray
    halves: np.ndarray
    share: np.ndarray
    freedom: float

    def arrays(self) -> dict[str, np.ndarray]:
        """Those whose last dimension is the columns."""
        names = ("value", "mcse", "within", "deleted", "halves")
        return {name: getattr(self, name) for name in names}


def estimate(sums: BatchSums, center: str, correlation: bool, replicates: bool) -> Estimates:
    """Estimate from sums over batches; arguments as of
    :func:`~bayesinf._covariance.cross_covariance`.

    Raises
    ------
    ValueError
        If a correlation is wanted and a column never varies.
    """  # noqa: D205
    s = _centred(sums, center == "chain")
    if correlation:
        s = _standardised(s)
    length = s.length
    total = length.sum()
    product = s.product.sum(axis=0)
    value = product / total
    squares = np.zeros_like(value)
    for b, own in enumerate(s.product):
        if correlation:
            expected = 0.5 * value * (s.x_square[b][:, None] + s.y_square[b])
        else:
            expected = length[b] * value
        squares += (own - expected) ** 2
    spread = total - (length**2).sum() / total  # what Σ_b (P_b − L_b V)² has per unit variance
    factor = 1.0 if correlation else total / (total - 1)
    within = value - _of_chain_means(s) / total
    return Estimates(
        factor * value,
        factor * np.sqrt(squares / (spread * total)),
        factor * within,
        _deleted(s, product, center, correlation) if replicates else value[None][:0],
        _halves(s, center, correlation) if replicates else value[None][:0],
        length / total,
        degrees_of_freedom(length),
    )


def _centred(s: BatchSums, by_chain: bool) -> BatchSums:
    """The same sums of values less their means."""
    length = s.length[:, None]
    owner = s.chain if by_chain else np.zeros_like(s.chain)
    mean_x, mean_y = _means(s.x, s.length, owner), _means(s.y, s.length, owner)
    x, y = s.x - length * mean_x, s.y - length * mean_y
    for b, product in enumerate(s.product):
        product -= s.x[b][:, None] * mean_y[b]
        product -= mean_x[b][:, None] * y[b]
    x_square = s.x_square - (s.x + x) * mean_x
    y_square = s.y_square - (s.y + y) * mean_y
    return BatchSums(s.length, s.chain, x, y, x_square, y_square, s.product)


def _means(total: np.ndarray, length: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Of each batch the mean over all batches of its owner, ``(B, columns)``."""
    member = (owner[:, None] == owner[None, :]).astype(np.float64)
    mean: np.ndarray = (member @ total) / (member @ length)[:, None]
    return mean


def _standardised(s: BatchSums) -> BatchSums:
    scales = []
    for square in (s.x_square, s.y_square):
        variance = square.sum(axis=0) / s.length.sum()
        require_varying(variance)
        scales.append(np.sqrt(variance))
    x, y = scales
    for product in s.product:
        product /= x[:, None]
        product /= y
    return BatchSums(
        s.length, s.chain, s.x / x, s.y / y, s.x_square / x**2, s.y_square / y**2, s.product
    )


def require_varying(variance: np.ndarray) -> None:
    """Raise ``ValueError`` where a loss that is to be correlated has no variance."""
    if not (variance > 0).all():
        raise ValueError(
            f"{int((~(variance > 0)).sum())} losses never vary over the draws, so that they "
            f"have no correlation. Use the covariance (normalize=None) or more, hotter draws."
        )


def _of_chain_means(s: BatchSums) -> np.ndarray:
    """``Σ_c T_c x̄_c ȳ_cᵀ``, the part of the covariance that chains disagree by."""
    member = (s.chain == np.unique(s.chain)[:, None]).astype(np.float64)
    x, y = member @ s.x, member @ s.y
    out: np.ndarray = (x / (member @ s.length)[:, None]).T @ y
    return out


def degrees_of_freedom(length: np.ndarray) -> float:
    """Satterthwaite's degrees of freedom of ``Σ_b (P_b − L_b V)²`` with independent batches."""
    total, second = length.sum(), (length**2).sum()
    trace = total - second / total
    return float(trace**2 / (second - 2 * (length**3).sum() / total + (second / total) ** 2))


def _part(
    s: BatchSums, keep: np.ndarray, product: np.ndarray, center: str, correlation: bool
) -> np.ndarray:
    """Estimate from some of the batches alone, ``product`` their sum of products; centred anew."""
    groups = np.unique(s.chain[keep]) if center == "chain" else [None]
    product = product.copy()
    x_square, y_square = s.x_square[keep].sum(0), s.y_square[keep].sum(0)
    for group in groups:
        mine = keep if group is None else keep & (s.chain == group)
        x, y, count = s.x[mine].sum(0), s.y[mine].sum(0), s.length[mine].sum()
        product -= x[:, None] * (y / count)
        x_square, y_square = x_square - x**2 / count, y_square - y**2 / count
    if correlation:
        scale: np.ndarray = np.sqrt(x_square[:, None] * y_square)
        return product / scale
    return product / (s.length[keep].sum() - 1)


def _deleted(s: BatchSums, product: np.ndarray, center: str, correlation: bool) -> np.ndarray:
    """Estimates without each batch, ``(B, Q, n)``."""
    keeps = ~np.eye(len(s.length), dtype=bool)
    return np.stack(
        [
            _part(s, keep, product - own, center, correlation)
            for keep, own in zip(keeps, s.product, strict=True)
        ]
    )


def _halves(s: BatchSums, center: str, correlation: bool) -> np.ndarray:
    """Estimates from the first and from the last half of the chains, ``(2, Q, n)``."""
    middle = s.length.cumsum() - s.length / 2
    first = middle < s.length.sum() / 2
    return np.stack(
        [_part(s, keep, s.product[keep].sum(0), center, correlation) for keep in (first, ~first)]
    )
