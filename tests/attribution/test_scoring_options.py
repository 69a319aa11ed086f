"""What all classical methods share: extremes, approximations of queries, and what is refused."""

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import bayesinf as bi
from bayesinf import fit_curvature
from bayesinf.attribution import _pairwise
from bayesinf.attribution._registry import METHODS
from tests import exact
from tests.layered_cases import LAYERED_BY_NAME

# ---------------------------------------------------------------- top k


@pytest.mark.parametrize("batch", [1, 3, 99])
@pytest.mark.parametrize("k", [1, 3, 8, 50])
def test_the_extremes_of_every_query(k, batch):
    task = LAYERED_BY_NAME["mlp-categorical"].task(
        train_ids=[f"t{i}" for i in range(12)], query_ids=[7, 5, 3, 2, 1]
    )
    options = {"fisher": "empirical", "damping": 0.1}
    whole = bi.ekfac(task, **options).influence.load()
    top = bi.ekfac(task, **options, top_k=k, batch_size=batch, query_batch_size=batch)
    assert top.influence.dims == ("query", "side", "rank")
    assert top.side.values.tolist() == ["helpful", "harmful"]
    assert top["query"].values.tolist() == [7, 5, 3, 2, 1]
    assert top.sizes["rank"] == min(k, 12)
    assert top.attrs["top_k"] == min(k, 12)
    order = np.argsort(whole.values, axis=1)
    for q, ranked in enumerate(order):
        for side, expected in (("helpful", ranked[:k]), ("harmful", ranked[::-1][:k])):
            row = top.influence[q].sel(side=side)
            exact.close(row, whole.values[q, expected], 1e-12)
            assert row.train.values.tolist() == [f"t{i}" for i in expected]


@pytest.mark.parametrize("batch", [1, 3, 99])
def test_the_extremes_of_tokens(batch, tmp_path):
    task = LAYERED_BY_NAME["decoder-tied"].task()
    options = {"query_tokens": "loss", "train_tokens": "position"}
    whole = bi.grad_dot(task, **options).load()
    top = bi.grad_dot(task, **options, top_k=2, batch_size=batch, query_batch_size=batch)
    assert top.influence.dims == ("query_token", "side", "rank")
    order = np.argsort(whole.influence.values, axis=1)
    for side, expected in (("helpful", order[:, :2]), ("harmful", order[:, ::-1][:, :2])):
        part = top.sel(side=side)
        values = np.take_along_axis(whole.influence.values, expected, axis=1)
        exact.close(part.influence, values, 1e-12)
        for name in ("train", "train_position", "train_token_id"):
            np.testing.assert_array_equal(part[name], whole[name].values[expected])
        for name in ("query", "query_position", "query_token_id"):
            np.testing.assert_array_equal(part[name], whole[name])
    top.to_zarr(tmp_path / "top", zarr_format=3, consolidated=False)
    with xr.open_zarr(tmp_path / "top", consolidated=False) as back:
        xr.testing.assert_identical(back.load(), top)


