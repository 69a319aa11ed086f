"""Removal of the most helpful, on a model whose retrainings are known in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import bayesinf as bi
from bayesinf.evaluation import RemovalWarning, SGDRecipe, _masks, removal_counterfactual
from bayesinf.evaluation import _counterfactual as module
from bayesinf.evaluation._replicates import mean_over_queries, share_over_queries
from tests.evaluation.mean_model import (
    RECIPE,
    MeanModel,
    N,
    Q,
    SignLikelihood,
    as_data,
    data,
    exact,
    influence,
)

COUNTS = [1, 3, 8]


def judge(scores: Any, **options: Any) -> xr.Dataset:
    train, query = data()
    settings = {"counts": COUNTS, "seeds": [0, 1], "train": as_data(train), "query": as_data(query)}
    settings |= options
    return removal_counterfactual(scores, MeanModel, SignLikelihood(), RECIPE, **settings)


def mean_without(removed: np.ndarray) -> float:
    return float(np.delete(data()[0], removed).mean())


def test_changes_are_those_of_the_mean_of_what_is_left() -> None:
    table = judge({"exact": exact(), "flipped sign": exact(influence=-influence())})
    assert table["scorer"].values.tolist() == ["exact", "flipped sign", "random"]
    train, query = data()
    for q in range(Q):
        order = np.argsort(influence()[q])
        base = 0.5 * (train.mean() - query[q]) ** 2
        for name, best in (("exact", order), ("flipped sign", order[::-1])):
            for k in COUNTS:
                expected = 0.5 * (mean_without(best[:k]) - query[q]) ** 2 - base
                found = float(table["change_query"].sel(scorer=name, count=k, query=q))
                assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    own = table["change_query"].sel(scorer="exact").values
    assert (own > 0).all()
    np.testing.assert_allclose(table["change"].sel(scorer="exact"), own.mean(axis=1), rtol=1e-6)
    # Seeds make no difference here, so that the interval is the t interval of the queries.
    error = own.std(axis=1, ddof=1) / np.sqrt(Q)
    np.testing.assert_allclose(table["change_standard_error"].sel(scorer="exact"), error, rtol=1e-4)
    half = 2.7764451 * error  # t quantile, 4 degrees of freedom
    np.testing.assert_allclose(
        table["change_upper"].sel(scorer="exact"), own.mean(axis=1) + half, rtol=1e-3
    )
    random = table["change_query"].sel(scorer="random").values
    excess = table["excess"].sel(control="random", scorer="exact")
    np.testing.assert_allclose(excess, (own - random).mean(axis=1), rtol=1e-6)
    assert (table["excess"].sel(control="random", scorer="random") == 0).all()


def test_brittleness_is_the_first_count_that_turns_the_sign() -> None:
    grid = [1, 2, 4, 8, 16]
    table = judge(exact(), counts=grid)
    query = data()[1]
    assert table["stable"].values.tolist() == [True, False, True, True, True]
    for q in range(Q):
        order = np.argsort(influence()[q])
        flips = [k for k in grid if (mean_without(order[:k]) > 0) != (query[q] > 0)]
        expected = 0.0 if query[q] < 0 else float(flips[0]) if flips else np.inf
        assert float(table["brittleness"].sel(scorer="exact", query=q)) == expected
    assert np.isfinite(table["brittleness"].sel(scorer="exact")).all()
    curve = table["brittle"].sel(scorer="exact").values
    stable = table["brittleness"].sel(scorer="exact").values[[0, 2, 3, 4]]
    np.testing.assert_allclose(curve, [(stable <= k).mean() for k in grid])
    np.testing.assert_allclose(table["flipped"].sel(scorer="exact"), curve)
    assert (table["flipped_lower"] >= 0).all()
    assert (table["brittle_upper"] <= 1).all()


def test_no_prediction_to_flip_is_said() -> None:
    scores = exact().sel(query=[1])
    with pytest.warns(RemovalWarning, match="no query is predicted right"):
        table = judge(scores)
    assert "flipped" not in table
    assert (table["brittleness"].sel(scorer="exact") == 0).all()


def test_order_form_and_choice_of_queries_do_not_matter() -> None:
    whole = exact()
    mixed = whole.isel(train=np.random.default_rng(0).permutation(N), query=[3, 1]).transpose()
    order = np.argsort(influence(), axis=1)[:, :8]
    dims, best = ("query", "side", "rank"), np.take_along_axis(influence(), order, 1)
    top = xr.Dataset(
        {"influence": (dims, best[:, None])},
        {"query": np.arange(Q), "side": ["helpful"], "rank": np.arange(8),
         "train": (dims, order[:, None])},
    )  # fmt: skip
    table = judge({"mixed": mixed, "top": top.isel(query=[1, 3])})
    expected = judge(whole)["change_query"].sel(scorer="exact", query=[3, 1])
    for name in ("mixed", "top"):
        found = table["change_query"].sel(scorer=name)
        np.testing.assert_array_equal(found["query"], [3, 1])
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def small_classifier() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(36, 3, generator=g), torch.arange(36) % 3
    return {
        "make_model": lambda: nn.Linear(3, 3), "likelihood": bi.Categorical(),
        "recipe": SGDRecipe(epochs=2, batch_size=6, lr=0.3), "train": (x, y),
        "query": (x[:4] + 0.1, y[:4]), "seeds": [0, 1, 2], "counts": [2, 5],
    }  # fmt: skip


def test_class_control_removes_from_the_class_of_the_query(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = small_classifier()
    kept: dict[str, Any] = {}

    def spy(masks: _masks.Masks, *args: Any, **more: Any) -> dict[str, np.ndarray]:
        kept["masks"], kept["outcomes"] = masks, _masks.measured(masks, *args, **more)
        return dict(kept["outcomes"])

    monkeypatch.setattr(module, "measured", spy)
    plans: dict[str, np.ndarray] = {}
    effects = module._Effects
    monkeypatch.setattr(module, "_Effects", lambda p, o, m: plans.update(p) or effects(p, o, m))
    rng = np.random.default_rng(0)
    scores = bi.make_scores(rng.standard_normal((4, 36)), query=np.arange(4), train=np.arange(36),
                            method="noise", estimand="similarity")  # fmt: skip
    table = removal_counterfactual(scores, **options)
    assert table["control"].values.tolist() == ["random", "random, same class"]
    masks = np.stack(kept["masks"]._rows)
    label = np.arange(36) % 3
    for j, k in enumerate([2, 5]):
        for q in range(4):
            own = masks[plans["random, same class"][j, :, q]]
            assert ((~own).sum(axis=1) == k).all()
            assert all((label[~row] == label[q]).all() for row in own)
            best = np.argsort(scores["influence"].values[q])[:k]
            assert (np.flatnonzero(~masks[plans["noise"][j, 0, q]]) == np.sort(best)).all()
        assert len(np.unique(plans["random"][j])) == 3
        np.testing.assert_array_equal(  # queries of one class share their masks
            plans["random, same class"][j, :, 0], plans["random, same class"][j, :, 3]
        )
    loss = kept["outcomes"]["loss"]
    control = loss[plans["random"][1, :, 0]]  # (masks, seeds, queries)
    expected = (control.mean(axis=(0, 1)) - loss[0].mean(axis=0)).mean()
    assert float(table["change"].sel(scorer="random", count=5)) == pytest.approx(expected)
    estimate = mean_over_queries([control.mean(axis=1), -loss[0]], 0.95)
    found = float(table["change_upper"].sel(scorer="random", count=5))
    assert found == pytest.approx(estimate.upper)
    assert table.attrs["networks"] == 3 * len(masks)


def test_killed_run_goes_on_in_its_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = small_classifier() | {"store": tmp_path / "bank", "group_size": 4}
    scores = bi.make_scores(np.random.default_rng(0).standard_normal((4, 36)), query=np.arange(4),
                            train=np.arange(36), method="noise", estimand="similarity")  # fmt: skip
    from bayesinf.evaluation import _retraining

    trained, whole = [], _retraining._train

    def dies(problem: Any, group: Any, inputs: Any) -> Any:
        trained.extend(group)
        if len(trained) > 20 and len(trained) < 30:
            raise KeyboardInterrupt
        return whole(problem, group, inputs)

    monkeypatch.setattr(_retraining, "_train", dies)
    with pytest.raises(KeyboardInterrupt):
        removal_counterfactual(scores, **options)
    done = len(trained)
    trained.extend([(0, 0)] * 10)
    table = removal_counterfactual(scores, **options)
    assert len(trained) - 10 - done < table.attrs["networks"] - 10  # the first rows were there
    fresh = removal_counterfactual(scores, **(options | {"store": None}))
    xr.testing.assert_identical(table["change"], fresh["change"])


def test_replicates_cover_the_mean_over_queries() -> None:
    """2,000 simulations with noise common to the queries: nominally 95 % of the intervals hold the
    mean; 93.5 % and 96.5 % are 3 standard errors away (false alarm 0.2 % for each)."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        query = rng.standard_normal(30)
        a = query + 0.3 * rng.standard_normal((6, 1)) + rng.standard_normal((6, 30))
        b = 0.3 * rng.standard_normal((5, 1)) + rng.standard_normal((5, 30))
        estimate = mean_over_queries([a, -b], 0.95)
        held += estimate.lower < 0 < estimate.upper
    assert 0.935 < held / 2000 < 0.965


