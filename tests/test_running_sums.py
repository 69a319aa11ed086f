"""Sums against the arrays that they are sums of, to rounding."""

from __future__ import annotations

import numpy as np
import pytest
from arviz_stats.base import array_stats
from scipy.sparse import csr_array

from bayesinf._covariance import combine, cross_covariance
from bayesinf._diagnostics import trend_share
from bayesinf._running_sums import RunningSums, Terms
from bayesinf._stream_diagnostics import segment_statistics

SHAPES = [  # chains, draws, queries, trains
    (1, 50, 3, 5), (2, 333, 9, 4), (3, 100, 2, 7), (4, 2, 2, 2), (4, 9, 3, 3), (4, 257, 20, 11),
    (4, 1000, 3, 5), (8, 500, 3, 5), (12, 77, 3, 5), (32, 130, 3, 5),
]  # fmt: skip


def losses(chains: int, draws: int, queries: int, trains: int) -> tuple[np.ndarray, np.ndarray]:
    """Float32, of mean 2.5 and standard deviation 10⁻³, with common factors."""
    rng = np.random.default_rng(chains + draws)
    common = rng.normal(size=(chains, draws, 3))

    def own(count: int) -> np.ndarray:
        noise = rng.normal(size=(chains, draws, count))
        return (2.5 + 1e-3 * (common @ rng.normal(size=(3, count)) + noise)).astype(np.float32)

    return own(queries), own(trains)


def streamed(x: np.ndarray, y: np.ndarray, step: int) -> RunningSums:
    sums = RunningSums(len(x), x.shape[2], y.shape[2])
    for start in range(0, x.shape[1], step):
        sums.add(x[:, start : start + step], y[:, start : start + step])
    return sums


def every(queries: int, trains: int) -> tuple[Terms, Terms]:
    """All query and all train values."""
    rows, columns = np.arange(queries), np.arange(trains)
    return Terms(rows, rows), Terms(columns, queries + columns)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("center", ["grand", "chain"])
@pytest.mark.parametrize("correlation", [False, True])
def test_covariances_are_those_of_the_traces(
    shape: tuple[int, int, int, int], center: str, correlation: bool
) -> None:
    chains, draws, queries, trains = shape
    x, y = losses(*shape)
    replicates = draws > 2  # a chain of two draws without one of them has no variance
    expected = cross_covariance(
        x, y, center=center, correlation=correlation, replicates=replicates, block=3
    )
    blocks = streamed(x, y, 7).blocks(list(range(chains)), *every(queries, trains), None, 2)
    result = combine(blocks, (queries, trains), center, correlation, replicates)
    assert (result.batches, result.freedom) == (expected.batches, expected.freedom)
    np.testing.assert_array_equal(result.share, expected.share)
    for name in ("value", "mcse", "within", "deleted", "halves"):
        one, other = getattr(result, name), getattr(expected, name)
        tolerance = 1e-12 if other.dtype == np.float64 else 1e-6  # short batches
        bound = tolerance * np.abs(other).max(initial=0)
        np.testing.assert_allclose(one, other, rtol=0, atol=bound)
    assert expected.mcse.min() > 0


@pytest.mark.parametrize("shape", [(4, 257, 20, 11), (12, 77, 3, 5)])
def test_how_draws_are_handed_over_changes_no_bit(shape: tuple[int, int, int, int]) -> None:
    x, y = losses(*shape)
    whole = streamed(x, y, 1000).used()
    for step in (1, 5, 64):
        parts = streamed(x, y, step).used()
        for name in whole:
            np.testing.assert_array_equal(parts[name], whole[name], err_msg=name)


def test_written_and_read_in_the_middle() -> None:
    x, y = losses(4, 257, 3, 5)
    first = streamed(x[:, :150], y[:, :150], 150)
    again = RunningSums(4, 3, 5)
    again.draws = first.draws
    for name, array in first.used().items():
        again.arrays[name][:, : array.shape[1]] = array
    again.add(x[:, 150:], y[:, 150:])
    for name, array in streamed(x, y, 257).used().items():
        np.testing.assert_array_equal(again.used()[name], array, err_msg=name)


def test_a_chain_that_fails_leaves_no_mark_on_the_others() -> None:
    x, y = losses(4, 100, 3, 5)
    broken_x, broken_y = x.copy(), y.copy()
    broken_x[2, 40:], broken_y[2, 40:] = np.nan, np.inf
    healthy = [0, 1, 3]
    expected = cross_covariance(x[healthy], y[healthy], batches_per_chain=3)
    sums = streamed(broken_x, broken_y, 9)
    result = combine(sums.blocks(healthy, *every(3, 5), 3, 9), (3, 5), "grand", False, False)
    np.testing.assert_allclose(result.value, expected.value, rtol=1e-10)
    np.testing.assert_allclose(result.mcse, expected.mcse, rtol=1e-10)


