"""The law of an LDS by chance: its exact variance, its quantiles, and refusals."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import xarray as xr

from bayesinf._scores import make_scores
from bayesinf.evaluation import lds, lds_null, random_subsets
from bayesinf.evaluation._null import permuted
from bayesinf.evaluation._statistics import Correlation, correlations

N, M, Q = 30, 40, 12


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_variance_is_that_of_all_permutations(kind: str) -> None:
    g = np.random.default_rng(0)
    prediction, truth = g.standard_normal((2, 6, 3))
    truth[:, 1] += truth[:, 0]
    truth = np.round(truth, 1)  # a few ties
    every = [
        correlations(prediction, truth[list(order)], kind).mean()
        for order in permutations(range(6))
    ]
    null = permuted(prediction, truth, kind, permutations=4000, seed=1, confidence=0.9)
    assert np.mean(every) == pytest.approx(0, abs=1e-14)
    assert null.sd == pytest.approx(np.std(every))
    assert null.value == pytest.approx(every[0])
    exact = np.mean(np.abs(every) >= abs(every[0]) - 1e-12)
    # four binomial standard errors of 4,000 draws
    assert abs(null.p_value - exact) < 4 * (exact * (1 - exact) / 4000) ** 0.5
    inside = np.mean((np.array(every) >= null.lower) & (np.array(every) <= null.upper))
    assert abs(inside - 0.9) < 4 * (0.1 * 0.9 / 4000) ** 0.5 + 0.01  # and few distinct values


def make(influence: np.ndarray, **attrs: object) -> xr.Dataset:
    ids = {"query": np.arange(len(influence)), "train": np.arange(N)}
    return make_scores(influence, **ids, method="m", estimand="influence", attrs=attrs)


@pytest.fixture
def effects() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((Q, N))


@pytest.fixture
def bank(effects: np.ndarray) -> xr.Dataset:
    subsets = random_subsets(N, count=M, seed=0)
    loss = (subsets.values @ effects.T)[:, None]
    return xr.Dataset(
        {"loss": (("subset", "seed", "query"), loss), "subset_mask": subsets},
        coords={"query": np.arange(Q), "seed": [0]},
    )


def test_table(effects: np.ndarray, bank: xr.Dataset) -> None:
    g = np.random.default_rng(1)
    own, alike = g.standard_normal((Q, N)), np.tile(g.standard_normal(N), (Q, 1))
    scores = {"exact": make(effects, seconds=3), "own": make(own), "alike": make(alike)}
    table = lds_null(scores, bank, permute="subsets", permutations=10_000)
    for name, one in scores.items():
        assert float(table["lds"].sel(scorer=name)) == pytest.approx(float(lds(one, bank)["lds"]))
    exact = table.sel(scorer="exact")
    assert float(exact["lds"]) == pytest.approx(1.0)
    assert float(exact["p_value"]) == pytest.approx(1 / 10_001)
    assert float(exact["seconds"]) == 3
    sd = table["null_sd"]
    assert float(sd.sel(scorer="own")) == pytest.approx((Q * (M - 1)) ** -0.5, rel=0.15)
    upper = table["null_upper"] / sd  # about Gaussian; 10,000 draws are within 4 % (4 errors)
    np.testing.assert_allclose(upper, 1.96, rtol=0.06)
    np.testing.assert_allclose(-table["null_lower"] / sd, 1.96, rtol=0.06)
    flipped = lds_null(make(-effects), bank, permute="subsets", permutations=99)
    assert float(flipped["p_value"].item()) == 0.01  # two-sided
    again = lds_null(scores, bank, permute="subsets", permutations=50, seed=1)
    assert not np.array_equal(again["null_upper"], table["null_upper"])
    np.testing.assert_array_equal(again["null_sd"], table["null_sd"])


def test_sharing_widens_the_null(effects: np.ndarray) -> None:
    """All queries with one truth and one score: the sd of a single query."""
    subsets = random_subsets(N, count=M, seed=0)
    loss = np.repeat((subsets.values @ effects[0])[:, None, None], Q, axis=2)
    bank = xr.Dataset(
        {"loss": (("subset", "seed", "query"), loss), "subset_mask": subsets},
        coords={"query": np.arange(Q), "seed": [0]},
    )
    table = lds_null(make(np.tile(effects[1], (Q, 1))), bank, permute="subsets")
    assert float(table["null_sd"].item()) == pytest.approx((M - 1) ** -0.5)


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_permuted_examples_are_scores_with_other_ids(
    effects: np.ndarray, bank: xr.Dataset, kind: Correlation
) -> None:
    """The draws are those of ``lds`` for scores whose training ids were permuted."""
    scores = make(effects)
    shuffled = scores.isel(train=np.random.default_rng(3).permutation(N))  # ids go along
    table = lds_null(shuffled, bank, permutations=20, seed=4, correlation=kind)
    rng, drawn = np.random.default_rng(4), []
    for _ in range(20):
        order = rng.permutation(N)  # mask[:, order] @ influence: example i stands in for order[i]
        renamed = scores.assign_coords(train=scores["train"].values[order])
        drawn.append(float(lds(renamed, bank, correlation=kind)["lds"]))
    assert float(table["null_sd"].item()) == pytest.approx(np.std(drawn))
    assert float(table["null_lower"].item()) == pytest.approx(np.quantile(drawn, 0.025))
    assert float(table["p_value"].item()) == pytest.approx(1 / 21)
    assert table.attrs["random"] == "permutation of examples"


def test_random_scores_vary_more_than_permuted_subsets(bank: xr.Dataset) -> None:
    """At 40 subsets of 30 examples by ``√(1 + M/n)`` = 1.53; the sds are known to 5 %."""
    g = np.random.default_rng(1)
    own = make(g.standard_normal((Q, N)))
    examples = lds_null(own, bank, permutations=400)["null_sd"].item()
    subsets = lds_null(own, bank, permute="subsets")["null_sd"].item()
    assert 1.25 < examples / subsets < 1.9


def test_refusals(effects: np.ndarray, bank: xr.Dataset) -> None:
    with pytest.raises(ValueError, match="permutations must be at least 1"):
        lds_null(make(effects), bank, permutations=0)
    with pytest.raises(ValueError, match="permute must be 'examples' or 'subsets'"):
        lds_null(make(effects), bank, permute="queries")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="correlation must be"):
        lds_null(make(effects), bank, correlation="rank")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="confidence must lie"):
        lds_null(make(effects), bank, confidence=95)
