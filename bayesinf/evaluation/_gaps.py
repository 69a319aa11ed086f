"""Why influence functions and retraining disagree: the five gaps of Bae et al. 2022, measured.

Dims: ``stage`` (procedures that answer "what if these examples were left out?", from retraining to
an approximate solver), ``query`` (Q), ``group`` (G sets of removed examples), ``gap`` (differences
of consecutive stages).
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr
from torch import Tensor

from bayesinf._scores import text_labels, versions
from bayesinf._task import Measurement, Task, measurement_name
from bayesinf.evaluation._problem import ModelFactory
from bayesinf.evaluation._recipes import SGDRecipe
from bayesinf.evaluation._responses import require_settings, warn_unconverged
from bayesinf.evaluation._stages import STAGES, Stage, Stages, retrain_without, standard_error
from bayesinf.evaluation._statistics import correlate

__all__ = ["response_gaps"]

GAPS = ("warm_start", "proximity", "non_convergence", "linearization")
FEWEST_GROUPS = 3

Reference = Literal["retrained", "checkpoint"]


def response_gaps(
    task: Task,
    groups: Mapping[Any, Any] | Sequence[Any] | np.ndarray,
    recipe: SGDRecipe,
    *,
    damping: float,
    make_model: ModelFactory | None = None,
    seeds: Sequence[int] = range(5),
    solvers: Mapping[str, xr.Dataset] | Sequence[xr.Dataset] = (),
    measurement: Measurement = "loss",
    reference: Reference = "retrained",
    tolerance: float = 1e-3,
    max_iterations: int = 300,
    rank: int = 200,
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> xr.Dataset:
    r"""Measure a removal five ways, from retraining to influence functions, and their differences.

    With ``S`` the removed examples, ``ws`` the checkpoint, ``κ`` the recipe's weight decay and
    ``λ`` the damping, the stages are

    ==============  ======================================================================
    ``cold_start``  trained by the recipe from new initial weights on what is left
    ``warm_start``  that objective, ``(1/n) Σ_{i∉S} ℓ_i + (κ n₋/2n)‖w‖²``, minimised from
                    ``ws`` (``n₋`` examples are left)
    ``proximal``    ``(1/n) Σ_{i∉S} ℓ_i + (κ/2)‖w‖² + ((λ−κ)/2)‖w − ws‖²``, minimised from
                    ``ws``
    ``bregman``     the proximal Bregman response, ``(1/n) Σ_i D_i − (1/n) Σ_{i∈S} ℓ_i +
                    (λ/2)‖w − ws‖²``: losses and weight decay are replaced by their
                    Bregman divergences from ``ws``
    ``linear``      its first-order term ``ws + (1/n) (G + λI)⁻¹ Σ_{i∈S} ∇ℓ_i`` with the exact
                    Gauss–Newton matrix
    solvers         ``−Σ_{i∈S} influence`` of given scores
    ==============  ======================================================================

    and the gaps between consecutive ones are called ``warm_start``, ``proximity``,
    ``non_convergence``, ``linearization`` and, between ``linear`` and each solver, by that
    solver's name. ``proximal`` and ``bregman`` agree where training has converged and the network
    is linear in its parameters; with ``λ = κ`` there is no proximal term.

    Parameters
    ----------
    task
        Checkpoint, likelihood, training and query examples.
    groups
        What is removed: training ids, or sets of them; a mapping names the groups.
    recipe
        How the checkpoint was trained: for cold starts, and for its weight decay.
    damping
        ``λ`` = γ/(nβ) + weight decay, in units of the mean loss, at least the weight decay.
    make_model
        Makes the untrained network, as in :func:`bayesinf.train_one`. None leaves cold starts,
        and their gap, out.
    seeds
        Of the cold starts.
    solvers
        Scores by name, or a list named by ``attrs["method"]``, at the same damping. For
        similarities, only correlations are reported.
    measurement
        φ of the queries; by name where there are cold starts.
    reference
        What removal is compared with. ``"retrained"``: the same stage with nothing removed, so
        that a change is the effect of the removal alone. ``"checkpoint"``: φ at ``ws``, as in Bae
        et al.; changes then include how far a stage moves with nothing removed (``shift``).
    tolerance, max_iterations
        When a minimisation (or solve) ends.
    rank, seed
        Of the preconditioner, as in :func:`bayesinf.pbrf`.
    store, progress
        Of the cold starts, as in :func:`bayesinf.retrain`.

    Returns
    -------
    xr.Dataset
        ``change (stage, query, group)``: φ after the removal minus φ of the reference;
        ``shift (stage, query)``: φ with nothing removed minus φ at ``ws``;
        ``standard_error (query, group)`` of the cold starts' change over seeds;
        ``residual (stage, group)`` of minimisations and solves; ``removed (group, train)``.
        By gap, with ``before`` and ``after`` its stages: ``rms`` of the difference over all pairs;
        ``noise``, the part of it that seeds explain (the rms of ``standard_error``; 0 for all but
        the first gap), so that ``√(rms² − noise²)`` estimates the gap itself;
        ``correlation_query (gap, query)`` over groups and ``correlation``, its mean over queries
        (NaN with fewer than three groups, or where a stage does not respond).

    Raises
    ------
    ValueError
        If an argument is out of range, groups are empty, repeat an example or leave none, or
        scores do not fit.
    KeyError
        If a training id is unknown.
    NotImplementedError
        If the likelihood lacks ``bregman`` or the measurement.
    TypeError
        If the measurement is a function and there are cold starts.

    Warns
    -----
    ConvergenceWarning
        If a minimisation has not reached the tolerance; it names the stages and groups.

    References
    ----------
    Bae, Ng, Lo, Ghassemi & Grosse 2022, "If influence functions are the answer, then what is the
    question?" (arXiv 2209.05364), §4.
    """
    require_settings(damping, tolerance, max_iterations, rank)
    _require_choices(damping, recipe, reference, measurement, make_model, seeds)
    names, removed = _groups(task, groups)
    predictions = _predictions(task, solvers, removed, measurement_name(measurement))
    seconds: dict[str, float] = {}
    stages: dict[str, Stage] = {}
    error = np.full((len(task.query), len(names)), np.nan)
    if make_model is not None:
        bank = retrain_without(
            task, recipe, removed, make_model, seeds, measurement, store, progress, seconds
        )
        stages["cold_start"] = Stage(bank.mean(axis=1), None)
        error = standard_error(bank, paired=reference == "retrained")
    local = Stages(
        task, recipe, removed, damping, measurement, tolerance, max_iterations, rank, seed, seconds
    )
    for name in STAGES[1:]:
        stages[name] = local.run(name)
    _warn(stages, names, tolerance, max_iterations)
    origin = local.origin
    change = {name: s.change(None if reference == "retrained" else origin)
              for name, s in stages.items()} | predictions  # fmt: skip
    ids = {"query": text_labels(task.query.ids), "train": text_labels(task.train.ids)}
    similar = {k for k, s in _named(solvers).items() if s.attrs.get("estimand") == "similarity"}
    return xr.Dataset(
        {
            "change": (("stage", "query", "group"), np.stack(list(change.values()))),
            **_stage_variables(list(change), stages, origin, len(names)),
            "standard_error": (("query", "group"), error),
            "removed": (("group", "train"), removed),
            **_gap_variables(change, error, similar),
        },
        coords={
            "stage": text_labels(np.array(list(change))),
            "group": text_labels(names),
            **ids,
            **_gap_coords(list(change)),
        },
        attrs={
            "damping": float(damping),
            "weight_decay": recipe.weight_decay,
            "measurement": measurement_name(measurement),
            "reference": reference,
            "recipe": json.dumps(recipe.as_dict()),
            "seeds": json.dumps([int(s) for s in seeds] if make_model is not None else []),
            "tolerance": tolerance,
            "checkpoint": task.fingerprint()["checkpoint"],
            "n": task.n,
            "parameters": task.dimension,
            "seconds": json.dumps({name: round(spent, 6) for name, spent in seconds.items()}),
            "forward_examples": local.near.forward_examples,
            "backward_examples": local.near.backward_examples,
            **versions(),
        },
    )


def _stage_variables(
    names: list[str], stages: dict[str, Stage], origin: np.ndarray, groups: int
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Shifts and residuals of all stages; solvers have neither."""
    shift, residual = np.zeros((len(names), len(origin))), np.full((len(names), groups), np.nan)
    for k, name in enumerate(names):
        if name in stages:
            shift[k] = stages[name].values[0] - origin
            reached = stages[name].residual
            if reached is not None:
                residual[k] = reached[1:]
    return {"shift": (("stage", "query"), shift), "residual": (("stage", "group"), residual)}


