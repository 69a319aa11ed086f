"""Sums over groups: the value of the scores added up, the error of the sum itself."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

import bayesinf as bi
from bayesinf._covariance import cross_covariance
from tests.interrupted import run

pytestmark = pytest.mark.filterwarnings("ignore::bayesinf.ConvergenceWarning")
IDS = [f"é{i}" for i in range(12)]
GROUPS = {"few": IDS[3:5], "one": [IDS[7]], "all": IDS}


@pytest.fixture(scope="module")
def stores():
    options = {"draws": 100, "measurements": ["loss", "margin"]}
    return run(None, "SGLD", **options), run(bi.StreamingCovariance(), "SGLD", **options)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("measurement", ["loss", "margin"])
def test_values_add_up_and_errors_are_those_of_the_sums(stores, which, measurement):
    options = {"measurement": measurement, "center": "grand"}
    result = bi.group_influence(stores[which], GROUPS, **options)
    single = bi.bif(stores[which], **options)
    assert result["group"].values.tolist() == ["few", "one", "all"]
    for name, ids in GROUPS.items():
        own = result.sel(group=name)
        summed = single["influence"].sel(train=ids).sum("train")
        np.testing.assert_allclose(own["influence"], summed, rtol=1e-9)
    np.testing.assert_allclose(
        result["mcse"].sel(group="one"), single["mcse"].sel(train=IDS[7]), rtol=1e-8
    )
    traces = stores[0]
    x = traces.values("query", measurement).values
    total = traces.values("train").values.astype(np.float64).sum(2, keepdims=True)
    exact = cross_covariance(x, total)
    scale = traces.config["posterior"]["n_beta"] / 12
    np.testing.assert_allclose(result["mcse"].sel(group="all"), scale * exact.mcse[:, 0], rtol=1e-8)
    independent = np.sqrt((single["mcse"] ** 2).sum("train"))
    assert float(np.abs(result["mcse"].sel(group="all") / independent - 1).max()) > 0.1
    assert result.attrs["mcse_df"] == single.attrs["mcse_df"]


def test_masks_of_subsets(stores):
    masks = bi.random_subsets(12, count=5, seed=0).assign_coords(train=IDS)
    result = bi.group_influence(stores[0], masks, center="grand")
    single = bi.bif(stores[0], center="grand")["influence"]
    assert result["influence"].dims == ("query", "subset")
    np.testing.assert_allclose(
        result["influence"].values,
        (single.values @ masks.transpose("train", ...).values),
        rtol=1e-9,
    )
    turned = bi.group_influence(stores[0], masks.isel(train=slice(None, None, -1)), center="grand")
    np.testing.assert_allclose(turned["influence"], result["influence"], rtol=1e-9)


def test_refusals(stores):
    for wrong, words in (
        ({}, "groups is empty"),
        ({"a": []}, "group 'a' is empty"),
        ({"a": [IDS[0], IDS[0]]}, "group 'a' holds an example twice"),
        ({"a": [IDS[0], "x"]}, r"group 'a' holds 1 train examples that were not observed.*'x'"),
        (
            xr.DataArray(np.ones((2, 2, 2)), dims=("train", "a", "b")),
            "alone for labels or with one",
        ),
        (xr.DataArray(np.ones(12), dims="train"), "12 train examples that were not observed"),
        (xr.DataArray([""] * 12, dims="train", coords={"train": IDS}), "there is no group"),
        (xr.DataArray(np.zeros((12, 2)), dims=("train", "g"), coords={"train": IDS}), "is empty"),
        (xr.DataArray(np.ones((1, 1)), dims=("train", "g"), coords={"train": ["x"]}), "'x'"),
    ):
        with pytest.raises(ValueError, match=words):
            bi.group_influence(stores[0], wrong)
    with pytest.raises(KeyError, match="was not recorded"):
        bi.group_influence(stores[0], GROUPS, measurement="m")
    with pytest.raises(ValueError, match="center must be 'auto', 'grand' or 'chain'"):
        bi.group_influence(stores[0], GROUPS, center="mean")
