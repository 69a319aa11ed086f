"""Retraining by a function of the user's own, with any model, library and device.

The bank is that of :func:`~bayesinf.evaluation.retrain`: the same layout, store, seeds and workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from bayesinf._data import Examples, resolve_ids
from bayesinf._likelihoods import Likelihood
from bayesinf.evaluation._filling import Outcomes, fill
from bayesinf.evaluation._problem import (
    check_design,
    examples,
    identity_of,
    label_bank,
    supported,
)
from bayesinf.evaluation._rows import Row
from bayesinf.evaluation._training import call, row_seeds

__all__ = ["retrain_with"]

TrainModel = Callable[[np.ndarray, int], Any]
"""``train(kept, seed)``: positions of the kept examples, ascending, and the seed of the run."""

Measure = Callable[[Any], Mapping[str, Any]]
"""``measure(model)``: ``(Q,)`` values by measurement."""

BATCH = 64


@dataclass(frozen=True)
class OwnTraining:
    """A checked run of a user's function; ``mask`` is ``(M, n)``."""

    train: TrainModel
    measure: Measure
    described: dict[str, Any]
    mask: np.ndarray
    seeds: tuple[int, ...]
    names: tuple[str, ...]
    query: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(M, R, Q)``."""
        return len(self.mask), len(self.seeds), len(self.query)

    def identity(self) -> dict[str, Any]:
        """Everything that the outcomes depend on, as far as it is known here."""
        design = identity_of(self.mask, self.seeds, self.names)
        return {**self.described, "n": self.mask.shape[1], **design}


@dataclass(frozen=True)
class Likely:
    """Measures a model by methods of a likelihood, some queries at a time."""

    likelihood: Likelihood
    query: Any
    names: tuple[str, ...]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, np.ndarray]:
        """Return ``(Q,)`` by name, in eval mode."""
        model.eval()
        parts: dict[str, list[np.ndarray]] = {name: [] for name in self.names}
        for _, (inputs, target) in examples(model, self.query, None, "query").batches(BATCH):
            outputs = call(model, inputs)
            for name, own in parts.items():
                own.append(getattr(self.likelihood, name)(outputs, target).float().cpu().numpy())
        return {name: np.concatenate(own) for name, own in parts.items()}


def retrain_with(
    train: TrainModel,
    *,
    recipe: Mapping[str, Any],
    subsets: xr.DataArray,
    seeds: Sequence[int],
    likelihood: Likelihood | None = None,
    query: Any = None,
    measure: Measure | None = None,
    measurements: Sequence[str] = ("loss", "margin"),
    query_ids: Sequence[Any] | np.ndarray | None = None,
    store: str | os.PathLike[str] | None = None,
    workers: int = 1,
    worker: tuple[int, int] | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """Retrain by a function of your own on every subset with every seed: a bank of outcomes.

    Parameters
    ----------
    train
        ``train(kept, seed)`` returns the trained model: ``kept`` holds the positions of the
        examples to train on, ascending, in the order of the coordinate ``train`` of ``subsets``,
        as in ``Subset(dataset, kept)`` or ``x[kept]``. All that is random should follow from
        ``seed``. PyTorch's global generator is seeded for each row beforehand, other generators
        are not.
    recipe
        Plain values that say how it trains, such as ``{"optimizer": "adam", "lr": 1e-3}``. A
        function cannot be compared: a store made with another ``recipe`` is refused.
    subsets, seeds
        As in :func:`retrain`.
    likelihood, query
        Measure the queries by methods of the likelihood: ``query`` as in :func:`retrain`.
    measure
        Or measure by ``measure(model)``, which returns ``(Q,)`` values for each of
        ``measurements``, in the order of ``query_ids``.
    measurements
        Methods of the likelihood (``"margin"`` is left out where it has none), or the names that
        ``measure`` returns.
    query_ids
        Ids of the queries; required with ``measure``, else ``0 … Q−1`` by default.
    store, workers, worker, progress
        As in :func:`retrain`.

    Returns
    -------
    xr.Dataset
        The bank, as of :func:`retrain`.

    Raises
    ------
    ValueError
        As in :func:`retrain`; if it is not said how to measure, or said twice; and if ``measure``
        returns other names or shapes than were said.
    RuntimeError
        If a worker process fails.

    Warns
    -----
    RuntimeWarning
        If other workers' rows do not come for a minute.

    Examples
    --------
    ::

        def train(kept, seed):
            torch.manual_seed(seed)
            ...
            return model

        bank = retrain_with(
            train, recipe={"lr": 0.1, "epochs": 20}, likelihood=Categorical(), query=(x, y),
            subsets=random_subsets(1000, count=100, seed=0), seeds=range(6), store="bank",
        )
    """
    check_design(subsets, seeds)
    names, ids, own, described = _measuring(likelihood, query, measure, measurements, query_ids)
    job = OwnTraining(
        train=train,
        measure=own,
        described={"recipe": dict(recipe), **described},
        mask=subsets.values,
        seeds=tuple(int(s) for s in seeds),
        names=names,
        query=ids,
    )
    values = fill(
        job,
        [[(j, s)] for j, s in np.ndindex(*job.shape[:2])],
        partial(_outcomes, job),
        partial(_prepare, job),
        store=store,
        worker=worker,
        workers=workers,
        progress=progress,
    )
    return label_bank(values, subsets, job.identity(), job.query, job.seeds)


def _prepare(job: OwnTraining) -> Outcomes:
    """Receive the job in another process."""
    return partial(_outcomes, job)


def _measuring(
    likelihood: Likelihood | None,
    query: Any,
    measure: Measure | None,
    measurements: Sequence[str],
    query_ids: Sequence[Any] | np.ndarray | None,
) -> tuple[tuple[str, ...], np.ndarray, Measure, dict[str, Any]]:
    """Names, ids of the queries, how to measure, and what a store should know of it."""
    by_likelihood = likelihood is not None and query is not None and measure is None
    by_measure = likelihood is None and query is None and measure is not None
    if not (by_likelihood or (by_measure and query_ids is not None)):
        raise ValueError(
            "say how models are measured, in one way: likelihood= and query=, or measure= with "
            "measurements= and query_ids=, the names and the ids of what it returns."
        )
    if measure is not None and query_ids is not None:
        names = tuple(measurements)
        return names, resolve_ids(query_ids, len(query_ids), "query"), measure, {}
    assert likelihood is not None
    held = Examples(query, query_ids, "query", torch.device("cpu"), torch.float32)
    names = supported(likelihood, measurements)
    described = {"likelihood": repr(likelihood), "query": held.fingerprint()}
    return names, held.ids, Likely(likelihood, query, names), described


def _outcomes(job: OwnTraining, group: list[Row]) -> list[dict[str, np.ndarray]]:
    """Train and measure rows, one after another."""
    return [_outcome(job, *row) for row in group]


def _outcome(job: OwnTraining, subset: int, seed: int) -> dict[str, np.ndarray]:
    mask, number = job.mask[subset], job.seeds[seed]
    with torch.random.fork_rng():
        torch.manual_seed(row_seeds(mask, number)[0])
        model = job.train(np.flatnonzero(mask), number)
        measured = job.measure(model)
    values = {name: _array(value) for name, value in measured.items()}
    shapes = {name: value.shape for name, value in values.items()}
    if shapes != dict.fromkeys(job.names, job.query.shape):
        raise ValueError(
            f"measure(model) must return {list(job.names)} (measurements=), each of shape "
            f"{job.query.shape} (query_ids=); got {shapes}."
        )
    return {name: values[name] for name in job.names}


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().float().cpu()
    return np.asarray(value, dtype=np.float32)
