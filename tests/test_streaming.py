"""Streams against traces of the same run, and stopping and going on, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import bayesinf as bi
from bayesinf import _run, _streaming
from tests import quadratic
from tests.interrupted import run

ROOT = Path(__file__).parents[1]
ARRAYS = ("influence", "mcse", "influence_within")


def stream(path=None, **options):
    return run(bi.StreamingCovariance(path), "SGLD", **options)


def same(one, other):
    """Every bit of the sums."""
    assert (one.draws, one.config, one.payload) == (other.draws, other.config, other.payload)
    assert {g: one.ids(g).tolist() for g in ("train", "query")} == {
        g: other.ids(g).tolist() for g in ("train", "query")
    }
    mine, others = one._ready.used(), other._ready.used()
    for name in mine:
        np.testing.assert_array_equal(mine[name], others[name], err_msg=name)


def quietly(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bi.ConvergenceWarning)
        warnings.simplefilter("ignore", bi.FailedChainsWarning)
        return function(*args, **options)


def equal_scores(one: xr.Dataset, other: xr.Dataset) -> None:
    assert set(one.data_vars) == set(other.data_vars)
    for name in one.data_vars:
        assert one[name].dims == other[name].dims
        np.testing.assert_allclose(one[name], other[name], rtol=1e-9, atol=1e-14, err_msg=str(name))
    for name in one.coords:
        assert one[name].values.tolist() == other[name].values.tolist()
    assert one.attrs.keys() == other.attrs.keys()
    for name in one.attrs.keys() - {"seconds"}:
        expected = other.attrs[name]
        near = expected if isinstance(expected, str) else pytest.approx(expected, rel=1e-9)
        assert one.attrs[name] == near, name


# ---------------------------------------------------------------- the same scores


@cache
def both(draws):
    """Traces and sums of one run."""
    options = {"draws": draws, "measurements": ["loss", "margin"]}
    return run(None, "SGLD", **options), stream(**options)


@pytest.mark.parametrize("draws", [37, 100])
@pytest.mark.parametrize("normalize", [None, "correlation"])
def test_scores_are_those_of_traces(draws, normalize):
    traces, sums = both(draws)
    for measurement in ("loss", "margin"):
        for center in ("grand", "chain"):
            settings = {"measurement": measurement, "center": center, "normalize": normalize}
            settings["replicates"] = center == "grand"
            equal_scores(
                quietly(bi.bif, sums, **settings), quietly(bi.bif, traces, block_size=5, **settings)
            )
    assert repr(sums) == f"<StreamingCovariance in memory: 4 chains × {draws} draws>"


def test_diagnostics_of_good_chains_have_the_same_verdict():
    problem = quadratic.make()
    step = float(0.3 / torch.linalg.eigvalsh(problem.hessian)[-1])
    settings = {"chains": 8, "draws": 500, "warmup": 300, "thin": 8, "progress": False}
    posterior, kernel = problem.posterior, bi.SGLD(step)
    sums = bi.sample(posterior, kernel, store=bi.StreamingCovariance(), **settings)
    traces = bi.sample(posterior, kernel, **settings)
    one, other = bi.diagnose(sums), bi.diagnose(traces)
    assert one.attrs == other.attrs
    assert one.attrs["ok"] == 1
    assert set(one.data_vars) == set(other.data_vars)
    for group in ("train", "query"):
        np.testing.assert_allclose(one[f"trend_{group}"], other[f"trend_{group}"], rtol=1e-6)
        np.testing.assert_allclose(one[f"rhat_{group}"], other[f"rhat_{group}"], atol=0.02)
    part = bi.diagnose(sums, max_examples=4)
    np.testing.assert_allclose(
        part["rhat_train"], one["rhat_train"].sel(train=part["train"].values)
    )
    equal_scores(bi.bif(sums), bi.bif(traces))
    drifting = bi.sample(
        posterior, bi.SGLD(step / 1000), store=bi.StreamingCovariance(),
        **{**settings, "draws": 100, "warmup": 0},
    )  # fmt: skip
    verdict = bi.diagnose(drifting).attrs["verdict"]
    for words in ("R-hat of the train losses", "nested R-hat", "linear drift"):
        assert words in verdict


def test_failed_chains_are_left_out_of_both():
    problem = quadratic.make()
    step = float(0.3 / torch.linalg.eigvalsh(problem.hessian)[-1])
    start = bi.sample(
        problem.posterior, bi.SGLD(step), draws=30, warmup=0, chains=4, progress=False
    )
    highest = start.values("train").mean("train").max("draw").values
    order = np.sort(highest)
    bound = float(order[-2:].mean())  # between the worst chain and the next

    def go(store):
        with pytest.warns(bi.FailedChainsWarning):
            return bi.sample(
                problem.posterior, bi.SGLD(step), draws=30, warmup=0, chains=4, progress=False,
                divergence_bound=bound, on_divergence="drop", store=store,
            )  # fmt: skip

    traces, sums = go(None), go(bi.StreamingCovariance())
    assert len(sums.healthy) == 3
    assert sums.failed == traces.failed
    assert sums.superchains.tolist() == traces.superchains.tolist()
    with pytest.warns() as said:
        scores = bi.bif(sums, center="grand")
    assert any("3 of 4 chains remain" in str(warning.message) for warning in said)
    equal_scores(scores, quietly(bi.bif, traces, center="grand"))
    assert np.isfinite(scores["influence"]).all()


# ---------------------------------------------------------------- stopping and going on


@pytest.mark.parametrize("step", [1, 37])
def test_more_draws_in_parts(tmp_path, step):
    whole = stream(draws=60)
    path = tmp_path / "sums"
    for draws in [*range(step, 60, step * 16), 60]:
        again = stream(path, draws=draws)
        assert again.draws == draws
    same(again, whole)
    same(bi.StreamingCovariance(path), whole)
    memory = bi.StreamingCovariance()
    for draws in (33, 50, 60):
        run(memory, "SGLD", draws=draws)
    same(memory, whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sums"]


def test_size_does_not_depend_on_draws(tmp_path):
    """The file holds the used part of the sums, so it stops growing; memory never grows."""
    sizes, files = set(), []
    path = tmp_path / "sums"
    for draws in (40, 96, 192):  # the last two: as many batches of twice the length
        sums = stream(path, draws=draws, thin=1)
        sizes.add(sums.nbytes)
        files.append(path.stat().st_size)
    assert len(sizes) == 1
    assert max(files[1:]) - min(files[1:]) < 64  # digits of numbers


def test_frequent_commits_change_nothing(tmp_path, monkeypatch):
    expected = stream()
    monkeypatch.setattr(_run, "_COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(_streaming, "_COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(_streaming, "_COMMIT_SHARE", float("inf"))
    same(stream(tmp_path / "sums"), expected)


def test_kill(tmp_path):
    path = tmp_path / "sums"
    command = [sys.executable, "-m", "tests.interrupted_stream", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        for line in process.stdout:
            if int(line) >= 11:
                break
        process.kill()
    assert process.returncode == -9
    kept = bi.StreamingCovariance(path)
    assert 11 <= kept.draws < 40
    same(kept, stream(draws=kept.draws))
    same(stream(path), stream())


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk(tmp_path, monkeypatch, where):
    path = tmp_path / "sums"
    stream(path, draws=9)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken:
        broken.setattr(_streaming.os, where, full)
        with pytest.raises(bi.StoreError, match=r"sums over 40 draws.*No space left.*free space"):
            stream(path)
    same(bi.StreamingCovariance(path), stream(draws=9))
    same(stream(path), stream())


def test_an_interrupt_while_draws_are_added(tmp_path, monkeypatch):
    path = tmp_path / "sums"
    stream(path, draws=9)
    sums = bi.StreamingCovariance(path)
    with monkeypatch.context() as broken:
        broken.setattr(
            _streaming.RunningSums, "add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            run(sums, "SGLD")
    with pytest.raises(bi.StoreError, match=r"an interrupt came .* of no use.* same path"):
        quietly(bi.bif, sums)
    same(stream(path), stream())


# ---------------------------------------------------------------- refusals


def test_other_settings_are_refused_with_both_values(tmp_path):
    path = tmp_path / "sums"
    stream(path, draws=9)
    with pytest.raises(bi.StoreError, match=r"(?s)sums'.*warmup: store has 20, asked for 21"):
        stream(path, warmup=21)
    memory = stream(draws=9)
    with pytest.raises(bi.StoreError, match=r"(?s)in memory .*thin: store has 2, asked for 3"):
        run(memory, "SGLD", thin=3)


def test_what_is_no_stream_is_refused_and_left_alone(tmp_path):
    for name, content in (
        ("text", b"hello\n"), ("json", b'{"kind": "other"}\n'), ("empty", b""),
        ("cut", json.dumps({"kind": _streaming._KIND}).encode() + b"\n"),
    ):  # fmt: skip
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(bi.StoreError, match=f"{name}' exists and holds no sums"):
            bi.StreamingCovariance(path)
        assert path.read_bytes() == content
    (tmp_path / "folder").mkdir()
    with pytest.raises(bi.StoreError, match="exists and holds no sums"):
        bi.StreamingCovariance(tmp_path / "folder")
    stream(tmp_path / "sums", draws=9)
    whole = (tmp_path / "sums").read_bytes()
    (tmp_path / "sums").write_bytes(whole[:-9])
    with pytest.raises(bi.StoreError, match="exists and holds no sums"):
        bi.StreamingCovariance(tmp_path / "sums")


def test_reading_too_early():
    empty = bi.StreamingCovariance()
    assert repr(empty) == "<StreamingCovariance in memory: empty>"
    for read in (bi.bif, bi.diagnose):
        with pytest.raises(bi.StoreError, match=r"no draw yet|nothing was streamed yet"):
            read(empty)
    sums = stream(draws=9)
    with pytest.raises(KeyError, match="'margin' of 'query' was not recorded"):
        bi.bif(sums, measurement="margin")
    with pytest.raises(ValueError, match="a stream keeps apart 3 to 6"):
        quietly(bi.bif, stream(draws=200), batches_per_chain=30)
    with pytest.raises(TypeError, match="expected what sample"):
        bi.bif(xr.Dataset())
