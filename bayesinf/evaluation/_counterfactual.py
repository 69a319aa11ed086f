"""Removing what is most helpful and training again: what is lost, beside random removal.

Dims: ``scorer`` (methods, then the controls), ``count`` (examples removed), ``query``. Every mask
of every query, method and control is a row of one bank (:mod:`bayesinf.evaluation._masks`).
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr

from bayesinf._likelihoods import Likelihood
from bayesinf._scores import text_labels, versions
from bayesinf.evaluation._masks import CORRECT, Masks, check_repeats, measured
from bayesinf.evaluation._problem import ModelFactory, examples
from bayesinf.evaluation._recipes import Recipe
from bayesinf.evaluation._replicates import (
    mean_over_queries,
    share_over_queries,
    stack_estimates,
)
from bayesinf.evaluation._tables import Named, named, with_costs
from bayesinf.evaluation._training import initialise
from bayesinf.evaluation._values import most_helpful

__all__ = ["RemovalWarning", "removal_counterfactual"]

RANDOM, SAME_CLASS = "random", "random, same class"


class RemovalWarning(UserWarning):
    """Something that was asked of a removal could not be measured."""


def removal_counterfactual(
    scores: Named,
    make_model: ModelFactory,
    likelihood: Likelihood,
    recipe: Recipe,
    *,
    train: Any,
    query: Any,
    counts: Sequence[int],
    seeds: Sequence[int],
    measurement: str = "loss",
    random: int = 3,
    random_seed: int = 0,
    train_ids: Sequence[Any] | np.ndarray | None = None,
    query_ids: Sequence[Any] | np.ndarray | None = None,
    confidence: float = 0.95,
    store: str | os.PathLike[str] | None = None,
    group_size: int | None = None,
    progress: bool = False,
) -> xr.Dataset:
    r"""Remove the ``k`` most helpful training examples of each query, retrain, and measure it.

    For every method, query and ``k`` in ``counts`` the ``k`` examples of most negative influence
    are left out, the network is trained anew with every seed, and the query's measurement is
    compared with networks trained on everything. Two controls remove ``k`` examples at random: of
    all, and, where targets are classes, of the query's own class (which alone can hurt a query).
    Controls are shared by the queries; equal masks are trained once.

    Parameters
    ----------
    scores
        By name, or a list, of the same queries: those to judge (``scores.sel(query=[…])``). Whole
        matrices, or scores of methods with ``top_k=``.
    make_model, likelihood, recipe, train, query
        As of :func:`bayesinf.retrain`.
    counts
        How many to remove, rising.
    seeds
        Of the retrainings, at least two.
    measurement
        What the scores were made for; by name.
    random, random_seed
        Random masks of a count (and class), at least two, and their seed.
    train_ids, query_ids
        Ids in the order of ``train`` and ``query``; positions by default.
    confidence
        Of all intervals.
    store, group_size, progress
        As of :func:`bayesinf.retrain`.

    Returns
    -------
    xr.Dataset
        By ``scorer`` and ``count``, with ``…_standard_error``, ``…_lower``, ``…_upper``:
        ``change``, the measurement after the removal less that without, mean over queries (a loss
        should rise); ``excess (control, scorer, count)``, the change less that of a control on the
        same queries. With a likelihood that has ``correct`` also ``flipped``, the share of
        predictions that turned wrong among the queries that networks of all seeds get right
        (``stable (query)``), and ``brittle``, the share of these queries whose ``brittleness
        (scorer, query)`` is at most ``count``: the smallest count of the grid at which more than
        half of the networks are wrong, ``inf`` where none is. By query: ``change_query`` and
        ``flipped_query (scorer, count, query)``. Costs of the scores by ``scorer``.

    Raises
    ------
    ValueError
        If queries differ between methods, counts do not rise or exceed the examples (of a class),
        there are fewer than two seeds or random masks, or scores are of another measurement.
    KeyError
        If a query or training id is unknown.
    NotImplementedError
        If the likelihood lacks the measurement.

    Warns
    -----
    RemovalWarning
        If no query is predicted right by the networks of all seeds, so that none can flip.

    Notes
    -----
    Random in the intervals: queries, seeds, and the random masks of controls. Networks trained on
    everything are common to all methods; their noise is part of ``change``, none of ``excess``.
    Ilyas et al. 2022 (arXiv 2202.00622) §4.1 on brittleness; Park et al. 2023 (arXiv 2303.14186).
    """
    began = time.perf_counter()
    methods = named(scores)
    grid = _checked(methods, counts, seeds, random, confidence, measurement)
    data = examples(initialise(make_model, 0), train, train_ids, "train")
    queries = examples(initialise(make_model, 0), query, query_ids, "query")
    wanted = next(iter(methods.values()))["query"].values
    places = queries.positions(wanted)
    masks = Masks(len(data))
    plans = {name: _targeted(own, name, wanted, grid, data.positions, masks)
             for name, own in methods.items()}  # fmt: skip
    classes = _classes(data.batch()[1]), _classes(queries.batch(torch.from_numpy(places))[1])
    plans |= _controls(grid, classes, len(places), random, random_seed, masks)
    outcomes = measured(
        masks, make_model, likelihood, recipe, train=train, query=query, seeds=seeds,
        measurement=measurement, train_ids=data.ids, query_ids=queries.ids, store=store,
        group_size=group_size, progress=progress,
    )  # fmt: skip
    effects = _Effects(plans, {name: array[..., places] for name, array in outcomes.items()}, masks)
    controls = [name for name in plans if name not in methods]
    variables = _change(effects, measurement, controls, confidence)
    if CORRECT in outcomes:
        variables |= _flips(effects, grid, confidence)
    table = xr.Dataset(
        variables,
        coords={
            "scorer": text_labels(np.array(list(plans))),
            "control": text_labels(np.array(controls)), "count": grid, "query": text_labels(wanted),
        },
        attrs={
            "measurement": measurement,
            "recipe": json.dumps(recipe.as_dict()),
            "seeds": json.dumps([int(s) for s in seeds]),
            "random_masks": random,
            "confidence": confidence,
            "networks": len(masks) * len(seeds),
            "seconds_retraining": time.perf_counter() - began,
            "random": "queries, seeds and random masks",
            **versions(),
        },
    )  # fmt: skip
    return with_costs(table, {name: methods.get(name, xr.Dataset()) for name in plans})


# ---------------------------------------------------------------------------- what is removed


def _targeted(
    own: xr.Dataset,
    name: str,
    wanted: np.ndarray,
    grid: np.ndarray,
    positions: Any,
    masks: Masks,
) -> np.ndarray:
    """Rows ``(counts, 1, Q)`` without the most helpful of each query."""
    best, ids = most_helpful(own, name, int(grid[-1]))
    if sorted(map(str, ids.tolist())) != sorted(map(str, wanted.tolist())):
        raise ValueError(
            f"{name} scores other queries than the first method ({len(ids)} and {len(wanted)}). "
            f"Compare on the common ones: scores.sel(query=[...])."
        )
    place = {key: i for i, key in enumerate(ids.tolist())}
    order = [place[key] for key in wanted.tolist()]
    removed = positions(best[order].ravel()).reshape(len(order), -1)
    return np.array([[[masks.add(row[:k]) for row in removed]] for k in grid])


def _controls(
    grid: np.ndarray,
    classes: tuple[np.ndarray | None, np.ndarray | None],
    queries: int,
    random: int,
    seed: int,
    masks: Masks,
) -> dict[str, np.ndarray]:
    """Rows ``(counts, random, Q)`` without random examples, of all and of the query's class."""
    rng = np.random.default_rng(seed)
    draws = [[masks.add(rng.permutation(masks.n)[:k]) for _ in range(random)] for k in grid]
    found = {RANDOM: np.repeat(np.array(draws)[:, :, None], queries, axis=2)}
    train, query = classes
    if train is not None and query is not None:
        rows = np.empty((len(grid), random, queries), dtype=np.int64)
        for label in np.unique(query):
            members = np.flatnonzero(train == label)
            if len(members) < grid[-1]:
                raise ValueError(
                    f"{int(grid[-1])} examples are to be removed, and class {label} has "
                    f"{len(members)} for the control that removes from a query's class. Lower the "
                    f"largest of counts=."
                )
            for j, k in enumerate(grid):
                for r in range(random):
                    rows[j, r, query == label] = masks.add(rng.permutation(members)[:k])
        found[SAME_CLASS] = rows
    return found


