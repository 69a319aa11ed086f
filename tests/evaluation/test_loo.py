"""Leave-one-out correlation: values, disattenuation of a known truth, its interval, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy.stats import binom, spearmanr

from bayesinf import ConvergenceWarning
from bayesinf._scores import make_scores
from bayesinf.evaluation import lds_table, loo_correlation
from bayesinf.evaluation._subsets import leave_one_out

N, Q = 80, 10


def make(influence: np.ndarray, **attrs: object) -> xr.Dataset:
    ids = {"query": np.arange(len(influence)), "train": np.arange(N)}
    return make_scores(influence, **ids, method="m", estimand="influence", attrs=attrs)


def make_bank(effects: np.ndarray, noise: float, runs: int, seed: int) -> xr.Dataset:
    """Leaving out example i changes the loss by ``−effects[q, i]``; seeds are common numbers."""
    subsets = leave_one_out(N)
    g = np.random.default_rng(seed)
    mean = (subsets.values @ effects.T)[:, None]
    own = noise * g.standard_normal((N + 1, runs, len(effects)))
    loss = mean + own + 5 * g.standard_normal((runs, len(effects)))
    return xr.Dataset(
        {"loss": (("subset", "seed", "query"), loss), "subset_mask": subsets},
        coords={"query": np.arange(len(effects)), "seed": np.arange(runs)},
    )


def test_is_the_correlation_of_minus_influence_with_the_change() -> None:
    g = np.random.default_rng(0)
    effects = g.standard_normal((Q, N))
    scores = make(effects + g.standard_normal((Q, N)), seconds=2)
    bank = make_bank(effects, 0.5, 6, 1)
    table = loo_correlation([scores], bank)
    mean = bank["loss"].mean("seed").values
    change = (mean[1:] - mean[0]).T
    rho = [
        spearmanr(-a, b).statistic for a, b in zip(scores["influence"].values, change, strict=True)
    ]
    np.testing.assert_allclose(table["correlation_query"][0], rho, atol=1e-12)
    assert float(table["correlation"].item()) == pytest.approx(np.mean(rho))
    assert float(table["seconds"].item()) == 2
    plain = lds_table([scores], bank.isel(subset=slice(1, None)))
    for name in ("standard_error", "lower", "upper"):
        assert float(table[name].item()) == pytest.approx(float(plain[name].item()))
    assert float(table["ceiling"]) == pytest.approx(float(plain["ceiling"]))
    ratio = table["correlation"] / table["ceiling"]
    assert float(table["disattenuated"].item()) == pytest.approx(float(ratio.item()))
    assert table.attrs["random"] == "examples left out, seeds, queries"
    assert (table.attrs["examples"], table.attrs["seeds"]) == (N, 6)
    exact = loo_correlation(make(effects), make_bank(effects, 0.0, 2, 1))
    assert float(exact["disattenuated"].item()) == pytest.approx(1.0)
    assert float(exact["reliability"]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "correlation", ["pearson", pytest.param("spearman", marks=pytest.mark.slow)]
)
def test_disattenuation_finds_the_correlation_with_the_truth(correlation: str) -> None:
    """Signal 0.3 of a seed's variance, 8 seeds, true correlation 0.6: the mean and the coverage.

    60 simulations: four standard errors of the mean (0.006) and 0.01 for the scale of ranks and
    the finite sample; coverage with a false alarm of 1e-4 for any true one in [0.9, 0.98].
    """
    found, held, plain = [], 0, []
    known = 0.6 if correlation == "pearson" else 6 / np.pi * np.arcsin(0.3)
    for seed in range(60):
        g = np.random.default_rng([9, seed])
        effects, noise = g.standard_normal((2, Q, N))
        scores = make(0.6 * effects + 0.8 * noise)
        bank = make_bank(effects, 0.3**-0.5, 8, seed)
        row = loo_correlation(scores, bank, correlation=correlation).isel(scorer=0)  # type: ignore[arg-type]
        found.append(float(row["disattenuated"]))
        plain.append(float(row["correlation"]))
        held += bool(row["disattenuated_lower"] < known < row["disattenuated_upper"])
        assert row["reliability_lower"] < row["reliability"] < row["reliability_upper"]
    assert abs(np.mean(found) - known) < 0.035
    assert np.mean(plain) < known - 0.08
    assert binom.ppf(5e-5, 60, 0.9) <= held <= binom.isf(5e-5, 60, 0.98)


def test_without_signal_it_says_so() -> None:
    g = np.random.default_rng(2)
    effects = g.standard_normal((Q, N))
    bank = make_bank(1e-3 * effects, 1.0, 2, 3)
    with pytest.warns(ConvergenceWarning, match="over 2 seeds hold no signal"):
        table = loo_correlation({"a": make(effects), "b": make(-effects)}, bank)
    for name in ("disattenuated", "disattenuated_lower", "disattenuated_standard_error"):
        assert np.isnan(table[name]).all()
    assert not np.isnan(table["correlation"]).any()
    assert float(table["reliability_lower"]) == 0


def test_refusals() -> None:
    effects = np.random.default_rng(2).standard_normal((Q, N))
    scores, bank = make(effects), make_bank(effects, 0.1, 2, 0)
    with pytest.raises(ValueError, match="the bank has one"):
        loo_correlation(scores, bank.isel(seed=[0]))
    with pytest.raises(ValueError, match="two subsets leave out the same example"):
        loo_correlation(scores, bank.isel(subset=[0, 1, 2, 3, 4, 4]))
    wide = bank.copy(deep=True)
    wide["subset_mask"][3, :10] = False
    with pytest.raises(ValueError, match=r"1 of 81 subsets leave out more than one example \(up"):
        loo_correlation(scores, wide)
    with pytest.raises(ValueError, match="correlation must be"):
        loo_correlation(scores, bank, correlation="rank")  # type: ignore[arg-type]
