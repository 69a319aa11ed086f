"""Figures of influences hold the scores' numbers and their intervals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from bayesinf.plots import plot_agreement, plot_forest, plot_heat_map, plot_sweep
from bayesinf.plots._look import ACCENT, INK, style_of

plt = pytest.importorskip("matplotlib.pyplot")
T = stats.t.ppf(0.975, 9)


@pytest.fixture(autouse=True)
def close() -> Iterator[None]:
    yield
    plt.close("all")


def scores(seed: int = 0, mcse: bool = True, **attrs: Any) -> xr.Dataset:
    """Two queries, six training examples; the errors are of 9 degrees of freedom."""
    rng = np.random.default_rng(seed)
    pair = ("query", "train")
    found = xr.Dataset(
        {"influence": (pair, rng.standard_normal((2, 6)))},
        {"query": ["q", "r"], "train": list("abcdef")},
        {"method": "bif", "estimand": "influence", **attrs},
    )
    if mcse:
        found["mcse"] = pair, rng.uniform(0.1, 0.2, (2, 6))
        found.attrs["mcse_df"] = 9.0
    return found


def bars_of(container: Any, along: int) -> np.ndarray:
    """Ends ``(points, 2)`` of the whiskers along x (0) or y (1)."""
    for lines in container.lines[2]:
        ends = np.array([segment[:, along] for segment in lines.get_segments()])
        if np.ptp(ends, axis=1).any():
            return ends
    raise AssertionError("no whiskers")


def test_forest_has_the_ends_of_the_order_with_intervals() -> None:
    given = scores()
    ax = plot_forest(given, "r", k=2, labels={"a": "the first"})
    value, error = (given[name].sel(query="r").values for name in ("influence", "mcse"))
    order = np.argsort(value)
    kept = np.r_[order[:2], order[-2:]]
    ax.figure.canvas.draw()
    texts = [t.get_text() for t in sorted(ax.get_yticklabels(), key=lambda t: -t.get_position()[1])]
    ids = [str(given["train"].values[i]) for i in kept]
    assert texts == ["the first" if i == "a" else i for i in ids]
    assert [c.lines[0].get_color() for c in ax.containers] == [INK, ACCENT]
    x = np.concatenate([c.lines[0].get_xdata() for c in ax.containers])
    y = np.concatenate([c.lines[0].get_ydata() for c in ax.containers])
    np.testing.assert_array_equal(x, value[kept])
    np.testing.assert_array_equal(y, [3, 2, 1, 0])
    ends = np.concatenate([bars_of(c, 0) for c in ax.containers])
    np.testing.assert_allclose(ends[:, 0], value[kept] - T * error[kept])
    np.testing.assert_allclose(ends[:, 1], value[kept] + T * error[kept])
    assert ax.get_xlabel() == "influence on query r, d E[φ] / d b in units of φ\n95 % interval"
    everything = plot_forest(given, "r", k=5)
    assert len(everything.get_yticks()) == 6  # no example twice


def test_forest_of_scores_without_errors_and_of_a_kept_top() -> None:
    plain = scores(mcse=False, estimand="similarity")
    ax = plot_forest(plain, "q", k=1)
    assert ax.get_xlabel() == "−similarity to query q, no unit"
    assert not ax.containers[0].has_xerr
    dims = ("query", "side", "rank")
    kept = xr.Dataset(
        {"influence": (dims, [[[-3.0, -2.0], [5.0, 4.0]]])},
        {"query": [7], "side": ["helpful", "harmful"], "train": (dims, [[[11, 12], [13, 14]]])},
    )
    ax = plot_forest(kept, 7)
    texts = {t.get_position()[1]: t.get_text() for t in ax.get_yticklabels()}
    assert texts == {3: "11", 2: "12", 1: "14", 0: "13"}


def test_scores_without_degrees_of_freedom_have_normal_intervals() -> None:
    given = scores()
    del given.attrs["mcse_df"]
    ax = plot_forest(given, "q", k=3)
    low = np.concatenate([bars_of(c, 0) for c in ax.containers])[:, 0]
    order = np.argsort(given["influence"].values[0])
    expected = (given["influence"] - stats.norm.ppf(0.975) * given["mcse"]).values[0, order]
    np.testing.assert_allclose(low, expected)


def test_heat_map_sorts_by_class() -> None:
    given = scores().transpose("train", "query")
    ax = plot_heat_map(given, train_classes=[1, 0, 1, 0, 2, 0], query_classes=["b", "a"])
    image = ax.images[0]
    expected = given["influence"].transpose("query", "train").values[[1, 0]][:, [1, 3, 5, 0, 2, 4]]
    np.testing.assert_array_equal(image.get_array(), expected)
    low, high = image.get_clim()
    assert low == -high
    assert high == pytest.approx(np.quantile(abs(expected), 0.95))
    assert ax.get_xticks().tolist() == [1.0, 3.5, 5.0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "1", "2"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    lines = [line.get_xdata()[0] for line in ax.lines if line.get_xdata()[0] == line.get_xdata()[1]]
    assert lines == [2.5, 4.5]
    share = (abs(given["influence"]) > T * given["mcse"]).values.mean()
    assert ax.get_title() == f"{share:.0%} of the 95 % intervals are without 0"
    bare = plot_heat_map(scores(mcse=False))
    assert bare.get_title() == ""
    assert len(bare.lines) == 0
    nothing = plot_heat_map(xr.zeros_like(scores(mcse=False)))
    assert nothing.images[0].get_clim() == (-1, 1)


def test_agreement_has_both_errors_and_the_line() -> None:
    x, y = scores(0), scores(1, mcse=False, method="ekfac")
    turned = y.isel(train=slice(None, None, -1), query=[1, 0]).transpose("train", "query")
    ax = plot_agreement(x, turned)
    given = ax.containers[0].lines[0]
    np.testing.assert_array_equal(given.get_xdata(), x["influence"].values.ravel())
    np.testing.assert_array_equal(given.get_ydata(), y["influence"].values.ravel())
    assert ax.containers[0].has_xerr
    assert not ax.containers[0].has_yerr
    ends = bars_of(ax.containers[0], 0)
    half = T * x["mcse"].values.ravel()
    np.testing.assert_allclose(ends[:, 1] - ends[:, 0], 2 * half)
    line = next(line for line in ax.lines if line.get_label() == "x = y")
    assert line.get_slope() == 1
    r = np.corrcoef(given.get_xdata(), given.get_ydata())[0, 1]
    assert ax.get_title() == f"12 pairs, correlation {r:.3f}"
    assert ax.get_xlabel() == "bif: d E[φ] / d b,\nunits of φ, 95 % interval"
    assert ax.get_ylabel() == "ekfac: d E[φ] / d b,\nunits of φ"
    assert plot_agreement(x, xr.zeros_like(y)).get_title() == "12 pairs, correlation undefined"


def test_sweep_of_lds_tables() -> None:
    def table(shift: float, names: list[str]) -> xr.Dataset:
        value = np.array([0.2, 0.4]) + shift
        value = value if names == ["a", "b"] else value[::-1]
        ends = {"lower": ("scorer", value - 0.05), "upper": ("scorer", value + 0.1)}
        return xr.Dataset(
            {"lds": ("scorer", value), **ends, "ceiling": 0.9},
            {"scorer": names},
            {"confidence": 0.9},
        )

    found = {1.0: table(0.1, ["b", "a"]), 0.01: table(0.0, ["a", "b"])}
    ax = plot_sweep(found, labels={"a": "method a"})
    first, second, ceiling = ax.lines[:3]
    np.testing.assert_array_equal(first.get_xdata(), [0.01, 1.0])
    np.testing.assert_allclose(first.get_ydata(), [0.2, 0.3])
    np.testing.assert_allclose(second.get_ydata(), [0.4, 0.5])
    assert second.get_color() == style_of(1)["color"]
    assert ceiling.get_ydata()[0] == 0.9
    band = ax.collections[0].get_paths()[0].vertices
    assert {0.15, 0.3} <= set(band[band[:, 0] == 0.01][:, 1].round(9).tolist())
    assert ax.get_xscale() == "log"
    assert ax.get_xlabel() == "damping λ, curvature of the mean loss"
    assert ax.get_ylabel() == "LDS, 90 % interval"
    texts = [t.get_text() for t in ax.get_legend().get_texts()]
    assert texts == ["method a", "b", "noise ceiling"]


def test_sweep_of_influences() -> None:
    """Each setting's interval is by its own degrees of freedom."""
    one, two = (scores(seed).sel(query="q", train=["a", "c"]) for seed in (0, 1))
    two.attrs["mcse_df"] = 30.0
    ax = plot_sweep({0.0: one, 10.0: two}, "influence", along="n_beta")
    np.testing.assert_array_equal(
        ax.lines[1].get_ydata(), [one["influence"][1], two["influence"][1]]
    )
    band = ax.collections[1].get_paths()[0].vertices
    at = band[band[:, 0] == 10.0][:, 1]
    half = stats.t.ppf(0.975, 30) * float(two["mcse"][1])
    assert at.max() == pytest.approx(float(two["influence"][1]) + half)
    assert ax.get_xscale() == "linear"
    assert ax.get_xlabel() == "nβ (hot ← → cold)"
    scalar = plot_sweep({1.0: one.sel(train="a"), 2.0: two.sel(train="a")}, "influence")
    assert scalar.get_legend() is None
    bare = plot_sweep({x: scores(mcse=False).sel(query="q") for x in (1.0, 2.0)}, "influence")
    assert not bare.collections
    assert bare.get_ylabel() == "influence, d E[φ] / d b,\nunits of φ"


def test_errors_teach() -> None:
    given = scores()
    with pytest.raises(KeyError, match=r"no query 'z'; there are \['q', 'r'\]"):
        plot_forest(given, "z")
    with pytest.raises(ValueError, match="k is how many"):
        plot_forest(given, "q", k=0)
    tokens = given.rename(train="train_token")
    with pytest.raises(ValueError, match="token_influence"):
        plot_forest(tokens, "q")
    with pytest.raises(ValueError, match="a heat map needs"):
        plot_heat_map(tokens)
    with pytest.raises(ValueError, match="one class for each of the 6"):
        plot_heat_map(given, train_classes=[0])
    with pytest.raises(ValueError, match="plot_lds"):
        plot_agreement(given, scores(estimand="similarity"))
    with pytest.raises(ValueError, match="same pairs"):
        plot_agreement(given, given.isel(train=[0, 1]))
    with pytest.raises(ValueError, match="two settings"):
        plot_sweep({1.0: given})
    with pytest.raises(ValueError, match="at most one dimension"):
        plot_sweep({1.0: given, 2.0: given}, "influence")
    with pytest.raises(ValueError, match="different entries"):
        plot_sweep({1.0: given.isel(query=0), 2.0: given.isel(query=0, train=[1])}, "influence")
