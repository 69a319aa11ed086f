"""Scores on disk: the same as in memory, resumed to the bit, never mixed with another run's."""

import json
import multiprocessing
import random

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import bayesinf as bi
from bayesinf import fit_curvature
from bayesinf.attribution import _sinks
from bayesinf.curvature._capture import Capture
from tests import exact, interrupted_scores
from tests.interrupted_scores import run
from tests.layered_cases import LAYERED_BY_NAME

COSTS = {"seconds", "forward_examples", "backward_examples"}


def same(one, other):
    """All labels, values and attributes but times and passes."""
    one, other = one.load(), other.load()
    assert set(one.variables) == set(other.variables)
    for name in one.variables:
        assert one[name].dims == other[name].dims
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name].values, other[name].values, err_msg=name)
    left, right = ({k: v for k, v in d.attrs.items() if k not in COSTS} for d in (one, other))
    assert left == right
    assert np.ptp(one.influence.values) > 0


OPTIONS = [
    {},
    {"modules": True},
    {"train_tokens": "position"},
    {"query_tokens": "loss", "train_tokens": "loss", "modules": True},
    {"query_tokens": "position", "query_rank": 1, "gradient_dtype": torch.bfloat16},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_a_store_holds_what_memory_does(tmp_path, options):
    task = LAYERED_BY_NAME["decoder-tied"].task(query_ids=["é", "bb", "c"])
    curvature = fit_curvature(task, fisher="empirical")
    options = {"curvature": curvature, "damping": 0.1, "batch_size": 3, "query_batch_size": 2,
               **options}  # fmt: skip
    stored = bi.ekfac(task, store=tmp_path / "s", **options)
    memory = bi.ekfac(task, **options)
    same(stored, memory)
    with xr.open_zarr(tmp_path / "s" / "scores", consolidated=False) as back:
        same(back, memory)
    memory.to_zarr(tmp_path / "copy", zarr_format=3, consolidated=False)
    with xr.open_zarr(tmp_path / "copy", consolidated=False) as back:
        xr.testing.assert_identical(back.load(), memory)


def test_float32_stays_float32(tmp_path):
    task = LAYERED_BY_NAME["cnn"].task().to(dtype=torch.float32)
    same(bi.grad_dot(task, store=str(tmp_path / "s")), bi.grad_dot(task))
    assert bi.grad_dot(task, store=tmp_path / "s").influence.dtype == np.float32


def test_more_than_one_chunk(tmp_path, monkeypatch):
    """Blocks that share chunks: each write reads, changes and replaces a chunk."""
    original = _sinks.StoreSink._array

    def small(group, name, dims, shape, chunks, dtype):
        original(group, name, dims, shape, (*chunks[:-2], 2, 3), dtype)

    monkeypatch.setattr(_sinks.StoreSink, "_array", staticmethod(small))
    task = LAYERED_BY_NAME["cnn"].task()
    options = {"modules": True, "batch_size": 2, "query_batch_size": 1}
    same(bi.grad_dot(task, store=tmp_path / "s", **options), bi.grad_dot(task, **options))


# ---------------------------------------------------------------- stopping and going on


def stop_after(monkeypatch, blocks):
    """Make the next run fail after some blocks."""
    original, count = _sinks.StoreSink.write, [0]

    def write(self, *args):
        if count[0] == blocks:
            raise KeyboardInterrupt
        count[0] += 1
        original(self, *args)

    monkeypatch.setattr(_sinks.StoreSink, "write", write)


@pytest.mark.parametrize("blocks", [0, 1, 11, 17])
def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch, blocks):
    with monkeypatch.context() as broken:
        stop_after(broken, blocks)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "s", "ekfac")
    resumed = run(tmp_path / "s", "ekfac")
    whole = run(tmp_path / "w", "ekfac")
    same(resumed, whole)
    fit = 6 + 3 + 6  # the check, half of it alone, one pass
    queries = 3 - blocks // 6
    assert resumed.attrs["forward_examples"] == queries + 18 - blocks
    assert whole.attrs["forward_examples"] == fit + 3 + 18
    assert "covariance" not in json.loads(resumed.attrs["seconds"])


