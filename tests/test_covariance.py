from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from bayesinf._covariance import batch_slices, cross_covariance


def _normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("block", [2, 100])
def test_grand_mean_covariance_is_numpys(block: int) -> None:
    x, y = _normal((3, 40, 4), 0), _normal((3, 40, 5), 1)
    y = y + 0.7 * x[..., :1]
    result = cross_covariance(x, y, block=block)
    exact = np.cov(x.reshape(120, 4).T, y.reshape(120, 5).T)[:4, 4:]
    np.testing.assert_allclose(result.value, exact, rtol=1e-12)
    correlation = cross_covariance(x, y, correlation=True, block=block)
    exact = np.corrcoef(x.reshape(120, 4).T, y.reshape(120, 5).T)[:4, 4:]
    np.testing.assert_allclose(correlation.value, exact, rtol=1e-12)


def test_within_chain_centring() -> None:
    x, y = _normal((3, 40, 2), 0), _normal((3, 40, 2), 1)
    x, y = x + np.array([0, 3, -2])[:, None, None], y + np.array([0, 1, -5])[:, None, None]
    exact = sum(np.cov(x[c].T, y[c].T, bias=True)[:2, 2:] for c in range(3)) / 3 * 120 / 119
    np.testing.assert_allclose(cross_covariance(x, y).within, exact, rtol=1e-10)
    np.testing.assert_allclose(cross_covariance(x, y, center="chain").value, exact, rtol=1e-10)
    assert np.abs(cross_covariance(x, y).value - exact).min() > 1


def test_small_fluctuations_on_a_large_mean_survive_float32() -> None:
    signal = 1e-3 * _normal((4, 500, 1), 3)
    x = (2.5 + signal).astype(np.float32)
    exact = np.cov(x.astype(np.float64).ravel())
    assert cross_covariance(x, x).value.item() == pytest.approx(float(exact), rel=1e-9)
    assert exact == pytest.approx(1e-6, rel=0.2)


def test_mcse_by_hand() -> None:
    x, y = _normal((2, 6, 1), 0), _normal((2, 6, 1), 1)
    result = cross_covariance(x, y, batches_per_chain=2)
    z = ((x - x.mean()) * (y - y.mean())).reshape(4, 3).mean(1)
    expected = z.std(ddof=1) / 2 * 12 / 11
    assert result.mcse.item() == pytest.approx(expected, rel=1e-12)
    assert result.batches == 4


def _ar1(rng: np.random.Generator, chains: int, draws: int, phi: float, rho: float) -> np.ndarray:
    """Two unit-variance AR(1) series with correlation rho, (chains, draws, 2), stationary."""
    root = np.linalg.cholesky(np.array([[1.0, rho], [rho, 1.0]]))
    noise = rng.normal(size=(chains, draws, 2)) @ root.T
    out = noise.copy()
    for t in range(1, draws):
        out[:, t] = phi * out[:, t - 1] + (1 - phi**2) ** 0.5 * noise[:, t]
    return out


@pytest.mark.parametrize("correlation", [False, True])
@pytest.mark.parametrize(("chains", "draws"), [(4, 500), (32, 100)])
def test_intervals_cover_on_autocorrelated_draws(
    correlation: bool, chains: int, draws: int
) -> None:
    """95 % intervals on AR(1), φ = 0.7, true covariance 0.3: 1,000 runs.

    The binomial standard error is 0.007; batches of 100 draws are 18 autocorrelation times, which
    costs about a percent. Bounds [0.92, 0.975] are 3.6 standard errors off nominal and more than 10
    from what a factor of 2 in the error would give (0.68 or 1.00).
    """
    rng = np.random.default_rng(8)
    covered, runs = 0, 1000
    for _ in range(runs):
        series = _ar1(rng, chains, draws, 0.7, 0.3)
        x, y = series[..., :1], series[..., 1:]
        result = cross_covariance(x, y, correlation=correlation)
        t = stats.t.ppf(0.975, result.batches - 1)
        covered += abs(result.value.item() - 0.3) < t * result.mcse.item()
    assert 0.92 <= covered / runs <= 0.975


def test_at_least_twenty_batches() -> None:
    assert [len(batch_slices(chains, 1000)) for chains in (1, 4, 7, 20, 50)] == [20, 5, 3, 1, 1]
    slices = batch_slices(4, 103)
    assert slices[0].start == 0
    assert slices[-1].stop == 103
    assert all(a.stop == b.start for a, b in pairwise(slices))


def test_errors() -> None:
    with pytest.raises(ValueError, match="at least two batches"):
        cross_covariance(_normal((1, 1, 1), 0), _normal((1, 1, 1), 1))
    constant = np.ones((2, 10, 1))
    with pytest.raises(ValueError, match="never vary"):
        cross_covariance(constant, constant, correlation=True)
