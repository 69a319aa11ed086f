"""Distributional LDS: the distance without its bias, exact laws, the mean's LDS, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy.optimize import linear_sum_assignment

from bayesinf._scores import make_scores
from bayesinf.evaluation import distributional_lds, lds, noise_ceiling, random_subsets
from bayesinf.evaluation._laws import predicted, split_wasserstein
from bayesinf.evaluation._subsets import leave_one_out

N, M, R, Q = 30, 40, 8, 10


def law(effects: np.ndarray, subsets: xr.DataArray, start: np.ndarray, noise: float = 0.0):
    """Bank in which run ``r`` measures ``start[r] − Σ_{i∉S} effects[r]`` and fresh noise."""
    removed = (~subsets.values).astype(float)
    loss = start - np.einsum("mn,rqn->mrq", removed, effects)
    loss = loss + noise * np.random.default_rng(8).standard_normal(loss.shape)
    return xr.Dataset(
        {"loss": (("subset", "seed", "query"), loss), "subset_mask": subsets},
        coords={"query": np.arange(Q), "seed": np.arange(len(start))},
    )


def make(influence: np.ndarray, **attrs: object) -> xr.Dataset:
    """Scores by seed from ``(K, Q, N)``."""
    every = [
        make_scores(
            one,
            query=np.arange(Q),
            train=np.arange(N),
            method="m",
            estimand="influence",
            attrs=attrs,
        )
        for one in influence
    ]
    return xr.concat(every, "seed").assign_coords(seed=np.arange(len(every)))


@pytest.fixture
def effects() -> np.ndarray:
    g = np.random.default_rng(0)
    return g.standard_normal((1, Q, N)) + 0.7 * g.standard_normal((R, Q, N))


@pytest.fixture
def start() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((R, Q))


SUBSETS, WHOLE = random_subsets(N, count=M, seed=3), leave_one_out(N, [])


def test_distance_is_unbiased_at_equal_laws() -> None:
    """4,000 laws of 6 draws: 0 within four standard errors, where the plain distance is not."""
    g = np.random.default_rng(0)
    values, base = g.standard_normal((4000, 6, 1)), g.standard_normal((6, 4000))
    found = split_wasserstein(values.transpose(2, 1, 0), base, splits=10)[0]
    error = found.std() / 4000**0.5
    assert abs(found.mean()) < 4 * error
    plain = ((np.sort(values[:, :, 0], axis=1) - np.sort(base, axis=0).T) ** 2).mean()
    assert plain > 0.5 > 50 * error


def test_distance_of_gaussians() -> None:
    """``(Δμ)² + c(Δσ)²``: 4,000 pairs, 10 draws each, 5 to a half, c = 0.64; four errors."""
    g = np.random.default_rng(0)
    values = 2.0 + 3.0 * g.standard_normal((1, 10, 4000))
    base = g.standard_normal((12, 4000))
    found = split_wasserstein(values, base, splits=10)[0]
    smooth = np.sort(g.standard_normal((200_000, 5)), axis=1).mean(axis=0)
    c = (smooth**2).mean()
    assert c == pytest.approx(0.64, abs=0.01)
    assert abs(found.mean() - (4 + c * 4)) < 4 * found.std() / 4000**0.5 + 0.02


def test_predictions_are_those_of_scipy(start: np.ndarray) -> None:
    g = np.random.default_rng(2)
    shift = g.standard_normal((3, R, Q))
    found = predicted(start, shift)
    for m in range(3):
        moved = start + shift[m]
        np.testing.assert_allclose(found["mean"][m], moved.mean(0) - start.mean(0))
        change = moved.var(axis=0, ddof=1) - start.var(axis=0, ddof=1)
        np.testing.assert_allclose(found["variance"][m], change)
        # in one dimension the distance of order 2 is that of sorted samples: the least cost of
        # any pairing
        cost = (moved[:, None, 0] - start[None, :, 0]) ** 2
        best = cost[linear_sum_assignment(cost)].mean()
        assert found["wasserstein"][m, 0] == pytest.approx(best)


def test_exact_members_predict_the_whole_law(effects: np.ndarray, start: np.ndarray) -> None:
    bank, full = law(effects, SUBSETS, start), law(effects, WHOLE, start)
    table = distributional_lds(make(effects, seconds=5), bank, full).isel(scorer=0)
    by = {name: float(table["lds"].sel(distance=name)) for name in table["distance"].values}
    assert by["mean"] == pytest.approx(1.0)
    assert by["variance"] == pytest.approx(1.0)
    assert by["wasserstein"] > 0.95  # true distances are estimated from halves
    assert (table["constant"] == 0).all()
    assert float(table["seconds"]) == 5
    assert table.attrs["random"] == "subsets, seeds of subsets, queries"
    flipped = distributional_lds(make(-effects), bank, full).isel(scorer=0)
    assert float(flipped["lds"].sel(distance="mean")) == pytest.approx(-1.0)


def test_mean_is_the_lds_of_mean_scores(effects: np.ndarray, start: np.ndarray) -> None:
    g = np.random.default_rng(5)
    bank, full = law(effects, SUBSETS, start, 2.0), law(effects, WHOLE, start)
    scores = make(effects + g.standard_normal(effects.shape))
    shuffled = scores.isel(seed=g.permutation(R), train=g.permutation(N), query=g.permutation(Q))
    table = distributional_lds({"a": scores, "b": shuffled}, bank, full)
    plain = lds(scores.mean("seed"), bank)
    for name in ("lds", "standard_error", "subset_error", "query_error", "lower", "upper"):
        found = table[name].sel(distance="mean")
        np.testing.assert_allclose(found, float(plain[name]), rtol=1e-9)
    np.testing.assert_allclose(table["lds_query"][0, 0], plain["lds_query"])
    np.testing.assert_allclose(table["lds"][0], table["lds"][1])
    ceiling = float(noise_ceiling(bank)["ceiling"])
    assert float(table["ceiling"].sel(distance="mean")) == pytest.approx(ceiling)
    assert (table["lower"] <= table["lds"]).all()
    assert (table["lds"] <= table["upper"]).all()
    few = distributional_lds(scores, bank.isel(seed=range(6)), full)
    assert np.isnan(few["ceiling"].values).tolist() == [False, False, True]


def test_one_score_predicts_a_shift(effects: np.ndarray, start: np.ndarray) -> None:
    """Noise that no subset changes: the mean moves, the variance does not and is not predicted."""
    common = np.repeat(effects[:1], R, axis=0)
    bank, full = law(common, SUBSETS, start, 0.3), law(common, WHOLE, start)
    one = make(common).isel(seed=0, drop=True)
    table = distributional_lds(one, bank, full, queries="fixed").isel(scorer=0)
    assert table["constant"].values.tolist() == [0, Q, 0]
    assert float(table["lds"].sel(distance="variance")) == 0
    assert float(table["lds"].sel(distance="mean")) > 0.98
    assert float(table["lds"].sel(distance="wasserstein")) > 0.95
    with pytest.raises(ValueError, match=r"never compared: \{'one': 1, 'many': 8\}"):
        distributional_lds({"one": one, "many": make(common)}, bank, full)


def test_refusals(effects: np.ndarray, start: np.ndarray) -> None:
    bank, full, scores = law(effects, SUBSETS, start), law(effects, WHOLE, start), make(effects)
    with pytest.raises(ValueError, match="the bank has 3 and full has 8"):
        distributional_lds(scores, bank.isel(seed=range(3)), full)
    with pytest.raises(ValueError, match="the bank has 8 and full has 3"):
        distributional_lds(scores.isel(seed=range(3)), bank, full.isel(seed=range(3)))
    with pytest.raises(ValueError, match="it has 0 of 40"):
        distributional_lds(scores, bank, bank)
    with pytest.raises(ValueError, match="full must hold the measurement 'loss'"):
        distributional_lds(scores, bank, full.isel(query=range(4)))
    with pytest.raises(ValueError, match=r"of the seeds \[0, 1, 2, 3, 4, 5, 6, 7\], and full has"):
        distributional_lds(scores, bank, full.isel(seed=range(5)))
    with pytest.raises(ValueError, match="must name two runs of full or more"):
        distributional_lds(scores.isel(seed=[0]), bank, full)
    with pytest.raises(ValueError, match="not finite for 8 of 80 outcomes"):
        distributional_lds(scores, bank, full.assign(loss=full["loss"].where(full["query"] != 3)))
    with pytest.raises(ValueError, match="queries must be"):
        distributional_lds(scores, bank, full, queries="all")  # type: ignore[arg-type]
