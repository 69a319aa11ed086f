"""What each training example is worth to a nearest-neighbour classifier on hidden states."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr

from bayesinf._scores import make_scores
from bayesinf._task import Task
from bayesinf.attribution._features import features
from bayesinf.attribution._needs import CLASS_LABELS, LINEAR_LAYER
from bayesinf.attribution._random_scores import class_labels
from bayesinf.attribution._registry import register
from bayesinf.curvature._accounting import Costs

__all__ = ["knn_shapley", "shapley_values"]


@register(
    "similarity",
    "Shapley values of a nearest-neighbour classifier on hidden states",
    needs=(CLASS_LABELS, LINEAR_LAYER),
)
def knn_shapley(
    task: Task, *, k: int = 5, module: str | None = None, batch_size: int = 256
) -> xr.Dataset:
    r"""Negative Shapley values of training examples for the ``k`` nearest neighbours of a query.

    The game is the share of the ``k`` nearest examples of a coalition, by Euclidean distance of
    hidden states, whose class is the query's (those that a coalition lacks count as wrong). With
    examples sorted from near to far,

    .. math::
        s_n = \frac{1[y_n = y]}{n}, \qquad
        s_i = s_{i+1} + \frac{1[y_i = y] - 1[y_{i+1} = y]}{k} \, \frac{\min(k, i)}{i}

    Near examples of the query's class help, near ones of others harm. A query's values sum to that
    share of the whole training set.

    Parameters
    ----------
    task
        Network and examples, with targets that are class labels.
    k
        Neighbours, at most as many as there are training examples.
    module, batch_size
        As of :func:`bayesinf.representation_similarity`.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)``, negative = helpful; attributes ``estimand = "similarity"``,
        ``k`` and ``module``.

    Raises
    ------
    ValueError
        If targets are no class labels, ``k`` is out of range, or as
        :func:`bayesinf.representation_similarity`.

    References
    ----------
    Jia et al. 2019, "Efficient task-specific data valuation for nearest neighbor algorithms",
    Theorem 1.
    """
    labels, wanted = class_labels(task, "train"), class_labels(task, "query")
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= task.n:
        raise ValueError(f"k must lie between 1 and the {task.n} training examples; got {k!r}.")
    costs = Costs()
    with costs.stage("scores"):
        query, train, name = features(task, module, batch_size, costs)
        distance = torch.cdist(query, train, compute_mode="donot_use_mm_for_euclid_dist")
        match = wanted[:, None] == labels
        values = shapley_values(distance.cpu().numpy(), match, k)
    return make_scores(
        -values,
        query=task.query.ids,
        train=task.train.ids,
        method="knn_shapley",
        estimand="similarity",
        attrs={
            "checkpoint": task.fingerprint()["checkpoint"],
            "n": task.n,
            "k": k,
            "module": name,
            **costs.attrs(),
        },
    )


def shapley_values(distance: np.ndarray, match: np.ndarray, k: int) -> np.ndarray:
    """Shapley values ``(Q, n)`` from distances and whether classes agree, both ``(Q, n)``."""
    n = distance.shape[1]
    order = np.argsort(distance, axis=1, kind="stable")
    right = np.take_along_axis(match, order, axis=1).astype(np.float64)
    place = np.arange(1, n)
    steps = (right[:, :-1] - right[:, 1:]) / k * np.minimum(k, place) / place
    last = right[:, -1:] / n
    later = np.concatenate([steps, last], axis=1)[:, ::-1].cumsum(axis=1)[:, ::-1]
    values = np.empty_like(later)
    np.put_along_axis(values, order, later, axis=1)
    return values
