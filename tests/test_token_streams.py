"""Streams of token losses against the traces of the same run, and float32 sums."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import xarray as xr

import bayesinf as bi
from bayesinf._running_sums import Part, RunningSums
from tests.language_task import run

pytestmark = pytest.mark.filterwarnings("ignore::bayesinf.ConvergenceWarning")
OPTIONS = {"draws": 53, "measurements": ["loss", "margin"]}


def close(one: xr.Dataset, other: xr.Dataset, rtol: float = 1e-8) -> None:
    assert set(one.data_vars) == set(other.data_vars)
    for name in one.data_vars:
        assert one[name].dims == other[name].dims
        bound = rtol * float(np.abs(other[name]).max())
        np.testing.assert_allclose(one[name], other[name], rtol=rtol, atol=bound, err_msg=name)
    for name in one.coords:
        assert one[name].values.tolist() == other[name].values.tolist()


@pytest.fixture(scope="module", params=["train", "query", "both"])
def stores(request):
    options = {**OPTIONS, "tokens": request.param}
    return run(**options), run(bi.StreamingCovariance(), **options)


@pytest.mark.parametrize("normalize", [None, "correlation"])
def test_scores_are_those_of_traces(stores, normalize):
    traces, sums = stores
    recorded = traces.config["tokens"]
    for tokens in {None, recorded, *(("train", "query") if recorded == "both" else ())}:
        for options in (
            {"center": "grand"}, {"center": "chain", "replicates": True},
            {"center": "grand", "query": [2, 0], "train": ["é6", "é1"]},
        ):  # fmt: skip
            pair = (bi.bif(t, tokens=tokens, normalize=normalize, **options) for t in stores)
            close(*reversed(list(pair)))
    margins = (bi.bif(t, measurement="margin", normalize=normalize) for t in (sums, traces))
    close(*margins)


def test_diagnoses_and_groups_are_those_of_traces(stores):
    traces, sums = stores
    one, other = bi.diagnose(sums), bi.diagnose(traces)
    for split in ("train", "query"):
        np.testing.assert_allclose(one[f"trend_{split}"], other[f"trend_{split}"], rtol=1e-6)
        np.testing.assert_allclose(one[f"rhat_{split}"], other[f"rhat_{split}"], atol=0.15)
    groups = {"a": ["é1", "é6"], "b": ["é0"]}
    close(*(bi.group_influence(t, groups, center="grand") for t in (sums, traces)))
    more = {"query_groups": {"q": [0, 2]}, "center": "grand"}
    close(*(bi.group_influence(t, groups, **more) for t in (sums, traces)))
    for group in ("train", "query"):
        if traces.has_tokens(group):
            tokens = traces.values(group, tokens=True)
            label = xr.DataArray(tokens[f"{group}_position"].values % 2, dims=f"{group}_token")
            both = {"query_groups": label} if group == "query" else {}
            own = groups if group == "query" else label
            close(*(bi.group_influence(t, own, center="grand", **both) for t in (sums, traces)))
        else:
            with pytest.raises(KeyError, match=f"losses of {group} tokens were not recorded"):
                sums.axis(group, tokens=True)


def test_stopping_and_going_on(tmp_path, monkeypatch):
    options = {"tokens": "both", "batch_size": 3, "measurements": ["loss", "margin"]}
    whole = run(bi.StreamingCovariance(), draws=60, **options)
    for draws in (1, 17, 33, 60):
        parts = run(bi.StreamingCovariance(tmp_path / "s"), draws=draws, **options)
    again = bi.StreamingCovariance(tmp_path / "s")
    for other in (parts, again):
        for name, array in whole._ready.used().items():
            np.testing.assert_array_equal(other._ready.used()[name], array, err_msg=name)
        close(bi.bif(other, tokens="both"), bi.bif(whole, tokens="both"), rtol=0)
    with pytest.raises(bi.StoreError, match="tokens: store has 'both', asked for None"):
        run(again, draws=61, measurements=["loss", "margin"], batch_size=3)


def test_float32_sums(tmp_path):
    """Off by about 10⁻⁶ of the largest score, where a standard error is 10⁻¹ of it."""
    exact = run(bi.StreamingCovariance(), draws=200, tokens="train")
    for path in (None, tmp_path / "s"):
        short = run(bi.StreamingCovariance(path, dtype="float32"), draws=200, tokens="train")
        assert short._ready.arrays["product"].dtype == np.float32
        assert short._ready.arrays["product"].nbytes * 2 == exact._ready.arrays["product"].nbytes
        close(*(bi.bif(t, tokens="train", center="grand") for t in (short, exact)), rtol=3e-6)
    again = bi.StreamingCovariance(tmp_path / "s")
    close(bi.bif(again, center="grand"), bi.bif(exact, center="grand"), rtol=3e-6)
    with pytest.raises(bi.StoreError, match="holds sums in float32, and dtype='float64' was asked"):
        bi.StreamingCovariance(tmp_path / "s", dtype="float64")
    with pytest.raises(ValueError, match="must be 'float64' or 'float32'; got 'float16'"):
        bi.StreamingCovariance(dtype="float16")


def test_float32_sums_of_losses_that_hardly_vary():
    """Mean 2.5, standard deviation 10⁻³, 4,096 draws: uncentred float32 would keep no digit."""
    rng = np.random.default_rng(0)
    x, y = ((2.5 + 1e-3 * rng.normal(size=(4, 4096, n))).astype(np.float32) for n in (2, 6))
    found = []
    for dtype in ("float64", "float32"):
        sums = RunningSums(4, 2, 6, [Part(2), Part(6, np.array([0, 3]))], dtype)
        sums.add(x, y)
        found.append(sums.arrays["product"].astype(np.float64))
    error = np.abs(found[1] - found[0]).max() / np.abs(found[0]).max()
    assert 0 < error < 1e-6


def test_wide_rows_have_short_tails():
    starts = np.arange(0, 252_000, 63)
    sums = RunningSums(4, 32, 252_000, [Part(32), Part(252_000, starts)], "float32")
    assert sums.block == 4
    assert sums.arrays["moments"].shape == (4, 16, 2, 32 + 4000)
    assert sum(a.nbytes for a in sums.arrays.values()) < 870e6  # not touched before it is used


def test_failed_chains_are_left_out():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bi.FailedChainsWarning)
        start = run(draws=20, warmup=0, chains=4, jitter=2.0)
        highest = np.sort(start.values("train").mean("train").max("draw").values)
        options = {
            "draws": 20, "warmup": 0, "chains": 4, "jitter": 2.0, "tokens": "both",
            "on_divergence": "drop", "divergence_bound": float(highest[-2:].mean()),
        }  # fmt: skip
        traces, sums = run(**options), run(bi.StreamingCovariance(), **options)
        assert len(sums.healthy) == 3
        # products of so few draws are float32
        close(*(bi.bif(t, tokens="both", center="grand") for t in (sums, traces)), rtol=1e-6)
