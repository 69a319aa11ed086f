"""Whether judgements hold what they promise: ``python -m benchmarks.lds_coverage [PART]``.

On simulated truth whose LDS is known: losses are sums of effects over a random half of 500
examples plus seed noise, on 100 subsets. Effects of two queries have nothing in common
(*independent*), or half of their variance is that of one effect common to all (*half shared*).
Directions are orthonormal, so that the correlation ``r`` of a query's predictions and losses is
known exactly, and sums are Gaussian to a few parts in a thousand: the expected sample Spearman
correlation at ``M`` subsets is ``6/π (asin r + (M−2) asin(r/2))/(M+1)``. Judged are

* *intervals* of ``lds(queries="random")`` and ``"fixed"`` at 50 and 200 queries: the share that
  hold the expected LDS of the population and of the queries at hand (bar: 93–97 %);
* *chance*: random scores, own to each query or the same for all: the share with a p value of 5 %
  or less by ``lds_null``, 39 permutations each (bar: 3–7 %);
* *ceilings*: the mean estimate of ``noise_ceiling`` over banks of ``s`` = signal/seed variance and
  ``R`` seeds (bar: within 0.02 of ``6/π asin(√(sR/(sR+1))/2)``). ``R = 1`` is the ceiling of a
  single retraining, estimated from 10 with ``seeds=1``: one seed alone cannot tell signal from
  noise.

The exit status is 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import xarray as xr

import bayesinf as bi
from bayesinf.evaluation import lds_null, noise_ceiling, random_subsets
from bayesinf.evaluation._statistics import Queries
from benchmarks._table import format_table, verdict

__all__ = ["Simulated", "ceiling", "chance", "expected_spearman", "intervals", "main", "simulate"]

EXAMPLES, SUBSETS = 500, 100
LOW, HIGH, COMMON = 0.3, 0.8, 0.5  # correlations of own effects, uniform; of the common one
COVERED, REJECTED, CLOSE = (0.93, 0.97), (0.03, 0.07), 0.02
SHARED = {"independent": 0.0, "half shared": 0.5}
SIGNALS, RUNS = (0.1, 0.3, 1.0, 3.0), (1, 5, 10, 50)
PARTS = ("intervals", "chance", "ceilings")
_HEADER = ("judged", "effects", "setting", "found", "bar", "")


@dataclass(frozen=True)
class Simulated:
    """Scores, ground truth, and the correlations ``r (Q,)`` of predictions and mean losses.

    ``factor`` is ``√(sR/(sR+1))``, by which seed noise lowers a correlation.
    """

    scores: xr.Dataset
    bank: xr.Dataset
    r: np.ndarray
    factor: float


def expected_spearman(r: np.ndarray, subsets: int = SUBSETS) -> np.ndarray:
    """Expectation of the sample Spearman correlation of Gaussian pairs with correlation ``r``."""
    return 6 / np.pi / (subsets + 1) * (np.arcsin(r) + (subsets - 2) * np.arcsin(r / 2))


@lru_cache(maxsize=1)
def _directions() -> np.ndarray:
    """Orthonormal vectors over examples, as columns, that sum to 0."""
    g = np.random.default_rng(0).standard_normal((EXAMPLES, EXAMPLES - 1))
    return np.linalg.qr(g - g.mean(axis=0))[0]


def simulate(
    queries: int, shared: float, seed: int, *, signal: float = 1.0, runs: int = 2
) -> Simulated:
    """Draw subsets, queries and seed noise.

    Parameters
    ----------
    queries
        At most 248.
    shared
        Part of the variance of a query's effects, and of its scores, that all queries share.
    seed
        Of everything.
    signal
        Variance of a subset's effect relative to that of the seeds.
    runs
        Seeds of each subset.
    """
    g = np.random.default_rng([queries, round(100 * shared), seed])
    own = g.uniform(LOW, HIGH, queries)
    e, e_all = _directions()[:, : 2 * queries], _directions()[:, -2:]
    effect = np.sqrt(shared) * e_all[:, :1] + np.sqrt(1 - shared) * e[:, :queries]
    common = COMMON * e_all[:, :1] + np.sqrt(1 - COMMON**2) * e_all[:, 1:]
    guess = own * e[:, :queries] + np.sqrt(1 - own**2) * e[:, queries:]
    score = np.sqrt(shared) * common + np.sqrt(1 - shared) * guess
    subsets = random_subsets(EXAMPLES, count=SUBSETS, seed=int(g.integers(2**31)))
    scale = np.sqrt(0.25 * EXAMPLES / (EXAMPLES - 1))  # of a sum over a random half
    mean = np.sqrt(signal) / scale * (subsets.values @ effect)
    loss = mean[:, None] + g.standard_normal((SUBSETS, runs, queries))
    bank = xr.Dataset(
        {"loss": (("subset", "seed", "query"), loss), "subset_mask": subsets},
        coords={"seed": np.arange(runs), "query": np.arange(queries)},
    )
    factor = float(np.sqrt(signal * runs / (signal * runs + 1)))
    r = factor * (shared * COMMON + (1 - shared) * own)
    return Simulated(_scores(score.T), bank, r, factor)


def _scores(influence: np.ndarray) -> xr.Dataset:
    return bi.make_scores(
        influence,
        query=np.arange(len(influence)),
        train=np.arange(EXAMPLES),
        method="simulated",
        estimand="influence",
    )


def intervals(queries: int, shared: float, simulations: int) -> dict[Queries, float]:
    """Share of intervals that hold what they are for, with queries random and fixed."""
    grid = np.linspace(LOW, HIGH, 2001)
    held: dict[Queries, int] = {"random": 0, "fixed": 0}
    for seed in range(simulations):
        one = simulate(queries, shared, seed)
        whole = one.factor * (shared * COMMON + (1 - shared) * grid)
        truth = {"random": whole, "fixed": one.r}
        for which in held:
            found = bi.lds(one.scores, one.bank, queries=which)
            expected = expected_spearman(truth[which]).mean()
            held[which] += bool(found["lower"] < expected < found["upper"])
    return {which: count / simulations for which, count in held.items()}


def chance(shared: float, alike: bool, simulations: int, queries: int = 50) -> float:
    """Share of random scores whose LDS has a p value of 5 % or less."""
    rejected = 0
    for seed in range(simulations):
        g = np.random.default_rng([7, seed])
        noise = g.standard_normal((1 if alike else queries, EXAMPLES))
        bank = simulate(queries, shared, seed).bank
        scores = _scores(np.broadcast_to(noise, (queries, EXAMPLES)))
        null = lds_null(scores, bank, permutations=39, seed=seed)
        rejected += bool(null["p_value"].item() <= 0.05)
    return rejected / simulations


def ceiling(
    signal: float, runs: int, shared: float, simulations: int, queries: int = 200
) -> tuple[float, float]:
    """Mean and standard deviation of the estimated ceiling of means of ``runs`` retrainings."""
    made = runs if runs > 1 else 10
    found = []
    for seed in range(simulations):
        bank = simulate(queries, shared, seed, signal=signal, runs=made).bank
        found.append(float(noise_ceiling(bank, seeds=runs)["ceiling"]))
    return float(np.mean(found)), float(np.std(found))


Row = tuple[tuple[str, ...], bool]


def _intervals(simulations: int) -> Iterator[Row]:
    for name, shared in SHARED.items():
        for queries in (50, 200):
            for which, share in intervals(queries, shared, simulations).items():
                held = COVERED[0] <= share <= COVERED[1]
                setting = f"{queries} queries, {which}"
                yield ("intervals", name, setting, f"{share:.1%}", "93–97 %"), held


def _chance(simulations: int) -> Iterator[Row]:
    for name, shared in SHARED.items():
        for alike, word in ((False, "scores own to each query"), (True, "one score for all")):
            share = chance(shared, alike, simulations)
            held = REJECTED[0] <= share <= REJECTED[1]
            yield ("chance", name, word, f"{share:.1%}", "3–7 %"), held


def _ceilings(banks: int) -> Iterator[Row]:
    for name, shared in SHARED.items():
        for signal, runs in product(SIGNALS, RUNS):
            mean, sd = ceiling(signal, runs, shared, banks)
            known = 6 / np.pi * np.arcsin(np.sqrt(signal * runs / (signal * runs + 1)) / 2)
            held = abs(mean - known) <= CLOSE
            found, bar = f"{mean:.3f} ± {sd:.3f}", f"{known:.3f} ± {CLOSE}"
            yield ("ceilings", name, f"s = {signal:g}, R = {runs}", found, bar), held


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lds_coverage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    add("--simulations", type=int, default=1000, help="judgements each (default: %(default)s)")
    add("--ceilings", type=int, default=20, help="banks to a ceiling (default: %(default)s)")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"there is no part {sorted(unknown)}; there are {', '.join(PARTS)}")
    makers = {
        "intervals": lambda: _intervals(args.simulations),
        "chance": lambda: _chance(args.simulations),
        "ceilings": lambda: _ceilings(args.ceilings),
    }
    rows, held = [], []
    for part in args.parts or PARTS:
        for row, holds in makers[part]():
            rows.append((*row, verdict(holds)))
            held.append(holds)
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    print(format_table(_HEADER, rows))
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
