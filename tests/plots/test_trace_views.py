"""Views of chains hold the traces' numbers, and ArviZ reads a store without a warning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import arviz_stats
import numpy as np
import pytest

import bayesinf as bi
from bayesinf.plots import plot_ess_evolution, plot_rank, plot_trace
from bayesinf.plots._look import ACCENT, COLORS, INK
from tests.cases import BY_NAME

plt = pytest.importorskip("matplotlib.pyplot")
arviz_plots = pytest.importorskip("arviz_plots")


@pytest.fixture(autouse=True)
def close() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def traces() -> bi.TraceStore:
    posterior = bi.LocalPosterior(BY_NAME["softmax-regression"].task(), n_beta=12.0, gamma=30.0)
    return bi.sample(posterior, bi.SGLD(0.05), draws=200, warmup=50, thin=5, progress=False)


def test_arviz_reads_a_store_without_a_warning(traces: bi.TraceStore) -> None:
    """Warnings are errors here. nβ = n, so that ``loo`` means something."""
    tree = traces.to_arviz()
    loss = traces.values("train").mean("train").values
    summary = arviz_stats.summary(tree)
    assert summary.loc["mean_train_loss", "mean"].item() == pytest.approx(loss.mean(), rel=0.05)
    ess = float(arviz_stats.ess(tree)["mean_train_loss"])
    assert 50 < ess < 2000
    assert float(arviz_stats.rhat(tree)["mean_train_loss"]) < 1.1
    mcse = float(arviz_stats.mcse(tree)["mean_train_loss"])
    assert mcse == pytest.approx(loss.std() / np.sqrt(ess), rel=0.2)
    assert np.isfinite(arviz_stats.loo(tree).elpd)
    for view in (arviz_plots.plot_trace, arviz_plots.plot_rank):
        drawn = view(tree, backend="matplotlib")
        assert set(drawn.viz["plot"].data_vars) == set(tree["posterior"].data_vars)


def test_traces_are_lines_of_chains(traces: bi.TraceStore, tmp_path: Path) -> None:
    drawn = plot_trace(traces, train=[3], query=[0, 2])
    panels = ["mean_train_loss", "mean_query_loss", "distance", "lp"]
    panels += ["loss of train 3", "loss of query 0", "loss of query 2"]
    assert list(drawn.viz["trace"].data_vars) == panels
    lines = drawn.viz["trace"]["loss of train 3"].values
    assert len(lines) == traces.chains
    for chain, line in enumerate(lines):
        np.testing.assert_array_equal(line.get_ydata(), traces.values("train").values[chain, :, 3])
        assert line.get_color() == COLORS[chain]
    assert drawn.viz["title"]["lp"].item().get_text() == "lp"
    assert drawn.viz["plot"]["lp"].item().get_xlabel() == "Draw"
    drawn.savefig(tmp_path / "trace.png")
    assert (tmp_path / "trace.png").stat().st_size > 0


def test_ranks_of_chains_that_agree_stay_in_the_band(traces: bi.TraceStore) -> None:
    """Against a rank transform of our own; the band is of independent draws: half its width at the
    middle is near 2.9 standard deviations of a share of 200.
    """
    from scipy.stats import rankdata

    drawn = plot_rank(traces)
    values = traces.values("train").mean("train").values
    ranks = rankdata(values).reshape(values.shape)[1]
    share = (ranks - ranks.min()) / np.ptp(ranks)  # as ArviZ scales them
    line = drawn.viz["ecdf_lines"]["mean_train_loss"].values[1]
    x, y = (np.asarray(part, dtype=float) for part in line.get_data())
    expected = (share <= x[:, None]).mean(1) - x
    np.testing.assert_allclose(y, expected, atol=0.021)  # ArviZ counts by cells
    assert np.corrcoef(y, expected)[0, 1] > 0.95
    band = drawn.viz["credible_interval"]["mean_train_loss"].values.ravel()[0]
    low, high = np.percentile(band.get_paths()[0].vertices[:, 1], [0, 100])
    assert 0.07 < high < 0.15
    assert -0.15 < low < -0.07
    assert low < y.min()
    assert y.max() < high


def test_effective_draws_grow_to_those_of_all_draws(traces: bi.TraceStore) -> None:
    drawn = plot_ess_evolution(traces)
    tree = traces.to_arviz()
    for kind, color in (("bulk", INK), ("tail", ACCENT)):
        line = drawn.viz[f"ess_{kind}_line"]["distance"].item()
        assert line.get_xdata()[-1] == 800
        expected = float(arviz_stats.ess(tree, method=kind)["distance"])
        assert line.get_ydata()[-1] == pytest.approx(expected)
        assert line.get_color() == color


def test_lp_is_shown_where_it_is_known() -> None:
    """A run that observes some of the training set has no lp."""
    posterior = bi.LocalPosterior(BY_NAME["softmax-regression"].task(), n_beta=12.0, gamma=5.0)
    some = bi.sample(
        posterior,
        bi.SGLD(0.05),
        draws=20,
        warmup=0,
        progress=False,
        observe={"train": [0, 5], "query": None},
    )
    assert "lp" not in plot_trace(some).viz["trace"].data_vars


def test_a_chain_that_failed_is_named(
    traces: bi.TraceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bi.TraceStore, "failed", {1: "it diverged"})
    with pytest.warns(bi.FailedChainsWarning, match=r"chains \[1\] diverged") as caught:
        drawn = plot_trace(traces)
    assert drawn.viz["trace"]["distance"].sizes == {"chain": 3}
    assert caught[0].filename == __file__


def test_options_reach_arviz(traces: bi.TraceStore) -> None:
    drawn = plot_trace(traces, var_names=["distance"], color=["k"], figure_kwargs={"dpi": 50})
    assert list(drawn.viz["trace"].data_vars) == ["distance"]
    assert drawn.viz["trace"]["distance"].values[0].get_color() == "k"
    assert drawn.viz["figure"].item().dpi == 50


def test_errors_teach(traces: bi.TraceStore) -> None:
    with pytest.raises(TypeError, match=r"arviz_plots\.plot_rank\(data\)"):
        plot_rank(traces.to_arviz())  # type: ignore[arg-type]
    with pytest.raises(KeyError, match=r"train examples \[99\]"):
        plot_trace(traces, train=[1, 99])
