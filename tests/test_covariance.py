from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy import stats
from scipy.signal import lfilter

from bayesinf import _covariance
from bayesinf._batch_sums import degrees_of_freedom
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
    x, y = _normal((2, 8, 1), 0), _normal((2, 8, 1), 1)
    result = cross_covariance(x, y, batches_per_chain=2)
    z = ((x - x.mean()) * (y - y.mean())).reshape(4, 4).mean(1)
    expected = z.std(ddof=1) / 2 * 16 / 15
    assert result.mcse.item() == pytest.approx(expected, rel=1e-12)
    assert (result.batches, result.freedom) == (4, pytest.approx(3))


def test_mcse_of_batches_of_several_lengths() -> None:
    """13 draws are batches of 2, 2, 2, 2, 2, 3: the law of Σ_b (P_b − L_b P̄)² by simulation.

    Its mean is the variance of a draw times 13·(1 − Σ s_b²), relative standard error 0.0024 in
    100,000 runs of products that are exactly normal; its degrees of freedom, 2·mean²/variance,
    have 0.008. Bounds are 5 standard errors.
    """
    edges = np.array([0, 2, 4, 6, 8, 10, 13])
    assert [s.start for s in batch_slices(2, 13)] == edges[:-1].tolist()
    length = np.diff(edges).astype(float)
    z = np.random.default_rng(3).normal(size=(100_000, 13))
    sums = np.add.reduceat(z, edges[:-1], axis=1) - length * z.mean(1, keepdims=True)
    form = (sums**2).sum(1)
    assert form.mean() == pytest.approx(13 * (1 - ((length / 13) ** 2).sum()), rel=0.012)
    assert 2 * form.mean() ** 2 / form.var() == pytest.approx(degrees_of_freedom(length), rel=0.04)


@pytest.mark.parametrize("center", ["grand", "chain"])
@pytest.mark.parametrize("correlation", [False, True])
def test_estimates_without_a_batch_and_of_halves(center: str, correlation: bool) -> None:
    """Against the same estimate of arrays that lack those draws (or hold those chains alone)."""
    x, y = _normal((4, 45, 2), 0), _normal((4, 45, 3), 1) + 0.5 * _normal((4, 1, 3), 2)
    whole = cross_covariance(x, y, center=center, correlation=correlation, replicates=True, block=2)
    np.testing.assert_allclose(whole.share.sum(), 1)
    for c, half in enumerate((slice(0, 2), slice(2, 4))):
        part = cross_covariance(x[half], y[half], center=center, correlation=correlation)
        np.testing.assert_allclose(whole.halves[c], part.value, rtol=1e-10)
    where = [(c, s) for c in range(4) for s in batch_slices(4, 45)]
    assert len(where) == whole.batches == len(whole.deleted)
    for b in (0, 7, len(where) - 1):
        keep = np.ones((4, 45), dtype=bool)
        keep[where[b]] = False
        if center == "grand":
            expected = _plain(x[keep], y[keep], correlation)
        else:  # centre each chain on what is left of it
            rest = [(x[c][keep[c]], y[c][keep[c]]) for c in range(4)]
            xc, yc = (np.concatenate([r[k] - r[k].mean(0) for r in rest]) for k in (0, 1))
            expected = _plain(xc, yc, correlation)
        np.testing.assert_allclose(whole.deleted[b], expected, rtol=1e-10)
    assert cross_covariance(x, y).deleted.shape == (0, 2, 3)


def _plain(x: np.ndarray, y: np.ndarray, correlation: bool) -> np.ndarray:
    both = np.corrcoef(x.T, y.T) if correlation else np.cov(x.T, y.T)
    return both[:2, 2:]


def _ar1(rng: np.random.Generator, chains: int, draws: int, phi: float, rho: float) -> np.ndarray:
    """Two unit-variance AR(1) series with correlation rho, (chains, draws, 2), stationary."""
    root = np.linalg.cholesky(np.array([[1.0, rho], [rho, 1.0]]))
    noise = rng.normal(size=(chains, draws, 2)) @ root.T
    noise[:, 1:] *= (1 - phi**2) ** 0.5
    return np.asarray(lfilter([1.0], [1.0, -phi], noise, axis=1))


@pytest.mark.parametrize("correlation", [False, True])
@pytest.mark.parametrize(("chains", "draws"), [(4, 500), (32, 100)])
def test_intervals_cover_on_autocorrelated_draws(
    correlation: bool, chains: int, draws: int
) -> None:
    """95 % intervals on AR(1), φ = 0.7, true covariance 0.3: 1,000 runs.

    The binomial standard error is 0.007; batches of 128 draws are 23 autocorrelation times, which
    costs about a percent. Bounds [0.92, 0.975] are 3.6 standard errors off nominal and more than 10
    from what a factor of 2 in the error would give (0.68 or 1.00).
    """
    rng = np.random.default_rng(8)
    covered, runs = 0, 1000
    for _ in range(runs):
        series = _ar1(rng, chains, draws, 0.7, 0.3)
        x, y = series[..., :1], series[..., 1:]
        result = cross_covariance(x, y, correlation=correlation)
        t = stats.t.ppf(0.975, result.freedom)
        covered += abs(result.value.item() - 0.3) < t * result.mcse.item()
    assert 0.92 <= covered / runs <= 0.975


