"""The covariance matrix of log-likelihoods: its spectrum, its pivots, a map of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from bayesinf._scores import versions
from bayesinf.attribution._self_variance import variances
from bayesinf.bayesian._draws import Draws, read_log_likelihood

__all__ = ["centred", "loss_map", "representative_cases", "standardised", "w_kernel"]

_RANK = 1e-12
"""Of the largest variance: what is left below it is rounding."""


def w_kernel(
    data: Any,
    *,
    sample_dims: str | Sequence[str] | None = None,
    log_likelihood_var_name: str | Sequence[str] | None = None,
) -> xr.Dataset:
    r"""Spectrum of the covariance matrix ``W_ij = Cov(log p_i, log p_j)``.

    Its trace is the functional variance, WAIC's effective number of parameters. Where the model is
    right and the data are many, about as many eigenvalues as the data identify parameters are near
    1 and the others near 0; an eigenvalue far above 1 is a direction in which the data scatter more
    than the model says. The leading eigenvectors name the observations that rule the posterior.

    Parameters
    ----------
    data, sample_dims, log_likelihood_var_name
        As of :func:`case_influence`.

    Returns
    -------
    xr.Dataset
        ``covariance (train, train_other)``; ``eigenvalue (component)``, falling, with ``mcse`` (of
        the variance along the eigenvector held fixed); ``eigenvector (train, component)``. There
        are at most as many components as draws less one. Attributes ``functional_variance`` and
        ``components`` = ``(Σλ)²/Σλ²``, how many eigenvalues carry it.

    Raises
    ------
    KeyError
        If the group or variable is missing.
    TypeError
        If ArviZ does not read the data.
    ValueError
        If shapes do not fit, a value is not finite, or no log-likelihood varies.

    Notes
    -----
    Iba 2023 (arXiv 2311.13017).
    """
    draws = read_log_likelihood(data, log_likelihood_var_name, sample_dims)
    moving = centred(draws)
    root = _root(moving)
    _, singular, vectors = np.linalg.svd(root, full_matrices=False)
    kept = min(len(singular), len(root) - 1)
    eigenvalue, vectors = singular[:kept] ** 2, vectors[:kept].T
    vectors = vectors * np.where(vectors.sum(axis=0) < 0, -1.0, 1.0)
    _, error, freedom = variances(moving @ vectors, "grand")
    return xr.Dataset(
        {
            "covariance": (("train", "train_other"), root.T @ root),
            "eigenvalue": ("component", eigenvalue),
            "mcse": ("component", error),
            "eigenvector": (("train", "component"), vectors),
        },
        coords={
            **draws.coords("train"),
            "train_other": draws.labels,
            "component": np.arange(kept),
        },
        attrs={
            "method": "w_kernel",
            "functional_variance": float(eigenvalue.sum()),
            "components": float(eigenvalue.sum() ** 2 / (eigenvalue**2).sum()),
            "mcse_df": freedom,
            **versions(),
        },
    )


def representative_cases(
    data: Any,
    k: int,
    *,
    sample_dims: str | Sequence[str] | None = None,
    log_likelihood_var_name: str | Sequence[str] | None = None,
) -> xr.Dataset:
    r"""Few observations that stand for all: pivots of an incomplete Cholesky factorisation of W.

    .. math:: W \approx L L^\top, \qquad L\ (n, k)

    Each step takes the observation of which the ones before tell least, by the variance of its log
    p that is left, so that observations which say the same are taken once. W itself is never
    formed: the cost is k products of the draws with one column.

    Parameters
    ----------
    data, sample_dims, log_likelihood_var_name
        As of :func:`case_influence`.
    k
        How many observations, at most; fewer where W has a lower rank.

    Returns
    -------
    xr.Dataset
        Dim ``component``, in the order taken: ``representative``, the observation, and
        ``remaining``, the share of the functional variance (the trace of W) that it and those
        before leave; ``factor (train, component)``, L.

    Raises
    ------
    KeyError
        If the group or variable is missing.
    TypeError
        If ArviZ does not read the data.
    ValueError
        If ``k`` is not from 1 to the number of observations, shapes do not fit, a value is not
        finite, or no log-likelihood varies.

    Notes
    -----
    Iba 2023 (arXiv 2311.13017), section on incomplete Cholesky decomposition; Fine and Scheinberg
    2001.
    """
    draws = read_log_likelihood(data, log_likelihood_var_name, sample_dims)
    n = len(draws.labels)
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to the number of observations, {n}; got {k}.")
    root = _root(centred(draws))
    left = (root**2).sum(axis=0)
    total, largest = left.sum(), left.max()
    factor, pivots, remaining = np.zeros((n, k)), list[int](), list[float]()
    for step in range(k):
        pivot = int(left.argmax())
        if left[pivot] <= _RANK * largest:
            break
        column = root.T @ root[:, pivot] - factor[:, :step] @ factor[pivot, :step]
        factor[:, step] = column / np.sqrt(left[pivot])
        left = np.clip(left - factor[:, step] ** 2, 0, None)
        left[pivot] = 0
        pivots.append(pivot)
        remaining.append(left.sum() / total)
    return xr.Dataset(
        {
            "representative": ("component", draws.labels[pivots]),
            "remaining": ("component", np.array(remaining)),
            "factor": (("train", "component"), factor[:, : len(pivots)]),
        },
        coords={**draws.coords("train"), "component": np.arange(len(pivots))},
        attrs={
            "method": "representative_cases",
            "functional_variance": float(total),
            **versions(),
        },
    )


def loss_map(
    data: Any,
    *,
    clusters: int | None = None,
    sample_dims: str | Sequence[str] | None = None,
    log_likelihood_var_name: str | Sequence[str] | None = None,
) -> xr.Dataset:
    r"""A map of the observations: near each other are those whose losses move together.

    The distance of two observations is ``√(2(1 − ρ))``, with ``ρ`` the posterior correlation of
    their losses. The two axes are classical scaling of these distances (the leading principal
    components of standardised losses); clusters are those of average linkage.

    Parameters
    ----------
    data, sample_dims, log_likelihood_var_name
        As of :func:`case_influence`.
    clusters
        How many, at most; None: no clusters.

    Returns
    -------
    xr.Dataset
        ``correlation (train, train_other)``, ``embedding (train, axis)``, ``share (axis)`` of the
        squared distances that an axis shows, and where asked for ``cluster (train)``, numbered from
        0 by falling size.

    Raises
    ------
    KeyError
        If the group or variable is missing.
    TypeError
        If ArviZ does not read the data.
    ValueError
        If ``clusters`` is not from 1 to the number of observations, one of them never varies, or
        there are fewer than 3.
    """
    draws = read_log_likelihood(data, log_likelihood_var_name, sample_dims)
    n = len(draws.labels)
    if n < 3 or (clusters is not None and not 1 <= clusters <= n):
        raise ValueError(
            f"a map needs 3 observations or more, and clusters from 1 to their number; got {n} "
            f"observations and clusters={clusters}."
        )
    unit = standardised(draws)
    correlation = np.clip(unit.T @ unit, -1, 1)
    middle = correlation - correlation.mean(axis=0) - correlation.mean(axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(middle + correlation.mean())
    values, vectors = np.clip(values[::-1], 0, None), vectors[:, ::-1]
    lead = vectors[:, :2] * np.where(vectors[:, :2].sum(axis=0) < 0, -1.0, 1.0)
    found = xr.Dataset(
        {
            "correlation": (("train", "train_other"), correlation),
            "embedding": (("train", "axis"), lead * np.sqrt(values[:2])),
            "share": ("axis", values[:2] / values.sum()),
        },
        coords={**draws.coords("train"), "train_other": draws.labels, "axis": [0, 1]},
        attrs={"method": "loss_map", **versions()},
    )
    if clusters is not None:
        distance = np.sqrt(np.clip(2 * (1 - correlation), 0, None))
        np.fill_diagonal(distance, 0)
        tree = linkage(squareform(distance, checks=False), method="average")
        raw = fcluster(tree, clusters, criterion="maxclust")
        names, sizes = np.unique(raw, return_counts=True)
        rank = {name: r for r, name in enumerate(names[np.argsort(-sizes, kind="stable")])}
        found["cluster"] = ("train", np.array([rank[name] for name in raw]))
    return found


def centred(draws: Draws) -> np.ndarray:
    """Log-likelihoods less their means; refuses those of which none varies."""
    if not np.ptp(draws.values, axis=(0, 1)).any():
        raise ValueError("no log-likelihood varies over the draws, so that there is no covariance.")
    moving: np.ndarray = draws.values - draws.values.mean(axis=(0, 1))
    return moving


def _root(moving: np.ndarray) -> np.ndarray:
    """``(C·T, n)``, whose Gram matrix is the covariance."""
    flat = moving.reshape(-1, moving.shape[2])
    root: np.ndarray = flat / np.sqrt(len(flat) - 1)
    return root


def standardised(draws: Draws) -> np.ndarray:
    """``(C·T, n)``: centred columns of length 1."""
    still = np.ptp(draws.values, axis=(0, 1)) == 0
    if still.any():
        raise ValueError(
            f"a correlation needs log-likelihoods that vary, and {int(still.sum())} never do, "
            f"first that of {draws.labels[still][0]}. Leave these observations out with .sel()."
        )
    flat = centred(draws).reshape(-1, len(draws.labels))
    unit: np.ndarray = flat / np.sqrt((flat**2).sum(axis=0))
    return unit