def _warn(
    stages: dict[str, Stage], names: np.ndarray, tolerance: float, max_iterations: int
) -> None:
    """Name the minimisations that have not converged, those with nothing removed included."""
    groups = ["nothing removed", *(f"group {name}" for name in names.tolist())]
    done = {name: s.residual for name, s in stages.items() if s.residual is not None}
    places = np.array([f"{name}, {group}" for name in done for group in groups])
    warn_unconverged(places, np.concatenate(list(done.values())), tolerance, max_iterations)


# ---------------------------------------------------------------------------- the gaps


def _pairs(stages: list[str]) -> list[tuple[str, str, str]]:
    """Name of each gap, and the stages before and after it."""
    steps = zip(GAPS, STAGES[:-1], STAGES[1:], strict=True)
    known = [(gap, a, b) for gap, a, b in steps if a in stages]
    return known + [(name, "linear", name) for name in stages if name not in STAGES]


def _gap_coords(stages: list[str]) -> dict[str, Any]:
    gap, before, after = (text_labels(np.array(x)) for x in zip(*_pairs(stages), strict=True))
    return {"gap": gap, "before": ("gap", before), "after": ("gap", after)}


def _gap_variables(
    change: dict[str, np.ndarray], error: np.ndarray, similar: set[str]
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    rms, noise, correlations = [], [], []
    for _, before, after in _pairs(list(change)):
        a, b = change[before], change[after]
        rms.append(np.nan if after in similar else np.sqrt(np.mean((a - b) ** 2)))
        noise.append(np.sqrt(np.mean(error**2)) if before == "cold_start" else 0.0)
        found = correlate(a.T, b.T)
        still = (np.ptp(a, axis=1) == 0) | (np.ptp(b, axis=1) == 0)
        correlations.append(np.where(still | (a.shape[1] < FEWEST_GROUPS), np.nan, found))
    by_query = np.stack(correlations)
    known = np.isfinite(by_query)
    count = known.sum(axis=1)
    mean = np.where(known, by_query, 0.0).sum(axis=1) / np.where(count, count, 1)
    return {
        "rms": (("gap",), np.array(rms)),
        "noise": (("gap",), np.array(noise)),
        "correlation": (("gap",), np.where(count, mean, np.nan)),
        "correlation_query": (("gap", "query"), by_query),
    }


# ---------------------------------------------------------------------------- the arguments


def _groups(task: Task, groups: Any) -> tuple[np.ndarray, np.ndarray]:
    """Names ``(G,)`` and masks ``(G, n)`` of what is removed."""
    sets = list(groups.values()) if isinstance(groups, Mapping) else list(groups)
    single = all(_is_id(s) for s in sets)
    names = list(groups) if isinstance(groups, Mapping) else sets if single else range(len(sets))
    removed = np.zeros((len(sets), task.n), dtype=bool)
    if not sets:
        raise ValueError("groups holds nothing to remove; give training ids, or sets of them.")
    for name, mask, ids in zip(names, removed, sets, strict=True):
        wanted = [ids] if _is_id(ids) else list(ids)
        positions = task.train.positions(wanted)
        if not 0 < len(positions) < task.n or len(np.unique(positions)) < len(positions):
            raise ValueError(
                f"group {name!r} names {len(positions)} of {task.n} training examples: {wanted[:8]}"
                f". A group must remove at least one, each once, and leave at least one."
            )
        mask[positions] = True
    return np.array(list(names)), removed


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or not isinstance(value, (Collection, np.ndarray, Tensor)) or (
        isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0
    )  # fmt: skip


def _named(solvers: Mapping[str, xr.Dataset] | Sequence[xr.Dataset]) -> dict[str, xr.Dataset]:
    if isinstance(solvers, Mapping):
        return dict(solvers)
    return {str(scores.attrs.get("method", f"solver {k}")): scores
            for k, scores in enumerate(solvers)}  # fmt: skip


def _predictions(
    task: Task, solvers: Any, removed: np.ndarray, measurement: str
) -> dict[str, np.ndarray]:
    """``−Σ_{i∈S} influence`` ``(Q, G)`` of each solver."""
    named, found = _named(solvers), {}
    if len(named) < len(solvers):
        raise ValueError(
            f"several scores are of the same method; only {sorted(named)} are left. Name them: "
            f"solvers={{'ekfac, damping 0.1': a, …}}."
        )
    taken = (set(STAGES) | set(GAPS)) & set(named)
    if taken:
        raise ValueError(
            f"a solver cannot be called {sorted(taken)[0]!r}, which is a stage or gap."
        )
    used = removed.any(axis=0)
    for name, scores in named.items():
        if "influence" not in scores or set(scores["influence"].dims) != {"query", "train"}:
            raise ValueError(
                f"{name}: scores must hold influence(query, train); got variables "
                f"{[str(k) for k in scores.data_vars]} with dims {dict(scores.sizes)}."
            )
        made_for = scores.attrs.get("measurement", "loss")
        if made_for != measurement:
            raise ValueError(
                f"{name} scores the measurement {made_for!r}, and the gaps are of {measurement!r}. "
                f"Make both for the same one."
            )
        wanted = {"query": task.query.ids, "train": task.train.ids[used]}
        for dim, ids in wanted.items():
            lacking = sorted(set(ids.tolist()) - set(scores[dim].values.tolist()), key=str)
            if lacking:
                raise ValueError(
                    f"{name} has no scores of {len(lacking)} {dim} examples that are needed, "
                    f"{lacking[:5]}. Scores of every query and of every removed example are."
                )
        influence = scores["influence"].sel(wanted).transpose("query", "train").values
        found[name] = -(influence.astype(np.float64) @ removed[:, used].T)
    return found


def _require_choices(
    damping: float,
    recipe: SGDRecipe,
    reference: Any,
    measurement: Measurement,
    make_model: ModelFactory | None,
    seeds: Sequence[int],
) -> None:
    if damping < recipe.weight_decay:
        raise ValueError(
            f"damping={damping:g} is below the recipe's weight decay {recipe.weight_decay:g}. It "
            f"is their sum, λ = γ/(nβ) + weight decay, so it is at least that."
        )
    if reference not in ("retrained", "checkpoint"):
        raise ValueError(f"reference must be 'retrained' or 'checkpoint'; got {reference!r}.")
    if make_model is not None and not isinstance(measurement, str):
        raise TypeError(
            "cold starts are measured by a method of the likelihood, such as 'loss' or 'margin'; "
            "for a measurement that is a function, leave them out with make_model=None."
        )
    if make_model is not None and not len(seeds):
        raise ValueError("seeds must name at least one cold start; five or more show the noise.")
