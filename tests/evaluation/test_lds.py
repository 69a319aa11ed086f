"""The score with its labels: exact cases, alignment by ids, differences, tables, refusals."""

import json

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from bayesinf._scores import make_scores
from bayesinf.evaluation import (
    SGDRecipe,
    lds,
    lds_difference,
    lds_table,
    noise_ceiling,
    random_subsets,
    retrain,
)
from bayesinf.evaluation._reliability import pearson_to_spearman
from bayesinf.evaluation._statistics import correlations

N, M, R, Q = 40, 60, 4, 25


def make_bank(effects: np.ndarray, noise: float = 0.0, seed: int = 0) -> xr.Dataset:
    """Losses ``Σ_{i kept} effects[q, i]`` plus seed noise, and margins of minus that."""
    subsets = random_subsets(N, count=M, seed=seed)
    rng = np.random.default_rng(seed)
    loss = subsets.values @ effects.T
    outcome = loss[:, None, :] + noise * rng.standard_normal((M, R, len(effects)))
    dims = ("subset", "seed", "query")
    return xr.Dataset(
        {"loss": (dims, outcome), "margin": (dims, -outcome), "subset_mask": subsets},
        coords={"seed": np.arange(R), "query": np.arange(len(effects)) + 100},
        attrs={"task": "synthetic", "fraction": 0.5},
    )


def make(influence: np.ndarray, method: str = "exact", **attrs: object) -> xr.Dataset:
    return make_scores(
        influence,
        query=np.arange(len(influence)) + 100,
        train=np.arange(N),
        method=method,
        estimand="influence",
        attrs=attrs,
    )


@pytest.fixture
def effects() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((Q, N))


