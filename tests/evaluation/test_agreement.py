"""Agreement of methods and of runs: values, laws by chance, intervals, refusals."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import xarray as xr
from scipy.stats import binom, spearmanr

from bayesinf._scores import make_scores
from bayesinf.evaluation import agreement, seed_stability

N, Q, K = 60, 12, 8


def make(influence: np.ndarray, method: str = "m", **attrs: object) -> xr.Dataset:
    ids = {"query": np.arange(len(influence)), "train": np.arange(influence.shape[1])}
    return make_scores(influence, **ids, method=method, estimand="influence", attrs=attrs)


def overlaps(a: np.ndarray, b: np.ndarray, k: int = K) -> np.ndarray:
    tops = [[set(np.argsort(row)[:k]) for row in x] for x in (a, b)]
    return np.array([len(x & y) / k for x, y in zip(*tops, strict=True)])


def spearmans(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array([spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])


def test_pairs_of_methods() -> None:
    g = np.random.default_rng(0)
    a = g.standard_normal((Q, N))
    b, c = a + g.standard_normal((Q, N)), g.standard_normal((Q, N))
    shuffled = make(b, "b").isel(train=g.permutation(N), query=g.permutation(Q))
    table = agreement([make(a, "a", seconds=4), shuffled, make(c, "c")], top_k=K)
    for x, y, left, right in (("a", "b", a, b), ("c", "a", c, a), ("b", "b", b, b)):
        pair = table.sel(scorer=x, other=y)
        assert float(pair["correlation"]) == pytest.approx(spearmans(left, right).mean())
        assert float(pair["overlap"]) == pytest.approx(overlaps(left, right).mean())
        error = spearmans(left, right).std(ddof=1) / Q**0.5
        assert float(pair["standard_error"]) == pytest.approx(error, abs=1e-12)
        assert float(pair["overlap"] - pair["overlap_lower"]) == pytest.approx(
            2.200985 * overlaps(left, right).std(ddof=1) / Q**0.5, rel=1e-6
        )  # t, 11 degrees of freedom
    assert float(table["overlap_null"]) == pytest.approx(K / N)
    assert float(table["overlap_p_value"].sel(scorer="a", other="b")) == pytest.approx(1 / 1001)
    assert float(table["overlap_p_value"].sel(scorer="a", other="c")) > 0.01
    np.testing.assert_array_equal(table["correlation"], table["correlation"].T)
    np.testing.assert_array_equal(table["seconds"], [4, np.nan, np.nan])
    assert table.attrs["random"] == "queries"


def test_null_sds_are_those_of_permutations() -> None:
    """4,000 permutations of the examples, all queries at once: sds within 6 % (5 errors)."""
    g = np.random.default_rng(1)
    common = g.standard_normal(N)
    a, b = (common + g.standard_normal((Q, N)) for _ in range(2))
    table = agreement({"a": make(a), "b": make(b)}, top_k=K).sel(scorer="a", other="b")
    ranks = np.argsort(np.argsort([a, b], axis=2), axis=2)
    member = ranks < K
    z = (ranks - (N - 1) / 2) / np.sqrt(N * (N * N - 1) / 12)
    orders = [g.permutation(N) for _ in range(4000)]
    rho = [(z[0] * z[1][:, order]).sum(axis=1).mean() for order in orders]
    shared = [(member[0] & member[1][:, order]).sum(axis=1).mean() / K for order in orders]
    assert float(table["null_sd"]) == pytest.approx(np.std(rho), rel=0.06)
    assert float(table["overlap_null_sd"]) == pytest.approx(np.std(shared), rel=0.06)
    upper = np.quantile(shared, 0.95)  # a multiple of 1/(QK), within one of them
    assert float(table["overlap_null_upper"]) == pytest.approx(upper, abs=1.01 / (Q * K))


def test_random_scores_are_rejected_at_the_stated_rate() -> None:
    """300 pairs that share one vector each: false alarm 1e-4 for a true rate in [0.03, 0.05].

    Overlaps are few numbers, so that the rate is a little below 5 %.
    """
    rejected = 0
    for seed in range(300):
        g = np.random.default_rng(seed)
        a, b = (g.standard_normal(N) + 0.5 * g.standard_normal((4, N)) for _ in range(2))
        pair = agreement({"a": make(a), "b": make(b)}, top_k=K, permutations=99, seed=seed)
        rejected += bool(pair["overlap_p_value"][0, 1] <= 0.05)
    assert binom.ppf(5e-5, 300, 0.03) <= rejected <= binom.isf(5e-5, 300, 0.05)


def test_runs_of_a_method() -> None:
    g = np.random.default_rng(2)
    truth = g.standard_normal((Q, N))
    runs = [truth + g.standard_normal((Q, N)) for _ in range(4)]
    few = [truth + 3 * g.standard_normal((Q, N)) for _ in range(2)]
    datasets = [make(x, seconds=s) for x, s in zip(runs, (1, 2, 3, 6), strict=True)]
    table = seed_stability({"good": datasets, "bad": [make(x) for x in few]}, top_k=K)
    pairs = list(combinations(runs, 2))
    good = table.sel(scorer="good")
    values = np.mean([spearmans(a, b) for a, b in pairs], axis=0)
    assert float(good["correlation"]) == pytest.approx(values.mean())
    assert float(good["overlap"]) == pytest.approx(np.mean([overlaps(a, b) for a, b in pairs]))
    assert float(good["seconds"]) == 3
    assert np.isnan(table["seconds"].sel(scorer="bad"))
    assert table["runs"].values.tolist() == [4, 2]
    bad = table.sel(scorer="bad")
    error = spearmans(*few).std(ddof=1) / Q**0.5  # of these two runs
    assert float(bad["standard_error"]) == pytest.approx(error)
    assert 0 < float(good["standard_error"]) < 0.1
    assert table.attrs["random"] == "queries"  # not all of four runs or more
    assert seed_stability(datasets).attrs["random"] == "runs, queries"
    assert seed_stability(datasets)["scorer"].values.tolist() == ["m"]
    one = agreement({"a": make(few[0]), "b": make(few[1])}, top_k=K).isel(scorer=0, other=1)
    for name in ("correlation", "null_sd", "overlap", "overlap_null_sd", "overlap_upper"):
        assert float(bad[name]) == pytest.approx(float(one[name]))


def test_stability_over_new_runs_is_covered() -> None:
    """200 times 8 runs of different quality; false alarm 1e-4 for a coverage in [0.9, 0.99]."""
    held, quality = 0, (0.7, 0.9)
    r = (0.5 * sum(quality)) ** 2  # mean product of two runs' correlations with the truth
    for seed in range(200):
        g = np.random.default_rng(seed)
        truth = g.standard_normal((Q, 200))
        share = g.choice(quality, 8)
        runs = [make(c * truth + (1 - c * c) ** 0.5 * g.standard_normal((Q, 200))) for c in share]
        found = seed_stability(runs).isel(scorer=0)
        products = [a * b for a in quality for b in quality]
        known = np.mean([6 / np.pi * np.arcsin(x / 2) for x in products])
        held += bool(found["lower"] < known < found["upper"])
    assert abs(known - r) < 0.05
    assert binom.ppf(5e-5, 200, 0.9) <= held <= binom.isf(5e-5, 200, 0.99)


def test_refusals() -> None:
    a = make(np.random.default_rng(0).standard_normal((Q, N)), "a")
    with pytest.raises(ValueError, match=r"stability compares runs.*\{'a': 1\}"):
        seed_stability([a])
    with pytest.raises(ValueError, match=r"fewer than two: \{'a': 1\}"):
        seed_stability(a)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fewer than two"):
        seed_stability({})
    with pytest.raises(ValueError, match="top_k must lie between 1 and the 60"):
        agreement(a, top_k=60)
    with pytest.raises(ValueError, match="needs two or more; got 1"):
        agreement(a.isel(query=[0]))
    with pytest.raises(ValueError, match="permutations must be at least 1"):
        agreement(a, permutations=0)
    with pytest.raises(ValueError, match="b lack 1"):
        agreement({"a": a, "b": a.isel(train=range(N - 1))})
    with pytest.raises(ValueError, match="b have 1 that a lacks"):
        agreement({"a": a.isel(train=range(N - 1)), "b": a})
    with pytest.raises(ValueError, match="measurement 'margin'"):
        agreement({"a": a, "b": a.assign_attrs(measurement="margin")})
