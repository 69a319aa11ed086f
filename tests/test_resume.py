"""Stopping and going on: by asking for more, by a full disk, by SIGKILL. Always bit for bit."""

import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from arviz_stats.base import array_stats

import bayesinf as bi
from bayesinf import _layout, _run, _traces
from tests import interrupted
from tests.interrupted import run

KERNELS = ["SGLD", "RMSpropSGLD"]  # without and with a state to adapt
ROOT = Path(__file__).parents[1]


def contents(traces):
    """Everything that was recorded, as arrays."""
    tree = traces.tree.load()
    return {
        f"{group}/{name}": variable.values
        for group in tree.children
        for name, variable in tree[group].to_dataset().variables.items()
    }


def same(one, other):
    one, other = contents(one), contents(other)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    assert np.isfinite(one["train/loss"]).all()


def in_steps(path, kernel, draws, step, **options):
    store = path
    for total in [*range(step, draws, step), draws]:
        store = run(store, kernel, draws=total, **options)
        assert store.draws == total
        store = path or store
    return store if path is None else bi.open_traces(path)


# ---------------------------------------------------------------- more draws


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("disk", [True, False])
def test_many_draws_at_once_or_37_at_a_time(tmp_path, kernel, disk):
    whole = run(None, kernel, draws=200, vectorize=True)
    parts = in_steps(tmp_path / "t.zarr" if disk else None, kernel, 200, 37, vectorize=True)
    same(parts, whole)
    assert whole.values("train").shape == (4, 200, 12)
    # and the draws are not one number over and over
    assert (whole.values("train").std("draw") > 1e-3).all()


@pytest.mark.parametrize("kernel", interrupted.KERNELS)
def test_every_kernel_goes_on_where_it_stopped(kernel):
    """Also where a part of the state exists only after the first step."""
    whole = run(None, kernel, draws=7, warmup=3)
    same(in_steps(None, kernel, 7, 3, warmup=3), whole)
    assert (whole.values("train").std("draw") > 1e-3).all()


@pytest.mark.parametrize(
    ("kernel", "disk", "draws"),
    [
        pytest.param("SGLD", False, 80, marks=pytest.mark.slow),
        ("SGLD", True, 15),
        ("RMSpropSGLD", True, 15),
    ],
)
def test_many_draws_at_once_or_one_at_a_time(tmp_path, kernel, disk, draws):
    parts = in_steps(tmp_path / "t.zarr" if disk else None, kernel, draws, 1)
    same(parts, run(None, kernel, draws=draws))


def test_a_chunk_ends_in_the_middle(tmp_path, monkeypatch):
    """Chunks of 7 draws: parts that end before, on and after their edges."""
    monkeypatch.setattr(_layout, "_CHUNK_VALUES", 7 * 12)
    path = tmp_path / "t.zarr"
    for draws in (3, 7, 8, 21, 40):
        traces = run(path, "SGLD", draws=draws)
        assert traces.chunk_draws == 7
    same(bi.open_traces(path), run(None, "SGLD"))


def test_warm_up_alone_is_no_draw():
    assert not np.array_equal(
        run(None, "SGLD", warmup=20).values("train"), run(None, "SGLD", warmup=21).values("train")
    )


def test_no_warm_up_at_all(tmp_path):
    whole = run(None, "SGLD", warmup=0)
    run(tmp_path / "t.zarr", "SGLD", warmup=0, draws=1)
    same(run(tmp_path / "t.zarr", "SGLD", warmup=0), whole)


def test_the_way_chains_are_run_does_not_matter(tmp_path):
    """Vectorised and looped agree beyond rounding, also within one store."""
    whole = run(None, "SGLD", vectorize=True).values("train").values
    looped = run(None, "SGLD", vectorize=False).values("train").values
    np.testing.assert_allclose(looped, whole, rtol=1e-6)
    run(tmp_path / "t.zarr", "SGLD", draws=11, vectorize=False)
    mixed = run(tmp_path / "t.zarr", "SGLD", vectorize=True).values("train").values
    np.testing.assert_array_equal(mixed[:, :11], looped[:, :11])
    np.testing.assert_allclose(mixed, whole, rtol=1e-6)


