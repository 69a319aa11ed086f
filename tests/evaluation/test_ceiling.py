"""What a bank can tell: its noise ceiling with its interval, and its effective queries."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy.stats import binom, spearmanr

from bayesinf.evaluation import effective_queries, noise_ceiling, random_subsets

M, R, Q = 40, 4, 30


def make_bank(seed: int, *, shared: float = 0.0, signal: float = 1.0, subsets: int = M):
    g = np.random.default_rng(seed)
    effect = np.sqrt(shared) * g.standard_normal((subsets, 1, 1))
    effect = effect + np.sqrt(1 - shared) * g.standard_normal((subsets, 1, Q))
    loss = np.sqrt(signal) * effect + g.standard_normal((subsets, R, Q))
    return xr.Dataset(
        {
            "loss": (("subset", "seed", "query"), loss),
            "subset_mask": random_subsets(10, count=subsets, seed=seed),
        },
        coords={"query": np.arange(Q), "seed": np.arange(R)},
    )


@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_interval_of_the_ceiling_covers(shared: float) -> None:
    """200 banks, Pearson: false alarm 1e-4 for any true coverage in [0.9, 0.98].

    The interval is carried over from that of the halves' correlation, at 40 subsets a little less
    exact than that of an LDS.
    """
    known, held = np.sqrt(R / (R + 1)), 0
    for seed in range(200):
        found = noise_ceiling(make_bank(seed, shared=shared), correlation="pearson")
        held += bool(found["lower"] < known < found["upper"])
    assert binom.ppf(5e-5, 200, 0.9) <= held <= binom.isf(5e-5, 200, 0.98)


def test_ceiling_of_other_numbers_of_seeds() -> None:
    """Mean over 20 banks, four standard errors of the mean (0.003 at most) and a bias of 0.005."""
    for seeds in (1, 4, 50):
        found = [noise_ceiling(make_bank(k), seeds=seeds) for k in range(20)]
        known = 6 / np.pi * np.arcsin(np.sqrt(seeds / (seeds + 1)) / 2)
        assert abs(np.mean([float(one["ceiling"]) for one in found]) - known) < 0.017
    assert found[0].attrs["seeds"] == 50
    assert found[0].attrs["seeds_of_bank"] == R
    assert found[0].attrs["random"] == "subsets, seeds, queries"
    fixed = noise_ceiling(make_bank(0), queries="fixed")
    assert fixed.attrs["random"] == "subsets, seeds"
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        noise_ceiling(make_bank(0), seeds=0)
    with pytest.raises(ValueError, match="correlation must be 'spearman' or 'pearson'"):
        noise_ceiling(make_bank(0), correlation="kendall")  # type: ignore[arg-type]


@pytest.mark.parametrize(("shared", "known"), [(0.0, 30.0), (0.5, None), (1.0, None)])
def test_effective_queries_of_known_sharing(shared: float, known: float | None) -> None:
    """Outcomes correlate by ``ρ = shared·s/(s + 1/R)``; over 30 banks of 100 subsets.

    The mean of ``c`` that the reported numbers stand for is within four of its standard errors.
    """
    rho = shared * 2 / (2 + 1 / R)
    values = []
    for seed in range(30):
        bank = make_bank(seed, shared=shared, signal=2.0, subsets=100)
        found = effective_queries(bank, correlation="pearson")
        values.append((Q / float(found["effective_queries"]) - 1) / (Q - 1))
        assert found["lower"] <= found["effective_queries"] <= found["upper"] <= Q
    error = np.std(values, ddof=1) / 30**0.5
    assert abs(np.mean(values) - rho**2) < 4 * error + 0.001  # clipped at 0
    if known:
        assert Q / (1 + (Q - 1) * np.mean(values)) > 0.95 * known


def test_effective_queries_reports_mean_correlation_of_scipy() -> None:
    bank = make_bank(3, shared=0.3)
    found = effective_queries(bank, query=[4, 9, 2])
    truth = bank["loss"].mean("seed").sel(query=[4, 9, 2]).values
    r = spearmanr(truth).statistic[np.triu_indices(3, 1)]
    assert float(found["correlation"]) == pytest.approx(np.abs(r).mean())
    assert float(found["independent"]) == pytest.approx(np.sqrt(2 / np.pi / (M - 1)))
    c = (r**2 - (1 - r**2) / (M - 2)).mean()
    assert float(found["effective_queries"]) == pytest.approx(min(3, 3 / (1 + 2 * max(c, 0))))
    with pytest.raises(ValueError, match="which needs two; got 1"):
        effective_queries(bank, query=[4])
