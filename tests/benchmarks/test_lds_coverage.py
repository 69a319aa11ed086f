"""The program that judges judgements: its simulation, small versions of its table, its verdict."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, spearmanr

import bayesinf as bi
from benchmarks import lds_coverage as program


def test_simulated_correlations_are_the_stated_ones() -> None:
    """100 simulations of 100 subsets: four standard errors of each mean, 0.1/√100."""
    found, expected = [], []
    for seed in range(100):
        one = program.simulate(3, 0.5, seed, signal=2.0, runs=3)
        found.append(bi.lds(one.scores, one.bank)["lds_query"].values)
        expected.append(program.expected_spearman(one.r))
    assert one.factor == pytest.approx((6 / 7) ** 0.5)
    assert np.abs(np.mean(found, axis=0) - np.mean(expected, axis=0)).max() < 4 * 0.1 / 10


def test_expected_spearman_is_that_of_a_small_sample() -> None:
    """40,000 samples of 10 pairs: four standard errors, 0.3/√40,000."""
    g, r = np.random.default_rng(0), 0.6
    x, e = g.standard_normal((2, 10, 40_000))
    seen = program.expected_spearman(np.array(r), 10)
    ranks = np.argsort(np.argsort([x, r * x + (1 - r * r) ** 0.5 * e], axis=1), axis=1)
    mean = (1 - 6 * ((ranks[0] - ranks[1]) ** 2).sum(axis=0) / (10 * 99)).mean()
    assert abs(mean - seen) < 4 * 0.3 / 200
    assert spearmanr(ranks[0][:, 0], ranks[1][:, 0]).statistic == pytest.approx(
        1 - 6 * ((ranks[0] - ranks[1])[:, 0] ** 2).sum() / 990
    )


def within(count: float, repeats: int, low: float, high: float) -> bool:
    """False alarm 1e-4 for any true share in [low, high]."""
    least, most = binom.ppf(5e-5, repeats, low), binom.isf(5e-5, repeats, high)
    return bool(least <= round(count * repeats) <= most)


@pytest.mark.parametrize("shared", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_intervals_cover_reduced(shared: float) -> None:
    """150 judgements at 50 queries; four shares, each with a false alarm of 1e-4."""
    for share in program.intervals(50, shared, 150).values():
        assert within(share, 150, 0.93, 0.97)


@pytest.mark.parametrize(
    ("shared", "alike"), [pytest.param(0.0, False, marks=pytest.mark.slow), (0.5, True)]
)
def test_random_scores_are_within_their_null_reduced(shared: float, alike: bool) -> None:
    """80 judgements; two shares, each with a false alarm of 1e-4."""
    assert within(program.chance(shared, alike, 80), 80, 0.05, 0.05)


@pytest.mark.parametrize(("signal", "runs"), [(0.1, 1), (0.1, 5), (0.3, 10), (3.0, 5)])
def test_ceilings_reduced(signal: float, runs: int) -> None:
    """Means of 2 banks of independent queries are within 0.02 of the known; their sd is 0.003."""
    mean, sd = program.ceiling(signal, runs, 0.0, 2)
    known = 6 / np.pi * np.arcsin(np.sqrt(signal * runs / (signal * runs + 1)) / 2)
    assert abs(mean - known) < 0.02
    assert sd < 0.012


def test_half_shared_effects_widen_the_interval() -> None:
    """At 200 queries the interval is 3 times as wide when half the variance is shared."""

    def width(shared: float) -> float:
        made = [program.simulate(200, shared, seed) for seed in range(4)]
        return float(np.mean([bi.lds(one.scores, one.bank)["standard_error"] for one in made]))

    assert 2 < width(0.5) / width(0.0) < 4.5


@pytest.mark.slow
def test_program_in_full() -> None:
    """As it is run, with the same seeds: about half an hour."""
    assert program.main([]) == 0


@pytest.mark.parametrize(("share", "status"), [(0.95, 0), (0.9, 1)])
def test_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], share: float, status: int
) -> None:
    def known(signal: float, runs: int, *_: object) -> tuple[float, float]:
        return 6 / np.pi * np.arcsin((signal * runs / (signal * runs + 1)) ** 0.5 / 2) + 0.01, 0.0

    monkeypatch.setattr(program, "intervals", lambda *_: {"random": share, "fixed": 0.95})
    monkeypatch.setattr(program, "chance", lambda *_: 0.05)
    monkeypatch.setattr(program, "ceiling", known)
    assert program.main(["--simulations", "3"]) == status
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 + 8 + 4 + 32
    assert ("MISSED" in out[2]) == bool(status)
    assert out[2].split() == [
        "intervals", "independent", "50", "queries,", "random", f"{share:.1%}", "93–97", "%",
        "MISSED" if status else "met",
    ]  # fmt: skip
    assert program.main(["chance"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4


def test_unknown_part() -> None:
    with pytest.raises(SystemExit):
        program.main(["nonsense"])
