"""The report's tables and data hold the judges' numbers; wrong input is refused with a way out."""

import json
import re
import warnings
from html import unescape

import numpy as np
import pytest
import xarray as xr

import bayesinf as bi
from bayesinf.plots import report
from bayesinf.plots._estimates import estimates
from bayesinf.plots._report_tables import read_table

COST = {"seconds": 2.5, "forward_examples": 1200, "backward_examples": 600, "peak_memory": 2**21}


def scores(name: str, seed: int, **attrs: object) -> xr.Dataset:
    values = np.random.default_rng(seed).standard_normal((6, 20))
    return xr.Dataset(
        {"influence": (("query", "train"), values)},
        coords={"query": np.arange(6), "train": np.arange(20)},
        attrs={"method": name, "estimand": "influence", **attrs},
    )


@pytest.fixture(scope="module")
def bank() -> xr.Dataset:
    rng = np.random.default_rng(0)
    mask = np.argsort(rng.random((30, 20)), axis=1) < 10
    signal = (mask @ rng.standard_normal((20, 6)))[:, None]
    return xr.Dataset(
        {
            "loss": (("subset", "seed", "query"), signal + rng.standard_normal((30, 4, 6))),
            "subset_mask": (("subset", "train"), mask),
        },
        coords={"train": np.arange(20), "query": np.arange(6)},
        attrs={"task": "made"},
    )


@pytest.fixture(scope="module")
def table(bank: xr.Dataset) -> xr.Dataset:
    return bi.lds_table({"a": scores("a", 1, **COST), "b": scores("b", 2)}, bank)


def simple(**variables: object) -> xr.Dataset:
    found = xr.Dataset(
        {
            "lds": ("scorer", [0.5, 0.25]),
            "lower": ("scorer", [0.4, 0.2]),
            "upper": ("scorer", [0.6, 0.3]),
        },
        coords={"scorer": ["a", "b"]},
        attrs={"confidence": 0.9, "random": "subsets"},
    )
    return found.assign(variables)


def titles(sheet: object, k: int = 0) -> list[str]:
    return [column.title for column in sheet.grids[k].columns]


# ---------------------------------------------------------------------------- what is shown


def test_an_lds_table_is_one_grid_with_the_costs_beside_the_estimate(table: xr.Dataset) -> None:
    sheet = read_table(table, "LDS")
    assert len(sheet.grids) == 1
    assert titles(sheet)[:6] == [
        "method", "LDS", "seconds", "examples forward", "examples backward", "peak memory, MiB",
    ]  # fmt: skip
    names, lds, seconds, *_, memory = sheet.grids[0].columns[:6]
    assert list(names.values) == ["a", "b"]
    np.testing.assert_array_equal(lds.values, table["lds"])
    np.testing.assert_array_equal([lds.lower, lds.upper], [table["lower"], table["upper"]])
    np.testing.assert_array_equal(seconds.values, [2.5, np.nan])
    assert memory.values[0] == 2.0
    assert [c.title for c in sheet.facts] == ["noise ceiling"]
    assert {"lds_query", "standard_error"} <= set(sheet.hidden)


def test_every_variable_is_shown_or_named_as_hidden(table: xr.Dataset) -> None:
    sheet = read_table(table, "LDS")
    drawn = len(sheet.facts) + sum(len(grid.columns) - grid.labels for grid in sheet.grids)
    ends = 2 * len(estimates(table))
    assert drawn + ends + len(sheet.hidden) == len(table.data_vars)


def test_judges_and_the_estimates_of_their_tables(bank: xr.Dataset, table: xr.Dataset) -> None:
    pair = {"a": scores("a", 1), "b": scores("b", 2)}
    values = {name: own.mean("query").rename(influence="value") for name, own in pair.items()}
    wrong = bi.mislabel_detection(values, [0, 1, 2], baseline="a", resamples=20)
    same = {"auroc", "auroc_difference", "average_precision", "recall"}
    assert set(estimates(wrong)) == same
    assert list(estimates(table)) == ["lds"]
    assert list(estimates(bi.noise_ceiling(bank))) == ["ceiling"]
    assert list(estimates(bi.lds_difference(pair["a"], pair["b"], bank))) == ["difference"]
    assert not estimates(bi.lds_null(pair, bank, permutations=20))
    agree = bi.agreement(pair, top_k=3, permutations=20)
    assert list(estimates(agree)) == ["correlation", "overlap"]

    sheet = read_table(wrong, "wrong")
    assert [grid.labels for grid in sheet.grids] == [1, 2]
    assert "seconds" in titles(sheet, 0)
    assert "seconds" in titles(sheet, 1)
    share = sheet.grids[1].columns[1]
    assert (share.title, share.values[0]) == ("share inspected", 0.05)
    pairs, costs = read_table(agree, "agree").grids
    assert [list(column.values) for column in pairs.columns[:2]] == [["a"], ["b"]]
    assert pairs.columns[2].values[0] == agree["correlation"].values[0, 1]
    assert [column.title for column in costs.columns][:2] == ["method", "seconds"]
    assert "seconds" not in [column.title for column in pairs.columns]


def test_the_order_of_variables_does_not_matter(bank: xr.Dataset, table: xr.Dataset) -> None:
    """A table that was stored and read has its variables in another order."""
    pair = {"a": scores("a", 1), "b": scores("b", 2)}
    agree = bi.agreement(pair, top_k=3, permutations=20)
    tables = [table, agree, bi.lds_difference(pair["a"], pair["b"], bank)]
    tables += [bi.lds(pair["a"], bank), bi.noise_ceiling(bank), bi.effective_queries(bank)]
    for one in tables:
        turned = one[list(one.data_vars)[::-1]]
        assert next(iter(estimates(one))) == next(iter(one.data_vars))
        assert estimates(turned) == estimates(one)


