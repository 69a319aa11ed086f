import numpy as np
import pytest

from bayesinf.evaluation import random_subsets


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