def _classes(target: Any) -> np.ndarray | None:
    """Integer labels ``(n,)``, or None where targets are none."""
    plain = hasattr(target, "is_floating_point") and not target.is_floating_point()
    return target.cpu().numpy() if plain and target.ndim == 1 else None


def _checked(
    methods: dict[str, xr.Dataset],
    counts: Sequence[int],
    seeds: Sequence[int],
    random: int,
    confidence: float,
    measurement: str,
) -> np.ndarray:
    grid = np.asarray(counts)
    rising = grid.ndim == 1 and len(grid) and grid.dtype.kind in "iu" and grid[0] > 0
    if not rising or (np.diff(grid) <= 0).any():
        raise ValueError(f"counts must be positive integers that rise; got {list(counts)}.")
    check_repeats(seeds, random, confidence)
    for name, own in methods.items():
        made_for = own.attrs.get("measurement", "loss")
        if made_for != measurement:
            raise ValueError(
                f"{name} scores the measurement {made_for!r} and was to be judged on "
                f"{measurement!r}. Use measurement={made_for!r}, or make scores for that."
            )
        taken = {RANDOM, SAME_CLASS} & {name}
        if taken:
            raise ValueError(f"a scorer cannot be called {name!r}, which is a control.")
    return grid


# ---------------------------------------------------------------------------- what it did


