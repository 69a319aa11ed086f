"""The covariance matrix of log-likelihoods: its spectrum, a map of the data, new points."""

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

__all__ = ["anomaly_scores", "loss_map", "w_kernel"]


def w_kernel(
    data: Any,
    *,
    sample_dims: str | Sequence[str] | None = None,
    log_likelihood_var_name: str | None = None,
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
    centred = _moving(draws)
    flat = centred.reshape(-1, centred.shape[2])
    root = flat / np.sqrt(len(flat) - 1)
    _, singular, vectors = np.linalg.svd(root, full_matrices=False)
    kept = min(len(singular), len(flat) - 1)
    eigenvalue, vectors = singular[:kept] ** 2, vectors[:kept].T
    vectors = vectors * np.where(vectors.sum(axis=0) < 0, -1.0, 1.0)
    _, error, freedom = variances(centred @ vectors, "grand")
    return xr.Dataset(
        {
            "covariance": (("train", "train_other"), root.T @ root),
            "eigenvalue": ("component", eigenvalue),
            "mcse": ("component", error),
            "eigenvector": (("train", "component"), vectors),
        },
        coords={"train": draws.labels, "train_other": draws.labels, "component": np.arange(kept)},
        attrs={
            "method": "w_kernel",
            "functional_variance": float(eigenvalue.sum()),
            "components": float(eigenvalue.sum() ** 2 / (eigenvalue**2).sum()),
            "mcse_df": freedom,
            **versions(),
        },
    )


def loss_map(
    data: Any,
    *,
    clusters: int | None = None,
    sample_dims: str | Sequence[str] | None = None,
    log_likelihood_var_name: str | None = None,
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
    unit = _standard(draws)
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
        coords={"train": draws.labels, "train_other": draws.labels, "axis": [0, 1]},
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


def anomaly_scores(
    data: Any,
    new: Any,
    *,
    sample_dims: str | Sequence[str] | None = None,
    log_likelihood_var_name: str | None = None,
) -> xr.Dataset:
    r"""How little new points behave like trusted ones, from log-likelihoods on the same draws.

    .. math:: \rho = \frac{\mathrm{Cov}(a, b)}{\sigma_a \sigma_b}, \qquad
              \mathrm{ccc} = \frac{2\,\mathrm{Cov}(a, b)}
                                  {\sigma_a^2 + \sigma_b^2 + (\bar a - \bar b)^2}

    of the log-likelihood ``a`` of a new point with ``b`` of a trusted one. The concordance also
    asks for the same level and spread.

    Parameters
    ----------
    data
        With the trusted observations in its group ``log_likelihood``.
    new
        The same for the new points, of the **same draws**: a ``DataTree``.
    sample_dims, log_likelihood_var_name
        As of :func:`case_influence`, of both.

    Returns
    -------
    xr.Dataset
        Dim ``new``: ``value = −mean_concordance``, **high = unlike the trusted set**;
        ``mean_correlation``, ``max_correlation``, ``mean_concordance``, ``max_concordance``.

    Raises
    ------
    KeyError
        If the group or variable is missing.
    TypeError
        If ArviZ does not read the data.
    ValueError
        If the draws are not as many, a value is not finite, or a log-likelihood never varies.

    Notes
    -----
    Correlation and concordance of traces as an anomaly score: arXiv 2604.18970.
    """
    trusted = read_log_likelihood(data, log_likelihood_var_name, sample_dims)
    fresh = read_log_likelihood(new, log_likelihood_var_name, sample_dims)
    if trusted.values.shape[:2] != fresh.values.shape[:2]:
        raise ValueError(
            f"the trusted log-likelihoods have (chains, draws) = {trusted.values.shape[:2]} and "
            f"the new ones {fresh.values.shape[:2]}. Evaluate the new points on the very draws of "
            f"the trusted ones."
        )
    correlation = _standard(fresh).T @ _standard(trusted)
    level = [d.values.mean(axis=(0, 1)) for d in (fresh, trusted)]
    spread = [d.values.std(axis=(0, 1)) for d in (fresh, trusted)]
    covariance = correlation * spread[0][:, None] * spread[1]
    scale = spread[0][:, None] ** 2 + spread[1] ** 2 + (level[0][:, None] - level[1]) ** 2
    concordance = 2 * covariance / scale
    columns = {
        "value": -concordance.mean(axis=1),
        "mean_correlation": correlation.mean(axis=1),
        "max_correlation": correlation.max(axis=1),
        "mean_concordance": concordance.mean(axis=1),
        "max_concordance": concordance.max(axis=1),
    }
    return xr.Dataset(
        {name: ("new", column) for name, column in columns.items()},
        coords={"new": fresh.labels},
        attrs={"method": "anomaly_scores", "high": "unlike the trusted set", **versions()},
    )


def _moving(draws: Draws) -> np.ndarray:
    """Log-likelihoods less their means; refuses those of which none varies."""
    centred: np.ndarray = draws.values - draws.values.mean(axis=(0, 1))
    if not np.ptp(draws.values, axis=(0, 1)).any():
        raise ValueError("no log-likelihood varies over the draws, so that there is no covariance.")
    return centred


def _standard(draws: Draws) -> np.ndarray:
    """``(C·T, n)``: centred columns of length 1."""
    still = np.ptp(draws.values, axis=(0, 1)) == 0
    if still.any():
        raise ValueError(
            f"a correlation needs log-likelihoods that vary, and {int(still.sum())} never do, "
            f"first that of {draws.labels[still][0]}. Leave these observations out with .sel()."
        )
    flat = _moving(draws).reshape(-1, len(draws.labels))
    unit: np.ndarray = flat / np.sqrt((flat**2).sum(axis=0))
    return unit
