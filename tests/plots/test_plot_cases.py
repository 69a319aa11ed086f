"""Figures of observations hold the numbers of their tables."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from bayesinf.bayesian import case_influence, case_summary, loss_map
from bayesinf.plots import plot_case_influence, plot_case_summary, plot_forest, plot_loss_map
from bayesinf.plots._look import ACCENT, style_of
from tests.bayesian.closed_forms import LinearRegression, regression

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def close() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def tree() -> xr.DataTree:
    """20 observations; number 4 has a leverage, and so a Pareto k, near 1."""
    plain = regression(n=20)
    x, y = plain.x.copy(), plain.y.copy()
    x[4], y[4] = 12 * x[4], 0.0
    return LinearRegression(x, y).tree(0, draws=250)


def test_index_plot_is_in_posterior_standard_deviations(tree: xr.DataTree) -> None:
    scores, summary = case_influence(tree), case_summary(tree)
    ax = plot_case_influence(scores, "w[1]", summary=summary, named=2)
    own = scores.sel(query="w[1]")
    value = (own["influence"] / own["posterior_sd"]).values
    points = ax.containers[0]
    np.testing.assert_array_equal(points.lines[0].get_xdata(), np.arange(20))
    np.testing.assert_allclose(points.lines[0].get_ydata(), value)
    half = stats.t.ppf(0.975, scores.attrs["mcse_df"]) * own["mcse"] / own["posterior_sd"]
    ends = np.array([s[:, 1] for s in points.lines[2][0].get_segments()])
    np.testing.assert_allclose(ends[:, 1] - ends[:, 0], 2 * half)
    (marks,) = [line for line in ax.lines if line.get_marker() == "D"]
    heavy = np.flatnonzero(summary["pareto_k"].values >= summary.attrs["pareto_threshold"])
    assert 4 in heavy
    np.testing.assert_array_equal(marks.get_xdata(), heavy)
    np.testing.assert_allclose(marks.get_ydata(), value[heavy])
    assert marks.get_color() == ACCENT
    named = {text.get_text() for text in ax.texts}
    assert named == {str(i) for i in np.argsort(-abs(value))[:2]}
    assert ax.get_ylabel() == "influence on w[1],\nposterior sd, 95 % interval"
    bare = plot_case_influence(scores, "w[1]", named=0)
    assert not bare.texts
    assert bare.get_legend() is None


def test_summary_has_three_panels_with_their_limits(tree: xr.DataTree) -> None:
    summary = case_summary(tree)
    axes = plot_case_summary(summary)
    for ax, name in zip(axes, ("largest_shift", "p_waic", "pareto_k"), strict=True):
        np.testing.assert_array_equal(ax.containers[0].lines[0].get_ydata(), summary[name])
    t = stats.t.ppf(0.975, summary.attrs["mcse_df"])
    for ax, name in ((axes[0], "largest_shift"), (axes[1], "p_waic")):
        ends = np.array([s[:, 1] for s in ax.containers[0].lines[2][0].get_segments()])
        np.testing.assert_allclose(ends[:, 1] - ends[:, 0], 2 * t * summary[f"{name}_mcse"])
    assert not axes[2].containers[0].has_yerr
    limits = [
        line.get_ydata()[0] for ax in axes for line in ax.lines if line.get_linestyle() == "--"
    ]
    assert limits == [0.4, summary.attrs["pareto_threshold"]]
    assert "4" in {text.get_text() for text in axes[2].texts}
    assert axes[2].get_xlabel() == "observation, in the order of the data"
    assert axes[0].figure.get_axes() == list(axes)


def test_forest_of_observations(tree: xr.DataTree) -> None:
    scores = case_influence(tree)
    ax = plot_forest(scores, "w[0]", k=3)
    assert ax.get_ylabel() == "observation"
    best = scores["train"].values[scores["influence"].sel(query="w[0]").values.argmin()]
    texts = {t.get_position()[1]: t.get_text() for t in ax.get_yticklabels()}
    assert texts[5] == str(best)


def test_map_shows_places_and_classes(tree: xr.DataTree) -> None:
    found = loss_map(tree, clusters=2)
    ax = plot_loss_map(found)
    cluster = found["cluster"].values
    for k, line in enumerate(ax.lines):
        np.testing.assert_array_equal(
            np.column_stack(line.get_data()), found["embedding"].values[cluster == k]
        )
        assert line.get_color() == style_of(k)["color"]
        assert line.get_marker() == style_of(k)["marker"]
    assert ax.get_legend().get_title().get_text() == "cluster"
    share = found["share"].values
    assert ax.get_ylabel() == f"axis 2, {share[1]:.0%} of the squared distances 2(1 − ρ)"
    classes = np.array(["x"] * 5 + ["y"] * 15)
    named = plot_loss_map(found, classes=classes)
    assert [len(line.get_xdata()) for line in named.lines] == [5, 15]
    assert [t.get_text() for t in named.get_legend().get_texts()] == ["x", "y"]
    assert plot_loss_map(loss_map(tree)).get_legend() is None


def test_errors_teach(tree: xr.DataTree) -> None:
    scores, summary = case_influence(tree), case_summary(tree)
    with pytest.raises(ValueError, match="plot_forest"):
        plot_case_influence(scores.drop_vars("posterior_sd"), "w[0]")
    with pytest.raises(ValueError, match="other observations"):
        plot_case_influence(scores, "w[0]", summary=summary.isel(train=slice(1, None)))
    with pytest.raises(ValueError, match=r"lacks \['largest_shift'"):
        plot_case_summary(scores)
    with pytest.raises(ValueError, match=r"plot_loss_map\(loss_map\(data\)\)"):
        plot_loss_map(scores)
    with pytest.raises(ValueError, match="one class for each of the 20"):
        plot_loss_map(loss_map(tree), classes=[1])
