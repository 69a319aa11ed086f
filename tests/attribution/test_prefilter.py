"""Candidates: who is kept, what is lost, and that the two passes make up the whole."""

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import binom
from torch import nn

import bayesinf as bi
from bayesinf.attribution._prefilter import _interval, prefilter


def scores(values, estimand="influence", train=None):
    values = np.asarray(values, dtype=float)
    return bi.make_scores(
        values,
        query=np.arange(len(values)),
        train=np.arange(values.shape[1]) if train is None else np.asarray(train),
        method="cheap",
        estimand=estimand,
    )


CHEAP = [[-5, 1, 0, 3, -4, 2], [-3, -9, 0, 8, 0, 7]]


def test_union_of_each_querys_best():
    helpful = prefilter(scores(CHEAP, train=list("abcdef")), 2)
    assert helpful.kept.tolist() == ["a", "b", "e"]
    assert helpful.rest.tolist() == ["c", "d", "f"]
    assert helpful.report.kept.values.tolist() == [True, True, False, False, True, False]
    assert helpful.report.attrs["share"] == 0.5
    assert prefilter(scores(CHEAP), 2, direction="harmful").kept.tolist() == [3, 5]
    assert prefilter(scores(CHEAP), 1, direction="both").kept.tolist() == [0, 1, 3]
    assert prefilter(scores(CHEAP), 6).rest.tolist() == []


def test_recall_on_a_sample_of_queries_and_of_training_examples():
    fine = scores([[-9, 0, -8, 0, -7, 0], [0, -2, -1, 0, 0, -3]])
    found = prefilter(scores(CHEAP), 2, reference=fine, top=3)  # kept: 0, 1, 4
    assert found.report.recall.values.tolist() == [2 / 3, 1 / 3]
    assert found.report.attrs["recall"] == 0.5
    assert found.report.attrs["lower"] < 0.5 < found.report.attrs["upper"]
    part = fine.isel(query=[1], train=[0, 1, 2, 3])
    found = prefilter(scores(CHEAP), 2, reference=part, top=2)
    assert found.report.recall.values.tolist() == [0.5]
    both = prefilter(scores(CHEAP), 1, reference=fine, top=1, direction="both")  # 0, 1, 3 kept
    assert both.report.recall.values.tolist() == [1.0, 0.5]


def test_interval_of_recall():
    """One trial a query where all agree; exact for independent trials of top = 1."""
    lower, upper = _interval(np.ones(20), 10, 0.95)
    assert (round(lower, 6), upper) == (round(0.025 ** (1 / 20), 6), 1.0)
    lower, upper = _interval(np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0] * 5), 1, 0.95)
    assert binom.sf(29, 40, lower) == pytest.approx(0.025, rel=0.1)  # 30 of 40; ddof costs 1
    assert binom.cdf(30, 40, upper) == pytest.approx(0.025, rel=0.1)


def test_coverage_of_the_interval(rng):
    """Recall of each query drawn from a beta law with mean 0.8 and 10 marks each, 30 queries.

    Of 400 intervals at 95 % at least 0.92 must cover; at exactly 95 % fewer do with chance 0.4 %.
    """
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        own = generator.beta(4, 1, size=30)
        lower, upper = _interval(generator.binomial(10, own) / 10, 10, 0.95)
        covered += lower <= 0.8 <= upper
    assert covered / 400 >= 0.92


@pytest.mark.filterwarnings("ignore::bayesinf.ConvergenceWarning")  # the chain may be short
def test_two_passes_make_the_whole(rng):
    """Candidates first, the rest later, by the same chain: the scores of one pass over all."""
    x = torch.randn(12, 3, generator=rng, dtype=torch.float64)
    y = x @ torch.randn(3, 1, generator=rng, dtype=torch.float64)
    task = bi.Task(nn.Linear(3, 1).double(), bi.Gaussian(), train=(x, y), query=(x[:4], y[:4]))
    posterior = bi.LocalPosterior(task, n_beta=12.0, gamma=5.0)

    def run(observe):
        return bi.sample(
            posterior, bi.SGLD(0.01), chains=4, draws=20, warmup=5, seed=3,
            observe=observe, progress=False,
        )  # fmt: skip

    found = prefilter(bi.grad_dot(task), 2)
    assert 2 <= len(found.kept) < 12
    whole = run(None)
    parts = [run({"train": ids, "query": None}) for ids in (found.kept, found.rest)]
    losses = whole.values("train")
    again = xr.concat([part.values("train") for part in parts], "train").sel(train=losses.train)
    xr.testing.assert_equal(again, losses)
    scores = bi.bif(whole, center="grand").influence
    joined = xr.concat([bi.bif(part, center="grand").influence for part in parts], "train")
    joined = joined.sel(train=scores.train)
    np.testing.assert_allclose(joined, scores, rtol=2e-6, atol=2e-7)  # float32, of size 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be an integer from 1 to 6"),
        ({"k": 7}, "k must be an integer from 1 to 6"),
        ({"top": 7, "reference": scores(CHEAP)}, "top must be an integer from 1 to 6"),
        ({"direction": "up"}, "direction must be one of"),
        ({"confidence": 1.0}, "confidence must lie between 0 and 1"),
        (
            {"scores": scores(CHEAP, "similarity"), "direction": "both"},
            "cheap only rank by similarity",
        ),
        (
            {"reference": scores(CHEAP, train=range(3, 9))},
            r"3 train ids that the scores lack, such as \[6, 7, 8\]",
        ),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        prefilter(**{"scores": scores(CHEAP), "k": 2, **options})
