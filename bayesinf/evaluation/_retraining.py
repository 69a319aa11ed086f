"""Retraining on subsets: the bank of outcomes that scores are judged by.

Dims of a bank: ``subset`` (M masks), ``seed`` (R runs of each), ``query`` (Q measured examples),
``train`` (n examples). Variables: ``loss`` and, where the likelihood has one, ``margin``
``(subset, seed, query)`` in float32, and ``subset_mask`` ``(subset, train)``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from bayesinf._likelihoods import Likelihood
from bayesinf.evaluation._filling import Outcomes, fill
from bayesinf.evaluation._problem import ModelFactory, Problem, examples, make_problem
from bayesinf.evaluation._recipes import Recipe
from bayesinf.evaluation._rows import Row
from bayesinf.evaluation._training import (
    call,
    choose_group_size,
    initialise,
    row_seeds,
    train_looped,
    train_stacked,
)

__all__ = ["retrain", "train_one"]


def train_one(
    make_model: ModelFactory,
    likelihood: Likelihood,
    recipe: Recipe,
    *,
    train: Any,
    seed: int,
    subset: np.ndarray | xr.DataArray | None = None,
    record: str | os.PathLike[str] | None = None,
    checkpoints: int = 6,
) -> nn.Module:
    """Train one network by a recipe, by default on all the data: the model to attribute.

    The result is a function of the data, the subset and the seed alone, and for a subset it is
    the network that :func:`retrain` measures in the row of that subset and seed.

    Parameters
    ----------
    make_model
        Makes the untrained network with ``torch.nn`` initialisation; called with the global
        generator seeded, which is left as it was found.
    likelihood
        What the loss is.
    recipe
        How to train.
    train
        ``(x, y)`` tensors, a dict of tensors, or a map-style ``Dataset``.
    seed
        Seed of the run.
    subset
        Boolean ``(n,)`` mask of the examples to train on; all by default.
    record
        Folder to record the run in, for :func:`bayesinf.open_checkpoints`: ids are positions in
        ``train``. The network is the same, to the bit, as without.
    checkpoints
        How many checkpoints a recorded run has, each in the middle of as many steps.

    Returns
    -------
    nn.Module
        In eval mode.

    Raises
    ------
    ValueError
        If the mask is empty or of the wrong length, or there are fewer steps than checkpoints.
    TypeError
        If a recipe other than :class:`SGDRecipe` and :class:`AdamWRecipe` is to be recorded.
    StoreError
        If the folder holds a run, or cannot be written.
    """
    data = examples(initialise(make_model, 0), train, None, "train")
    mask = np.ones(len(data), dtype=bool) if subset is None else np.asarray(subset, dtype=bool)
    if mask.shape != (len(data),) or not mask.any():
        raise ValueError(
            f"subset must be a mask of shape ({len(data)},) that keeps at least one example; got "
            f"shape {mask.shape} with {int(mask.sum())} kept."
        )
    members = torch.from_numpy(np.flatnonzero(mask))
    wanted = None if record is None else (record, checkpoints)
    keys = row_seeds(mask, seed)
    return train_looped(make_model, likelihood, recipe, data, members, keys, wanted)


def retrain(
    make_model: ModelFactory,
    likelihood: Likelihood,
    recipe: Recipe,
    *,
    train: Any,
    query: Any,
    subsets: xr.DataArray,
    seeds: Sequence[int],
    store: str | os.PathLike[str] | None = None,
    measurements: Sequence[str] = ("loss", "margin"),
    query_ids: Sequence[Any] | np.ndarray | None = None,
    group_size: int | None = None,
    workers: int = 1,
    worker: tuple[int, int] | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """Train on every subset with every seed and measure the queries: a bank of outcomes.

    A row (subset, seed) depends on its own subset and seed alone: bitwise for the same
    ``group_size``, to rounding (amplified by training) for another.

    Parameters
    ----------
    make_model, likelihood, recipe, train
        As in :func:`train_one`.
    query
        Examples that are measured after training, in the form of ``train``.
    subsets
        Boolean masks with dims ``subset, train`` (:func:`random_subsets`); the coordinate
        ``train`` holds the ids of the training examples, in the order of ``train``.
    seeds
        Distinct integers.
    store
        Directory that rows are written to as they finish. A killed run that is started again
        with the same arguments goes on where it stopped. Default: memory.
    measurements
        Methods of the likelihood. ``"margin"`` is left out where the likelihood has none.
    query_ids
        Ids of the queries; ``0 … Q−1`` by default.
    group_size
        How many networks are trained at once, vectorised; 1 trains one after another. Default:
        30 for small plain MLPs, else 1. Subsets of unequal size always train one by one.
    workers
        Processes that train at a time on this machine, of one thread each; 1 trains in this one.
        With several, what they need must be importable: no lambda, no notebook's function.
    worker
        ``(k, K)``: this is number k of K processes, on any machines, that are run with the same
        arguments and a common ``store``. Each trains a slice of the rows that is its own and
        returns the whole bank when the others have trained theirs. Default: ``RANK`` and
        ``WORLD_SIZE`` of the environment, which ``torchrun`` sets, where there is a ``store``;
        else ``(0, 1)``.
    progress
        Show a progress bar.

    Returns
    -------
    xr.Dataset
        The bank; see the module for its layout. Attrs: ``recipe`` (JSON), ``fraction``, ``n``,
        ``seeds``, ``subset_seed`` where known, hashes of the data, library versions.

    Raises
    ------
    ValueError
        If masks and data do not fit, seeds repeat, the store was made with another recipe,
        data or masks, or a training run gives a measurement that is not finite.
    RuntimeError
        If a worker process fails.
    NotImplementedError
        If the likelihood lacks a measurement other than ``"margin"``.

    Warns
    -----
    RuntimeWarning
        If other workers' rows do not come for a minute.
    """
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size must be at least 1; got {group_size}.")
    make = partial(
        make_problem,
        make_model,
        likelihood,
        recipe,
        train=train,
        query=query,
        subsets=subsets,
        seeds=list(seeds),
        measurements=measurements,
        query_ids=query_ids,
    )
    problem = make()
    groups = list(_groups(problem, group_size or choose_group_size(problem.model)))
    values = fill(
        problem,
        groups,
        partial(_outcomes, problem),
        partial(_prepare, make),
        store=store,
        worker=worker,
        workers=workers,
        progress=progress,
    )
    return problem.label(values, subsets)


def _prepare(make: Callable[[], Problem]) -> Outcomes:
    """Make the problem in another process."""
    return partial(_outcomes, make())


def _groups(problem: Problem, size: int) -> Iterator[list[Row]]:
    """Yield the rows in order, up to ``size`` at a time, all with subsets of one size.

    Rows that are done are not left out: a group that was cut short is trained again as it was.
    """
    members = problem.mask.sum(axis=1)
    group: list[Row] = []
    for j, s in np.ndindex(*problem.shape[:2]):
        if group and (len(group) == size or members[j] != members[group[0][0]]):
            yield group
            group = []
        group.append((j, s))
    yield group


@torch.no_grad()
def _outcomes(problem: Problem, group: list[Row]) -> list[dict[str, np.ndarray]]:
    """Train the rows of a group; returns the measurements ``(Q,)`` of each."""
    inputs, target = problem.queries.batch()
    return [
        {n: getattr(problem.likelihood, n)(outputs, target).cpu().numpy() for n in problem.names}
        for outputs in _train(problem, group, inputs)
    ]


@torch.enable_grad()
def _train(problem: Problem, group: list[Row], inputs: Any) -> Tensor:
    """Train the rows of a group; returns their outputs ``(G, Q, …)`` on the queries' inputs."""
    p = problem
    members = [torch.from_numpy(np.flatnonzero(p.mask[j])) for j, _ in group]
    keys = [row_seeds(p.mask[j], p.seeds[s]) for j, s in group]
    if len(group) == 1:
        model = train_looped(p.make_model, p.likelihood, p.recipe, p.data, members[0], keys[0])
        return call(model, inputs).detach().unsqueeze(0)
    predict = train_stacked(p.make_model, p.likelihood, p.recipe, p.data, members, keys)
    return predict(inputs).detach()
