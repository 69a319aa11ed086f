from collections.abc import Callable

import numpy as np
import pytest

from bayesinf.evaluation import (
    disjoint_subsets,
    leave_one_out,
    listed_subsets,
    random_subsets,
)


def test_subsets_have_one_size_and_carry_the_ids() -> None:
    masks = random_subsets(["a", "b", "c", "d", "e"], fraction=0.4, count=7, seed=3)
    assert masks.dims == ("subset", "train")
    assert masks.dtype == bool
    assert (masks.sum("train") == 2).all()
    assert masks["train"].values.tolist() == ["a", "b", "c", "d", "e"]
    assert masks.attrs == {"design": "random", "fraction": 0.4, "seed": 3, "stratified": False}


def test_every_example_and_pair_is_kept_as_often_as_chance_says() -> None:
    """z-tests at 5 standard errors over 12 + 66 frequencies: false alarm below 5e-5."""
    n, count, size = 12, 20_000, 4
    masks = random_subsets(n, fraction=1 / 3, count=count, seed=0).values.astype(float)
    together = masks.T @ masks / count
    one, two = size / n, size * (size - 1) / (n * (n - 1))
    upper = together[np.triu_indices(n, 1)]
    assert np.abs(np.diag(together) - one).max() < 5 * np.sqrt(one * (1 - one) / count)
    assert np.abs(upper - two).max() < 5 * np.sqrt(two * (1 - two) / count)


def test_the_seed_decides() -> None:
    def draw(seed: int) -> np.ndarray:
        return random_subsets(50, count=9, seed=seed).values

    assert np.array_equal(draw(0), draw(0))
    assert not (draw(0) == draw(1)).all(axis=1).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 10, "count": 0}, "count must be at least 1; got 0"),
        ({"train": 10, "count": 2, "fraction": 1.0}, "fraction=1.0 of 10 examples leaves 10"),
        ({"train": 10, "count": 2, "fraction": 50}, "a share between 0 and 1"),
        ({"train": ["a", "a"], "count": 2}, "train_ids must be unique"),
    ],
)
def test_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_subsets(**options, seed=0)


LABELS = np.array(["a"] * 5 + ["b"] * 13 + ["c"] * 2)


def test_stratified_halves_keep_the_share_of_each_class() -> None:
    """Quotas of 2.5, 6.5 and 1: rounded up or down, 10 in all; every example equally often.

    A z-test of 20 frequencies at 5 standard errors: false alarm below 2e-5.
    """
    count = 4000
    masks = random_subsets(20, fraction=0.5, count=count, seed=1, labels=LABELS)
    assert (masks.sum("train") == 10).all()
    kept = {c: masks.values[:, c == LABELS].sum(axis=1) for c in "abc"}
    assert {c: set(k.tolist()) for c, k in kept.items()} == {"a": {2, 3}, "b": {6, 7}, "c": {1}}
    often = masks.values.mean(axis=0)
    assert np.abs(often - 0.5).max() < 5 * 0.5 / np.sqrt(count)
    assert masks.attrs["stratified"]


def test_stratified_with_shares_that_are_no_whole_numbers() -> None:
    """30 classes of odd sizes, 37 % of all: the size is one, each class within one of its share."""
    labels = np.repeat(np.arange(30), np.arange(30) % 7 + 1)
    n = len(labels)
    masks = random_subsets(n, fraction=0.37, count=50, seed=2, labels=labels)
    size = round(0.37 * n)
    assert (masks.sum("train") == size).all()
    kept = masks.values.astype(int) @ (labels[:, None] == np.arange(30))
    assert (np.abs(kept - size / n * np.bincount(labels)) < 1).all()


@pytest.mark.parametrize("labels", [None, LABELS])
@pytest.mark.parametrize("parts", [2, 4, 7, 20])
def test_disjoint_parts(parts: int, labels: np.ndarray | None) -> None:
    rest = disjoint_subsets(20, parts=parts, seed=3, labels=labels)
    part = disjoint_subsets(20, parts=parts, seed=3, kept="part", labels=labels)
    np.testing.assert_array_equal(rest.values, ~part.values)
    assert (part.sum("subset") == 1).all()
    assert np.ptp(part.sum("train").values) == (20 % parts > 0)
    for name in "abc" if labels is not None else ():
        assert np.ptp(part.values[:, name == LABELS].sum(axis=1)) <= 1
    other = disjoint_subsets(20, parts=parts, seed=4, labels=labels)
    assert parts == 20 or not np.array_equal(other, rest)
    assert rest.attrs == {
        "design": "disjoint", "parts": parts, "kept": "rest", "seed": 3,
        "stratified": labels is not None,
    }  # fmt: skip


def test_parts_are_random() -> None:
    """Two examples share one of 5 parts of 4 with probability 3/19: 5 standard errors, 6e-7."""
    together = [disjoint_subsets(20, parts=5, seed=s, kept="part").values for s in range(2000)]
    share = np.mean([(m[:, 0] & m[:, 1]).any() for m in together])
    assert abs(share - 3 / 19) < 5 * np.sqrt(3 / 19 * 16 / 19 / 2000)


def test_leave_one_out() -> None:
    masks = leave_one_out(["x", "y", "z"])
    np.testing.assert_array_equal(masks, [[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]])
    assert masks.dtype == bool
    assert masks.attrs == {"design": "leave-one-out"}
    chosen = leave_one_out(4, [3, 1])
    np.testing.assert_array_equal(chosen, [[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 1, 1]])


def test_lists_of_what_is_kept_or_left_out() -> None:
    lists = [[30, 10], [], [20]]
    kept = listed_subsets([10, 20, 30], lists, kept=True)
    np.testing.assert_array_equal(kept, [[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(listed_subsets([10, 20, 30], lists, kept=False), ~kept)
    assert kept["train"].values.tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: random_subsets(5, count=2, seed=0, labels=[1, 2]), "one for each of the 5"),
        (lambda: disjoint_subsets(5, parts=1, seed=0), "between 2 and the number of examples 5"),
        (lambda: disjoint_subsets(5, parts=6, seed=0), "got 6"),
        (lambda: disjoint_subsets(5, parts=2, seed=0, kept="all"), r"one of \('rest', 'part'\)"),
        (lambda: leave_one_out(5, [5]), r"examples has unknown ids \[5\]"),
        (lambda: leave_one_out(5, [1, 1]), "an id more than once"),
        (lambda: listed_subsets(5, [[0], [1, 9]], kept=True), r"subset 1 has unknown ids \[9\]"),
        (lambda: listed_subsets(5, [], kept=True), "holds no subset"),
    ],
)
def test_designs_that_are_refused(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
