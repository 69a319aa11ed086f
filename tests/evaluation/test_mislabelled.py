"""Finding wrong labels, against scikit-learn, exact cases and simulated coverage."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr
from sklearn.metrics import average_precision_score, roc_auc_score

from bayesinf.evaluation import mislabel_detection
from bayesinf.evaluation._detection import auroc, auroc_interval, recall_and_precision

N = 60
IDS = np.array([f"é{i}" for i in range(N)])
WRONG = np.arange(N) % 5 == 0


def make(values: np.ndarray, **attrs: object) -> xr.Dataset:
    return xr.Dataset({"value": ("train", values)}, {"train": IDS}, dict(attrs))


@pytest.fixture
def noisy() -> dict[str, xr.Dataset]:
    rng = np.random.default_rng(0)
    loss = WRONG + rng.standard_normal(N)
    tied = np.round(1.5 * WRONG + rng.standard_normal(N))
    return {"loss": make(loss), "tied": make(tied, seconds=json.dumps({"a": 1.0, "b": 2.0}))}


def test_areas_and_precisions_are_scikit_learns(noisy: dict[str, xr.Dataset]) -> None:
    table = mislabel_detection(noisy, IDS[WRONG], inspected=[0.1, 0.5, 1.0])
    for name, own in noisy.items():
        row = table.sel(scorer=name)
        values = own["value"].values
        assert float(row["auroc"]) == pytest.approx(roc_auc_score(WRONG, values), abs=1e-14)
        precision = average_precision_score(WRONG, values)
        assert float(row["average_precision"]) == pytest.approx(precision, abs=1e-14)
        assert float(row["recall"].sel(inspected=1.0)) == 1
        for measure in ("auroc", "average_precision"):
            assert row[f"{measure}_lower"] < row[measure] < row[f"{measure}_upper"]
    order = np.argsort(-noisy["loss"]["value"].values)
    assert float(table["recall"].sel(scorer="loss", inspected=0.1)) == WRONG[order[:6]].sum() / 12
    assert table["seconds"].values[1] == 3
    assert np.isnan(table["seconds"].values[0])
    assert table.attrs["baseline"] == "loss"


def test_covariance_of_areas_is_that_of_structural_components(
    noisy: dict[str, xr.Dataset],
) -> None:
    values = np.stack([own["value"].values for own in noisy.values()])
    _, covariance = auroc(values, WRONG)
    above = np.array([
        [[(p > q) + 0.5 * (p == q) for q in row[~WRONG]] for p in row[WRONG]] for row in values
    ])  # fmt: skip
    expected = np.cov(above.mean(axis=2)) / 12 + np.cov(above.mean(axis=1)) / 48
    np.testing.assert_allclose(covariance, expected, rtol=1e-12)
    table = mislabel_detection(noisy, IDS[WRONG])
    variance = expected[0, 0] + expected[1, 1] - 2 * expected[0, 1]
    found = table["auroc_difference_standard_error"].values
    np.testing.assert_allclose(found, [0.0, np.sqrt(variance)], rtol=1e-12)
    difference = table["auroc"].values[1] - table["auroc"].values[0]
    np.testing.assert_allclose(table["auroc_difference"].values, [0, difference], atol=1e-15)


def test_ties_count_as_a_random_order() -> None:
    values, wrong = np.array([2.0, 1.0, 1.0, 1.0, 0.0]), np.array([True, True, False, False, False])
    recall, _ = recall_and_precision(values, wrong, np.array([0.2, 0.4, 0.8]), np.ones((1, 5)))
    np.testing.assert_allclose(recall[0], [1 / 2, 1 / 2 + 1 / 6, 1])


def test_weights_are_copies() -> None:
    rng = np.random.default_rng(1)
    values, counts = np.round(rng.standard_normal(N), 1), rng.integers(0, 4, (3, N))
    recall, precision = recall_and_precision(values, WRONG, np.array([0.3]), counts)
    for row in range(3):
        copies = np.repeat(np.arange(N), counts[row])
        expected = average_precision_score(WRONG[copies], values[copies])
        assert precision[row] == pytest.approx(expected, abs=1e-12)
        plain, _ = recall_and_precision(
            values[copies], WRONG[copies], np.array([0.3]), np.ones((1, len(copies)))
        )
        assert recall[row, 0] == pytest.approx(plain[0, 0], abs=1e-12)


def test_self_influence_is_turned_round_and_order_does_not_matter(
    noisy: dict[str, xr.Dataset],
) -> None:
    own = noisy["loss"]
    other = xr.Dataset({"influence": -own["value"]}).isel(train=slice(None, None, -1))
    table = mislabel_detection({"loss": own, "self": other}, IDS[WRONG])
    for name in ("auroc", "average_precision", "recall", "auroc_lower"):
        np.testing.assert_array_equal(table[name].values[0], table[name].values[1])


def test_perfect_and_useless() -> None:
    table = mislabel_detection({"a": make(WRONG * 1.0), "b": make(-1.0 * WRONG)}, IDS[WRONG],
                               baseline=None, inspected=[0.2])  # fmt: skip
    np.testing.assert_array_equal(table["auroc"], [1, 0])
    edge = 0.025 ** (1 / 12)  # Clopper and Pearson's bound for 12 of 12
    np.testing.assert_allclose(table["auroc_lower"], [edge, 0])
    np.testing.assert_allclose(table["auroc_upper"], [1, 1 - edge])
    np.testing.assert_array_equal(table["recall"].values[:, 0], [1, 0])
    np.testing.assert_allclose(table["recall_lower"].values[0, 0], edge)
    np.testing.assert_allclose(table["recall_upper"].values[1, 0], 1 - edge)
    assert "auroc_difference" not in table


def test_intervals_cover_the_area_of_two_gaussians() -> None:
    """1,000 data sets of 30 and 270 examples, areas 0.76 and 0.95: nominally 95 % of the intervals
    hold the area; 92.5 % and 97.5 % are 3.6 standard errors away (false alarm 3e-4 at each)."""
    from scipy.stats import norm

    rng = np.random.default_rng(0)
    wrong = np.arange(300) < 30
    for shift in (1.0, 2.33):
        values = rng.standard_normal((1000, 300)) + shift * wrong
        area, error = np.empty((2, 1000))
        for k, row in enumerate(values):
            found, covariance = auroc(row[None], wrong)
            area[k], error[k] = found[0], np.sqrt(covariance[0, 0])
        low, high = auroc_interval(area, error, 30, 0.95)
        truth = norm.cdf(shift / np.sqrt(2))
        assert 0.925 < np.mean((low < truth) & (truth < high)) < 0.975


def test_refusals(noisy: dict[str, xr.Dataset]) -> None:
    wrong = IDS[WRONG]
    with pytest.raises(ValueError, match=r"baseline='loss' is not among the scorers \['tied'\]"):
        mislabel_detection({"tied": noisy["tied"]}, wrong)
    with pytest.raises(KeyError, match="names 1 ids that no value is of"):
        mislabel_detection(noisy, [*wrong, "unknown"])
    with pytest.raises(ValueError, match="1 of 60 examples are mislabelled"):
        mislabel_detection(noisy, wrong[:1])
    with pytest.raises(ValueError, match="tied values 59 training examples where 60 are wanted"):
        mislabel_detection({**noisy, "tied": noisy["tied"].isel(train=slice(59))}, wrong)
    with pytest.raises(ValueError, match="tied holds no value of each training example"):
        mislabel_detection({**noisy, "tied": noisy["tied"].rename(value="score")}, wrong)
    broken = make(np.where(np.arange(N) == 3, np.nan, 1.0))
    with pytest.raises(ValueError, match="loss is not finite for 1 of 60"):
        mislabel_detection({"loss": broken}, wrong)
    with pytest.raises(ValueError, match="inspected must be shares"):
        mislabel_detection(noisy, wrong, inspected=[10])
    with pytest.raises(ValueError, match="confidence must lie"):
        mislabel_detection(noisy, wrong, confidence=95)
    repeated = xr.concat([noisy["loss"], noisy["loss"].isel(train=[0])], dim="train")
    with pytest.raises(ValueError, match="train ids of loss repeat"):
        mislabel_detection({"loss": repeated}, wrong)
