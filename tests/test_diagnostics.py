from __future__ import annotations

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats

import bayesinf as bi
from bayesinf._diagnostics import rhat_of_means, trend_share
from tests import quadratic


def _traces(**options: object) -> bi.TraceStore:
    problem = quadratic.make()
    step = float(options.pop("relative_step", 0.3)) / float(  # type: ignore[arg-type]
        torch.linalg.eigvalsh(problem.hessian)[-1]
    )
    settings = {"chains": 8, "draws": 400, "warmup": 300, "thin": 8, "progress": False}
    return bi.sample(problem.posterior, bi.SGLD(step), **{**settings, **options})  # type: ignore[arg-type]


def test_values_are_those_of_the_library() -> None:
    traces = _traces()
    report = bi.diagnose(traces)
    x = traces.values("train").values[:, :, 3].astype(np.float64)
    assert report["rhat_train"].values[3] == pytest.approx(array_stats.rhat(x, 0, 1))
    assert report["ess_bulk_train"].values[3] == pytest.approx(
        array_stats.ess(x, chain_axis=0, draw_axis=1, method="bulk")
    )
    nested = array_stats.rhat_nested(
        x, superchain_ids=np.repeat(np.arange(4), 2), chain_axis=0, draw_axis=1
    )
    assert report["rhat_nested_train"].values[3] == pytest.approx(nested)


def test_trend_share_of_lines_and_noise() -> None:
    time = np.linspace(-1, 1, 200)
    noise = np.random.default_rng(0).normal(size=(3, 200))
    noise -= noise.mean(1, keepdims=True)
    noise -= (noise @ time / (time @ time))[:, None] * time
    noise /= np.sqrt((noise**2).sum(1, keepdims=True) / (time @ time))
    stack = np.stack([noise, noise + time, time + 0 * noise, 5 * noise - 5 * time], axis=2)
    np.testing.assert_allclose(trend_share(stack), [0, 0.5, 1, 0.5], atol=1e-12)
    assert trend_share(np.ones((2, 10, 1))) == pytest.approx(0)


def test_good_chains_pass() -> None:
    report = bi.diagnose(_traces(draws=800))
    assert report.attrs["ok"] == 1
    assert "no sign of trouble" in report.attrs["verdict"]


def test_drift_is_named() -> None:
    report = bi.diagnose(_traces(relative_step=0.002, warmup=0, thin=1, draws=200))
    assert report.attrs["ok"] == 0
    assert "linear drift" in report.attrs["verdict"]
    assert "nested R-hat" in report.attrs["verdict"]
    assert float(report["trend_train"].median()) > 0.2


def test_few_draws_are_named() -> None:
    report = bi.diagnose(_traces(draws=10))
    assert report.attrs["ok"] == 0
    assert "effective draws" in report.attrs["verdict"]


def test_one_chain_is_named() -> None:
    assert "one chain" in bi.diagnose(_traces(chains=1, draws=2000)).attrs["verdict"]


def test_a_part_of_the_examples() -> None:
    traces = _traces()
    part = bi.diagnose(traces, max_examples=5)
    assert part.sizes == {"train": 5, "query": 5}
    whole = bi.diagnose(traces)
    np.testing.assert_allclose(
        part["rhat_train"], whole["rhat_train"].sel(train=part["train"].values)
    )


def test_too_few_draws_for_anything() -> None:
    with pytest.raises(ValueError, match="at least 4 draws"):
        bi.diagnose(_traces(draws=3))


def test_rhat_of_means_leaves_failed_chains_out() -> None:
    means = np.random.default_rng(0).normal(size=(4, 100))
    broken = np.concatenate([means, np.full((1, 100), np.nan)])
    assert rhat_of_means(broken) == pytest.approx(array_stats.rhat(means, 0, 1))
    assert np.isnan(rhat_of_means(np.ones((2, 10))))
