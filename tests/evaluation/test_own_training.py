"""Banks by a function of one's own: against the built-in recipes, and against plain arithmetic."""

import json
from pathlib import Path

import interrupted
import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import bayesinf as bi
from bayesinf.evaluation import SGDRecipe, random_subsets, retrain, retrain_with, train_one

N = 20
SUBSETS = random_subsets([f"t{i}" for i in range(N)], count=4, seed=0)
RECIPE = SGDRecipe(epochs=2, batch_size=4, lr=0.1)


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 2))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(N, 3, generator=g), torch.randint(0, 2, (N,), generator=g)


def by_recipe(kept: np.ndarray, seed: int) -> nn.Module:
    mask = np.isin(np.arange(N), kept)
    return train_one(
        make_model, bi.Categorical(), RECIPE, train=data(), seed=seed, subset=mask
    ).train()


def test_equal_to_the_built_in_training() -> None:
    """The same trainings, measured in eval mode: the same bank but for what is known of it."""
    common = {
        "subsets": SUBSETS,
        "seeds": [3, 5],
        "query": data(),
        "query_ids": range(100, 100 + N),
    }
    own = retrain_with(by_recipe, recipe=RECIPE.as_dict(), likelihood=bi.Categorical(), **common)
    built_in = retrain(make_model, bi.Categorical(), RECIPE, train=data(), **common)
    xr.testing.assert_allclose(own, built_in, rtol=1e-6)
    assert own["loss"].dims == ("subset", "seed", "query")
    assert own["train"].values.tolist() == [f"t{i}" for i in range(N)]
    for name in ("recipe", "likelihood", "subsets", "seeds", "n", "fraction", "subset_seed"):
        assert own.attrs[name] == built_in.attrs[name]
    assert own.attrs["subset_design"] == "random"


def mean_of(kept: np.ndarray, seed: int) -> dict[str, float]:
    """A "model" that is no module."""
    return {"mean": float(np.mean(kept)), "seed": float(seed)}


def measure(model: dict[str, float]) -> dict[str, object]:
    away = model["mean"] - np.arange(3.0) + 100 * model["seed"]
    return {"away": away, "square": torch.tensor(away, requires_grad=True) ** 2}


def test_a_measure_of_ones_own() -> None:
    bank = retrain_with(
        mean_of, measure=measure, measurements=("square", "away"), query_ids=["a", "b", "c"],
        recipe={}, subsets=SUBSETS, seeds=(1, 2),
    )  # fmt: skip
    means = np.array([np.mean(np.flatnonzero(row)) for row in SUBSETS.values])
    expected = means[:, None, None] + 100 * np.array([1, 2])[:, None] - np.arange(3)
    np.testing.assert_allclose(bank["away"], expected, rtol=1e-6)
    np.testing.assert_allclose(bank["square"], expected**2, rtol=1e-6)
    assert bank["query"].values.tolist() == ["a", "b", "c"]


def forgetful(kept: np.ndarray, seed: int) -> nn.Module:
    return nn.Linear(3, 2)


def test_the_global_generator_is_seeded_by_row_and_left_alone() -> None:
    before = torch.random.get_rng_state()
    common = {"recipe": {}, "likelihood": bi.Categorical(), "query": data(), "seeds": (1, 2)}
    whole = retrain_with(forgetful, subsets=SUBSETS, **common)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    part = retrain_with(forgetful, subsets=SUBSETS[2:3], **common)
    np.testing.assert_array_equal(part["loss"][0], whole["loss"][2])
    assert len(np.unique(whole["loss"][..., 0])) == 8


def test_workers_make_the_same_bank_and_report_what_fails(tmp_path: Path) -> None:
    """Two new processes, which take seconds to start."""
    alone = interrupted.bank()
    shared = interrupted.bank(tmp_path / "store", workers=2)
    xr.testing.assert_identical(shared, alone)
    with pytest.raises(RuntimeError, match=r"(?s)a worker process failed.*no 3 on purpose"):
        retrain_with(fails, recipe={}, measure=measure, measurements=("away", "square"),
                     query_ids=range(3), subsets=SUBSETS, seeds=(1, 2, 3), workers=2,
                     store=tmp_path / "failing")  # fmt: skip


def fails(kept: np.ndarray, seed: int) -> dict[str, float]:
    if seed == 3:
        raise OSError("no 3 on purpose")
    return mean_of(kept, seed)


def test_a_worker_that_dies(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"exit code 7 before its task was done"):
        retrain_with(dies, recipe={}, measure=measure, measurements=("away", "square"),
                     query_ids=range(3), subsets=SUBSETS, seeds=(1,), workers=2)  # fmt: skip


def dies(kept: np.ndarray, seed: int) -> None:
    import os

    os._exit(7)


def test_a_store_of_another_recipe_is_refused(tmp_path: Path) -> None:
    bank = interrupted.bank(tmp_path / "store", recipe={"lr": 0.1})
    assert json.loads(bank.attrs["recipe"]) == {"lr": 0.1}
    with pytest.raises(ValueError, match=r"another recipe .*0\.1.* there, .*0\.2.* now"):
        interrupted.bank(tmp_path / "store", recipe={"lr": 0.2})


GOOD = {"measure": measure, "measurements": ("away", "square"), "query_ids": range(3)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "say how models are measured, in one way"),
        ({**GOOD, "likelihood": bi.Categorical()}, "in one way"),
        ({**GOOD, "query_ids": None}, "the names and the ids of what it returns"),
        ({**GOOD, "measurements": ("away",)}, r"must return \['away'\].*got .*square"),
        ({**GOOD, "query_ids": range(4)}, r"of shape \(4,\) \(query_ids=\); got .*\(3,\)"),
        ({**GOOD, "seeds": (1, 1)}, "distinct integers"),
        ({**GOOD, "subsets": SUBSETS.values}, "must be a boolean DataArray"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrain_with(mean_of, **{"recipe": {}, "subsets": SUBSETS, "seeds": (1,), **options})
