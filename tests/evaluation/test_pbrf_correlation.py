"""Scores against measured responses: by query and by id, pooled, slopes, their intervals."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy.stats import binom, spearmanr

from bayesinf._scores import make_scores
from bayesinf.evaluation import pbrf_correlation

FEW = [5, 3, 30, 8, 9]


def make(influence: np.ndarray, estimand: str = "influence", **attrs: object) -> xr.Dataset:
    ids = {"query": np.arange(len(influence)), "train": np.arange(influence.shape[1])}
    return make_scores(influence, **ids, method="m", estimand=estimand, attrs=attrs)


def test_is_by_query_and_by_id() -> None:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((6, 40))
    scale = np.arange(1, 7)[:, None]  # of each query: pooled sees it, the mean does not
    scores = make(scale * truth, seconds=3).isel(query=slice(None, None, -1))
    found = pbrf_correlation(scores, make(truth).isel(train=FEW)).isel(scorer=0)
    assert float(found["correlation"]) == pytest.approx(1.0, abs=1e-12)
    assert float(found["lower"]) == pytest.approx(1.0, abs=1e-6)
    assert float(found["pooled"]) < 0.99
    assert float(found["seconds"]) == 3
    x, y = (scale * truth)[:, FEW], truth[:, FEW]
    assert float(found["pooled"]) == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1])
    assert float(found["slope"]) == pytest.approx((x * y).sum() / (x * x).sum())
    noisy = truth + 0.5 * rng.standard_normal(truth.shape)
    both = {"values": make(noisy), "ranks": make(noisy, "similarity")}
    table = pbrf_correlation(both, make(truth, damping=0.1))
    other = table.sel(scorer="ranks")
    each = [np.corrcoef(a, b)[0, 1] for a, b in zip(noisy, truth, strict=True)]
    np.testing.assert_allclose(other["correlation_query"], each)
    assert float(other["correlation"]) == pytest.approx(np.mean(each))
    assert other["lower"] < other["correlation"] < other["upper"]
    assert np.isnan([other[name] for name in ("slope", "slope_lower", "slope_upper")]).all()
    assert not np.isnan(table["slope"].sel(scorer="values"))
    assert table.attrs["random"] == "training examples, queries"
    assert table.attrs["damping"] == 0.1
    ranks = pbrf_correlation(make(noisy), make(truth), correlation="spearman", queries="fixed")
    rho = [spearmanr(a, b).statistic for a, b in zip(noisy, truth, strict=True)]
    np.testing.assert_allclose(ranks["correlation_query"][0], rho)
    assert ranks.attrs["random"] == "training examples"
    assert (ranks["upper"] - ranks["lower"]).item() > 0


def test_intervals_cover() -> None:
    """150 draws of 60 examples and 20 queries, of known correlation and slope.

    False alarm 1e-4 for a true coverage in [0.91, 0.995]; pooled and slope add two variances.
    """
    shared, held = 0.4, np.zeros(3)
    known = np.array([0.8, 0.8, 0.8])
    for seed in range(150):
        g = np.random.default_rng(seed)
        x, e = (
            np.sqrt(shared) * g.standard_normal((1, 60))
            + np.sqrt(1 - shared) * g.standard_normal((20, 60))
            for _ in range(2)
        )
        found = pbrf_correlation(make(x), make(0.8 * x + 0.6 * e)).isel(scorer=0)
        lower = np.array([found[k] for k in ("lower", "pooled_lower", "slope_lower")])
        upper = np.array([found[k] for k in ("upper", "pooled_upper", "slope_upper")])
        held += (lower < known) & (known < upper)
    assert (held >= binom.ppf(5e-5, 150, 0.91)).all(), held
    assert held[0] <= binom.isf(5e-5, 150, 0.97)


def test_refusals() -> None:
    truth = make(np.random.default_rng(0).standard_normal((3, 8)))
    with pytest.raises(ValueError, match=r"at least 4 of them.*the truth has 3"):
        pbrf_correlation(truth, truth.isel(train=[0, 1, 2]))
    with pytest.raises(ValueError, match=r"of the truth and half do not match: half lack 4"):
        pbrf_correlation({"half": truth.isel(train=range(4))}, truth)
    with pytest.raises(ValueError, match="half lack 1"):
        pbrf_correlation({"half": truth.isel(query=[0, 1])}, truth)
    with pytest.raises(ValueError, match="m scores the measurement 'loss'"):
        pbrf_correlation(truth, truth.assign_attrs(measurement="margin"))
    with pytest.raises(ValueError, match="queries must be"):
        pbrf_correlation(truth, truth, queries="all")  # type: ignore[arg-type]