def test_intervals_of_shares_stay_inside_and_cover() -> None:
    """Without replicates they are Clopper and Pearson's, also at 0 and 1. With 8 queries' worth of
    noise common to 40 queries, 1,000 simulations: nominally 95 %, conservative, so more than 93 %
    (3 standard errors of 0.7 % below)."""
    none = share_over_queries(np.zeros((1, 20)), 0.95)
    assert (none.mean, none.lower) == (0, 0)
    assert none.upper == pytest.approx(1 - 0.025 ** (1 / 20))
    every = share_over_queries(np.ones((3, 20)), 0.95)
    assert (every.upper, every.lower) == (1, pytest.approx(0.025 ** (1 / 20)))
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        chance = np.clip(0.8 + 0.1 * rng.standard_normal((5, 1)), 0, 1)
        estimate = share_over_queries((rng.random((5, 40)) < chance) * 1.0, 0.95)
        assert 0 <= estimate.lower < estimate.mean < estimate.upper <= 1
        held += estimate.lower < 0.7985 < estimate.upper  # the mean of the clipped chance
    assert held > 930


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match=r"counts must be positive integers that rise; got \[3, 1\]"
    ):
        judge(exact(), counts=[3, 1])
    with pytest.raises(ValueError, match="at least two seeds and two random masks; got 1 seeds"):
        judge(exact(), seeds=[0])
    with pytest.raises(ValueError, match="exact holds 24 training examples"):
        judge(exact(), counts=[25])
    with pytest.raises(ValueError, match="scores the measurement 'margin'"):
        judge(exact(attrs={"measurement": "margin"}))
    with pytest.raises(ValueError, match="'random', which is a control"):
        judge({"random": exact()})
    with pytest.raises(ValueError, match="b scores other queries than the first"):
        judge({"a": exact(), "b": exact().sel(query=[1])})
    with pytest.raises(ValueError, match=r"influence\(query, train\)"):
        judge({"a": exact().rename(influence="x")})
    with pytest.raises(NotImplementedError, match="margin"):
        judge(exact(attrs={"measurement": "margin"}), measurement="margin")
    options = small_classifier() | {"counts": [13]}
    scores = bi.make_scores(np.ones((4, 36)), query=np.arange(4), train=np.arange(36),
                            method="m", estimand="similarity")  # fmt: skip
    with pytest.raises(ValueError, match="class 0 has 12"):
        removal_counterfactual(scores, **options)
    with pytest.raises(ValueError, match="confidence must lie"):
        judge(exact(), confidence=2)