@dataclass(frozen=True)
class _Effects:
    """Outcomes of every plan: rows ``(counts, replicates of masks, Q)`` of a bank."""

    plans: dict[str, np.ndarray]
    outcomes: dict[str, np.ndarray]
    masks: Masks

    def base(self, name: str) -> np.ndarray:
        """Measurements ``(R, Q)`` with nothing removed."""
        return self.outcomes[name][self.masks.everything]

    def replicates(self, name: str, scorer: str, count: int) -> np.ndarray:
        """Independent replicates ``(R, Q)`` of a removal: of its seeds, or of random masks."""
        runs = self.runs(name, scorer, count)
        return runs[0] if len(runs) == 1 else runs.mean(axis=1)

    def runs(self, name: str, scorer: str, count: int) -> np.ndarray:
        """All networks ``(masks, seeds, Q)`` of a removal."""
        rows = self.plans[scorer][count]
        own = np.arange(rows.shape[1])
        return self.outcomes[name][rows, :, own].transpose(0, 2, 1)

    def each(self, function: Any) -> np.ndarray:
        """``function(scorer, place of the count)`` of all, an array ``(scorers, counts, …)``."""
        counts = range(len(next(iter(self.plans.values()))))
        return np.array([[function(scorer, j) for j in counts] for scorer in self.plans])


def _change(
    effects: _Effects, measurement: str, controls: Iterable[str], confidence: float
) -> dict[str, Any]:
    base = effects.base(measurement)

    def change(scorer: str, j: int) -> Any:
        return mean_over_queries([effects.replicates(measurement, scorer, j), -base], confidence)

    def excess(control: str) -> np.ndarray:
        def less(scorer: str, j: int) -> Any:
            own, other = (effects.replicates(measurement, s, j) for s in (scorer, control))
            parts = [own - other] if scorer == control else [own, -other]
            return mean_over_queries(parts, confidence)

        return effects.each(less)

    by_query = effects.each(
        lambda scorer, j: effects.runs(measurement, scorer, j).mean(axis=(0, 1)) - base.mean(axis=0)
    )
    dims = ("scorer", "count")
    over = np.stack([excess(control) for control in controls])
    return {
        **stack_estimates("change", dims, effects.each(change)),
        **stack_estimates("excess", ("control", *dims), over),
        "change_query": ((*dims, "query"), by_query),
    }


def _flips(effects: _Effects, grid: np.ndarray, confidence: float) -> dict[str, Any]:
    right = effects.base(CORRECT)
    stable = (right == 1).all(axis=0)
    wrong = effects.each(lambda scorer, j: 1 - effects.runs(CORRECT, scorer, j).mean(axis=(0, 1)))
    dims = ("scorer", "count")
    smallest = np.where((wrong > 0.5).any(axis=1), grid[(wrong > 0.5).argmax(axis=1)], np.inf)
    smallest[:, 1 - right.mean(axis=0) > 0.5] = 0.0
    found: dict[str, Any] = {
        "stable": ("query", stable),
        "flipped_query": ((*dims, "query"), wrong),
        "brittleness": (("scorer", "query"), smallest),
    }
    if not stable.any():
        warnings.warn(
            "no query is predicted right by the networks of all seeds, so that no prediction can "
            "flip; flipped and brittle are left out. Judge queries that the network gets right.",
            RemovalWarning,
            stacklevel=3,
        )
        return found

    def flipped(scorer: str, j: int) -> Any:
        return share_over_queries(1 - effects.replicates(CORRECT, scorer, j)[:, stable], confidence)

    def brittle(scorer: str, j: int) -> Any:
        reached = smallest[list(effects.plans).index(scorer)][stable] <= grid[j]
        return share_over_queries(reached[None].astype(np.float64), confidence)

    for name, function in (("flipped", flipped), ("brittle", brittle)):
        found |= stack_estimates(name, dims, effects.each(function))
    return found
