"""Arrays of any convention become the estimand, or are refused with the line that fixes them."""

import json
import re

import numpy as np
import pytest
import torch

from bayesinf.evaluation import lds
from bayesinf.scores import SignWarning, from_array, read_npy

SCORES = np.array([[3.0, -1.0, 0.5], [0.0, 2.0, -4.0]])
QUERY, TRAIN = ["q1", "q2"], [10, 30, 20]
IDS = {"query": QUERY, "train": TRAIN}


def read(matrix=SCORES, **options):
    return from_array(matrix, **{**IDS, "sign": "helpful", **options})


@pytest.mark.parametrize(
    ("sign", "measurement", "direction"),
    [
        ("helpful", "loss", -1),
        ("harmful", "loss", 1),
        ("helpful", "margin", 1),
        ("harmful", "margin", -1),
        ("lowers", "loss", -1),
        ("raises", "margin", 1),
        ("lowers", "temperature", -1),
        ("raises", "temperature", 1),
    ],
)
def test_sign_is_that_of_the_change_of_the_measurement(sign, measurement, direction):
    data = read(sign=sign, measurement=measurement)
    np.testing.assert_array_equal(data.influence.values, direction * SCORES)
    assert data.attrs["factor"] == direction
    assert data.attrs["measurement"] == measurement
    assert data.attrs["source_sign"].startswith("positive")
    assert data.attrs["estimand"] == "similarity"


def test_factor_makes_them_values_and_everything_is_recorded():
    attrs = {"n": 8, "seconds": {"fit": 2.0}}
    data = read(factor=0.125, method="mine", attrs=attrs)
    np.testing.assert_array_equal(data.influence.values, -SCORES / 8)
    assert data.influence.dtype == np.float64
    assert data.influence.dims == ("query", "train")
    assert data["query"].values.tolist() == QUERY
    assert data["train"].values.tolist() == TRAIN
    assert (data.attrs["estimand"], data.attrs["factor"], data.attrs["n"]) == (
        "influence",
        -0.125,
        8,
    )
    assert data.attrs["source_sign"] == "positive is helpful"
    assert data.attrs["source_orientation"] == "query × train"
    assert (data.attrs["source"], data.attrs["method"]) == ("array", "mine")
    assert json.loads(data.attrs["seconds"]) == {"fit": 2.0}


def test_either_orientation_and_any_kind_of_array():
    expected = read()
    turned = read(SCORES.T, dims=("train", "query"))
    np.testing.assert_array_equal(turned.influence, expected.influence)
    assert turned.attrs["source_orientation"] == "train × query"
    half = torch.tensor(SCORES, dtype=torch.bfloat16, requires_grad=True)
    np.testing.assert_array_equal(read(half).influence, expected.influence)
    np.testing.assert_array_equal(read(SCORES.tolist()).influence, expected.influence)
    np.testing.assert_array_equal(
        read(SCORES[:, :2].astype(int), train=[1, 2]).influence, -SCORES[:, :2]
    )


def test_the_caller_s_array_is_left_as_it_was():
    mine = SCORES.copy()
    read(mine).influence[:] = 0.0
    np.testing.assert_array_equal(mine, SCORES)


def test_positions_where_there_are_no_ids():
    data = read(query=None, train=None)
    assert data["query"].values.tolist() == [0, 1]
    assert data["train"].values.tolist() == [0, 1, 2]


def test_self_scores():
    data = from_array(
        np.array([1.0, 4.0]), query=None, train=["a", "b"], sign="helpful", factor=0.5
    )
    assert data.influence.dims == ("train",)
    np.testing.assert_array_equal(data.influence, [-0.5, -2.0])
    assert data.attrs["pairs"] == "self"
    assert data["train"].values.tolist() == ["a", "b"]


# ---------------------------------------------------------------------------- signs


def gram(rng, n=20):
    """Gradient products: with itself every example agrees."""
    gradients = rng.standard_normal((n, 6))
    return gradients @ gradients.T


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.mark.parametrize("ids", [list(range(20)), [f"x{i}" for i in range(20)]])
@pytest.mark.parametrize(
    ("measurement", "right", "wrong"),
    [
        ("loss", "helpful", "harmful"),
        ("loss", "lowers", "raises"),
        ("margin", "helpful", "harmful"),
        ("margin", "raises", "lowers"),
    ],
)
def test_wrong_sign_of_shared_examples(rng, ids, measurement, right, wrong):
    order = rng.permutation(20)
    matrix = gram(rng)[order]
    options = {"query": [ids[i] for i in order], "train": ids, "measurement": measurement}
    from_array(matrix, sign=right, **options)
    words = f"20 of 20 self-influences of the ids that .* share .* with sign='{right}'"
    with pytest.warns(SignWarning, match=words) as caught:
        from_array(matrix, sign=wrong, **options)
    assert caught[0].filename == __file__


