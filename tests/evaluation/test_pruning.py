"""Networks trained on what a value keeps, on a model whose retrainings are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import bayesinf as bi
from bayesinf.evaluation import pruning_curve
from bayesinf.evaluation._replicates import mean_over_queries
from tests.evaluation.mean_model import RECIPE, MeanModel, N, SignLikelihood, as_data, data

FRACTIONS = [0.25, 0.5]


def make(values: np.ndarray, **attrs: Any) -> xr.Dataset:
    return xr.Dataset({"value": ("train", values)}, {"train": np.arange(N)}, attrs)


def judge(values: Any, **options: Any) -> xr.Dataset:
    train, query = data()
    settings = {"fractions": FRACTIONS, "seeds": [0, 1]} | options
    return pruning_curve(
        values, MeanModel, SignLikelihood(), RECIPE, train=as_data(train), query=as_data(query),
        **settings,
    )  # fmt: skip


def test_outcomes_are_those_of_the_mean_of_what_is_kept() -> None:
    train, query = data()
    values = {"target": make(train, seconds=2.0), "tied": make(np.round(train))}
    for keep, sign in (("high", -1.0), ("low", 1.0)):
        table = judge(values, keep=keep)
        assert table["scorer"].values.tolist() == ["target", "tied", "random"]
        for name, own in values.items():
            order = np.argsort(sign * own["value"].values, kind="stable")  # ties: the earlier first
            for f in FRACTIONS:
                theta = train[order[: round(f * N)]].mean()
                loss = 0.5 * (theta - query) ** 2
                row = table.sel(scorer=name, fraction=f)
                assert float(row["loss"]) == pytest.approx(loss.mean(), rel=1e-4)
                error = loss.std(ddof=1) / np.sqrt(len(query))
                assert float(row["loss_standard_error"]) == pytest.approx(error, rel=1e-3)
                assert float(row["accuracy"]) == ((theta > 0) == (query > 0)).mean()
                random = table.sel(scorer="random", fraction=f)
                excess = float(row["loss"] - random["loss"])
                assert float(row["loss_excess"]) == pytest.approx(excess, abs=1e-6)
        full = 0.5 * (train.mean() - query) ** 2
        assert float(table["full_loss"]) == pytest.approx(full.mean(), rel=1e-4)
        assert (table["loss_excess"].sel(scorer="random") == 0).all()
        np.testing.assert_array_equal(table["seconds"].values, [2.0, np.nan, np.nan])
        assert table.attrs["keep"] == keep


def test_random_subsets_are_replicates_and_order_of_ids_does_not_matter() -> None:
    """The noise of random subsets is common to the test examples, and enters the interval."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 3, generator=g), torch.arange(30) % 3
    ids = [f"é{i}" for i in range(30)]
    values = xr.Dataset({"influence": ("train", -np.arange(30.0))}, {"train": ids})
    options: dict[str, Any] = {
        "train": (x, y), "query": (x[:9] + 0.1, y[:9]), "fractions": [0.4], "seeds": [0, 1, 2],
        "random": 4, "train_ids": ids,
    }  # fmt: skip
    recipe = bi.SGDRecipe(epochs=3, batch_size=6, lr=0.3)

    def make_model() -> nn.Module:
        return nn.Linear(3, 3)

    table = pruning_curve({"a": values}, make_model, bi.Categorical(), recipe, **options)
    rng = np.random.default_rng(0)
    masks = np.ones((4, 30), dtype=bool)
    for row in masks:
        row[rng.permutation(30)[:18]] = False
    subsets = xr.DataArray(masks, {"train": ids}, ("subset", "train"))
    bank = bi.retrain(
        make_model, bi.Categorical(), recipe, train=(x, y), query=options["query"],
        subsets=subsets, seeds=[0, 1, 2],
    )  # fmt: skip
    outcomes = bank["loss"].transpose("subset", "seed", "query").values.astype(np.float64)
    estimate = mean_over_queries([outcomes.mean(axis=1)], 0.95)
    found = table.sel(scorer="random", fraction=0.4)
    assert float(found["loss"]) == pytest.approx(estimate.mean, rel=1e-6)
    assert float(found["loss_upper"]) == pytest.approx(estimate.upper, rel=1e-5)
    shuffled = values.isel(train=np.random.default_rng(1).permutation(30))
    again = pruning_curve({"a": shuffled}, make_model, bi.Categorical(), recipe, **options)
    xr.testing.assert_identical(again["loss"], table["loss"])


def test_refusals() -> None:
    own = make(data()[0])
    with pytest.raises(ValueError, match=r"fractions must be shares between 0 and 1; got \[1.0\]"):
        judge(own, fractions=[1.0])
    with pytest.raises(ValueError, match="keep must be one of"):
        judge(own, keep="hardest")
    with pytest.raises(ValueError, match="'random', which is the control"):
        judge({"random": own})
    with pytest.raises(ValueError, match="random=1"):
        judge(own, random=1)
    with pytest.raises(ValueError, match="keeps no example"):
        judge(own, fractions=[0.01])
    with pytest.raises(ValueError, match="values 20 training examples where 24 are wanted"):
        judge(own.isel(train=slice(20)))
