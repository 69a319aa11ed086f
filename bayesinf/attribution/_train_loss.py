"""The loss of the training example as a score for every query."""

from __future__ import annotations

import json

import numpy as np
import xarray as xr

from bayesinf._scores import make_scores
from bayesinf._task import Task
from bayesinf.attribution._difficulty import example_loss
from bayesinf.attribution._registry import register

__all__ = ["train_loss"]


@register("similarity", "loss of the training example, the same for all queries")
def train_loss(task: Task) -> xr.Dataset:
    r"""Negative losses of the training examples, ``−ℓ_t`` for every query.

    The baseline that knows nothing of queries: examples with a large loss have large gradients,
    and so move the network most. To search for wrong labels use :func:`bayesinf.example_loss`.

    Parameters
    ----------
    task
        Network, likelihood and examples.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)``, equal rows, negative = large loss; attribute
        ``estimand = "similarity"``.

    Raises
    ------
    ValueError
        If a loss is not finite.
    """
    losses = example_loss(task)
    rows = np.broadcast_to(-losses["value"].values, (len(task.query), task.n)).copy()
    kept = ("checkpoint", "n", "forward_examples", "backward_examples")
    return make_scores(
        rows,
        query=task.query.ids,
        train=task.train.ids,
        method="train_loss",
        estimand="similarity",
        attrs={
            **{name: losses.attrs[name] for name in kept},
            "seconds": json.loads(losses.attrs["seconds"]),
        },
    )
