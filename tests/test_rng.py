"""Batches, generators and starting points: what they depend on, and what not."""

import numpy as np
import pytest
import torch

import bayesinf as bi
from bayesinf._rng import BatchStream, ChainGenerators, starting_points
from tests import quadratic

CPU = torch.device("cpu")


def epoch(stream, number, per=3):
    """Rows of one epoch, ``(C, per · batch)``."""
    return torch.cat([stream.at(number * per + k) for k in range(per)], dim=1)


@pytest.mark.parametrize("n", [12, 14])
def test_an_epoch_is_a_permutation_without_replacement(n):
    stream = BatchStream(3, 5, n, 4)
    rows = []
    for number in range(4):
        order = epoch(stream, number)
        assert order.shape == (5, 12)
        assert order.dtype == torch.int64
        for row in order:
            assert len(set(row.tolist())) == 12
            assert set(row.tolist()) <= set(range(n))
            rows.append(tuple(row.tolist()))
    assert len(set(rows)) == len(rows)  # reshuffled every epoch, and each chain's own


def test_the_remainder_of_an_epoch_changes():
    """A fixed set of 2 of 14 is never left out thirty times over: false alarm 91^-29."""
    stream = BatchStream(0, 1, 14, 4)
    left = {frozenset(range(14)) - set(epoch(stream, e)[0].tolist()) for e in range(30)}
    assert len(left) > 1


def test_every_example_is_as_likely_in_every_batch():
    """Chi-square at 14 cells: above 60 has a false-alarm rate below 1e-7."""
    stream, epochs = BatchStream(1, 1, 14, 4), 2000
    first = torch.stack([stream.at(3 * e)[0] for e in range(epochs)])
    counts = np.bincount(first.flatten().numpy(), minlength=14)
    expected = epochs * 4 / 14
    assert ((counts - expected) ** 2 / expected).sum() < 60


def test_batches_are_a_function_of_seed_chain_and_step_alone():
    steps = [0, 7, 3, 100, 3, 4, 5, 0]
    many, few = BatchStream(3, 8, 13, 4), BatchStream(3, 2, 13, 4)
    for step in steps:
        fresh = BatchStream(3, 8, 13, 4).at(step)
        assert torch.equal(many.at(step), fresh)
        assert torch.equal(few.at(step), fresh[:2])
    assert not torch.equal(BatchStream(4, 8, 13, 4).at(0), BatchStream(3, 8, 13, 4).at(0))


def test_the_full_batch_is_none():
    assert BatchStream(0, 2, 5, None).at(9) is None
    assert sorted(BatchStream(0, 1, 5, 5).at(9)[0].tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [0, -1, 6])
def test_batch_sizes_that_cannot_be_are_refused(size):
    with pytest.raises(ValueError, match=f"between 1 and the 5 training examples.*got {size}"):
        BatchStream(0, 1, 5, size)


def test_a_chains_noise_does_not_depend_on_how_many_there_are():
    many, few = ChainGenerators(5, 8, CPU), ChainGenerators(5, 3, CPU)
    for size in (1, 7, 40):
        a, b = many.normal_like(torch.zeros(8, size)), few.normal_like(torch.zeros(3, size))
        assert torch.equal(a[:3], b)
        assert len({tuple(row.tolist()) for row in a}) == 8
    other = ChainGenerators(6, 3, CPU).normal_like(torch.zeros(3, 40))
    assert not torch.equal(other, ChainGenerators(5, 3, CPU).normal_like(torch.zeros(3, 40)))


def test_noise_is_standard_and_independent_across_chains():
    """z-scores of 4 means, 4 variances and 6 correlations at 6 sd: false alarm below 3e-8."""
    z = ChainGenerators(0, 4, CPU).normal_like(torch.zeros(4, 20_000, dtype=torch.float64)).numpy()
    n = z.shape[1]
    assert np.abs(z.mean(1)).max() * n**0.5 < 6
    assert np.abs(z.var(1) - 1).max() * (n / 2) ** 0.5 < 6
    assert np.abs(np.corrcoef(z)[np.triu_indices(4, 1)]).max() * n**0.5 < 6


def test_state_comes_back():
    rng, zero = ChainGenerators(5, 3, CPU), torch.zeros(3, 9)
    rng.normal_like(zero)
    states = rng.get_state()
    after = rng.normal_like(zero)
    other = ChainGenerators(99, 3, CPU)
    other.set_state(states)
    assert torch.equal(other.normal_like(zero), after)


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    ChainGenerators(0, 2, CPU).normal_like(torch.zeros(2, 3))
    BatchStream(0, 2, 9, 3).at(4)
    starting_points(torch.zeros(3), 4, 2, lambda z: z, 0)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


def test_starting_points_are_shared_within_a_superchain():
    center = torch.arange(5.0, dtype=torch.float64)
    points = starting_points(center, 8, 4, lambda z: 0.3 * z, 1)
    assert points.shape == (8, 5)
    assert torch.equal(points[::2], points[1::2])
    assert len({tuple(p.tolist()) for p in points}) == 4
    assert torch.equal(starting_points(center, 12, 4, lambda z: 0.3 * z, 1)[::3], points[::2])
    assert torch.equal(starting_points(center, 2, 2, lambda z: 0.3 * z, 1), points[:4:2])
    assert torch.equal(starting_points(center, 8, 4, torch.zeros_like, 1), center.expand(8, 5))
    assert not torch.equal(starting_points(center, 8, 4, lambda z: 0.3 * z, 2), points)
    double = starting_points(center, 8, 4, lambda z: 0.6 * z, 1)
    torch.testing.assert_close(double - center, 2 * (points - center))


def test_starting_points_have_the_stated_spread():
    """z-scores of a mean and a variance over 40,000 numbers, at 6 sd: false alarm below 1e-8."""

    def half(z):
        return 0.5 * z

    points = starting_points(torch.full((10_000,), 2.0, dtype=torch.float64), 4, 4, half, 3)
    assert abs(float(points.mean()) - 2) / 0.5 * 200 < 6
    assert abs(float(points.var()) / 0.25 - 1) * 20_000**0.5 < 6


def test_chains_of_a_preconditioned_kernel_start_at_laplace_draws():
    """Mean square distance of 1,000 starts is tr P, within 5 standard errors (6e-7)."""
    problem = quadratic.make()
    inverse = bi.fit_curvature(problem.task, fisher="enumerated").inverse(0.2)
    kernel = bi.SGLD(1e-30, preconditioner=bi.Preconditioner(inverse, n_beta=60))
    traces = bi.sample(
        problem.posterior, kernel, draws=1, warmup=0, chains=1000, superchains=1000,
        vectorize=True, progress=False,
    )  # fmt: skip
    squares = traces.tree["sample_stats"]["distance"].values.ravel() ** 2
    error = squares.std() / 1000**0.5
    assert abs(squares.mean() - inverse.trace() / 60) < 5 * error
    assert abs(squares.mean() - 4 / problem.posterior.prior_precision) > 8 * error
