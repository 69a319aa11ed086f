"""Figures hold the table's numbers."""

import builtins
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import xarray as xr

from bayesinf.plots import plot_lds, plot_lds_time

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def close() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture
def table() -> xr.Dataset:
    values = np.array([0.3, 0.6, 0.1])
    return xr.Dataset(
        {
            "lds": ("scorer", values),
            "lower": ("scorer", values - 0.05),
            "upper": ("scorer", values + 0.02),
            "seconds": ("scorer", [1.0, 100.0, np.nan]),
            "ceiling": 0.9,
        },
        coords={"scorer": ["b", "a", "c"]},
        attrs={"confidence": 0.95},
    )


def points(ax: object) -> np.ndarray:
    return np.concatenate([np.stack(c.lines[0].get_data(), axis=1) for c in ax.containers])


def whiskers(ax: object) -> np.ndarray:
    return np.concatenate([np.array(c.lines[2][0].get_segments()) for c in ax.containers])


def test_points_intervals_and_ceiling(table: xr.Dataset) -> None:
    ax = plot_lds(table, labels={"a": "Method A"})
    ax.figure.canvas.draw()
    assert [t.get_text() for t in ax.get_yticklabels()] == ["b", "Method A", "c"]
    np.testing.assert_allclose(points(ax), [[0.3, 1], [0.6, 2], [0.1, 0]])
    np.testing.assert_allclose(whiskers(ax)[0, :, 0], [0.25, 0.32])
    ceiling = next(line for line in ax.lines if line.get_label() == "noise ceiling")
    assert list(ceiling.get_xdata()) == [0.9, 0.9]
    assert ax.get_xlabel() == "LDS, 95 % interval"
    np.testing.assert_allclose(points(plot_lds(table, order="table"))[:, 1], [2, 1, 0])


def test_time(table: xr.Dataset) -> None:
    _, own = plt.subplots()
    ax = plot_lds_time(table, ax=own)
    assert ax is own
    ax.figure.canvas.draw()
    assert ax.get_xscale() == "log"
    np.testing.assert_allclose(points(ax), [[1, 0.3], [100, 0.6]])
    np.testing.assert_allclose(whiskers(ax)[1, :, 1], [0.55, 0.62])
    named = {handle.get_label(): handle.lines[0].get_color() for handle in ax.containers}
    assert list(named) == ["b", "a"]
    assert len(set(named.values())) == 2
    assert {t.get_text() for t in ax.get_legend().get_texts()} == {"b", "a", "noise ceiling"}


def test_without_a_ceiling(table: xr.Dataset) -> None:
    bare = table.drop_vars("ceiling")
    assert plot_lds(bare).get_legend() is None
    texts = plot_lds_time(bare).get_legend().get_texts()
    assert {t.get_text() for t in texts} == {"b", "a"}


def test_refusals(table: xr.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"lacks \['upper'\]"):
        plot_lds(table.drop_vars("upper"))
    with pytest.raises(ValueError, match="order must be"):
        plot_lds(table, order="name")
    with pytest.raises(ValueError, match="no method of the table has its seconds"):
        plot_lds_time(table.assign(seconds=table["seconds"] * np.nan))
    real = builtins.__import__

    def absent(name: str, *rest: object, **options: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"pip install 'bayesinf\[plots\]'"):
        plot_lds(table)


def test_importing_the_plots_does_not_import_pyplot() -> None:
    code = "import sys, bayesinf.plots; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
