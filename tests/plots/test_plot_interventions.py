"""Figures of interventions hold their tables' numbers."""

from collections.abc import Iterator

import numpy as np
import pytest
import xarray as xr

from bayesinf.plots import plot_curves, plot_mislabels

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def close() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture
def table() -> xr.Dataset:
    value = np.array([0.9, 0.7, 0.8])
    curve = np.arange(6.0).reshape(3, 2)
    found: dict[str, object] = {}
    for name, dims, array in (
        ("auroc", ("scorer",), value), ("change", ("scorer", "count"), curve),
    ):  # fmt: skip
        found |= {name: (dims, array), f"{name}_lower": (dims, array - 0.1),
                  f"{name}_upper": (dims, array + 0.05)}  # fmt: skip
    return xr.Dataset(
        found, {"scorer": ["a", "loss", "random"], "count": [10, 40]},
        {"confidence": 0.95, "baseline": "loss"},
    )  # fmt: skip


def test_points_best_on_top_with_the_baseline(table: xr.Dataset) -> None:
    ax = plot_mislabels(table, labels={"a": "method a"})
    ax.figure.canvas.draw()
    x, y = ax.containers[0].lines[0].get_data()
    np.testing.assert_array_equal(x, [0.9, 0.7, 0.8])
    np.testing.assert_array_equal(y, [2, 0, 1])
    texts = {t.get_position()[1]: t.get_text() for t in ax.get_yticklabels()}
    assert texts == {2: "method a", 0: "loss", 1: "random"}
    (bars,) = ax.containers[0].lines[2]
    np.testing.assert_allclose(bars.get_segments()[0][:, 0], [0.8, 0.95])
    assert ax.get_legend().get_texts()[0].get_text() == "baseline: loss"
    assert ax.get_xlabel() == "AUROC of wrong labels, 95 % interval"
    del table.attrs["baseline"]
    assert plot_mislabels(table).get_legend() is None


def test_a_line_for_each_method_and_grey_controls(table: xr.Dataset) -> None:
    _, own = plt.subplots()
    ax = plot_curves(table, "change", along="count", scorers=["loss", "random"], ax=own)
    assert ax is own
    first, control = (c.lines[0] for c in ax.containers)
    np.testing.assert_array_equal(first.get_ydata(), [2, 3])
    np.testing.assert_allclose(first.get_xdata(), [10, 40], rtol=0.02)
    assert control.get_color() == "0.45"
    assert first.get_color() != control.get_color()
    assert ax.get_xscale() == "log"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["loss", "random"]
    assert ax.get_xlabel() == "training examples removed"
    assert ax.get_ylabel() == "change, 95 % interval"
    assert len(plot_curves(table, "change", along="count").containers) == 3


def test_refusals(table: xr.Dataset) -> None:
    with pytest.raises(ValueError, match=r"lacks \['recall', 'recall_lower', 'recall_upper'\]"):
        plot_curves(table, "recall", along="count")
    with pytest.raises(ValueError, match="needs the dims 'scorer' and 'fraction'"):
        plot_curves(table, "change", along="fraction")
    with pytest.raises(ValueError, match="mislabel_detection"):
        plot_mislabels(table, variable="average_precision")
