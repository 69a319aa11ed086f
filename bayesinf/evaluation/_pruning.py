"""Training on less: networks on the share of the examples that a value would keep."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
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
from bayesinf.evaluation._values import common_values

__all__ = ["pruning_curve"]

RANDOM = "random"
KEEP = ("high", "low")


def pruning_curve(
    values: Named,
    make_model: ModelFactory,
    likelihood: Likelihood,
    recipe: Recipe,
    *,
    train: Any,
    query: Any,
    fractions: Sequence[float],
    seeds: Sequence[int],
    keep: Literal["high", "low"] = "high",
    measurement: str = "loss",
    random: int = 3,
    random_seed: int = 0,
    train_ids: Sequence[Any] | np.ndarray | None = None,
    confidence: float = 0.95,
    store: str | os.PathLike[str] | None = None,
    group_size: int | None = None,
    progress: bool = False,
) -> xr.Dataset:
    r"""Keep a share of the training examples by value, train on them alone, and test.

    A value worth pruning by beats random examples of the same number. Values are high for hard
    examples: ``keep="high"`` keeps the hardest, which is best where data are plenty; ``"low"`` the
    easiest, which is best where they are few, or mislabelled (Sorscher et al. 2022).

    Parameters
    ----------
    values
        Values of the training examples, as of :func:`bayesinf.mislabel_detection`.
    make_model, likelihood, recipe, train
        As of :func:`bayesinf.retrain`. A recipe counts epochs: fewer examples are fewer steps.
    query
        Test examples, which no value has seen.
    fractions
        Shares that are kept, each below 1.
    seeds
        Of the retrainings, at least two.
    keep
        Which end is kept; of equal values the earlier example.
    measurement
        Of the test examples, by name.
    random, random_seed
        Random subsets of a size, at least two, and their seed.
    train_ids
        Ids in the order of ``train``; positions by default.
    confidence
        Of all intervals.
    store, group_size, progress
        As of :func:`bayesinf.retrain`.

    Returns
    -------
    xr.Dataset
        By ``scorer`` (the last is ``random``) and ``fraction``, with ``…_standard_error``,
        ``…_lower`` and ``…_upper``: the measurement under its name and, with a likelihood that has
        ``correct``, ``accuracy``, means over test examples and seeds; ``…_excess``, the same less
        that of random subsets. ``full_…``: networks trained on everything. Costs of the values.

    Raises
    ------
    ValueError
        If values are missing, not finite or of other examples, a fraction is out of range, or
        there are fewer than two seeds or random subsets.
    NotImplementedError
        If the likelihood lacks the measurement.

    Notes
    -----
    Random in the intervals: test examples, seeds, and the random subsets.
    """
    began = time.perf_counter()
    methods = named(values)
    shares = _checked(methods, fractions, keep)
    check_repeats(seeds, random, confidence)
    data = examples(initialise(make_model, 0), train, train_ids, "train")
    matrix, _ = common_values(methods, data.ids)
    masks = Masks(len(data))
    sizes = [len(data) - round(share * len(data)) for share in shares]
    order = matrix if keep == "high" else -matrix
    dropped = len(data) - 1 - np.argsort(order[:, ::-1], axis=1, kind="stable")
    plans = {name: [[masks.add(row[:k])] for k in sizes]
             for name, row in zip(methods, dropped, strict=True)}  # fmt: skip
    rng = np.random.default_rng(random_seed)
    plans[RANDOM] = [
        [masks.add(rng.permutation(len(data))[:k]) for _ in range(random)] for k in sizes
    ]
    outcomes = measured(
        masks, make_model, likelihood, recipe, train=train, query=query, seeds=seeds,
        measurement=measurement, train_ids=data.ids, store=store, group_size=group_size,
        progress=progress,
    )  # fmt: skip
    variables: dict[str, Any] = {}
    for name, runs in outcomes.items():
        title = "accuracy" if name == CORRECT else name
        variables |= _curves(title, runs, plans, masks.everything, confidence)
    table = xr.Dataset(
        variables,
        coords={"scorer": text_labels(np.array(list(plans))), "fraction": shares},
        attrs={
            "keep": keep,
            "measurement": measurement,
            "recipe": json.dumps(recipe.as_dict()),
            "seeds": json.dumps([int(s) for s in seeds]),
            "random_masks": random,
            "confidence": confidence,
            "networks": len(masks) * len(seeds),
            "seconds_retraining": time.perf_counter() - began,
            "random": "test examples, seeds and random subsets",
            **versions(),
        },
    )
    return with_costs(table, {name: methods.get(name, xr.Dataset()) for name in plans})


def _curves(
    title: str,
    runs: np.ndarray,
    plans: dict[str, list[list[int]]],
    everything: int,
    confidence: float,
) -> dict[str, Any]:
    """Means and excesses of one measurement from outcomes ``(masks, R, Q)``."""

    def replicates(rows: list[int]) -> np.ndarray:
        found: np.ndarray = runs[rows[0]] if len(rows) == 1 else runs[rows].mean(axis=1)
        return found

    def level(part: np.ndarray) -> Any:
        if title == "accuracy":
            return share_over_queries(part, confidence)
        return mean_over_queries([part], confidence)

    means, excesses = [], []
    for name, plan in plans.items():
        own = [replicates(rows) for rows in plan]
        others = [replicates(rows) for rows in plans[RANDOM]]
        pairs = [[x - y] if name == RANDOM else [x, -y] for x, y in zip(own, others, strict=True)]
        means.append([level(x) for x in own])
        excesses.append([mean_over_queries(parts, confidence) for parts in pairs])
    dims = ("scorer", "fraction")
    full = np.array(level(runs[everything]))
    return {
        **stack_estimates(title, dims, np.array(means)),
        **stack_estimates(f"{title}_excess", dims, np.array(excesses)),
        **stack_estimates(f"full_{title}", (), full),
    }


def _checked(methods: dict[str, xr.Dataset], fractions: Sequence[float], keep: str) -> np.ndarray:
    shares = np.asarray(fractions, dtype=np.float64)
    if shares.ndim != 1 or not len(shares) or not ((shares > 0) & (shares < 1)).all():
        raise ValueError(f"fractions must be shares between 0 and 1; got {list(fractions)}.")
    if keep not in KEEP:
        raise ValueError(f"keep must be one of {KEEP}; got {keep!r}.")
    if RANDOM in methods:
        raise ValueError(f"a scorer cannot be called {RANDOM!r}, which is the control.")
    return shares
