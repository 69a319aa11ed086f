"""The frontier holds the table's numbers, and steps through the methods that none cheaper beats."""

from collections.abc import Iterator

import numpy as np
import pytest
import xarray as xr

from bayesinf.plots import plot_frontier

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def close() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture
def table() -> xr.Dataset:
    area = np.array([0.6, 0.9, 0.7, 0.5, 0.8, 0.99, 0.65])
    return xr.Dataset(
        {
            "auroc": ("scorer", area),
            "auroc_lower": ("scorer", area - 0.1),
            "auroc_upper": ("scorer", area + 0.05),
            "seconds": ("scorer", [1.0, 50.0, 10.0, 20.0, 60.0, np.nan, 10.0]),
            "peak_memory": ("scorer", [0.0, *[2.0**21] * 6]),
        },
        coords={"scorer": list("abcdefg")},
        attrs={"confidence": 0.9},
    )


def points(ax: object) -> np.ndarray:
    return np.concatenate([np.stack(c.lines[0].get_data(), axis=1) for c in ax.containers])


def test_points_intervals_and_frontier(table: xr.Dataset) -> None:
    ax = plot_frontier(table, "auroc", labels={"a": "Method A"})
    known = [0, 1, 2, 3, 4, 6]
    expected = np.stack([table["seconds"], table["auroc"]], axis=1)[known]
    np.testing.assert_allclose(points(ax), expected)
    ends = np.concatenate([c.lines[2][0].get_segments() for c in ax.containers])[:, :, 1]
    np.testing.assert_allclose(ends, np.stack([expected[:, 1] - 0.1, expected[:, 1] + 0.05], 1))
    line = next(one for one in ax.lines if one.get_label() == "_frontier")
    np.testing.assert_allclose(np.stack(line.get_data()), [[1, 10, 50], [0.6, 0.7, 0.9]])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["Method A", *"bcdeg"]
    assert (ax.get_xscale(), ax.get_xlabel()) == ("log", "seconds")
    assert ax.get_ylabel() == "AUROC, 90 % interval"


def test_memory_is_in_mib_and_a_cost_of_0_is_left_out(table: xr.Dataset) -> None:
    ax = plot_frontier(table, "auroc", cost="peak_memory")
    np.testing.assert_allclose(points(ax)[:, 0], 2.0)
    assert ax.get_xlabel() == "peak memory, MiB"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list("bcdefg")


def test_refusals(table: xr.Dataset) -> None:
    with pytest.raises(ValueError, match="cost must be one of"):
        plot_frontier(table, "auroc", cost="money")
    with pytest.raises(ValueError, match=r"has the estimates \['auroc'\]"):
        plot_frontier(table, "seconds")
    with pytest.raises(ValueError, match="an interval by 'scorer' and 'forward_examples'"):
        plot_frontier(table, "auroc", cost="forward_examples")
    with pytest.raises(ValueError, match=r"no method of the table has its seconds"):
        plot_frontier(table.assign(seconds=table["seconds"] * np.nan), "auroc")
    names = ["auroc", "auroc_lower", "auroc_upper"]
    curves = table.assign({name: table[name].expand_dims(count=[1, 2]) for name in names})
    with pytest.raises(ValueError, match=r"Choose: table.sel\(count=…\)"):
        plot_frontier(curves, "auroc")
