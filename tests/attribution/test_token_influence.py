"""Scores of tokens: sums, parts, extremes and stores of the one matrix; groups by label."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr
import zarr

import bayesinf as bi
from bayesinf import _layout
from bayesinf._covariance import cross_covariance
from bayesinf.attribution import _covariance_scores
from tests.language_task import run

pytestmark = pytest.mark.filterwarnings("ignore::bayesinf.ConvergenceWarning")
SCALE = 20.0 / 8
VARIABLES = ("influence", "mcse", "influence_within")


@pytest.fixture(scope="module")
def traces():
    return run(tokens="both", measurements=["loss", "margin"])


@pytest.fixture(scope="module")
def whole(traces):
    return bi.bif(traces, tokens="both", center="grand")


def same(one: xr.Dataset, other: xr.Dataset, rtol: float = 1e-10) -> None:
    for name in VARIABLES:
        assert one[name].dims == other[name].dims
        bound = rtol * float(np.abs(other[name]).max())
        np.testing.assert_allclose(one[name], other[name], rtol=rtol, atol=bound)
    assert set(one.coords) == set(other.coords)
    for name in one.coords:
        assert one[name].values.tolist() == other[name].values.tolist()


@pytest.mark.parametrize("tokens", ["train", "query", "both"])
@pytest.mark.parametrize("center", ["grand", "chain"])
@pytest.mark.parametrize("normalize", [None, "correlation"])
def test_scores_are_covariances_of_token_losses(traces, tokens, center, normalize):
    scores = bi.bif(traces, tokens=tokens, center=center, normalize=normalize)
    x, y = (traces.values(split, tokens=tokens in (split, "both")) for split in ("query", "train"))
    exact = cross_covariance(
        x.values, y.values, center=center, correlation=normalize is not None, batches_per_chain=3
    )
    scale = SCALE if normalize is None else 1.0
    assert scores["influence"].dims == (x.dims[2], y.dims[2])
    np.testing.assert_allclose(scores["influence"], -scale * exact.value, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(scores["mcse"], scale * exact.mcse, rtol=1e-9)
    np.testing.assert_allclose(
        scores["influence_within"], -scale * exact.within, rtol=1e-7, atol=1e-13
    )
    assert scores.attrs["mcse_df"] == exact.freedom
    for side in (x, y):
        for name in set(side.coords) - {"chain", "draw"}:
            assert scores[name].values.tolist() == side[name].values.tolist()


def test_tokens_sum_to_sequences(traces, whole):
    """To the rounding of float64."""
    sequences = bi.bif(traces, center="grand")
    for name in ("influence", "influence_within"):
        summed = whole[name].groupby("train").sum().groupby("query").sum()
        got = summed.sel(query=sequences["query"].values, train=sequences["train"].values)
        expected = sequences[name].values
        np.testing.assert_allclose(
            got.transpose("query", "train"), expected, rtol=1e-10, atol=1e-12 * abs(expected).max()
        )


@pytest.mark.parametrize("tokens", [None, "train", "query", "both"])
def test_one_pair_is_a_part_of_the_whole(traces, tokens):
    every = bi.bif(traces, tokens=tokens, center="grand")
    pair = bi.bif(traces, tokens=tokens, query=1, train="é3", center="grand")
    place = {}
    for split, key in (("query", 1), ("train", "é3")):
        place[every[split].dims[0]] = np.flatnonzero(every[split].values == key)
    same(pair, every.isel(place))
    several = bi.bif(traces, tokens=tokens, train=["é3", "é0"], center="grand")
    order = np.concatenate([np.flatnonzero(every["train"].values == k) for k in ("é3", "é0")])
    same(several, every.isel({every["train"].dims[0]: order}))


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch, traces):
    """Chunks of other columns are gone: a pair does not miss them."""
    monkeypatch.setattr(_layout, "_CHUNK_VALUES", 32)
    stored = run(tmp_path / "t.zarr", tokens="both", measurements=["loss", "margin"])
    array = zarr.open_array(tmp_path / "t.zarr/train_token/loss", mode="r+")
    assert array.chunks == (1, 4, 8)
    first = int(np.flatnonzero(stored.values("train", tokens=True)["train"].values == "é3")[0])
    array[:, :, : first // 8 * 8] = np.nan
    assert first >= 8
    with_holes = bi.bif(stored, tokens="train", train="é3", center="chain")
    expected = bi.bif(traces, tokens="train", train="é3", center="chain")
    np.testing.assert_array_equal(with_holes["influence"], expected["influence"])


def blocks(monkeypatch, rows: int, columns: int) -> None:
    monkeypatch.setattr(_covariance_scores, "ROWS", rows)
    monkeypatch.setattr(_covariance_scores, "COLUMNS", columns)
    monkeypatch.setattr(_covariance_scores, "_BLOCK_VALUES", 1)


def test_blocks_change_nothing(monkeypatch, traces, whole):
    blocks(monkeypatch, 3, 5)
    parts = bi.bif(traces, tokens="both", center="grand")
    same(parts, whole)
    assert parts.attrs["relative_mcse"] == pytest.approx(whole.attrs["relative_mcse"], rel=1e-9)


@pytest.mark.parametrize("size", [(3, 5), (100, 100)])
def test_extremes(monkeypatch, traces, whole, size):
    blocks(monkeypatch, *size)
    top = bi.bif(traces, tokens="both", center="grand", top_k=4)
    assert top["influence"].dims == ("query_token", "side", "rank")
    assert top.attrs["relative_mcse"] == pytest.approx(whole.attrs["relative_mcse"], rel=1e-9)
    values = whole["influence"].values
    for side, order in (("helpful", values.argsort(1)), ("harmful", (-values).argsort(1))):
        chosen = order[:, :4]
        own = top.sel(side=side)
        for name in VARIABLES:
            expected = np.take_along_axis(whole[name].values, chosen, axis=1)
            np.testing.assert_allclose(own[name], expected, rtol=1e-9, atol=1e-13)
        for name in ("train", "train_position", "train_token_id"):
            assert own[name].values.tolist() == whole[name].values[chosen].tolist()


def test_a_store_holds_what_memory_does_and_goes_on(tmp_path, monkeypatch, traces, whole):
    blocks(monkeypatch, 3, 5)
    original, count = _covariance_scores.StoreSink.write, [0]

    def write(self, *args):
        count[0] += 1
        if count[0] == 6:
            raise KeyboardInterrupt
        original(self, *args)

    with monkeypatch.context() as broken:
        broken.setattr(_covariance_scores.StoreSink, "write", write)
        with pytest.raises(KeyboardInterrupt):
            bi.bif(traces, tokens="both", center="grand", store=tmp_path / "s")
    assert len(json.loads((tmp_path / "s/progress.json").read_text())["done"]) == 5
    stored = bi.bif(traces, tokens="both", center="grand", store=tmp_path / "s")
    assert stored["influence"].dtype == np.float32
    same(stored.load(), whole, rtol=1e-6)
    assert stored.attrs["relative_mcse"] == pytest.approx(whole.attrs["relative_mcse"], rel=1e-5)
    assert stored.attrs["mcse_df"] == whole.attrs["mcse_df"]
    with pytest.raises(ValueError, match=r"another run: .*tokens: 'both' there, 'train' here"):
        bi.bif(traces, tokens="train", center="grand", store=tmp_path / "s")


def test_replicates_of_tokens(traces):
    scores = bi.bif(traces, tokens="train", center="grand", replicates=True)
    assert scores["influence_replicate"].dims == ("batch", "query", "train_token")
    sums = scores["influence_replicate"].groupby("train").sum()
    sequences = bi.bif(traces, center="grand", replicates=True)
    np.testing.assert_allclose(
        sums.sel(train=sequences["train"].values), sequences["influence_replicate"], rtol=1e-8,
        atol=1e-12,
    )  # fmt: skip
    assert float(scores["batch_share"].sum()) == pytest.approx(1)


def test_refusals(traces):
    plain = run(draws=9)
    with pytest.raises(KeyError, match=r"train tokens were not recorded.*tokens='train'"):
        bi.bif(plain, tokens="train")
    for options, kind, words in (
        ({"tokens": "all"}, ValueError, "must be None, 'train', 'query' or 'both'; got 'all'"),
        ({"query": 9}, KeyError, "query=9 names no observed example: 9 is unknown"),
        ({"train": ["é1", "x"]}, KeyError, "'x' is unknown; ids run from 'é0' to 'é7'"),
        ({"train": []}, KeyError, "names no observed example"),
        ({"top_k": 0}, ValueError, "top_k must be a positive integer"),
        ({"top_k": 3, "store": "x"}, ValueError, "top_k and store exclude each other"),
        ({"replicates": True, "store": "x"}, ValueError, "store and replicates exclude"),
        ({"tokens": "query", "measurement": "margin"}, KeyError, "one number an example"),
    ):
        with pytest.raises(kind, match=words):
            bi.bif(traces, center="grand", **options)


# ---------------------------------------------------------------- groups


def labels(traces, values=None):
    """One label a token: whether it stands early, in the middle, or (no group) late."""
    tokens = traces.values("train", tokens=True)[0, 0].drop_vars(["chain", "draw"])
    position = tokens["train_position"]
    names = np.where(position < 3, "early", np.where(position < 5, "middle", ""))
    return tokens.copy(data=np.zeros(tokens.size)).astype(str).copy(data=names)


def test_groups_by_label(traces, whole):
    named = labels(traces)
    result = bi.group_influence(traces, named, center="grand")
    assert result["group"].values.tolist() == ["early", "middle"]
    single = bi.bif(traces, tokens="train", center="grand")["influence"]
    x = traces.values("query").values
    y = traces.values("train", tokens=True).values.astype(np.float64)
    for name in ("early", "middle"):
        inside = named.values == name
        own = result.sel(group=name)
        np.testing.assert_allclose(
            own["influence"], single.values[:, inside].sum(1), rtol=1e-9, atol=1e-13
        )
        exact = cross_covariance(x, y[:, :, inside].sum(2, keepdims=True), batches_per_chain=3)
        np.testing.assert_allclose(own["mcse"], SCALE * exact.mcse[:, 0], rtol=1e-9)
    for missing in (np.nan, None):
        other = np.where(named.values == "", missing, np.where(named.values == "early", 1, 2))
        kind = float if missing is np.nan else object
        again = bi.group_influence(traces, named.copy(data=other.astype(kind)), center="grand")
        np.testing.assert_array_equal(again["influence"], result["influence"])


def test_groups_of_queries(traces, whole):
    named = labels(traces)
    tokens = traces.values("query", tokens=True)
    odd = xr.DataArray((tokens["query_position"].values % 2).astype(int), dims="query_token")
    result = bi.group_influence(traces, named, query_groups=odd, center="grand")
    assert result["influence"].dims == ("query_group", "group")
    for q in (0, 1):
        rows = whole["influence"].values[odd.values == q]
        for name in ("early", "middle"):
            np.testing.assert_allclose(
                result["influence"].sel(query_group=q, group=name),
                rows[:, named.values == name].sum(),
                rtol=1e-8,
            )
    pair = bi.group_influence(
        traces, {"a": ["é1", "é3"]}, query_groups={"b": [0, 2]}, center="grand"
    )
    summed = bi.bif(traces, query=[0, 2], train=["é1", "é3"], center="grand")["influence"].sum()
    np.testing.assert_allclose(pair["influence"].item(), float(summed), rtol=1e-9)


def test_groups_of_documents_are_those_of_their_ids(traces):
    documents = xr.DataArray(
        ["a", "b", "", "a"], dims="train", coords={"train": ["é3", "é1", "é2", "é0"]}
    )
    one = bi.group_influence(traces, documents, center="grand")
    other = bi.group_influence(traces, {"a": ["é0", "é3"], "b": ["é1"]}, center="grand")
    for name in VARIABLES:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-12, atol=1e-15)


def test_labels_that_do_not_fit(traces):
    named = labels(traces)
    with pytest.raises(ValueError, match=r"must be those of the store's 27 tokens.*got 26"):
        bi.group_influence(traces, named[1:])
    with pytest.raises(ValueError, match="or other coordinates"):
        bi.group_influence(traces, named[::-1])
    with pytest.raises(KeyError, match="train tokens were not recorded"):
        bi.group_influence(run(draws=9), named)
