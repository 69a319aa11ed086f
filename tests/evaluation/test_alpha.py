"""LDS over subset sizes: each point is the table of its bank."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from bayesinf._scores import make_scores
from bayesinf.evaluation import alpha_curve, lds_table, random_subsets

N, Q = 40, 8
EFFECTS = np.random.default_rng(0).standard_normal((Q, N))


def make_bank(fraction: float, *, count: int = 30, runs: int = 3) -> xr.Dataset:
    """Effects that add up, with seed noise that matters more where subsets are alike."""
    subsets = random_subsets(N, fraction=fraction, count=count, seed=round(100 * fraction))
    g = np.random.default_rng(round(100 * fraction))
    loss = (subsets.values @ EFFECTS.T)[:, None] + g.standard_normal((count, runs, Q))
    return xr.Dataset(
        {"loss": (("subset", "seed", "query"), loss), "subset_mask": subsets},
        coords={"query": np.arange(Q), "seed": np.arange(runs)},
    )


def make(noise: float, **attrs: object) -> xr.Dataset:
    influence = EFFECTS + noise * np.random.default_rng(7).standard_normal(EFFECTS.shape)
    return make_scores(
        influence,
        query=np.arange(Q),
        train=np.arange(N),
        method=f"noise {noise}",
        estimand="influence",
        attrs=attrs,
    )


def test_each_point_is_the_table_of_its_bank() -> None:
    scores = [make(0.5, seconds=2), make(2.0)]
    banks = [make_bank(0.5), make_bank(0.95, count=40), make_bank(0.1)]
    curve = alpha_curve(scores, banks, correlation="pearson", queries="fixed")
    np.testing.assert_allclose(curve["fraction"], [0.1, 0.5, 0.95])
    assert curve["lds"].dims == ("fraction", "scorer")
    assert curve["subsets"].values.tolist() == [30, 30, 40]
    assert curve["seconds"].dims == ("scorer",)
    for fraction, bank in zip((0.5, 0.95, 0.1), banks, strict=True):
        point = curve.sel(fraction=fraction, method="nearest")
        table = lds_table(scores, bank, correlation="pearson", queries="fixed")
        for name in table.data_vars:
            np.testing.assert_allclose(point[name].values, table[name].values)
    assert curve.attrs["correlation"] == "pearson"
    assert curve.attrs["random"] == "subsets, seeds"
    # leaving two of 40 out moves losses 2.3 times less than halves do, the noise is the same
    assert curve["ceiling"][2] < curve["ceiling"][1] - 0.02


def test_banks_of_a_single_seed_have_no_ceiling() -> None:
    one, many = make_bank(0.5, runs=1), make_bank(0.2)
    assert "ceiling" not in alpha_curve(make(0.5), [one])
    curve = alpha_curve(make(0.5), [one, many])
    assert np.isnan(curve["ceiling"].values).tolist() == [False, True]
    assert np.isnan(curve["relative"].values[:, 0]).tolist() == [False, True]
    assert curve["seeds"].values.tolist() == [3, 1]


def test_refusals() -> None:
    half = make_bank(0.5)
    with pytest.raises(ValueError, match=r"list of banks of different fractions.*got one bank"):
        alpha_curve(make(1.0), half)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got none"):
        alpha_curve(make(1.0), [])
    with pytest.raises(ValueError, match=r"several banks keep the fraction \[0\.5\]"):
        alpha_curve(make(1.0), [half, half])
    half["subset_mask"][0, :] = True
    with pytest.raises(ValueError, match="the subsets of bank 0 keep 20 to 40 of 40"):
        alpha_curve(make(1.0), [half])