def test_a_chain_does_not_depend_on_how_many_there_are():
    few = run(None, "SGLD", chains=2, superchains=2).values("train").values
    many = run(None, "SGLD", chains=3, superchains=3).values("train").values
    np.testing.assert_allclose(many[:2], few, rtol=1e-6)


def test_a_commit_that_does_not_fit_its_draws_is_refused():
    traces = run(None, "SGLD", draws=5)
    traces.append({}, run(None, "SGLD", draws=7).payload, {})
    with pytest.raises(bi.StoreError, match="commit is at step 34, its draws end at 30"):
        run(traces, "SGLD", draws=9)


# ---------------------------------------------------------------- a full disk


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("where", ["array", "commit", "replace"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_full_disk(tmp_path, monkeypatch, kernel, where, after):
    """The write number ``after`` fails: at the end of warm-up, or in sampling."""
    path, count = tmp_path / "t.zarr", [0]
    monkeypatch.setattr(_layout, "_CHUNK_VALUES", 10 * 12)  # commits at 0, 10, 20, … draws

    def failing(original, only=""):
        def sometimes(*args):
            count[0] += str(args[-1]).endswith(only)
            return full() if count[0] > after else original(*args)

        return sometimes

    with monkeypatch.context() as broken:
        if where == "array":
            broken.setattr(zarr.Array, "__setitem__", failing_writes(after))
        elif where == "commit":
            broken.setattr(_traces.os, "fsync", failing(os.fsync))
        else:
            broken.setattr(_traces.os, "replace", failing(os.replace, only="commit"))
        with pytest.raises(bi.StoreError, match=r"No space left.*(Free space|free space)") as info:
            run(path, kernel)
    if not path.exists():  # the layout itself did not fit
        assert (where, after) == ("array", 0)
        assert "making a store" in str(info.value)
    else:
        kept = bi.open_traces(path)
        assert kept.draws == max(0, 10 * (after - 1))
        assert f"The {kept.draws} draws before them are committed and intact" in str(info.value)
        if kept.draws:
            exact = run(None, kernel).values("train")[:, : kept.draws]
            np.testing.assert_array_equal(kept.values("train"), exact)
            np.testing.assert_array_equal(kept.tree["train"].loss, exact)
    same(run(path, kernel), run(None, kernel))


def failing_writes(after):
    """Let the layout through (its coordinates), then ``after − 1`` whole appends, then fail."""
    original, seen = zarr.Array.__setitem__, {"losses": 0}

    def write(self, key, value):
        if after == 0:
            full()
        if self.basename == "loss" and "query" in self.path:
            seen["losses"] += 1
            if seen["losses"] > after - 1:
                original(self, (key[0], key[1], slice(0, 2)), value[..., :2])  # half of it
                full()
        original(self, key, value)

    return write


def test_a_full_disk_when_growing(tmp_path, monkeypatch):
    path = tmp_path / "t.zarr"
    run(path, "SGLD", draws=5)
    with monkeypatch.context() as broken:
        broken.setattr(zarr.Array, "resize", full)
        with pytest.raises(bi.StoreError, match=r"making room for 40 draws .*No space left"):
            run(path, "SGLD")
    same(bi.open_traces(path), run(None, "SGLD", draws=5))
    same(run(path, "SGLD"), run(None, "SGLD"))


def test_a_kill_while_growing(tmp_path, monkeypatch):
    """Whatever array the kill comes after, and also between a coordinate's size and its values."""

    class Kill(BaseException):
        pass

    original, few, more = zarr.Array.resize, run(None, "SGLD", draws=5), run(None, "SGLD", draws=9)
    for survive in range(9):  # arrays with draws
        path, count = tmp_path / f"{survive}.zarr", [0]
        run(path, "SGLD", draws=5)

        def resize(self, shape, count=count, survive=survive):
            original(self, shape)
            count[0] += 1
            if count[0] > survive:
                raise Kill

        with monkeypatch.context() as broken:
            broken.setattr(zarr.Array, "resize", resize)
            with pytest.raises(Kill):
                run(path, "SGLD", draws=9)
        np.testing.assert_array_equal(bi.open_traces(path).values("train"), few.values("train"))
        traces = run(path, "SGLD", draws=9)
        same(traces, more)
        for node in traces.tree.children.values():
            assert node.draw.values.tolist() == list(range(9))


def test_a_kill_while_the_store_is_made(tmp_path, monkeypatch):
    class Kill(BaseException):
        pass

    def kill(*_):
        raise Kill

    path = tmp_path / "t.zarr"
    with monkeypatch.context() as broken:
        broken.setattr(_layout, "_coordinate", kill)
        with pytest.raises(Kill):
            run(path, "SGLD")
    assert not path.exists()
    same(run(path, "SGLD"), run(None, "SGLD"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.zarr"]


# ---------------------------------------------------------------- other processes


def command(*args):
    return [sys.executable, "-m", "tests.interrupted", *map(str, args)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}


def killed(path, kernel, step):
    """Start a run and kill it at about a step of this process's part; return the last one seen."""
    with subprocess.Popen(
        command(path, kernel), stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
    ) as process:
        first = last = None
        for line in process.stdout:
            last = int(line)
            first = last if first is None else first
            if last >= step:
                break
        process.kill()
    assert process.returncode == -9
    return first


@pytest.mark.parametrize(
    ("kernel", "first"),
    [("SGLD", (25, 60)), pytest.param("RMSpropSGLD", (3, 19), marks=pytest.mark.slow)],
)
def test_kill_twice(tmp_path, kernel, first):
    """In sampling twice, or in warm-up and in sampling, at moments drawn afresh at every run."""
    path, moment = tmp_path / "t.zarr", random.Random()
    assert killed(path, kernel, moment.randrange(*first)) == 0
    kept = bi.open_traces(path)
    assert kept.draws > 0 if first[0] > 20 else kept.draws == 0
    begins = 20 + 2 * kept.draws if kept.draws else 0
    assert (
        killed(path, kernel, moment.randrange(max(begins, 25) + 4, max(begins + 6, 90))) == begins
    )
    kept = bi.open_traces(path)
    assert begins < 20 + 2 * kept.draws <= 100
    same(kept, run(None, kernel, draws=kept.draws))
    same(run(path, kernel), run(None, kernel))
    with xr.open_datatree(path, engine="zarr", consolidated=False) as tree:
        assert dict(tree["train"].sizes) == {"chain": 4, "draw": 40, "train": 12}


def test_files_that_may_not_grow(tmp_path):
    """A real refusal by the system: files of at most 3 kB hold the layout and not the chunks."""
    path = tmp_path / "t.zarr"
    done = subprocess.run(
        command(path, "SGLD", 3000), capture_output=True, text=True, cwd=ROOT, env=environment()
    )
    assert done.returncode == 3, done.stderr
    assert "File too large" in done.stdout
    assert "free space (or mend the disk)" in done.stdout
    same(run(path, "SGLD"), run(None, "SGLD"))


def test_frequent_commits_change_nothing(monkeypatch):
    expected = run(None, "SGLD")
    monkeypatch.setattr(_run, "_COMMIT_SECONDS", 0.0)
    same(run(None, "SGLD"), expected)


def test_progress_shows_the_loss_and_its_rhat(monkeypatch, capsys):
    said = []
    monkeypatch.setattr(_run.tqdm, "set_postfix_str", lambda bar, text: said.append(text))
    monkeypatch.setattr(_run, "_COMMIT_SECONDS", 0.0)
    shown = run(None, "SGLD", progress=True)
    same(shown, run(None, "SGLD"))
    means = shown.values("train").mean("train").values
    assert "/100" in capsys.readouterr().err
    assert len(said) == 40
    assert said[3] == f"loss {means[:, :4].mean():.4g}"
    rhat = array_stats.rhat(means, chain_axis=0, draw_axis=1)
    assert said[-1] == f"loss {means.mean():.4g}, R-hat {rhat:.3f}"
