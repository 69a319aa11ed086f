"""Random scores: what any method must beat."""

from __future__ import annotations

import numpy as np
import xarray as xr

from bayesinf._scores import make_scores
from bayesinf._task import Task
from bayesinf.attribution._needs import CLASS_LABELS
from bayesinf.attribution._registry import register
from bayesinf.curvature._accounting import Costs

__all__ = ["class_labels", "random_scores", "same_class_random"]


@register("similarity", "independent random numbers")
def random_scores(task: Task, *, seed: int = 0) -> xr.Dataset:
    r"""Independent scores, uniform on ``(−1, 1]``: the null of every comparison.

    Parameters
    ----------
    task
        Whose examples.
    seed
        Of the numbers.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)``; attribute ``estimand = "similarity"``.
    """
    costs = Costs()
    with costs.stage("scores"):
        values = 1 - 2 * _uniform(task, seed)
    return _labelled(task, values, "random_scores", seed, costs)


@register("similarity", "random order, the query's class first", needs=(CLASS_LABELS,))
def same_class_random(task: Task, *, seed: int = 0) -> xr.Dataset:
    r"""Random scores that know the labels: ``−u`` for examples of the query's class, else ``u``.

    ``u`` is uniform on ``[0, 1)``. Training examples of the query's class come first, in random
    order, then the others. A stronger null than :func:`random_scores`: what a method finds beyond
    it, it has found within classes.

    Parameters
    ----------
    task
        With targets that are class labels.
    seed
        Of the numbers.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)``, negative = of the query's class; attribute
        ``estimand = "similarity"``.

    Raises
    ------
    ValueError
        If targets are no class labels.
    """
    costs = Costs()
    with costs.stage("scores"):
        same = class_labels(task, "query")[:, None] == class_labels(task, "train")
        values = np.where(same, -1.0, 1.0) * _uniform(task, seed)
    return _labelled(task, values, "same_class_random", seed, costs)


def class_labels(task: Task, split: str) -> np.ndarray:
    """Class of every example.

    Raises
    ------
    ValueError
        If targets are no class labels.
    """
    reason = CLASS_LABELS.missing(task, {})
    if reason is not None:
        raise ValueError(f"classes are wanted, and {reason}. Methods without them: grad_dot(task).")
    parts = [batch[1].cpu().numpy() for _, batch in task.examples(split).batches(1024)]
    return np.concatenate(parts)


def _uniform(task: Task, seed: int) -> np.ndarray:
    """Numbers ``(query, train)`` that hang on ids alone, whatever the order of examples."""
    shape = len(task.query), task.n
    order = [np.argsort(np.argsort(examples.ids)) for examples in (task.query, task.train)]
    numbers: np.ndarray = np.random.default_rng(seed).random(shape)[np.ix_(*order)]
    return numbers


def _labelled(task: Task, values: np.ndarray, name: str, seed: int, costs: Costs) -> xr.Dataset:
    return make_scores(
        values,
        query=task.query.ids,
        train=task.train.ids,
        method=name,
        estimand="similarity",
        attrs={"n": task.n, "seed": seed, **costs.attrs()},
    )