@pytest.mark.parametrize("batch", [1, 2, 99])
def test_ties_go_to_the_first(batch):
    """Four examples twice over; equal scores are in the order of the examples on both sides."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    task = bi.Task(
        nn.Linear(2, 1, bias=False).double(), Slope(), train=(x, x), query=(x[:1], x[:1])
    )
    top = bi.grad_dot(task, top_k=4, batch_size=batch)
    assert top.train.values[0].tolist() == [[0, 2, 1, 3], [1, 3, 0, 2]]
    assert top.influence.values[0].tolist() == [[-1, -1, 0, 0], [0, 0, -1, -1]]


class Slope:
    def loss(self, outputs, target):
        return outputs.sum(1)


# ---------------------------------------------------------------- low rank


def preconditioned(task, curvature, damping):
    """Query gradients after preconditioning, ``(queries, P, M)`` by layer."""
    g = exact.gradients(task, "query")
    rows = curvature.inverse(damping).apply(g)
    return {
        layer: rows[:, exact.index(task, layer)].view(len(g), *layer.shape)
        for layer in curvature.layers
    }


def truncated(matrices, rank):
    u, s, v = np.linalg.svd(matrices.numpy(), full_matrices=False)
    s[..., rank:] = 0
    return torch.from_numpy((u * s[..., None, :]) @ v)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", ["mlp-categorical", "cnn", "decoder-tied", "raw"])
def test_low_rank_query_gradients_and_their_error(name, rank):
    task = LAYERED_BY_NAME[name].task()
    curvature = fit_curvature(task, fisher="empirical")
    scores = bi.ekfac(task, curvature=curvature, damping=0.1, query_rank=rank)
    right = exact.gradients(task)
    expected = lost = total = 0.0
    for layer, matrices in preconditioned(task, curvature, 0.1).items():
        kept = truncated(matrices, rank) if layer.kind != "embedding" else matrices
        lost = lost + (kept - matrices).square().sum()
        total = total + matrices.square().sum()
        part = right[:, exact.index(task, layer)]
        expected = expected - kept.flatten(1) @ part.T / task.n
    exact.close(scores.influence, expected, 1e-9)
    error = float((lost / total).sqrt())
    assert scores.attrs["query_rank_error"] == pytest.approx(error, rel=1e-8)
    assert error > 1e-3
    assert scores.attrs["query_rank"] == rank


def test_full_rank_is_exact():
    task = LAYERED_BY_NAME["cnn"].task()
    options = {"fisher": "empirical", "damping": 0.1}
    scores = bi.ekfac(task, **options, query_rank=4)
    exact.same(scores.influence, bi.ekfac(task, **options).influence)
    assert scores.attrs["query_rank_error"] == 0


@pytest.mark.parametrize("kind", ["loss", "position"])
@pytest.mark.parametrize("name", ["decoder-tied", "decoder-left"])
def test_low_rank_gradients_of_tokens(name, kind):
    """Rows of tokens, of embeddings beside matrices; at full rank nothing is lost."""
    task = LAYERED_BY_NAME[name].task()
    for run in (
        lambda **o: bi.ekfac(task, fisher="empirical", damping=0.1, query_tokens=kind, **o),
        lambda **o: bi.gauss_newton(task, damping=0.1, query_tokens=kind, **o),
    ):
        whole, rank = run().influence, 4
        exact.close(run(query_rank=rank).influence, whole, 1e-10)
        low = run(query_rank=1)
        assert 1e-3 < low.attrs["query_rank_error"] < 1
        assert low.influence.shape == whole.shape
        assert 1e-4 < float(abs(low.influence - whole).max() / abs(whole).max()) < 1


def test_the_error_is_that_of_the_worst_block():
    task = LAYERED_BY_NAME["cnn"].task()
    whole = bi.grad_dot(task, query_rank=1).attrs["query_rank_error"]
    worst = bi.grad_dot(task, query_rank=1, query_batch_size=1).attrs["query_rank_error"]
    assert worst > whole > 0


# ---------------------------------------------------------------- stored precision


def test_bfloat16_query_gradients_and_their_error():
    task = LAYERED_BY_NAME["cnn"].task()
    curvature = fit_curvature(task, fisher="empirical")
    scores = bi.ekfac(task, curvature=curvature, damping=0.1, gradient_dtype=torch.bfloat16)
    right = exact.gradients(task)
    expected = lost = total = 0.0
    for layer, matrices in preconditioned(task, curvature, 0.1).items():
        kept = matrices.bfloat16().double()
        lost = lost + (kept - matrices).square().sum()
        total = total + matrices.square().sum()
        expected = expected - kept.flatten(1) @ right[:, exact.index(task, layer)].T / task.n
    exact.close(scores.influence, expected, 1e-9)  # products are in float64
    assert scores.influence.dtype == np.float64
    error = float((lost / total).sqrt())
    assert 1e-4 < error < 2**-8
    assert scores.attrs["gradient_dtype_error"] == pytest.approx(error, rel=1e-6)
    assert scores.attrs["gradient_dtype"] == "torch.bfloat16"


@pytest.mark.parametrize("name", ["decoder-tied", "conv-groups", "words"])
@pytest.mark.parametrize("method", [bi.grad_dot, bi.grad_cos])
def test_bfloat16_with_every_kind_of_row(name, method):
    task = LAYERED_BY_NAME[name].task()
    whole = method(task).influence.values
    scores = method(task, gradient_dtype=torch.bfloat16, query_rank=2)
    assert {"gradient_dtype_error", "query_rank_error"} <= set(scores.attrs)
    relative = np.abs(method(task, gradient_dtype=torch.bfloat16).influence - whole).max()
    assert 0 < float(relative) < 2**-6 * np.abs(whole).max()


def test_a_zero_query_has_no_error():
    x = torch.eye(2, dtype=torch.float64)
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        y = model(x)
    task = bi.Task(model, bi.Gaussian(), train=(x, y + 1), query=(x, y))
    scores = bi.grad_dot(task, gradient_dtype=torch.float32)
    assert scores.attrs["gradient_dtype_error"] == 0


# ---------------------------------------------------------------- sizes


def test_large_queries_come_in_blocks(monkeypatch):
    """As many as fit; never more than asked for."""
    task = LAYERED_BY_NAME["cnn"].task()
    sizes = []
    original = _pairwise._gradients

    def noted(source, split, where, *rest):
        sizes.append((split, where.stop - where.start))
        return original(source, split, where, *rest)

    monkeypatch.setattr(_pairwise, "_gradients", noted)
    bi.grad_dot(task)
    assert sizes == [("query", 5), ("train", 12)]
    sizes.clear()
    monkeypatch.setattr(_pairwise, "_QUERY_ELEMENTS", 3 * task.dimension)
    bi.grad_dot(task, batch_size=7)
    assert sizes == [("query", 3), ("train", 7), ("train", 5), ("query", 2), ("train", 7),
                     ("train", 5)]  # fmt: skip
    sizes.clear()
    bi.grad_dot(task, query_batch_size=1)
    assert [s for s in sizes if s[0] == "query"] == [("query", 1)] * 5


# ---------------------------------------------------------------- refusals


CLASSICAL = {
    "ekfac": {"fisher": "empirical", "damping": 0.1},
    "kfac": {"fisher": "empirical", "damping": 0.1},
    "gauss_newton": {"damping": 0.1},
    "hessian": {"damping": 10.0},
    "grad_dot": {},
    "grad_cos": {},
}

BAD = [
    ({"batch_size": 0}, "batch_size must be a positive integer; got 0"),
    ({"batch_size": 2.5}, r"batch_size must be a positive integer; got 2\.5"),
    ({"batch_size": None}, "batch_size must be a positive integer; got None"),
    ({"batch_size": True}, "batch_size must be a positive integer; got True"),
    ({"query_batch_size": -1}, "query_batch_size must be a positive integer; got -1"),
    ({"query_rank": 0}, "query_rank must be a positive integer; got 0"),
    ({"top_k": 1.0}, r"top_k must be a positive integer; got 1\.0"),
    ({"pairs": "own"}, "pairs must be 'all' or 'self'; got 'own'"),
    ({"train_tokens": "word"}, "train_tokens must be None, 'position' or 'loss'; got 'word'"),
    ({"query_tokens": True}, "query_tokens must be None, 'position' or 'loss'; got True"),
    ({"gradient_dtype": "bfloat16"}, r"gradient_dtype must be a floating dtype .*got 'bfloat16'"),
    ({"gradient_dtype": torch.int8}, r"gradient_dtype must be a floating dtype .*got torch\.int8"),
    (
        {"query_tokens": "loss", "measurement": "margin"},
        r"query_tokens= split the loss; got measurement='margin'",
    ),
    (
        {"pairs": "self", "modules": True, "top_k": 3},
        r"pairs='self' gives one number an example; drop \['modules', 'top_k'\]",
    ),
    ({"pairs": "self", "store": "x"}, r"one number an example; drop \['store'\]"),
    ({"pairs": "self", "train_tokens": "loss"}, r"drop \['train_tokens'\]"),
    ({"top_k": 3, "modules": True, "store": "x"}, r"no whole matrix; drop \['modules', 'store'\]"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda v: str(v)[:30])
def test_bad_options(options, message):
    task = LAYERED_BY_NAME["linear-gaussian"].task()
    for name, needed in CLASSICAL.items():
        with pytest.raises(ValueError, match=message):
            METHODS[name].function(task, **needed, **options)


@pytest.mark.parametrize("name", CLASSICAL)
def test_unknown_options(name):
    task = LAYERED_BY_NAME["linear-gaussian"].task()
    message = r"unknown option \['rank', 'topk'\]; options of every method are \['batch_size', "
    with pytest.raises(TypeError, match=message):
        METHODS[name].function(task, **CLASSICAL[name], topk=3, rank=2)


def test_methods_refuse_what_find_layers_refuses():
    class Batchwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(x - x.mean(0))

    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    task = bi.Task(Batchwise(), bi.Gaussian(), train=(x, x[:, :2]), query=(x, x[:, :2]))
    for name, needed in CLASSICAL.items():
        with pytest.raises(
            ValueError, match="The loss of an example depends on the other examples"
        ):
            METHODS[name].function(task, **needed)
