"""How far scores agree: methods with one another, and a method with itself on another run.

Shapes: influences ``(n, Q)`` of the same training examples and queries; a *top* is a query's ``k``
most helpful examples, those of most negative influence. By chance, if the examples of one are
permuted for all queries at once, rank correlations are 0 on average and tops share ``k/n``; the
variance of both means over queries is exact, see :mod:`bayesinf.evaluation._null`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement
from typing import Any, cast

import numpy as np
import xarray as xr

from bayesinf.evaluation._alignment import influence_of, method_name
from bayesinf.evaluation._null import null_sd
from bayesinf.evaluation._statistics import (
    mean_estimate,
    random_parts,
    require_options,
    standardised,
)
from bayesinf.evaluation._tables import COSTS, Named, named, with_costs

__all__ = ["agreement", "seed_stability"]

_FEWEST_RUNS = 4  # that can be left out in turn

Runs = Mapping[str, Sequence[xr.Dataset]] | Sequence[xr.Dataset]
"""Runs of each method by name, or those of one method."""


@dataclass(frozen=True)
class Ranking:
    """What is compared of scores: standardised ranks, and tops.

    Attributes
    ----------
    ranks
        ``(n, Q)``, of mean 0 and norm 1.
    top
        ``(Q, k)`` positions of the most helpful examples.
    """

    ranks: np.ndarray
    top: np.ndarray

    @property
    def member(self) -> np.ndarray:
        """``(n, Q)``: 1 for the examples of the top."""
        result = np.zeros(self.ranks.shape)
        np.put_along_axis(result, self.top.T, 1.0, axis=0)
        return result


def agreement(
    scores: Named,
    *,
    top_k: int = 10,
    permutations: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> xr.Dataset:
    """Compare methods pair by pair: rank correlations, and how many of the top they share.

    Rank correlation over many training examples is ruled by those of next to no influence; the
    overlap of the tops says whether a person who looks at the first ``k`` sees the same examples.

    Parameters
    ----------
    scores
        Scores by name or a list of them, of the same training examples and queries.
    top_k
        ``k``, how many of the most helpful examples of each query are compared: those of the most
        negative influence, which are the harmful ones where φ is a margin.
    permutations, seed
        Drawn for the law of the overlap by chance, and from which seed.
    confidence
        Of the intervals. Random in them are the queries; the training examples are as they are.

    Returns
    -------
    xr.Dataset
        By ``scorer`` and ``other``, symmetric: ``correlation``, Spearman's, the mean over queries,
        with ``standard_error``, ``lower``, ``upper`` and ``null_sd``, its standard deviation by
        chance; ``overlap``, the share of the top that is common, with
        ``overlap_standard_error``, ``overlap_lower``, ``overlap_upper``, ``overlap_null_sd``,
        ``overlap_null_upper``, the quantile at ``confidence`` by chance, and ``overlap_p_value``,
        one-sided. Scalar ``overlap_null = k/n``, the overlap by chance. What the scores cost, by
        ``scorer``.

    Raises
    ------
    ValueError
        If ids or measurements differ, there is a single query, or an argument is out of range.
    """
    require_options("spearman", "random", confidence)
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1; got {permutations}.")
    methods = named(scores)
    rankings = _rankings(methods, top_k)
    n, size = len(rankings[0].ranks), len(rankings)
    found: dict[str, np.ndarray] = {}
    for a, b in combinations_with_replacement(range(size), 2):
        pair = rankings[a], rankings[b]
        chance = _overlap_null(*pair, permutations, seed)
        values = {
            **_over_queries(_correlation(*pair), "correlation", "", confidence),
            "null_sd": null_sd(pair[0].ranks, pair[1].ranks),
            **_over_queries(_overlap(*pair), "overlap", "overlap_", confidence),
            "overlap_null_sd": _overlap_null_sd(*pair),
            "overlap_null_upper": float(np.quantile(chance, confidence)),
        }
        reached = chance >= values["overlap"] - 1e-12
        values["overlap_p_value"] = (1 + int(reached.sum())) / (1 + permutations)
        for key, value in values.items():
            table = found.setdefault(key, np.empty((size, size)))
            table[a, b] = table[b, a] = value
    result = xr.Dataset(
        {key: (("scorer", "other"), table) for key, table in found.items()},
        coords={"scorer": list(methods), "other": list(methods)},
        attrs={
            **_attrs(methods, top_k, confidence),
            **random_parts("random"),
            "permutations": permutations,
            "seed": seed,
        },
    )
    return with_costs(result.assign(overlap_null=top_k / n), methods)


def seed_stability(runs: Runs, *, top_k: int = 10, confidence: float = 0.95) -> xr.Dataset:
    """Compare runs of one method that differ by chance: another training or sampler seed.

    Two runs of a method that agree by the rank correlation ``r`` hold each a share of about ``r``
    of signal, and neither can correlate with any truth by more than about ``√r``.

    Parameters
    ----------
    runs
        Scores of one method from several seeds, or such lists by name, of the same training
        examples and queries.
    top_k
        ``k``, how many of the most helpful examples of each query are compared: those of the most
        negative influence, which are the harmful ones where φ is a margin.
    confidence
        Of the intervals. Random in them are the queries and, from 4 runs on, the runs (a jackknife
        over runs); with fewer they are for these runs.

    Returns
    -------
    xr.Dataset
        By ``scorer``, means over pairs of runs and over queries: ``correlation``, Spearman's, with
        ``standard_error``, ``lower``, ``upper`` and ``null_sd``, by chance; ``overlap`` of the
        tops with ``overlap_standard_error``, ``overlap_lower``, ``overlap_upper``,
        ``overlap_null_sd``; ``runs``; the mean costs of a run. Scalar ``overlap_null = k/n``.

    Raises
    ------
    ValueError
        If a method has a single run, ids or measurements differ, there is a single query, or an
        argument is out of range.
    """
    require_options("spearman", "random", confidence)
    groups = _groups(runs)
    every = {f"{name}, run {k}": one for name, own in groups.items() for k, one in enumerate(own)}
    rankings = iter(_rankings(every, top_k))
    rows = []
    for own in groups.values():
        rows.append(_stability([next(rankings) for _ in own], confidence))
    table = xr.concat(rows, dim="scorer").assign_coords(scorer=list(groups))
    n = next(iter(every.values())).sizes["train"]
    fewest = min(len(own) for own in groups.values())
    random = random_parts("random", *(["runs"] * (fewest >= _FEWEST_RUNS)))
    table.attrs = {**_attrs(every, top_k, confidence), **random}
    costs = {name: _mean_costs(own) for name, own in groups.items()}
    return with_costs(table.assign(overlap_null=top_k / n), costs)


# ---------------------------------------------------------------------------- two scores


def _rankings(methods: Mapping[str, xr.Dataset], top_k: int) -> list[Ranking]:
    first = next(iter(methods))
    found = []
    for name, own in methods.items():
        x = influence_of(own, name, like=methods[first], owner=first, exact=True)
        if not 1 <= top_k < len(x):
            raise ValueError(
                f"top_k must lie between 1 and the {len(x)} training examples less one; got "
                f"{top_k}."
            )
        if x.shape[1] < 2:
            raise ValueError("the intervals are over queries, which needs two or more; got 1.")
        top = np.argsort(x, axis=0, kind="stable")[:top_k].T
        found.append(Ranking(standardised(x, "spearman"), top))
    return found


def _correlation(a: Ranking, b: Ranking) -> np.ndarray:
    return np.asarray((a.ranks * b.ranks).sum(axis=0))


def _overlap(a: Ranking, b: Ranking) -> np.ndarray:
    return np.asarray((a.member * b.member).sum(axis=0)) / a.top.shape[1]


def _overlap_null(a: Ranking, b: Ranking, permutations: int, seed: int) -> np.ndarray:
    """Mean overlaps over queries with the examples of one permuted, for all queries at once."""
    rng, member = np.random.default_rng(seed), b.member.T
    queries = np.arange(len(member))[:, None]
    drawn = [member[queries, rng.permutation(member.shape[1])[a.top]] for _ in range(permutations)]
    return np.array([one.mean() for one in drawn])


def _overlap_null_sd(a: Ranking, b: Ranking) -> float:
    """Exact: the overlap is ``k/n + (1 − k/n) r``, ``r`` the correlation of the memberships."""
    share = a.top.shape[1] / len(a.ranks)
    return (1 - share) * null_sd(
        standardised(a.member, "pearson"), standardised(b.member, "pearson")
    )


def _over_queries(
    values: np.ndarray, name: str, prefix: str, confidence: float, deleted: np.ndarray | None = None
) -> dict[str, float]:
    """Mean over random queries with its interval; ``deleted`` as of ``mean_estimate``."""
    still = np.stack([values, values])  # nothing but the queries is random
    found = mean_estimate(
        values, still if deleted is None else deleted, random_queries=True, confidence=confidence
    )
    return {
        name: found.mean,
        f"{prefix}standard_error": found.standard_error,
        f"{prefix}lower": found.lower,
        f"{prefix}upper": found.upper,
    }


# ---------------------------------------------------------------------------- runs of one


def _stability(runs: list[Ranking], confidence: float) -> xr.Dataset:
    pairs = list(combinations(range(len(runs)), 2))
    row: dict[str, float] = {}
    for statistic, name, prefix in (
        (_correlation, "correlation", ""),
        (_overlap, "overlap", "overlap_"),
    ):
        values = np.stack([statistic(runs[a], runs[b]) for a, b in pairs])  # (pairs, Q)
        deleted = None
        if len(runs) >= _FEWEST_RUNS:
            without = [[k not in pair for pair in pairs] for k in range(len(runs))]
            deleted = np.stack([values[left].mean(axis=0) for left in without])
        row |= _over_queries(values.mean(axis=0), name, prefix, confidence, deleted)
    sds = [null_sd(runs[a].ranks, runs[b].ranks) for a, b in pairs]
    overlap_sds = [_overlap_null_sd(runs[a], runs[b]) for a, b in pairs]
    return xr.Dataset(
        {
            **row,  # pairs are uncorrelated by chance, each run being permuted on its own
            "null_sd": float(np.linalg.norm(sds)) / len(pairs),
            "overlap_null_sd": float(np.linalg.norm(overlap_sds)) / len(pairs),
            "runs": len(runs),
        }
    )


def _groups(runs: Runs) -> dict[str, list[xr.Dataset]]:
    if isinstance(runs, Mapping) and not isinstance(runs, xr.Dataset):
        groups = {str(k): list(own) for k, own in cast(Mapping[str, Any], runs).items()}
    else:
        own = [runs] if isinstance(runs, xr.Dataset) else list(runs)
        groups = {method_name(own[0]) if own else "scores": own}
    few = {name: len(own) for name, own in groups.items() if len(own) < 2}
    if few or not groups:
        raise ValueError(
            f"stability compares runs of a method, and these have fewer than two: {few}. Score "
            f"again with another seed: [bif(sample(..., seed=k)) for k in range(4)]."
        )
    return groups


def _mean_costs(runs: list[xr.Dataset]) -> xr.Dataset:
    costs = with_costs(xr.Dataset(), {str(k): one for k, one in enumerate(runs)})
    return xr.Dataset(attrs={name: float(costs[name].mean(skipna=False)) for name in COSTS})


def _attrs(methods: Mapping[str, xr.Dataset], top_k: int, confidence: float) -> dict[str, Any]:
    first = next(iter(methods.values()))
    return {
        "measurement": str(first.attrs.get("measurement", "loss")),
        "correlation": "spearman",
        "top_k": top_k,
        "confidence": confidence,
        "examples": first.sizes["train"],
        "of_queries": first.sizes["query"],
    }
