r"""Distributional LDS: scores judged on the law of the trained networks, not on their mean alone.

Training is random, so a query's measurement ``φ`` has a law over training seeds for every subset:
``P_S``, and ``P`` for all the data. Removing examples moves its mean, changes its variance, and
moves the whole law by the 2-Wasserstein distance ``W``. Scores of ``K`` networks trained on all the
data, seed by seed, predict all three (d-TDA): network ``k``, trained without the examples that
``S`` lacks, is predicted to measure ``φ_k + δ_k(S)``, ``δ_k(S) = −Σ_{i∉S} influence_k[i]``, and the
predicted law is that of these ``K`` numbers. The distance of few runs is
corrected for its bias: see :mod:`bayesinf.evaluation._laws`.
"""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import xarray as xr

from bayesinf.evaluation._alignment import (
    align,
    check_same_kind,
    checkpoints,
    method_name,
    outcomes,
)
from bayesinf.evaluation._laws import DISTANCES, SPLITS, predicted, statistics
from bayesinf.evaluation._reliability import Statistic, split_half
from bayesinf.evaluation._statistics import (
    Queries,
    correlations,
    delete_one,
    mean_estimate,
    random_parts,
    require_options,
)
from bayesinf.evaluation._tables import Named, named, with_costs

__all__ = ["distributional_lds"]

_FEWEST_SEEDS = 4
_CEILING_SPLITS = 20


def distributional_lds(
    scores: Named,
    bank: xr.Dataset,
    full: xr.Dataset,
    *,
    measurement: str = "loss",
    queries: Queries = "random",
    confidence: float = 0.95,
    seed: int = 0,
) -> xr.Dataset:
    """Rank-correlate predicted and true changes of mean, variance and whole law over seeds.

    Parameters
    ----------
    scores
        Scores by name, a list of them, or those of one method: ``influence (seed, query, train)``,
        ``seed`` naming the run in ``full`` that was scored (``xr.concat([ekfac(t, ...) for t in
        tasks], "seed").assign_coords(seed=seeds)``). Scores without ``seed`` are taken for every
        run: they predict that the law is shifted, its variance unchanged.
    bank
        Ground truth with at least 4 seeds.
    full
        A bank of the same recipe with one subset that keeps everything and at least 4 seeds:
        ``retrain(..., subsets=leave_one_out(n, []), seeds=...)``.
    measurement, queries
        As in :func:`lds`.
    confidence
        Of the intervals. Random in them are the subsets, the seeds of their retrainings and, as
        ``queries`` says, the queries; the runs of ``full`` and the scores are as they are.
    seed
        Of the splits.

    Returns
    -------
    xr.Dataset
        By ``scorer`` and ``distance`` (``"mean"``: ordinary LDS of the scores' mean over seeds;
        ``"variance"``; ``"wasserstein"``): ``lds``, the mean over queries of ``lds_query``, with
        ``standard_error``, ``subset_error``, ``query_error``, ``lower``, ``upper``; ``constant``,
        how many queries' predictions do not vary with the subset and count as 0; what the scores
        cost. By ``distance``: ``ceiling``, about what true effects would reach (from halves of the
        seeds, whose noise is taken to fall as one over their number); NaN for ``"wasserstein"``
        with fewer than 8 seeds.

    Raises
    ------
    ValueError
        As in :func:`lds`; if seeds are too few, ``full`` has no subset or several that keep
        everything, or scores are of a seed that it lacks.

    References
    ----------
    Mlodozeniec et al. 2025, "Distributional training data attribution" (arXiv 2506.12965).
    """
    require_options("spearman", queries, confidence)
    methods = {name: _with_count(own) for name, own in named(scores).items()}
    check_same_kind(list(methods.values()), list(methods))
    query = next(iter(methods.values()))["query"].values
    base = _full(full, measurement, query)
    values = outcomes(bank, measurement, query)
    if values.shape[1] < _FEWEST_SEEDS or base.sizes["seed"] < _FEWEST_SEEDS:
        raise ValueError(
            f"a law over training seeds needs at least {_FEWEST_SEEDS} of them, and 10 to be of "
            f"use; the bank has {values.shape[1]} and full has {base.sizes['seed']}."
        )
    measured = statistics(base.values, seed)
    truth = {name: statistic(values) for name, statistic in measured.items()}
    table = xr.concat(
        [
            _judge(own.sel(query=query), bank, base, measurement, truth, queries, confidence)
            for own in methods.values()
        ],
        dim="scorer",
    ).assign_coords(scorer=list(methods), distance=list(DISTANCES))
    table["ceiling"] = "distance", [_ceiling(values, s) for s in measured.items()]
    table.attrs = {
        "measurement": measurement,
        "correlation": "spearman",
        "confidence": confidence,
        **random_parts(queries, "subsets", "seeds of subsets"),
        "subsets": len(values),
        "seeds": values.shape[1],
        "seeds_of_full": base.sizes["seed"],
        "splits": SPLITS,
        "seed": seed,
    }
    return with_costs(table, methods)