def test_plain_ends_of_an_unknown_variable_are_those_of_the_one_between_them() -> None:
    own = simple().rename(lds="own")
    assert estimates(own) == {"own": ("lower", "upper")}
    assert estimates(own.assign(twin=own["own"])) == {}
    assert estimates(own.assign(twin=own["own"] + 1)) == {"own": ("lower", "upper")}
    assert titles(read_table(own.assign(twin=own["own"]), "x"))[1:] == [
        "own", "lower", "upper", "twin",
    ]  # fmt: skip


def test_rows_of_several_dimensions_keep_their_values() -> None:
    values = np.arange(6.0).reshape(3, 2)
    dims = "count", "scorer"
    found = xr.Dataset(
        {"change": (dims, values), "change_lower": (dims, values - 1)}
        | {"change_upper": (dims, values + 2), "seconds": ("scorer", [7.0, 8.0])},
        coords={"count": [1, 2, 4], "scorer": ["a", "b"]},
    )
    name, count, change, seconds = read_table(found, "x").grids[0].columns
    for row in range(6):
        at = {"scorer": name.values[row], "count": count.values[row]}
        assert change.values[row] == found["change"].sel(at)
        assert change.upper[row] == found["change_upper"].sel(at)
        assert seconds.values[row] == found["seconds"].sel(scorer=at["scorer"])
    assert len(set(zip(name.values, count.values, strict=True))) == 6


def test_numbers_on_the_page() -> None:
    """Two digits of the interval, a dash for the unknown, and the interval's ends as drawn."""
    found = report(
        {"T": simple(seconds=("scorer", [np.nan, 1234.5]), p_value=("scorer", [0.012, 1.0]))},
        title="t",
    ).html
    cells = re.findall(r'<td data-value="([^"]*)">(.*?)</td>', found)
    texts = [unescape(re.sub("<.*?>", "", text)) for _, text in cells]
    assert texts == ["0.500 [0.400, 0.600]", "–", "0.0120", "0.250 [0.200, 0.300]", "1,234", "1"]
    assert [value for value, _ in cells] == ["0.5", "", "0.012", "0.25", "1234.5", "1.0"]
    drawn = re.findall(r'<line x1="([\d.]+)" x2="([\d.]+)"', found)
    assert drawn == [("48.0", "96.0"), ("0.0", "24.0")]  # of 96, from 0.2 to 0.6
    assert "90 % intervals; random in them: subsets." in found


def test_text_from_outside_is_escaped() -> None:
    bad = '<script>alert("1")</script>'
    found = simple().assign_coords(scorer=[bad, "{style} {body}"])
    found.attrs[bad] = bad
    page = report({bad.replace("/", ""): found}, title=bad, configuration={bad: {bad: bad}}).html
    assert page.count("<script>") == 1
    assert "&lt;script&gt;alert(&quot;1&quot;)" in page
    assert 'alert("1")' not in page
    assert "{style} {body}" in page


# ---------------------------------------------------------------------------- the same as data


def test_dataset_holds_tables_configuration_and_versions(table: xr.Dataset, tmp_path) -> None:
    found = report({"LDS": table}, title="t", configuration={"threads": 1, "at": {"lr": 0.1}})
    tree = found.dataset
    xr.testing.assert_equal(tree["LDS"].to_dataset(), table)
    assert tree["LDS"].attrs == table.attrs
    assert tree.attrs["title"] == "t"
    assert json.loads(tree.attrs["configuration"]) == {"threads": 1, "at": {"lr": 0.1}}
    assert tree.attrs["bayesinf_version"] in found.html
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tree.to_zarr(tmp_path / "t.zarr", zarr_format=3, consolidated=False)
    with xr.open_datatree(tmp_path / "t.zarr", engine="zarr", consolidated=False) as read:
        np.testing.assert_array_equal(read["LDS"]["lds"], table["lds"])
        assert list(read["LDS"]["scorer"].values) == ["a", "b"]


def test_figures_are_inside_the_page(tmp_path) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    figure, ax = plt.subplots()
    figure.savefig(tmp_path / "a.png")
    (tmp_path / "b.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    figures = {"1": figure, "2": ax, "3": tmp_path / "a.png", "4": str(tmp_path / "b.svg")}
    found = report({"T": simple()}, title="t", figures=figures)
    plt.close(figure)
    kinds = re.findall(r'<img src="data:(image/[a-z+]+);base64,(\w+)', found.html)
    assert [kind for kind, _ in kinds] == ["image/png"] * 3 + ["image/svg+xml"]
    page = found.save(tmp_path / "r.html")
    assert page.read_text(encoding="utf-8") == found.html
    assert found._repr_html_().startswith('<iframe title="t" sandbox')


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("tables", "error", "match"),
    [
        ({}, ValueError, "at least one table"),
        (simple(), TypeError, "given by title"),
        ([simple()], TypeError, "given by title; got list"),
        ({"a/b": simple()}, ValueError, "cannot be empty or hold '/'"),
        ({"a": {"lds": 1}}, TypeError, "must be an xr.Dataset as the judges return; got dict"),
        ({"a": scores("a", 0)}, ValueError, "Scores are judged first"),
    ],
)
def test_tables_that_are_none(tables: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        report(tables, title="t")


@pytest.mark.parametrize(
    ("figure", "error", "match"),
    [("a.jpg", ValueError, "'c': an image must be a .png or .svg"), (3, TypeError, "got int")],
)
def test_figures_that_are_none(figure: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        report({"a": simple()}, title="t", figures={"c": figure})
