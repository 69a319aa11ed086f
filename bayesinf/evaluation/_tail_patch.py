"""Tail-patch: one training step on what was retrieved, and what the target gains by it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from bayesinf._scores import text_labels, versions
from bayesinf._task import Task
from bayesinf.evaluation._recipes import Recipe
from bayesinf.evaluation._replicates import mean_over_queries, stack_estimates
from bayesinf.evaluation._tables import Named, named, with_costs
from bayesinf.evaluation._values import most_helpful

__all__ = ["tail_patch"]

RANDOM = "random"
FEWEST = 2
_BATCH = 32


def tail_patch(
    scores: Named,
    task: Task,
    recipe: Recipe,
    *,
    top_k: int = 10,
    random: int = 20,
    random_seed: int = 0,
    confidence: float = 0.95,
) -> xr.Dataset:
    r"""Take one training step on each query's ``k`` most helpful examples; measure its target.

    From the task's checkpoint ``w₀`` one step of the recipe's optimiser, started anew, at its
    learning rate ``lr`` on ``L_B(w) = (1/k) Σ_{i∈B} ℓ_i(w)`` gives ``w₁`` (for SGD
    ``w₁ = w₀ − lr (∇L_B(w₀) + weight_decay·w₀)``), and the query gains

    .. math:: \mathrm{gain}_q = \ell_q(w_0) - \ell_q(w_1)
              = \log p(y_q \mid w_1) - \log p(y_q \mid w_0),

    in nats, summed over the tokens of its target. No retraining: it can be afforded for language
    models, and tells only of the first step.

    Parameters
    ----------
    scores
        By name, or a list, of the same queries. Whole matrices, or scores with ``top_k=``.
    task
        Checkpoint, likelihood, training and query examples. Only selected parameters move.
    recipe
        Optimiser, learning rate and weight decay: of the last steps of training, say. Epochs,
        batch size and schedule do not count.
    top_k
        ``k``.
    random, random_seed
        Random sets of ``k`` training examples, common to all queries, at least two; their seed.
    confidence
        Of all intervals.

    Returns
    -------
    xr.Dataset
        By ``scorer`` (the last is ``random``), with ``…_standard_error``, ``…_lower`` and
        ``…_upper``: ``gain``, mean over queries, and ``excess``, the gain less that of random
        sets; ``gain_query (scorer, query)``; costs of the scores.

    Raises
    ------
    ValueError
        If queries differ between methods, an option is out of range, or the loss after a step is
        not finite.
    KeyError
        If an id is unknown to the task.

    Notes
    -----
    Random in the intervals: queries, and the random sets.

    References
    ----------
    Chang, Rajagopal, Bolukbasi, Dixon & Tenney 2024, "Scalable influence and fact tracing for large
    language model pretraining" (arXiv 2410.17413).
    """
    began = time.perf_counter()
    methods = named(scores)
    if random < FEWEST or not 0 < confidence < 1 or RANDOM in methods:
        raise ValueError(
            f"tail_patch needs at least two random sets and a confidence between 0 and 1, and no "
            f"scorer called {RANDOM!r}; got random={random}, confidence={confidence} and scorers "
            f"{list(methods)}."
        )
    retrieved, query = _retrieved(methods, task, top_k)
    places = task.query.positions(query)
    before = _losses(task, task.flatten(task.params), places)
    gains = {
        name: np.array([[
            before[q] - _losses(task, _stepped(task, recipe, row), places[q : q + 1])[0]
            for q, row in enumerate(rows)
        ]])
        for name, rows in retrieved.items()
    }  # fmt: skip
    rng = np.random.default_rng(random_seed)
    sets = [rng.permutation(task.n)[:top_k] for _ in range(random)]
    control = np.stack(
        [before - _losses(task, _stepped(task, recipe, row), places) for row in sets]
    )
    gains[RANDOM] = control
    _require_finite(gains, query)
    excess = [[own - control] if name == RANDOM else [own, -control] for name, own in gains.items()]
    table = xr.Dataset(
        {
            **_estimates("gain", ([own] for own in gains.values()), confidence),
            **_estimates("excess", excess, confidence),
            "gain_query": (
                ("scorer", "query"), np.stack([own.mean(axis=0) for own in gains.values()])
            ),
        },
        coords={"scorer": text_labels(np.array(list(gains))), "query": text_labels(query)},
        attrs={
            "top_k": top_k,
            "recipe": json.dumps(recipe.as_dict()),
            "random_sets": random,
            "confidence": confidence,
            "checkpoint": task.fingerprint()["checkpoint"],
            "seconds_patching": time.perf_counter() - began,
            "random": "queries and random sets",
            **versions(),
        },
    )  # fmt: skip
    return with_costs(table, {name: methods.get(name, xr.Dataset()) for name in gains})


def _retrieved(
    methods: dict[str, xr.Dataset], task: Task, top_k: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Positions ``(Q, k)`` of what each method retrieves, and the queries' ids."""
    found: dict[str, np.ndarray] = {}
    query = next(iter(methods.values()))["query"].values
    for name, own in methods.items():
        if set(own["query"].values.tolist()) != set(query.tolist()):
            raise ValueError(
                f"{name} scores other queries than the first method. Compare on the common ones: "
                f"scores.sel(query=[...])."
            )
        best, _ = most_helpful(own.sel(query=query), name, top_k)
        found[name] = task.train.positions(best.ravel()).reshape(best.shape)
    return found, query


def _stepped(task: Task, recipe: Recipe, positions: np.ndarray) -> Tensor:
    """Weights after one step on the examples at these positions."""
    flat = task.flatten(task.params).detach().clone().requires_grad_()
    batch = task.train.batch(torch.from_numpy(positions))
    with torch.enable_grad():
        loss = task.losses(task.unflatten(flat), batch).mean()
        (gradient,) = torch.autograd.grad(loss, flat)
    weights = flat.detach().clone()
    weights.requires_grad_()
    recipe.optimizer([weights])([gradient], recipe.lr)
    return weights.detach()


@torch.no_grad()
def _losses(task: Task, flat: Tensor, places: np.ndarray) -> np.ndarray:
    """Losses ``(Q,)`` of queries in float64."""
    params = task.unflatten(flat)
    parts = [
        task.losses(params, task.query.batch(torch.from_numpy(places[start : start + _BATCH])))
        for start in range(0, len(places), _BATCH)
    ]
    return torch.cat(parts).double().cpu().numpy()


def _estimates(name: str, parts: Iterable[list[np.ndarray]], confidence: float) -> dict[str, Any]:
    found = np.array([mean_over_queries(own, confidence) for own in parts])
    return dict(stack_estimates(name, ("scorer",), found))


def _require_finite(gains: dict[str, np.ndarray], query: np.ndarray) -> None:
    for name, own in gains.items():
        bad = ~np.isfinite(own).all(axis=0)
        if bad.any():
            raise ValueError(
                f"after a step on what {name} retrieved the loss of {int(bad.sum())} queries is "
                f"not finite, first query {query[bad][0]!r}. Usual cause: a learning rate that is "
                f"too large for one step on so few examples; lower recipe.lr."
            )