def _coverage(runs: int, chains: int, draws: int, effective: int, squares: bool) -> float:
    """Of 95 % intervals, over all pairs of 12 losses that share factors to various degrees.

    The losses are AR(1) with as many effective draws in all; with ``squares`` each has half its
    square added, as losses at a minimum have, whose products are heavy-tailed.
    """
    rng = np.random.default_rng(5)
    tau = chains * draws / effective
    phi = (tau - 1) / (tau + 1)
    loadings = rng.normal(size=(12, 12)) + 3 * np.eye(12)
    loadings /= np.sqrt((loadings**2).sum(1, keepdims=True))
    rho = loadings @ loadings.T
    truth = rho + 0.5 * rho**2 if squares else rho
    covered = []
    for _ in range(runs):
        noise = rng.normal(size=(chains, draws, 12)) @ loadings.T
        noise[:, 1:] *= (1 - phi**2) ** 0.5
        z = lfilter([1.0], [1.0, -phi], noise, axis=1)
        z = z + 0.5 * z**2 if squares else z
        result = cross_covariance(z[..., :4], z[..., 4:])
        t = stats.t.ppf(0.975, result.freedom)
        covered.append(np.abs(result.value - truth[:4, 4:]) < t * result.mcse)
    return float(np.mean(covered))


@pytest.mark.parametrize("chains", [4, 16])
def test_coverage_over_pairs_of_few_effective_draws(chains: int) -> None:
    """400 effective draws in 200 runs of 32 pairs: 0.93 to 0.97 nominally covered.

    The standard error of the coverage, taken from 20 groups of runs, is below 0.005 (pairs of a run
    are nearly independent): false alarms are below 1 in 1,000 where the coverage is 0.946 to 0.954.
    """
    assert 0.93 <= _coverage(200, chains, 400, 400, squares=False) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize(("chains", "draws"), [(2, 2000), (4, 1000), (8, 600), (16, 400)])
def test_coverage_over_pairs_at_the_worst_that_passes_the_diagnostics(
    chains: int, draws: int, squares: bool
) -> None:
    """100 effective draws, the fewest that pass the diagnostics, in 2,000 runs."""
    assert 0.93 <= _coverage(2000, chains, draws, 100, squares) <= 0.97


def test_batches_are_powers_of_two_and_at_least_twelve() -> None:
    counts = [len(batch_slices(chains, 1000)) for chains in (1, 4, 7, 12, 50)]
    assert counts == [15, 3, 3, 1, 1]
    for draws in range(24, 300, 7):
        for chains in (1, 2, 5, 11):
            assert 12 <= chains * len(batch_slices(chains, draws)) <= 2 * (11 + chains)
    slices = batch_slices(4, 103)
    assert slices[0].start == 0
    assert slices[-1].stop == 103
    assert all(a.stop == b.start for a, b in pairwise(slices))


@pytest.mark.parametrize(("chains", "draws"), [(2, 20), (2, 21)])
def test_products_of_float32_traces_round_as_float32(chains: int, draws: int) -> None:
    """Losses of mean 2.5 and deviation 10⁻³, exact to the rounding of their deviations."""
    x, y = (2.5 + 1e-3 * _normal((chains, draws, n), n) for n in (3, 7))
    x32, y32 = (values.astype(np.float32) for values in (x, y))
    exact = cross_covariance(x32.astype(np.float64), y32.astype(np.float64))
    short = cross_covariance(x32, y32)
    assert short.value.dtype == np.float32
    for name in ("value", "mcse", "within"):
        np.testing.assert_allclose(
            getattr(short, name), getattr(exact, name), rtol=2e-5, atol=2e-11
        )
    alone = cross_covariance(x32, y32, errors=False, block=4)
    np.testing.assert_allclose(alone.value, exact.value, rtol=1e-5, atol=1e-11)
    assert (alone.batches, alone.freedom) == (exact.batches, exact.freedom)


def test_errors() -> None:
    with pytest.raises(ValueError, match="at least two batches"):
        cross_covariance(_normal((1, 1, 1), 0), _normal((1, 1, 1), 1))
    constant = np.ones((2, 10, 1))
    with pytest.raises(ValueError, match="never vary"):
        cross_covariance(constant, constant, correlation=True)


@pytest.mark.parametrize("center", ["grand", "chain"])
@pytest.mark.parametrize(("chains", "draws"), [(2, 20), (2, 21), (4, 13), (1, 27), (12, 3)])
def test_short_batches_are_as_long_ones(
    monkeypatch: pytest.MonkeyPatch, chains: int, draws: int, center: str
) -> None:
    """Errors from pairs of draws against those from every batch's product, of one length or two."""
    x, y = _normal((chains, draws, 3), 0), _normal((chains, draws, 7), 1)
    y = 5.0 + y + 0.7 * x[..., :1] + np.arange(chains)[:, None, None]
    assert batch_slices(chains, draws)[0].stop <= _covariance._SHORT
    monkeypatch.setattr(_covariance, "_TILE", (2, 3))
    short = cross_covariance(x, y, center=center, block=4)
    monkeypatch.setattr(_covariance, "_SHORT", 0)
    long = cross_covariance(x, y, center=center)
    for name in ("value", "mcse", "within", "share"):
        np.testing.assert_allclose(getattr(short, name), getattr(long, name), rtol=1e-9, atol=1e-13)
    assert (short.batches, short.freedom) == (long.batches, long.freedom)