def test_a_finished_run_costs_nothing(tmp_path, monkeypatch):
    whole = run(tmp_path / "s", "ekfac")
    monkeypatch.setattr(Capture, "record", interrupted)
    again = run(tmp_path / "s", "ekfac")
    xr.testing.assert_identical(again.load(), whole.load())  # what it cost to make them, too


def test_a_kill_before_the_labels(tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(_sinks.StoreSink, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "s", "ekfac")
    same(run(tmp_path / "s", "ekfac"), run(tmp_path / "w", "ekfac"))


def test_errors_of_approximations_outlive_a_stop(tmp_path, monkeypatch):
    task = LAYERED_BY_NAME["cnn"].task()
    options = {"query_batch_size": 1, "query_rank": 1, "gradient_dtype": torch.bfloat16}
    whole = bi.grad_dot(task, **options)
    worst = [bi.grad_dot(only(task, i), query_rank=1).attrs["query_rank_error"] for i in range(5)]
    assert whole.attrs["query_rank_error"] == pytest.approx(max(worst), rel=1e-12)
    for blocks in (1, 2, 3):
        path = tmp_path / str(blocks)
        with monkeypatch.context() as broken:
            stop_after(broken, blocks)
            broken.setattr(_sinks.StoreSink, "finish", interrupted)
            with pytest.raises(KeyboardInterrupt):
                dot(task, path, **options)
        same(dot(task, path, **options), whole)


def only(task, query):
    """The same task with one of its queries."""
    one = task.query.batch(slice(query, query + 1))
    return bi.Task(
        task.module, task.likelihood, train=task.train.batch(), query=one, parameters=".*"
    )


def killed(path, method, words):
    """Start a run and kill it a random while after a number of steps; whether it was alive."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.interrupted_scores"])
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=interrupted_scores.tell, args=(path, method, theirs))
    process.start()
    theirs.close()
    said = []
    while len(said) < words and "done" not in said:
        said.append(mine.recv())
    process.join(random.Random().uniform(0, 0.006))
    process.kill()
    process.join()
    mine.close()
    assert process.exitcode == -9
    return said


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "gauss_newton" else ())
        for name in interrupted_scores.METHODS
    ],
)
def test_five_kills_at_random_moments(tmp_path, method):
    """In the fit, in saving it, between blocks and while one is written; drawn at every run."""
    whole, moments = run(tmp_path / "whole", method), random.Random()
    for _ in range(5):
        assert "done" not in killed(tmp_path / "s", method, moments.randrange(1, 12))
    same(run(tmp_path / "s", method), whole)
    with xr.open_zarr(tmp_path / "s" / "scores", consolidated=False) as back:
        same(back, whole)
    memory = interrupted_scores.METHODS[method](
        LAYERED_BY_NAME["called-twice"].task(), modules=True
    )
    exact.close(whole.influence, memory.influence, 1e-10)


# ---------------------------------------------------------------- another run's store


def dot(task, path, **options):
    return bi.grad_dot(task, store=path, **options)


def test_other_settings_are_refused_with_both_values(tmp_path):
    task, path = LAYERED_BY_NAME["mlp-categorical"].task(), tmp_path / "s"
    bi.ekfac(task, fisher="empirical", damping=0.1, store=path)
    for options, there, here in (
        ({"damping": 0.2}, "'damping': 0.1", "'damping': 0.2"),
        ({"batch_size": 4}, "'batch_size': 256", "'batch_size': 4"),
        ({"measurement": "margin"}, "'measurement': 'loss'", "'measurement': 'margin'"),
    ):
        with pytest.raises(ValueError, match="holds scores of another run") as caught:
            bi.ekfac(task, **{"fisher": "empirical", "damping": 0.1, **options}, store=path)
        message = str(caught.value)
        assert there in message.split(" there, ")[0]
        assert here in message.split(" there, ")[1]
        assert "Choose another path, or run with the settings" in message
    with pytest.raises(ValueError, match="method: 'ekfac' there, 'grad_dot' here"):
        dot(task, path)


def test_another_task_is_refused(tmp_path, rng):
    x, y = torch.randn(5, 3, generator=rng), torch.randn(5, 2, generator=rng)
    model = nn.Linear(3, 2)

    def task(**options):
        data = {"train": (x, y), "query": (x, y), **options}
        return bi.Task(model, bi.Gaussian(), **data)

    dot(task(), tmp_path / "s")
    dot(task(), tmp_path / "s")
    for other in (
        task(train=(x + 1, y)), task(query=(x + 1, y)), task(train_ids=[4, 3, 2, 1, 0]),
        task(parameters="weight"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"another run: task: \{.*\} there, \{.*\} here"):
            dot(other, tmp_path / "s")
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(ValueError, match="'checkpoint'"):
        dot(task(), tmp_path / "s")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    task = LAYERED_BY_NAME["linear-gaussian"].task()
    with pytest.raises(ValueError, match=r"exists and is no score store\. Choose another path"):
        dot(task, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def variants():
    """Runs whose curvature a run with EK-FAC of the data's labels must not take over."""
    plain = LAYERED_BY_NAME["mlp-categorical"]
    return {
        "kfac": (bi.kfac, plain.task(), {"fisher": "empirical"}),
        "fisher": (bi.ekfac, plain.task(), {"fisher": "enumerated"}),
        "seed": (bi.ekfac, plain.task(), {"fisher": "sampled", "seed": 2}),
        "data": (bi.ekfac, shorter(plain.task()), {"fisher": "empirical"}),
    }


def shorter(task):
    x, y = task.train.batch(slice(0, 5))
    return bi.Task(
        task.module, task.likelihood, train=(x, y), query=task.query.batch(), parameters=".*"
    )


@pytest.mark.parametrize("other", variants())
def test_a_curvature_of_other_settings_is_not_taken_over(tmp_path, monkeypatch, other):
    """After a kill between the fit and the first block."""
    first = {"fisher": "sampled", "seed": 1} if other == "seed" else {"fisher": "empirical"}
    with monkeypatch.context() as broken:
        broken.setattr(_sinks.StoreSink, "__init__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bi.ekfac(
                LAYERED_BY_NAME["mlp-categorical"].task(),
                damping=0.1,
                store=tmp_path / "s",
                **first,
            )
    assert (tmp_path / "s" / "curvature" / "curvature.json").exists()
    method, task, options = variants()[other]
    expected = method(task, damping=0.1, **options)
    exact.close(
        method(task, damping=0.1, store=tmp_path / "s", **options).influence, expected.influence,
        1e-12,
    )  # fmt: skip


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_score_that_is_not_finite_stops_the_run(tmp_path):
    """Gradients are finite, their products overflow; good blocks before it stay."""
    x = torch.ones(4, 2)
    x[2:] = 1e25
    ids = ["a", "b", "c", "d"]
    task = bi.Task(
        nn.Linear(2, 1, bias=False), Steep(), train=(x, x[:, :1]), query=(x, x[:, :1]),
        train_ids=ids, query_ids=ids,
    )  # fmt: skip
    message = r"influence is not finite for 1 of 1 pairs, first query 'c' and train 'c'"
    for options in ({"store": tmp_path / "s"}, {"top_k": 1}):
        with pytest.raises(ValueError, match=message):
            bi.grad_dot(task, batch_size=1, query_batch_size=1, **options)
    with pytest.raises(ValueError, match=r"not finite for 4 of 16 pairs, first query 'c' and"):
        bi.grad_dot(task)
    assert len(json.loads((tmp_path / "s" / "progress.json").read_text())["done"]) == 10


class Steep:
    def loss(self, outputs, target):
        return outputs.sum(1)
