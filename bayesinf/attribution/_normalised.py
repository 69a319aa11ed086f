"""Scores on other scales: per nat of the query, and centred among the training examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr

from bayesinf._scores import label_scores
from bayesinf._task import Task
from bayesinf.attribution._random_scores import class_labels

__all__ = ["center", "per_nat"]


def per_nat(scores: xr.Dataset, task: Task) -> xr.Dataset:
    r"""Scores of every query divided by its loss: ``influence[q, t] / ℓ_q``.

    Long or surprising queries have large scores with everything. Per nat of their loss, a sum over
    tokens for a sequence, queries can be compared with each other; ranks within a query stay.

    Parameters
    ----------
    scores
        Of any method, by query.
    task
        Which the scores are of; its query losses are computed.

    Returns
    -------
    xr.Dataset
        Every variable by query divided by the query's loss, errors included; ``loss(query)`` added,
        ``attrs["normalised"] = "per nat"``.

    Raises
    ------
    ValueError
        If scores are not by query, a query is not of the task, or a loss is not positive.

    References
    ----------
    Ruis et al. 2024, "Procedural knowledge in pretraining drives reasoning in large language
    models" (arXiv 2411.12580), who divide by the nats of the completion.
    """
    if "query" not in scores["influence"].dims:
        raise ValueError(f"per_nat needs scores by query; got {scores['influence'].dims}.")
    with torch.no_grad():
        parts = [task.losses(task.params, batch) for _, batch in task.query.batches(256)]
    losses = torch.cat(parts).double().cpu().numpy()
    place = {key: i for i, key in enumerate(task.query.ids.tolist())}
    ids = scores["query"].values.tolist()
    unknown = [key for key in ids if key not in place]
    if unknown:
        raise ValueError(f"query {unknown[0]!r} of the scores is no query of the task.")
    nats = xr.DataArray(losses[[place[key] for key in ids]], dims="query")
    bad = np.flatnonzero(~(nats.values > 0))
    if len(bad):
        raise ValueError(
            f"the loss of query {ids[bad[0]]!r} is {float(nats[bad[0]]):.3g}, and nats must be "
            f"positive. Drop it: scores.sel(query=[…]). Usual cause: a Gaussian or user's own "
            f"likelihood, whose loss is no negative log-probability."
        )
    divided = {
        name: (own / nats).transpose(*own.dims)
        for name, own in scores.data_vars.items()
        if "query" in own.dims and name != "loss"
    }
    return scores.assign(divided).assign(loss=nats).assign_attrs(normalised="per nat")


def center(scores: xr.Dataset, task: Task | None = None) -> xr.Dataset:
    r"""Scores less their mean over training examples: of all, or of each class.

    .. math:: \mathrm{influence}[q, t] - \frac{1}{|C(t)|} \sum_{i \in C(t)} \mathrm{influence}[q, i]

    ``C(t)``: all training examples, or those of the class of ``t``. Centred on all, a score is the
    effect of one example's weight at the others' expense. Centred by class, what all examples of a
    class do to a query is taken out, and examples are ranked within classes.

    Parameters
    ----------
    scores
        Of any method, by train.
    task
        Whose class labels give the classes; None: all training examples are one.

    Returns
    -------
    xr.Dataset
        All variables ``influence…`` by train, centred; standard errors are left out, as those of
        differences do not follow from those of the terms. ``attrs["normalised"]`` says how.

    Raises
    ------
    ValueError
        If scores are not by train, or of other examples than the task, or its targets are no class
        labels.
    """
    if "train" not in scores["influence"].dims:
        raise ValueError(f"center needs scores by train; got {scores['influence'].dims}.")
    classes = np.zeros(scores.sizes["train"], dtype=np.int64)
    if task is not None:
        place = {key: i for i, key in enumerate(task.train.ids.tolist())}
        ids = scores["train"].values.tolist()
        unknown = [key for key in ids if key not in place]
        if unknown:
            raise ValueError(f"train {unknown[0]!r} of the scores is no example of the task.")
        classes = class_labels(task, "train")[[place[key] for key in ids]]
    arrays: dict[str, Any] = {}
    for name, own in scores.data_vars.items():
        if str(name).startswith("influence") and "train" in own.dims:
            last = own.transpose(..., "train")
            centred = _centred(last.values, classes).astype(own.dtype)
            arrays[str(name)] = (tuple(map(str, own.dims)), _back(last, centred, own))
    attrs = {k: v for k, v in scores.attrs.items() if k not in ("mcse_df", "relative_mcse")}
    attrs["normalised"] = "centred" if task is None else "centred by class"
    coords = {str(k): v for k, v in scores.coords.items()}
    return label_scores(arrays, coords, attrs.pop("method"), attrs.pop("estimand"), attrs)


def _centred(values: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Values ``(…, n)`` less the mean of their class, in float64."""
    found = values.astype(np.float64)
    for label in np.unique(classes):
        own = classes == label
        found[..., own] -= found[..., own].mean(axis=-1, keepdims=True)
    return found


def _back(last: xr.DataArray, values: np.ndarray, like: xr.DataArray) -> np.ndarray:
    """Values in the order of dimensions that they had."""
    return last.copy(data=values).transpose(*like.dims).values
