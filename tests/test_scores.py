"""The format of scores: labels, refusals, attributes, and the way to Zarr and back."""

import json
import re

import numpy as np
import pytest
import xarray as xr

from bayesinf import _scores
from bayesinf._scores import label_scores, make_scores, text_labels
from bayesinf.attribution import _ekfac, _grad_dot
from bayesinf.attribution._registry import METHODS, register

INFLUENCE = np.arange(6.0).reshape(2, 3) - 2.5
LABELS = {"query": np.array([7, 3]), "train": np.array([10, 30, 20])}


def scores(influence=INFLUENCE, **options):
    return make_scores(
        influence, **{**LABELS, "method": "made", "estimand": "influence", **options}
    )


def test_schema():
    attrs = {"damping": 0.1, "nothing": None, "seconds": {"fit": 1.5, "n": np.int64(3)}}
    data = scores(mcse=INFLUENCE**2, attrs=attrs)
    assert set(data.data_vars) == {"influence", "mcse"}
    assert data.influence.dims == data.mcse.dims == ("query", "train")
    assert dict(data.sizes) == {"query": 2, "train": 3}
    assert float(data.influence.sel(query=3, train=20)) == INFLUENCE[1, 2]
    assert float(data.mcse.sel(query=7, train=30)) == INFLUENCE[0, 1] ** 2
    assert data.attrs["method"] == "made"
    assert data.attrs["estimand"] == "influence"
    assert data.attrs["checkpoints"] == 1
    assert data.attrs["damping"] == 0.1
    assert json.loads(data.attrs["seconds"]) == {"fit": 1.5, "n": 3}
    assert "nothing" not in data.attrs
    assert data.attrs["numpy_version"] == np.__version__
    assert scores(attrs={"checkpoints": 4}).attrs["checkpoints"] == 4


def test_attributes_are_json_able():
    attrs = {
        "flag": True,
        "count": np.int64(3),
        "single": np.float32(0.5),
        "list": [1, 2],
        "array": {"a": np.arange(2)},
    }
    got = scores(attrs=attrs).attrs
    assert json.loads(json.dumps(got)) == got
    assert {type(v) for v in got.values()} <= {str, int, float}
    assert (got["count"], got["single"]) == (3, 0.5)
    assert [json.loads(got[k]) for k in ("flag", "list", "array")] == [True, [1, 2], {"a": [0, 1]}]


@pytest.mark.parametrize("text", [False, True])
def test_zarr_gives_back_what_it_was_given(tmp_path, text):
    labels = {"query": np.array(["é", "q2"]), "train": np.array(["a", "bcd", "c"])}
    data = scores(mcse=INFLUENCE**2, attrs={"seconds": {"fit": 1.5}}, **(labels if text else {}))
    data.to_zarr(tmp_path / "scores.zarr", zarr_format=3, consolidated=False)
    with xr.open_zarr(tmp_path / "scores.zarr", consolidated=False) as back:
        xr.testing.assert_identical(back.load(), data)
        assert back.influence.dtype == np.float64
    if text:
        assert float(back.influence.sel(query="q2", train="bcd")) == INFLUENCE[1, 1]
        assert back.train.values.tolist() == ["a", "bcd", "c"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["influence", "mcse"])
def test_what_is_not_finite_is_refused_by_name(bad, where):
    broken = INFLUENCE.copy()
    broken[1, 2] = bad
    words = f"made: {where} is not finite for 1 of 6 pairs, first query 3 and train 20"
    arrays = {"influence": INFLUENCE, "mcse": INFLUENCE, where: broken}
    with pytest.raises(ValueError, match=words):
        scores(**arrays)


def test_ids_of_text_are_shown_as_they_are():
    labels = {"query": np.array(["x", "y"]), "train": np.array(["a", "b", "c"])}
    broken = INFLUENCE.copy()
    broken[0, 1:] = np.nan
    with pytest.raises(ValueError, match=r"for 2 of 6 pairs, first query 'x' and train 'b'"):
        scores(broken, **labels)


def test_errors():
    with pytest.raises(ValueError, match=r"estimand must be one of .*; got 'rank'"):
        scores(estimand="rank")
    with pytest.raises(ValueError, match=re.escape("(query, train) = (2, 3); got (3, 2)")):
        scores(INFLUENCE.T)
    with pytest.raises(ValueError, match=r"mcse must have shape .* got \(2,\)"):
        scores(mcse=np.ones(2))


def test_registry(monkeypatch):
    monkeypatch.setattr("bayesinf.attribution._registry.METHODS", found := {})

    @register("similarity", "A test.")
    def lucky(task):
        return scores()

    assert list(found) == ["lucky"]
    assert found["lucky"].function is lucky
    assert (found["lucky"].estimand, found["lucky"].summary) == ("similarity", "A test.")
    assert METHODS["ekfac"].function is _ekfac.ekfac
    assert METHODS["ekfac"].estimand == "influence"
    assert METHODS["grad_dot"].function is _grad_dot.grad_dot
    assert METHODS["grad_dot"].estimand == "similarity"
    for name, method in METHODS.items():
        assert (method.name, method.function.__name__) == (name, name)


def test_versions_of_what_is_not_installed_are_left_out(monkeypatch):
    """As when the package is used from its source."""

    def version(package):
        if package == "bayesinf":
            raise _scores.PackageNotFoundError(package)
        return "1.2"

    monkeypatch.setattr(_scores, "version", version)
    monkeypatch.setattr(_scores, "_versions", _scores._versions.__wrapped__)  # kept otherwise
    attrs = scores().attrs
    assert "bayesinf_version" not in attrs
    assert attrs["torch_version"] == attrs["numpy_version"] == "1.2"


def test_scores_of_other_dimensions():
    """Extremes of queries: which pairs are not finite is told as far as there are labels."""
    values = np.array([[[0.5, np.nan]], [[1.0, 2.0]]])
    dims = ("query", "side", "rank")
    coords = {"query": [7, 3], "side": text_labels(np.array(["helpful"]))}
    with pytest.raises(
        ValueError, match=r"influence is not finite for 1 of 4 pairs, first query 7"
    ):
        label_scores({"influence": (dims, values)}, coords, "made", "influence", {})
    labelled = label_scores({"influence": (dims, values[1:])}, {}, "made", "similarity", {})
    assert labelled.influence.dims == dims
    assert labelled.attrs["estimand"] == "similarity"
