"""Precision: what it says, how many draws it foretells, and runs that stop when it is there."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import bayesinf as bi
from bayesinf import _accuracy
from bayesinf._accuracy import draws_needed, relative_mcse
from bayesinf._covariance import cross_covariance
from tests import quadratic
from tests.interrupted import run

PROBLEM = quadratic.make()


def _sample(draws: int = 4000, **options: object) -> object:
    step = float(0.3 / torch.linalg.eigvalsh(PROBLEM.hessian)[-1])
    settings = {"chains": 4, "warmup": 100, "thin": 4, "progress": False, "draws": draws}
    return bi.sample(PROBLEM.posterior, bi.SGLD(step), **{**settings, **options})  # type: ignore[arg-type]


def test_precision_is_the_median_over_the_spread_of_its_query() -> None:
    value = np.array([[1.0, 3.0, 5.0], [2.0, 2.0, 2.0], [0.0, 10.0, 20.0]])
    mcse = np.array([[0.1, 0.2, 0.3], [9.0, 9.0, 9.0], [1.0, 1.0, 1.0]])
    small, large = np.sqrt(8 / 3), 10 * np.sqrt(2 / 3)
    ratios = [np.sqrt((0.01 + 0.04 + 0.09) / 3) / small, 1 / large]
    assert relative_mcse(value, mcse) == pytest.approx(np.median(ratios))
    assert relative_mcse(value[1:2], mcse[1:2]) == math.inf


def test_foretold_draws_reach_the_precision() -> None:
    """Independent draws, 8 runs each: precision is foretold within 10 %, 5 standard errors."""
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(3, 220))

    def precision(draws: int) -> float:
        seen = []
        for _ in range(8):
            z = rng.normal(size=(4, draws, 3)) @ factor + 2 * rng.normal(size=(4, draws, 220))
            result = cross_covariance(z[..., :20], z[..., 20:])
            seen.append(relative_mcse(result.value, result.mcse))
        return float(np.mean(seen))

    before = precision(50)
    needed = draws_needed(50, before, 0.1)
    assert needed is not None
    assert needed > 60
    assert precision(needed) == pytest.approx(0.1, rel=0.1)


def test_what_cannot_be_foretold_and_what_is_there_already() -> None:
    assert draws_needed(50, 1.2, 0.1) is None
    assert draws_needed(50, 0.05, 0.1) == 50
    assert draws_needed(100, math.sqrt(0.5), math.sqrt(0.21)) in (376, 377)


def test_sampling_stops_at_the_precision_and_goes_on_to_another() -> None:
    first = _sample(until=bi.Until(mcse=0.3))
    assert 8 <= first.draws < 4000  # type: ignore[attr-defined]
    assert bi.bif(first).attrs["relative_mcse"] <= 0.3  # type: ignore[arg-type]
    draws = first.draws  # type: ignore[attr-defined]
    again = _sample(store=first, until=bi.Until(mcse=0.3))
    assert again.draws == draws  # type: ignore[attr-defined]
    finer = _sample(store=first, until=bi.Until(mcse=0.05))
    assert draws < finer.draws < 4000  # type: ignore[attr-defined]
    plain = _sample(draws=finer.draws)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(finer.values("train"), plain.values("train"))  # type: ignore[attr-defined]


def test_a_precision_of_chains_in_doubt_is_not_believed() -> None:
    """Chains that hardly move are very precise about nothing."""
    slow = bi.SGLD(float(1e-5 / torch.linalg.eigvalsh(PROBLEM.hessian)[-1]))
    traces = bi.sample(
        PROBLEM.posterior, slow, draws=30, warmup=0, until=bi.Until(mcse=0.9), progress=False
    )
    assert traces.draws == 30
    result = _accuracy.covariance_of(traces)
    assert relative_mcse(result.value, result.mcse) < 0.9


def test_a_stream_stops_at_the_precision() -> None:
    sums = _sample(store=bi.StreamingCovariance(), until=bi.Until(mcse=0.3))
    assert 8 <= sums.draws < 4000  # type: ignore[attr-defined]
    assert bi.bif(sums).attrs["relative_mcse"] <= 0.3  # type: ignore[arg-type]


def test_draws_are_the_most() -> None:
    assert run(None, "SGLD", draws=30, until=bi.Until(mcse=0.001)).draws == 30


def test_a_time_budget_is_for_all_calls(tmp_path) -> None:
    path = tmp_path / "t.zarr"
    first = run(path, "SGLD", draws=100_000, until=bi.Until(seconds=0.5))
    assert 0 < first.draws < 100_000
    spent = first.commit_facts["seconds"]
    assert spent >= 0.5
    again = run(path, "SGLD", draws=100_000, until=bi.Until(seconds=0.5))
    assert again.draws == first.draws
    more = run(path, "SGLD", draws=100_000, until=bi.Until(seconds=spent + 0.2))
    assert first.draws < more.draws < 100_000
    assert run(None, "SGLD", draws=50, until=bi.Until(seconds=1e-9)).draws == 1


def test_a_function_of_the_store() -> None:
    asked = []

    def enough(store) -> bool:
        asked.append(store.draws)
        return store.draws >= 30

    traces = run(None, "SGLD", draws=100, until=enough)
    assert asked == [8, 10, 13, 17, 22, 28, 35]
    assert traces.draws == 35
    np.testing.assert_array_equal(
        traces.values("train"), run(None, "SGLD", draws=35).values("train")
    )


@pytest.mark.filterwarnings("ignore::bayesinf.ConvergenceWarning")
def test_scores_that_are_not_precise_enough_say_what_it_takes() -> None:
    traces = _sample(draws=60)
    scores = bi.bif(traces, center="grand")  # type: ignore[arg-type]
    precision = scores.attrs["relative_mcse"]
    assert 0.05 < precision < 1
    needed = draws_needed(60, precision, precision / 2)
    words = (
        rf"{precision:.2f} of the spread .* About {needed - 60} more draws .* draws={needed} and"
    )
    with pytest.warns(bi.MonteCarloWarning, match=words):
        bi.bif(traces, center="grand", target_mcse=precision / 2)  # type: ignore[arg-type]
    bi.bif(traces, center="grand", target_mcse=precision * 1.01)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::bayesinf.ConvergenceWarning")
def test_noise_alone_foretells_nothing(monkeypatch) -> None:
    traces = _sample(draws=60)
    monkeypatch.setattr("bayesinf.attribution._covariance_scores.median_relative", lambda *_: 1.1)
    with pytest.warns(bi.MonteCarloWarning, match="cannot be foretold: draw ten times"):
        bi.bif(traces, target_mcse=0.3)  # type: ignore[arg-type]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="needs mcse=, seconds=, or both"):
        bi.Until()
    for wrong in (0, 1, -0.1):
        with pytest.raises(ValueError, match="mcse must lie between 0 and 1, as it is relative"):
            bi.Until(mcse=wrong)
    with pytest.raises(ValueError, match="seconds must be > 0"):
        bi.Until(seconds=0)
    with pytest.raises(ValueError, match="target_mcse must lie between 0 and 1"):
        bi.bif(run(None, "SGLD", draws=9), target_mcse=2.0)
    with pytest.raises(KeyError, match="'margin' of 'query' was not recorded"):
        run(None, "SGLD", draws=20, until=bi.Until(mcse=0.1, measurement="margin"))
