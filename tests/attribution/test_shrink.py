"""Shrinkage: its algebra, its limits, and that it lowers the error it claims to lower."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

import bayesinf as bi

QUERIES, TRAIN = 40, 60


def scores(value: np.ndarray, mcse: np.ndarray | None = None, method: str = "bif") -> xr.Dataset:
    extra = {} if mcse is None else {"mcse": mcse}
    return bi.make_scores(
        value, query=np.arange(len(value)), train=np.arange(value.shape[1]) + 100,
        method=method, estimand="influence", **extra,
    )  # fmt: skip


def draw(seed: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth, a noisy measurement of it, and a classical score of another scale near it."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((QUERIES, TRAIN)) ** 3
    classical = 0.2 * truth + 0.1 * rng.standard_normal(truth.shape)
    return truth, truth + noise * rng.standard_normal(truth.shape), classical


def test_exact_scores_stay_and_useless_ones_become_the_target() -> None:
    truth, _, classical = draw(0, 1.0)
    target = scores(classical, method="ekfac")
    exact = scores(truth, np.zeros_like(truth))
    for shrunk in (bi.shrink(exact), bi.shrink(exact, target)):
        np.testing.assert_allclose(shrunk.influence, truth, rtol=1e-12, atol=1e-14)
    useless = scores(truth, np.full_like(truth, 1e6))
    assert not bi.shrink(useless).influence.any()
    scale = (truth * classical).sum(1) / (classical**2).sum(1)
    np.testing.assert_allclose(bi.shrink(useless, target).influence, scale[:, None] * classical)


def test_the_formulas() -> None:
    _, value, classical = draw(1, 2.0)
    mcse = np.random.default_rng(2).uniform(1, 3, value.shape)
    zero = bi.shrink(scores(value, mcse))
    q, t = 3, 7
    weight = max(0.0, 1 - (mcse[q, t] / value[q, t]) ** 2)
    assert zero.influence.values[q, t] == pytest.approx(weight * value[q, t], rel=1e-12)
    assert zero.mcse.values[q, t] == pytest.approx(weight * mcse[q, t], rel=1e-12)
    hybrid = bi.shrink(scores(value, mcse), scores(classical, method="ekfac"))
    centre = value[q] @ classical[q] / (classical[q] @ classical[q]) * classical[q]
    share = max(0.0, 1 - (mcse[q] ** 2).sum() / ((value[q] - centre) ** 2).sum())
    expected = centre + share * (value[q] - centre)
    np.testing.assert_allclose(hybrid.influence.values[q], expected, rtol=1e-12)
    np.testing.assert_allclose(hybrid.weight.values[q], share, rtol=1e-12)


def test_it_lowers_the_error_where_noise_is_large() -> None:
    """2,400 pairs, noise of twice the typical score: the gains are dozens of standard errors."""
    truth, value, classical = draw(3, 2.0)
    noisy = scores(value, np.full_like(value, 2.0))

    def error(found: xr.Dataset) -> float:
        return float(np.square(found.influence.values - truth).mean())

    plain, zero = error(noisy), error(bi.shrink(noisy))
    hybrid = error(bi.shrink(noisy, scores(classical, method="ekfac")))
    assert zero < 0.8 * plain
    assert hybrid < 0.5 * plain


def test_a_hybrid_says_so_and_a_pure_one_does_not() -> None:
    _, value, classical = draw(4, 1.0)
    own = scores(value, np.ones_like(value))
    assert bi.shrink(own).attrs["method"] == "shrunk bif"
    assert "hybrid" not in bi.shrink(own).attrs
    hybrid = bi.shrink(own, scores(classical, method="ekfac"))
    assert hybrid.attrs["method"] == "hybrid bif + ekfac"
    assert hybrid.attrs["hybrid"] == "bif + ekfac"


def test_ids_are_matched_in_any_order() -> None:
    _, value, classical = draw(5, 1.0)
    own, target = scores(value, np.ones_like(value)), scores(classical, method="ekfac")
    turned = target.isel(query=slice(None, None, -1), train=slice(None, None, -1))
    np.testing.assert_array_equal(
        bi.shrink(own, turned).influence, bi.shrink(own, target).influence
    )


def test_what_it_refuses() -> None:
    _, value, classical = draw(6, 1.0)
    own, target = scores(value, np.ones_like(value)), scores(classical, method="ekfac")
    with pytest.raises(ValueError, match=r"no 'mcse'.*'ekfac'.*target="):
        bi.shrink(target, own)
    with pytest.raises(ValueError, match=r"different train examples \(60 and 59\)"):
        bi.shrink(own, target.isel(train=slice(1, None)))
    with pytest.raises(ValueError, match="target is zero for a query"):
        bi.shrink(own, scores(np.zeros_like(value), method="ekfac"))