class MeanModel(nn.Module):
    """Its output is its only parameter, whatever the input."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(1, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.theta.expand(len(x), 1)


class MeanLikelihood:
    def loss(self, outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return 0.5 * (outputs - target).square().sum(1)

    def value(self, outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """φ = θ."""
        return outputs[:, 0]


def test_mean_estimation_has_lds_exactly_one_from_retraining_to_sign() -> None:
    """θ(S) is the mean of S, so dθ/db_i = (y_i − θ)/n ranks the retrained θ without error."""
    n = 20
    y = torch.from_numpy(np.random.default_rng(1).standard_normal((n, 1)))
    data = (torch.zeros(n, 1, dtype=torch.float64), y)
    bank = retrain(
        MeanModel,
        MeanLikelihood(),
        SGDRecipe(epochs=60, batch_size=n, lr=0.5, momentum=0.0, schedule="constant"),
        train=data,
        query=(data[0][:2], y[:2]),
        subsets=random_subsets(n, count=25, seed=4),
        seeds=[0, 1],
        measurements=("loss", "value"),
    )
    means = (bank["subset_mask"].values @ y.numpy()[:, 0]) / 10
    np.testing.assert_allclose(bank["value"].values[:, 1, 0], means, rtol=1e-6, atol=1e-7)
    influence = ((y - y.mean()) / n).numpy().T.repeat(2, axis=0)
    scores = make_scores(
        influence,
        query=np.arange(2),
        train=np.arange(n),
        method="exact",
        estimand="influence",
        attrs={"measurement": "value"},
    )
    result = lds(scores, bank, measurement="value")
    assert float(result["lds"]) == pytest.approx(1.0, abs=1e-14)
    assert float(result["standard_error"]) < 1e-12
    scores["influence"] *= -1
    assert float(lds(scores, bank, measurement="value")["lds"]) == pytest.approx(-1.0, abs=1e-14)


def test_prediction_is_the_plus_sum_over_kept(effects: np.ndarray) -> None:
    bank = make_bank(effects, noise=3.0)
    result = lds(make(effects), bank)
    prediction = np.array(
        [[effects[q][kept].sum() for q in range(Q)] for kept in bank["subset_mask"].values]
    )
    expected = correlations(prediction, bank["loss"].mean("seed").values, "spearman")
    np.testing.assert_allclose(result["lds_query"], expected, atol=1e-14)
    assert float(result["lds"]) == pytest.approx(expected.mean())
    assert float(result["lds"]) > 0.5
    assert float(result["lower"]) < float(result["lds"]) < float(result["upper"])
    assert result.attrs["task"] == "synthetic"


def test_known_lds(effects: np.ndarray) -> None:
    """Scores whose correlation with the effects is r have LDS (6/π) asin(r/2).

    300 queries, M = 60: standard error 0.006 (seen) and finite-M bias 0.006: 0.04 is 5 of them.
    """
    rng = np.random.default_rng(2)
    effects, other = rng.standard_normal((2, 300, N))
    for r in (0.3, 0.8):
        scores = make(r * effects + np.sqrt(1 - r**2) * other)
        result = float(lds(scores, make_bank(effects))["lds"])
        assert abs(result - pearson_to_spearman(np.array(r))) < 0.04


def test_margin_is_judged_with_the_sign_of_margin(effects: np.ndarray) -> None:
    bank = make_bank(effects)
    scores = make(-effects, measurement="margin")
    assert float(lds(scores, bank, measurement="margin")["lds"]) == pytest.approx(1.0)


def test_fixed_queries_leave_the_query_part_out(effects: np.ndarray) -> None:
    reliable = np.where(np.arange(Q) % 2, 1.0, 0.0)[:, None]  # every other query is predicted
    other = np.random.default_rng(1).standard_normal(effects.shape)
    bank = make_bank(effects)
    scores = make(reliable * effects + (1 - reliable) * other)
    random, fixed = lds(scores, bank), lds(scores, bank, queries="fixed")
    assert float(fixed["query_error"]) == 0
    assert float(random["query_error"]) > 0
    assert float(fixed["subset_error"]) == float(random["subset_error"])


def test_order_of_ids_and_dims_does_not_matter(effects: np.ndarray) -> None:
    bank, scores = make_bank(effects, noise=2.0), make(effects)
    rng = np.random.default_rng(0)
    mixed = scores.isel(train=rng.permutation(N), query=rng.permutation(Q)).transpose()
    mixed_bank = bank.isel(
        train=rng.permutation(N), query=rng.permutation(Q), seed=[2, 0, 3, 1]
    ).transpose()
    a, b = lds(scores, bank), lds(mixed, mixed_bank)
    assert not np.array_equal(a["query"].values, b["query"].values)
    xr.testing.assert_allclose(a["lds_query"], b["lds_query"].sel(query=a["query"]))
    for name in ("lds", "standard_error", "lower", "upper"):
        assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-9)
    part = lds(scores.isel(query=[7, 3]), bank)
    expected = a["lds_query"].isel(query=[7, 3]).values
    np.testing.assert_allclose(part["lds_query"].values, expected)


def test_string_ids(effects: np.ndarray) -> None:
    names = np.array([f"example {i}" for i in range(N)])
    bank, scores = make_bank(effects), make(effects)
    bank, scores = bank.assign_coords(train=names), scores.assign_coords(train=names)
    assert float(lds(scores.isel(train=slice(None, None, -1)), bank)["lds"]) == pytest.approx(1.0)


def test_difference_is_paired(effects: np.ndarray) -> None:
    bank = make_bank(effects, noise=3.0)
    rng = np.random.default_rng(3)
    good = make(effects + 0.1 * rng.standard_normal(effects.shape), "good")
    bad = make(effects + 0.4 * rng.standard_normal(effects.shape), "bad")
    mixed = bad.isel(query=rng.permutation(Q), train=rng.permutation(N))
    result = lds_difference(good, mixed, bank)
    one, two = lds(good, bank), lds(bad, bank)
    expected = (one["lds_query"] - two["lds_query"]).values
    np.testing.assert_allclose(result["difference_query"], expected, atol=1e-12)
    assert float(result["difference"]) == pytest.approx(float(one["lds"] - two["lds"]))
    single = np.hypot(one["standard_error"], two["standard_error"])
    assert 0 < float(result["standard_error"]) < 0.6 * single
    assert (result.attrs["method_a"], result.attrs["method_b"]) == ("good", "bad")
    back = lds_difference(bad, good, bank)
    assert float(back["difference"]) == pytest.approx(-float(result["difference"]))
    none = lds_difference(good, good, bank)
    assert float(none["lower"]) == float(none["upper"]) == 0


def test_ceiling_is_what_the_true_effects_reach() -> None:
    """300 queries: both are within 0.03 (5 standard errors of their difference, 0.006)."""
    effects = np.random.default_rng(6).standard_normal((300, N))
    bank = make_bank(effects, noise=4.0)
    ceiling = noise_ceiling(bank)
    assert 0.6 < float(ceiling["ceiling"]) < 0.9
    assert abs(float(ceiling["ceiling"]) - float(lds(make(effects), bank)["lds"])) < 0.03
    part = noise_ceiling(bank, query=[103, 101])["ceiling_query"].values
    np.testing.assert_array_equal(part, ceiling["ceiling_query"].sel(query=[103, 101]).values)
    assert float(noise_ceiling(bank, "margin")["ceiling"]) == pytest.approx(
        float(ceiling["ceiling"])
    )


def test_table(effects: np.ndarray) -> None:
    bank = make_bank(effects, noise=3.0)
    rng = np.random.default_rng(3)
    a = make(effects, "a", seconds={"fit": 1.5, "scores": 0.5})
    b = make(effects + rng.standard_normal(effects.shape), "b", seconds=7)
    c = make(rng.standard_normal(effects.shape), "c")
    table = lds_table([a, b.isel(query=slice(None, None, -1)), c], bank)
    assert table["scorer"].values.tolist() == ["a", "b", "c"]
    for name, own in zip("abc", (a, b, c), strict=True):
        row, alone = table.sel(scorer=name), lds(own, bank)
        for key in ("lds", "standard_error", "lower", "upper", "lds_query"):
            np.testing.assert_allclose(row[key].values, alone[key].values)
    assert float(table["ceiling"]) == float(noise_ceiling(bank)["ceiling"])
    np.testing.assert_allclose(table["relative"] * table["ceiling"], table["lds"])
    np.testing.assert_array_equal(table["seconds"], [2.0, 7.0, np.nan])
    assert "method" not in table.attrs
    assert json.dumps(table.attrs)  # plain values only
    named = lds_table({"x": a, "y": a}, bank.isel(seed=[0]))
    assert named["scorer"].values.tolist() == ["x", "y"]
    assert "ceiling" not in named


def test_constant_predictions_are_named_or_counted_as_zero(effects: np.ndarray) -> None:
    bank = make_bank(effects)
    influence = effects.copy()
    influence[3] = 0.1  # the same sum for every subset of one size, up to rounding
    with pytest.raises(ValueError, match=r"1 of 25 queries is the same for every subset.*103"):
        lds(make(influence), bank)
    result = lds(make(influence), bank, constant="zero")
    assert float(result["lds_query"][3]) == 0
    assert float(result["lds"]) == pytest.approx(24 / 25)


def refuse(message: str, scores: xr.Dataset, bank: xr.Dataset, **options: object) -> None:
    with pytest.raises(ValueError, match=message):
        lds(scores, bank, **options)


def test_refusals_of_ids(effects: np.ndarray) -> None:
    bank, scores = make_bank(effects), make(effects)
    refuse(r"the scores lack 1 \(\[4\]\)", scores.drop_sel(train=4), bank)
    refuse(r"1 that the bank lacks \(\[9\]\)", scores, bank.drop_sel(train=9))
    refuse(r"query ids .* the bank lack 1 \(\[105\]\)", scores, bank.drop_sel(query=105))
    doubled = scores.assign_coords(train=[0, 0, *range(2, N)])
    refuse("train ids of the scores repeat", doubled, bank)


def test_refusals_of_values(effects: np.ndarray) -> None:
    bank, scores = make_bank(effects), make(effects)
    refuse("scores the measurement 'margin'", make(effects, measurement="margin"), bank)
    refuse("judged on 'margin'", scores, bank, measurement="margin")
    refuse("no measurement 'loss'; it has \\['margin'\\]", scores, bank.drop_vars("loss"))
    refuse("influence\\(query, train\\)", scores.rename(influence="score"), bank)
    refuse("influence is not finite for 25 pairs", scores.where(scores["train"] != 3), bank)
    refuse("queries must be 'random' or 'fixed'", scores, bank, queries="all")
    refuse("confidence must lie between", scores, bank, confidence=95)
    refuse("constant must be one of", scores, bank, constant="nan")
    refuse("at least 4 of them", scores, bank.isel(subset=[0, 1, 2]))
    refuse(
        "loss of the bank is not finite for 240 of 6000", scores, bank.where(bank["query"] != 104)
    )
    flat = bank.assign(loss=bank["loss"] * (bank["query"] != 102))
    refuse("the loss of 1 queries is the same after every retraining.*102", scores, flat)
    with pytest.raises(ValueError, match="compares seeds, and the bank has one"):
        noise_ceiling(bank.isel(seed=[0]))


def test_single_checkpoints_and_ensembles_are_never_mixed(effects: np.ndarray) -> None:
    bank = make_bank(effects)
    one, ten = make(effects, "one"), make(effects, "ten", checkpoints=10)
    with pytest.raises(ValueError, match=r"never compared: \{'one': 1, 'ten': 10\}"):
        lds_table([one, ten], bank)
    with pytest.raises(ValueError, match="different numbers of checkpoints"):
        lds_difference(one, ten, bank)
    assert lds(ten, bank).attrs["checkpoints"] == 10
    assert lds_table({"a": ten, "b": ten}, bank).attrs["checkpoints"] == 10


def test_refusals_of_tables(effects: np.ndarray) -> None:
    bank, scores = make_bank(effects), make(effects)
    with pytest.raises(ValueError, match=r"several scores are of the method \['exact'\]"):
        lds_table([scores, scores], bank)
    with pytest.raises(ValueError, match="at least one method"):
        lds_table([], bank)
    with pytest.raises(ValueError, match="different queries \\(25 and 2, 2 in common\\)"):
        lds_table({"a": scores, "b": scores.isel(query=[0, 1])}, bank)


def test_pearson_is_of_values_and_is_said(effects: np.ndarray) -> None:
    bank = make_bank(effects, noise=3.0)
    noisy = make(effects + np.random.default_rng(3).standard_normal(effects.shape))
    result = lds(noisy, bank, correlation="pearson", queries="fixed")
    prediction = bank["subset_mask"].values @ noisy["influence"].values.T
    truth = bank["loss"].mean("seed").values
    expected = [np.corrcoef(prediction[:, q], truth[:, q])[0, 1] for q in range(Q)]
    np.testing.assert_allclose(result["lds_query"], expected)
    assert result.attrs["correlation"] == "pearson"
    assert result.attrs["random"] == "subsets, seeds"
    one = lds(noisy.isel(query=[4]), bank, correlation="pearson", queries="fixed")
    assert float(one["standard_error"]) == pytest.approx(float(result["lds_query_error"][4]))
    table = lds_table([noisy], bank, correlation="pearson")
    pearson = float(noise_ceiling(bank, correlation="pearson")["ceiling"])
    assert float(table["ceiling"]) == pytest.approx(pearson)
    again = make(effects, "again")
    difference = lds_difference(noisy, again, bank, correlation="pearson")
    other = lds(again, bank, correlation="pearson")
    assert float(difference["difference"]) == pytest.approx(float(result["lds"] - other["lds"]))
    refuse("correlation must be 'spearman' or 'pearson'", noisy, bank, correlation="kendall")


def test_effective_queries_are_all_or_one() -> None:
    """25 queries of their own count for 25, within half (3 errors of a variance); copies for 1."""
    effects = np.random.default_rng(8).standard_normal((Q, 4000))
    own = np.random.default_rng(9).standard_normal((Q, 60, 2))
    bank = xr.Dataset(
        {
            "loss": (("subset", "seed", "query"), own.transpose(1, 2, 0)),
            "subset_mask": random_subsets(4000, count=60, seed=0),
        },
        coords={"query": np.arange(Q) + 100, "seed": [0, 1]},
    )
    scores = make_scores(
        effects, query=bank["query"].values, train=np.arange(4000), method="m", estimand="influence"
    )
    assert 15 < float(lds(scores, bank)["effective_queries"]) < 40
    copies = scores.copy(deep=True)
    copies["influence"][:] = scores["influence"][:1].values
    alike = bank.copy(deep=True)
    alike["loss"][:] = bank["loss"][:, :, :1].values
    assert float(lds(copies, alike)["effective_queries"]) == pytest.approx(1.0)
    exact = make_bank(np.random.default_rng(1).standard_normal((Q, N)))
    perfect = make(np.random.default_rng(1).standard_normal((Q, N)))
    assert np.isnan(lds(perfect, exact)["effective_queries"])  # neither varies
