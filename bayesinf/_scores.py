"""The one format of scores: a labelled ``xarray.Dataset``.

``influence[query, train] = d E[φ_query] / d b_train``: negative = helpful (up-weighting the
training example lowers the query's loss). Methods that only rank store ``−similarity`` in the same
variable and say so in ``attrs["estimand"]``.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import xarray as xr

__all__ = ["finite", "label_scores", "make_scores", "text_labels", "versions"]

ESTIMANDS = ("influence", "similarity")


def make_scores(
    influence: np.ndarray,
    *,
    query: np.ndarray,
    train: np.ndarray,
    method: str,
    estimand: str,
    attrs: dict[str, Any] | None = None,
    **variables: np.ndarray,
) -> xr.Dataset:
    """Label a score matrix.

    Parameters
    ----------
    influence
        ``(queries, train examples)``, sign and unit of the estimand.
    query, train
        Ids.
    method
        Name of the method.
    estimand
        ``"influence"`` or ``"similarity"`` (only ranks mean something).
    attrs
        What made the scores: ``n_beta``, ``gamma``, ``damping``, ``fisher``, checkpoint hash,
        ``seconds``, …; nested values are stored as JSON.
    **variables
        Further ``(query, train)`` arrays, such as ``mcse``.

    Returns
    -------
    xr.Dataset
        Variables ``influence`` and the others, dims ``query`` and ``train``.

    Raises
    ------
    ValueError
        If a shape is wrong, the estimand unknown, or any score not finite.
    """
    shape = (len(query), len(train))
    arrays = {"influence": influence, **variables}
    for name, array in arrays.items():
        if array.shape != shape:
            raise ValueError(f"{name} must have shape (query, train) = {shape}; got {array.shape}.")
    return label_scores(
        {name: (("query", "train"), array) for name, array in arrays.items()},
        {"query": text_labels(query), "train": text_labels(train)},
        method,
        estimand,
        attrs or {},
    )


def label_scores(
    arrays: dict[str, tuple[tuple[str, ...], np.ndarray]],
    coords: dict[str, Any],
    method: str,
    estimand: str,
    attrs: dict[str, Any],
) -> xr.Dataset:
    """Label arrays of any dimensions as scores; arguments as for :func:`make_scores`.

    Raises
    ------
    ValueError
        If the estimand is unknown, or any score not finite.
    """
    if estimand not in ESTIMANDS:
        raise ValueError(f"estimand must be one of {ESTIMANDS}; got {estimand!r}.")
    meta = {"method": method, "estimand": estimand, "checkpoints": 1, **versions(), **attrs}
    scores = xr.Dataset(
        arrays,
        coords=coords,
        attrs={key: _plain(value) for key, value in meta.items() if value is not None},
    )
    for name, array in scores.data_vars.items():
        if not bool(np.isfinite(array).all()):
            raise ValueError(_not_finite(f"{method}: {name}", array))
    return scores


def finite(name: str, block: np.ndarray, query: np.ndarray, train: np.ndarray) -> None:
    """Raise ``ValueError`` if a block of scores ``(query, train)`` is not finite."""
    if not np.isfinite(block).all():
        raise ValueError(
            _not_finite(
                name, xr.DataArray(block, {"query": query, "train": train}, ("query", "train"))
            )
        )


def _not_finite(name: str, array: xr.DataArray) -> str:
    bad = ~np.isfinite(array.values)
    first = array[tuple(np.argwhere(bad)[0])]
    labels = [f"{k} {first[k].item()!r}" for k in ("query", "train") if k in first.coords]
    return (
        f"{name} is not finite for {int(bad.sum())} of {bad.size} pairs, first "
        f"{' and '.join(labels)}. Usual causes: inf or NaN in an example's loss or gradient, or a "
        f"damping too small for precision."
    )


def text_labels(ids: np.ndarray) -> np.ndarray:
    """Ids as Zarr has a specification for them: text of variable length."""
    return ids.astype(np.dtypes.StringDType()) if ids.dtype.kind in "UO" else ids


def versions() -> dict[str, str]:
    """Versions of what computed, as attributes."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    found = {}
    for package in ("bayesinf", "torch", "numpy"):
        try:
            found[f"{package}_version"] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return value
    if isinstance(value, np.generic):
        return value.item()
    return json.dumps(value, default=lambda array: array.tolist())
