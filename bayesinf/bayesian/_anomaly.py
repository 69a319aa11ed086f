"""How little new points behave like trusted ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from bayesinf._scores import text_labels, versions
from bayesinf.bayesian._draws import read_log_likelihood
from bayesinf.bayesian._loss_kernel import standardised

__all__ = ["anomaly_scores"]


def anomaly_scores(
    data: Any,
    new: Any,
    *,
    classes: Sequence[Any] | np.ndarray | None = None,
    sample_dims: str | Sequence[str] | None = None,
    log_likelihood_var_name: str | Sequence[str] | None = None,
) -> xr.Dataset:
    r"""How little new points behave like trusted ones, from log-likelihoods on the same draws.

    .. math:: \rho = \frac{\mathrm{Cov}(a, b)}{\sigma_a \sigma_b}, \qquad
              \mathrm{ccc} = \frac{2\,\mathrm{Cov}(a, b)}
                                  {\sigma_a^2 + \sigma_b^2 + (\bar a - \bar b)^2}

    of the log-likelihood ``a`` of a new point with ``b`` of a trusted one. The concordance also
    asks for the same level and spread. Points of a class behave like others of their class rather
    than like all: where classes are known, a new point is held against the class it is most like.

    Parameters
    ----------
    data
        With the trusted observations in its group ``log_likelihood``.
    new
        The same for the new points, of the **same draws**: a ``DataTree``.
    classes
        Of the trusted observations, in their order.
    sample_dims, log_likelihood_var_name
        As of :func:`case_influence`, of both.

    Returns
    -------
    xr.Dataset
        Dim ``new``: ``value``, **high = unlike the trusted set**: ``−mean_concordance``, or with
        classes minus the greatest of a class; ``mean_correlation``, ``max_correlation``,
        ``mean_concordance``, ``max_concordance``. With classes the same four per class, as
        ``class_mean_correlation (new, class)``, and ``nearest_class (new)``.

    Raises
    ------
    KeyError
        If the group or variable is missing.
    TypeError
        If ArviZ does not read the data.
    ValueError
        If the draws are not as many, a value is not finite, a log-likelihood never varies, or
        there is not one class per trusted observation.

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
    correlation = standardised(fresh).T @ standardised(trusted)
    level = [d.values.mean(axis=(0, 1)) for d in (fresh, trusted)]
    spread = [d.values.std(axis=(0, 1)) for d in (fresh, trusted)]
    covariance = correlation * spread[0][:, None] * spread[1]
    scale = spread[0][:, None] ** 2 + spread[1] ** 2 + (level[0][:, None] - level[1]) ** 2
    concordance = 2 * covariance / scale
    arrays: dict[str, Any] = {
        name: ("new", column) for name, column in _levels(correlation, concordance).items()
    }
    arrays["value"] = "new", -concordance.mean(axis=1)
    coords = fresh.coords("new")
    if classes is not None:
        members = _members(np.asarray(classes), trusted.labels)
        parts = [_levels(correlation[:, m], concordance[:, m]) for m in members.values()]
        for name in parts[0]:
            column = np.stack([part[name] for part in parts], axis=1)
            arrays[f"class_{name}"] = ("new", "class"), column
        nearest = arrays["class_mean_concordance"][1].argmax(axis=1)
        coords["class"] = text_labels(np.array(list(members)))
        arrays["nearest_class"] = "new", coords["class"][nearest]
        arrays["value"] = "new", -arrays["class_mean_concordance"][1].max(axis=1)
    return xr.Dataset(
        arrays,
        coords=coords,
        attrs={"method": "anomaly_scores", "high": "unlike the trusted set", **versions()},
    )


def _levels(correlation: np.ndarray, concordance: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and maximum over trusted observations, ``(new,)``."""
    return {
        "mean_correlation": correlation.mean(axis=1),
        "max_correlation": correlation.max(axis=1),
        "mean_concordance": concordance.mean(axis=1),
        "max_concordance": concordance.max(axis=1),
    }


def _members(classes: np.ndarray, labels: np.ndarray) -> dict[Any, np.ndarray]:
    """Positions of each class's observations."""
    if classes.shape != labels.shape:
        raise ValueError(
            f"classes= must hold one class for each of the {len(labels)} trusted observations, in "
            f"their order; got {classes.shape}. Usual cause: classes of all data, trusted or not."
        )
    return {key: np.flatnonzero(classes == key) for key in np.unique(classes).tolist()}