def test_a_mixture_of_train_losses() -> None:
    x, y = losses(4, 100, 3, 5)
    mix = np.random.default_rng(0).normal(size=(5, 2))
    expected = cross_covariance(x, np.stack([own.astype(np.float64) @ mix for own in y]))
    blocks = streamed(x, y, 100).blocks([0, 1, 2, 3], *every(3, 5), None, 2, csr_array(mix))
    result = combine(blocks, (3, 2), "grand", False, False)
    np.testing.assert_allclose(result.value, expected.value, rtol=1e-8)
    np.testing.assert_allclose(result.mcse, expected.mcse, rtol=1e-8)


def test_more_batches_than_are_kept_apart() -> None:
    x, y = losses(4, 100, 3, 5)
    sums = streamed(x, y, 100)
    fewer = combine(sums.blocks([0, 1, 2, 3], *every(3, 5), 2, 9), (3, 5), "grand", False, False)
    expected = cross_covariance(x, y, batches_per_chain=2)
    np.testing.assert_allclose(fewer.mcse, expected.mcse, rtol=1e-9)
    with pytest.raises(ValueError, match=r"40 batches .* keeps apart 3 to 6 .*record traces"):
        next(sums.blocks([0, 1, 2, 3], *every(3, 5), 40, 9))


def test_memory_does_not_depend_on_draws() -> None:
    sizes = set()
    x, y = losses(4, 1000, 3, 5)
    for draws in (10, 100, 1000):
        sums = streamed(x[:, :draws], y[:, :draws], 50)
        sizes.add(sum(array.nbytes for array in sums.arrays.values()))
    assert len(sizes) == 1


@pytest.mark.parametrize("draws", [8, 128, 512])
def test_split_rhat_is_the_librarys_where_halves_are_whole_segments(draws: int) -> None:
    x, y = losses(4, draws, 3, 5)
    x[1] += np.float32(1e-3)
    stats = segment_statistics(
        streamed(x, y, 64).segments([0, 1, 2, 3], np.arange(3)), np.array([0, 0, 1, 1])
    )
    for q in range(3):
        own = x[:, :, q].astype(np.float64)
        rhat = array_stats.rhat(own, chain_axis=0, draw_axis=1, method="split")
        assert stats["rhat"][q] == pytest.approx(rhat, rel=1e-9)
        nested = array_stats.rhat_nested(
            own, superchain_ids=[0, 0, 1, 1], chain_axis=0, draw_axis=1, method="split"
        )
        assert stats["rhat_nested"][q] == pytest.approx(nested, rel=1e-9)
    np.testing.assert_allclose(stats["trend"], trend_share(x.astype(np.float64)), rtol=1e-9)


def test_other_lengths_split_nearly_in_the_middle() -> None:
    x, y = losses(4, 1000, 3, 5)
    stats = segment_statistics(
        streamed(x, y, 64).segments([0, 1, 2, 3], np.arange(3)), np.arange(4)
    )
    for q in range(3):
        own = x[:, :, q].astype(np.float64)
        rhat = array_stats.rhat(own, chain_axis=0, draw_axis=1, method="split")
        assert stats["rhat"][q] == pytest.approx(rhat, abs=2e-3)
    np.testing.assert_allclose(stats["trend"], trend_share(x.astype(np.float64)), rtol=1e-9)


def test_effective_draws_of_an_autoregression() -> None:
    """φ = 0.8: τ = 9, 1,778 effective draws of 16,000; 32 losses, 15 segments × 16 chains.

    The mean over losses has a relative standard error of √(2/239/32) = 0.016 and segments of 64
    draws overstate by about 7 %: bounds [−0.07, 0.15] are 4.9 standard errors off that.
    """
    rng = np.random.default_rng(1)
    z = rng.normal(size=(16, 1000, 32))
    z[:, 1:] *= 0.6
    for t in range(1, 1000):
        z[:, t] += 0.8 * z[:, t - 1]
    stats = segment_statistics(
        streamed(z, z[..., :1], 100).segments(list(range(16)), np.arange(32)), np.arange(16)
    )
    exact = 16_000 / 9
    assert -0.07 < 1 / (exact / stats["ess_bulk"]).mean() - 1 < 0.15


def test_losses_that_never_vary() -> None:
    x, y = losses(4, 100, 3, 5)
    x[..., 1] = 0.1
    stats = segment_statistics(
        streamed(x, y, 30).segments([0, 1, 2, 3], np.arange(3)), np.arange(4)
    )
    for name in ("rhat", "ess_bulk"):
        assert np.isnan(stats[name]).tolist() == [False, True, False]
    assert stats["trend"][1] == 0