def test_only_names_count_where_sets_differ(rng):
    """Numbers of a smaller set are positions, more often than not, of other examples."""
    matrix = gram(rng)[:5]
    numbers, names = np.arange(20), np.array([f"x{i}" for i in range(20)])
    from_array(matrix, query=numbers[:5], train=numbers, sign="harmful")
    from_array(matrix, query=numbers[:5].astype(str), train=numbers, sign="harmful")
    with pytest.warns(SignWarning, match="5 of 5"):
        from_array(matrix, query=names[:5], train=names, sign="harmful")


def test_given_self_influence_is_what_counts(rng):
    own = np.abs(rng.standard_normal(3)) + 0.1
    read(self_influence=own)
    with pytest.warns(SignWarning, match=r"3 of 3 self-influences of self_influence="):
        read(self_influence=own, sign="harmful")
    with pytest.warns(SignWarning, match=r"2 of 3 .*raise its own loss"):
        read(self_influence=torch.tensor([1.0, -1.0, -1.0]))
    read(self_influence=np.array([1.0, -1.0, 0.0]))  # no more than half
    read(self_influence=np.zeros(3), sign="harmful")
    read(self_influence=own, sign="raises", measurement="temperature")  # no sign is wrong


def test_wrong_sign_of_self_scores():
    with pytest.warns(SignWarning, match="2 of 2 self-influences given") as caught:
        from_array(np.array([1.0, 4.0]), query=None, train=None, sign="harmful")
    assert caught[0].filename == __file__


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"matrix": SCORES.T}, "3 rows and 2 columns, read as (query, train), and there are 2 "
         "query ids and 3 train ids: it is transposed. Read it with from_array(matrix, ..., "
         "dims=('train', 'query'))"),
        ({"dims": ("train", "query")}, "dims=('query', 'train')"),
        ({"matrix": SCORES.T, "query": None}, "it is transposed"),
        ({"query": ["a"]}, "2 rows and 3 columns, read as (query, train), and there are 1 query"),
        ({"train": range(4)}, "4 train ids. Usual cause: ids of another split"),
        ({"train": [1, 1, 2]}, "train_ids must be unique: 1 occurs 2 times"),
        ({"query": [0.5, 1.5]}, "query_ids must be 2 integers or strings"),
        ({"matrix": SCORES[None]}, "got shape (1, 2, 3). Scores of tokens add up"),
        ({"matrix": np.empty((0, 3))}, "got shape (0, 3)"),
        ({"matrix": SCORES + 1j}, "scores must be real numbers; got complex128"),
        ({"matrix": np.where(SCORES == 2, np.nan, SCORES)},
         "not finite for 1 of 6 pairs, first query 'q2' and train 30"),
        ({"sign": "positive"}, "sign must be one of ('helpful', 'harmful', 'lowers', 'raises')"),
        ({"measurement": "depth"}, "sign='helpful' says nothing about the measurement 'depth'"),
        ({"factor": -0.5}, "factor must be a positive number; got -0.5"),
        ({"factor": np.nan}, "factor must be a positive number"),
        ({"dims": ("query", "token")}, "dims must be ('query', 'train') or ('train', 'query')"),
        ({"self_influence": np.ones(2)}, "one number for each of the 3 training examples"),
        ({"matrix": SCORES[0]}, "have no queries. Leave query= and self_influence= out"),
        ({"matrix": SCORES[0], "query": None, "self_influence": SCORES[0]}, "have no queries"),
        ({"matrix": SCORES[0], "query": None, "train": [1]}, "3 self-influences and 1 train ids"),
    ],
)  # fmt: skip
def test_refusals(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        read(**options)


# ---------------------------------------------------------------------------- .npy


def test_npy(tmp_path):
    path = tmp_path / "theirs.npy"
    np.save(path, SCORES.T.astype(np.float32))
    data = read_npy(path, **IDS, sign="helpful", dims=("train", "query"), n=8)
    np.testing.assert_array_equal(data.influence, -SCORES / 8)
    assert (data.attrs["method"], data.attrs["source_file"]) == ("theirs", "theirs.npy")
    assert (data.attrs["source"], data.attrs["n"], data.attrs["estimand"]) == (
        "npy",
        8,
        "influence",
    )
    assert read_npy(path, sign="harmful", method="m").attrs["estimand"] == "similarity"


def test_npy_of_something_else(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}, None]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"objects\.npy holds no array of numbers .*unpickled"):
        read_npy(tmp_path / "objects.npy", sign="helpful")
    np.savez(tmp_path / "many.npz", a=SCORES)
    with pytest.raises(ValueError, match=r"an archive of arrays.*np\.load\(path\)\['name'\]"):
        read_npy(tmp_path / "many.npz", sign="helpful")
    np.save(tmp_path / "few.npy", SCORES)
    with pytest.raises(ValueError, match=r"n=2 examples are fewer than the 3 .*n=3"):
        read_npy(tmp_path / "few.npy", sign="helpful", n=2)
    with pytest.raises(ValueError, match="n must be the size of the training set; got 0"):
        read_npy(tmp_path / "few.npy", sign="helpful", n=0)


def test_a_judge_asks_for_the_measurement_that_they_were_made_for():
    with pytest.raises(ValueError, match="scores the measurement 'margin'"):
        lds(read(measurement="margin"), None)