# ---------------------------------------------------------------------------- helpers


def _judge(
    scores: xr.Dataset,
    bank: xr.Dataset,
    base: xr.DataArray,
    measurement: str,
    truth: dict[str, np.ndarray],
    queries: Queries,
    confidence: float,
) -> xr.Dataset:
    runs, shift = _shifts(scores, bank, base, measurement)
    rows = []
    for name, prediction in predicted(runs, shift).items():
        values = correlations(prediction, truth[name], "spearman")
        found = mean_estimate(
            values,
            delete_one(prediction, truth[name], "spearman"),
            random_queries=queries == "random",
            confidence=confidence,
        )
        scalars = asdict(found)
        rows.append(
            xr.Dataset(
                {
                    "lds": scalars.pop("mean"),
                    **scalars,
                    "lds_query": ("query", values),
                    "constant": int((np.ptp(prediction, axis=0) == 0).sum()),
                },
                coords={"query": scores["query"].values},
            )
        )
    return xr.concat(rows, dim="distance")


def _shifts(
    scores: xr.Dataset, bank: xr.Dataset, base: xr.DataArray, measurement: str
) -> tuple[np.ndarray, np.ndarray]:
    """Measurements ``(K, Q)`` of the runs that were scored, and their shifts ``(M, K, Q)``."""
    if "seed" not in scores["influence"].dims:
        shift = _shift(scores, bank, measurement)
        return base.values, np.repeat(shift[:, None], base.sizes["seed"], axis=1)
    name = method_name(scores)
    if "seed" not in scores.coords or scores.sizes["seed"] < 2:
        raise ValueError(
            f"{name} has a dim seed of {scores.sizes['seed']}, which must name two runs of full or "
            f"more: scores.assign_coords(seed=[0, 1, ...])."
        )
    seeds = scores["seed"].values
    unknown = sorted(set(seeds.tolist()) - set(base["seed"].values.tolist()))
    if unknown or len(set(seeds.tolist())) < len(seeds):
        raise ValueError(
            f"{name} is of the seeds {seeds.tolist()}, and full has "
            f"{base['seed'].values.tolist()}: each run is scored once, and must be measured in "
            f"full."
        )
    every = [_shift(scores.isel(seed=k), bank, measurement) for k in range(len(seeds))]
    return base.sel(seed=seeds).values, np.stack(every, axis=1)


def _shift(scores: xr.Dataset, bank: xr.Dataset, measurement: str) -> np.ndarray:
    """``−Σ_{i∉S} influence``, ``(M, Q)``."""
    kept = align(scores, bank, measurement, "zero").prediction
    whole = scores["influence"].transpose("query", "train").values.astype(np.float64).sum(axis=1)
    return np.asarray(kept - whole)


def _with_count(scores: xr.Dataset) -> xr.Dataset:
    """Scores whose attribute ``checkpoints`` counts their seeds."""
    return scores.assign_attrs(checkpoints=checkpoints(scores) * scores.sizes.get("seed", 1))


def _full(full: xr.Dataset, measurement: str, query: np.ndarray) -> xr.DataArray:
    """Measurements ``(seed, query)`` of the runs on all the data, in float64."""
    whole = np.flatnonzero(full["subset_mask"].transpose("subset", "train").values.all(axis=1))
    if len(whole) != 1:
        raise ValueError(
            f"full must have one subset that keeps everything; it has {len(whole)} of "
            f"{full.sizes['subset']}. Make it by retrain(..., subsets=leave_one_out(n, []))."
        )
    if measurement not in full or not set(query.tolist()) <= set(full["query"].values.tolist()):
        raise ValueError(
            f"full must hold the measurement {measurement!r} of all queries that are judged; it "
            f"has {[str(k) for k in full.data_vars]} of {full.sizes['query']} queries."
        )
    found = full[measurement].isel(subset=int(whole[0])).sel(query=query)
    found = found.transpose("seed", "query").astype(np.float64)
    if not np.isfinite(found).all():
        bad = int((~np.isfinite(found)).sum())
        raise ValueError(f"{measurement} of full is not finite for {bad} of {found.size} outcomes.")
    return found


def _ceiling(values: np.ndarray, which: tuple[str, Statistic]) -> float:
    name, statistic = which
    if name == "wasserstein" and values.shape[1] < 2 * _FEWEST_SEEDS:
        return np.nan
    splits = 200 if name == "mean" else _CEILING_SPLITS
    half = split_half(values, "spearman", statistic=statistic, splits=splits)
    runs = values.shape[1]
    mean, *_ = half.ceiling_estimate(runs, random_queries=True, confidence=0.95)
    return mean
