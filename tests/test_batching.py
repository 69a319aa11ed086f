"""Batches of every kind: unbiased by exact enumeration, reproducible, less noisy as claimed."""

from itertools import combinations, pairwise, product

import numpy as np
import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf._batching import Batching, normalise
from bayesinf._rng import BatchStream, systematic
from tests.cases import BY_NAME

SIZE = 4
KINDS = {
    "uniform": {},
    "loss": {"probabilities": "loss"},
    "gradient": {"probabilities": "gradient", "floor": 0.3},
    "given": {"probabilities": np.arange(12.0)},
    "label": {"strata": "label"},
    "quantiles": {"strata": "loss", "quantiles": 3},
    "groups": {"strata": list("aabbbbbbbbbc")},
}
ANCHORS = {"none": {}, "checkpoint": {}, "moving": {"every": 3}}


@pytest.fixture(scope="module")
def task():
    return BY_NAME["mlp-categorical"].task()


def posterior(task, kind="tilted"):
    return bi.LocalPosterior(task, 20.0, 3.0, 0.1, kind)


def positions(task, chains=3, spread=0.3):
    g = torch.Generator().manual_seed(4)
    center = task.flatten(task.params)
    return center + spread * torch.randn(chains, len(center), generator=g, dtype=center.dtype)


def batching(task, kind="tilted", seed=0, chains=3, **options):
    target = posterior(task, kind)
    batches = normalise(bi.Batches(SIZE, **options), target)
    return Batching(batches, target.bind(vectorize=False), seed, chains)


def law(stream, n):
    """Every batch of a stream and its probability; one place at a time for systematic samples."""
    if stream.parts[0].cumulated is not None:
        p = np.diff(stream.parts[0].cumulated, prepend=0)
        return [([i], p[i]) for i in range(n)]
    choices = [list(combinations(part.members.tolist(), part.count)) for part in stream.parts]
    every = list(product(*choices))
    return [([i for part in batch for i in part], 1 / len(every)) for batch in every]


@pytest.mark.parametrize("potential", ["tilted", "plain"])
@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_estimator_is_unbiased(task, kind, anchor, potential):
    made = batching(task, potential, anchor=anchor, **ANCHORS[anchor], **KINDS[kind])
    made.at(0, positions(task, spread=0.1))
    w = positions(task)
    mean = torch.zeros_like(w)
    found = law(made.stream, 12)
    assert sum(p for _, p in found) == pytest.approx(1, abs=1e-12)
    rows = torch.tensor([batch for batch, _ in found])
    p = torch.tensor([p for _, p in found], dtype=torch.float64)
    if len(rows) > 60:  # an average over all batches is one over their members
        share = torch.zeros(12, dtype=torch.float64)
        share.index_add_(0, rows.flatten(), p.repeat_interleave(rows.shape[1]) / rows.shape[1])
        rows, p = torch.arange(12)[:, None], share
    for batch, chance in zip(rows, p.tolist(), strict=True):
        mean += chance * made.potential.grad(w, batch.expand(3, -1))
    exact = made.potential.grad(w)
    assert float((mean - exact).abs().max() / exact.abs().max()) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_averages_its_members(task, kind):
    """What the enumeration above takes for granted of batches of more than one."""
    made = batching(task, **KINDS[kind])
    w, batch = positions(task), made.at(0, positions(task))
    whole = made.potential.grad(w, batch)
    parts = [made.potential.grad(w, batch[:, k : k + 1]) for k in range(batch.shape[1])]
    torch.testing.assert_close(whole, torch.stack(parts).mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [5, 8, 12])
def test_systematic_samples_have_the_right_expectation(size):
    """Counts are constant between the offsets where a point crosses a cell's edge."""
    p = np.array([0.5, 0.01, 0.2, 0.0, 0.09, 0.2])
    edges = np.cumsum(p)
    cuts = np.unique(np.concatenate([[0, 1], (edges * size) % 1]))
    counts = np.zeros(len(p))
    for low, high in pairwise(cuts):
        found = np.bincount(systematic(edges, size, (low + high) / 2), minlength=len(p))
        assert np.all(np.abs(found - size * p) < 1 + 1e-9)
        counts += (high - low) * found
    np.testing.assert_allclose(counts, size * p, rtol=0, atol=1e-12)


def test_places_of_an_epoch_are_alike():
    """Chi-square of the first and the last place, 5 cells, above 60: false alarm below 1e-11."""
    p, epochs = np.array([0.4, 0.05, 0.3, 0.05, 0.2]), 3000
    stream = BatchStream(0, 1, 5, 2, None, p)
    for place in (0, 3):
        drawn = [int(stream.at(2 * e + place // 2)[0, place % 2]) for e in range(epochs)]
        counts = np.bincount(drawn, minlength=5)
        assert ((counts - epochs * p) ** 2 / (epochs * p)).sum() < 60


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_a_function_of_seed_chain_and_step(task, kind):
    many, few = batching(task, **KINDS[kind]), batching(task, chains=2, **KINDS[kind])
    other, w = batching(task, seed=1, **KINDS[kind]), positions(task)
    for step in (0, 7, 3, 100, 3):
        assert torch.equal(many.stream.at(step)[:2], few.stream.at(step))
        many.stream.probe(step)
        assert many.at(step, w).shape == (3, SIZE)
    assert not torch.equal(other.stream.at(0), many.stream.at(0))


def test_strata_share_every_batch(task):
    labels = np.array(list("aabbbbbbbbbc"))
    made = batching(task, strata=labels)
    assert [part.count for part in made.stream.parts] == [1, 2, 1]
    seen = set()
    for step in range(12):
        rows = made.stream.at(step)
        assert all(sorted(labels[row]) == ["a", "b", "b", "c"] for row in rows.numpy())
        seen |= set(rows.flatten().tolist())
    assert seen == set(range(12))
    weights = dict(zip(labels, made.potential.weights.tolist(), strict=True))
    assert weights == pytest.approx({"a": 2 * 4 / 12, "b": 9 * 4 / 24, "c": 4 / 12})


@pytest.mark.parametrize("floor", [0.05, 0.5, 1.0])
def test_no_weight_exceeds_the_floor_allows(task, floor):
    spike = np.zeros(12)
    spike[3] = 1.0
    weights = batching(task, probabilities=spike, floor=floor).potential.weights
    assert float(weights.max()) == pytest.approx(1 / floor)
    assert float(weights[3]) == pytest.approx(1 / (12 * (1 - floor) + floor))


# ---------------------------------------------------------------- noise


def spread(made, w, draws=200):
    """Trace of the covariance of the gradient."""
    rows = torch.stack([made.potential.grad(w, made.stream.probe(k)) for k in range(draws)])
    return float(rows.var(0).sum(1).mean())


def test_a_moving_anchor_is_exact_where_it_was_taken(task):
    made, w = batching(task, anchor="moving", every=5), positions(task)
    batch = made.at(0, w)
    torch.testing.assert_close(made.potential.grad(w, batch), made.potential.grad(w))
    before = made.potential.anchor
    assert made.at(4, w + 1) is not None
    assert made.potential.anchor is before
    made.at(5, w + 1)
    assert torch.equal(made.potential.anchor.position, w + 1)
    noisy = batching(task, anchor="none")
    assert spread(made, w + 1.01) < 0.01 * spread(noisy, w + 1.01)


def test_probabilities_and_strata_take_noise_away():
    """Five of fifty examples weigh thirty times as much; they are also a group of their own."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=g, dtype=torch.float64)
    x[:5] *= 30**0.5
    y = torch.randn(50, 1, generator=g, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    heavy = bi.Task(model, bi.Gaussian(), train=(x, y), query=(x, y))
    w = positions(heavy)
    plain = spread(batching(heavy), w)
    assert spread(batching(heavy, probabilities="gradient"), w) < 0.5 * plain
    ideal = x.square().sum(1).numpy()  # |x|²: what a gradient's difference is in proportion to
    assert spread(batching(heavy, probabilities=ideal), w) < 0.3 * plain
    groups = np.arange(50) < 5
    assert spread(batching(heavy, strata=groups, anchor="checkpoint"), w) < plain


# ---------------------------------------------------------------- in a run


@pytest.mark.parametrize(
    "options",
    [
        {"probabilities": "gradient"},
        {"strata": "label"},
        {"anchor": "none"},
        {"anchor": "moving", "every": 7},
        {"probabilities": "loss", "anchor": "moving", "every": 1},
    ],
)
def test_a_resumed_run_is_bitwise_the_same(task, options):
    target = posterior(task)

    def run(draws, store=None):
        return bi.sample(
            target, bi.Underdamped(1e-3, 2.0), draws=draws, warmup=5, thin=2, vectorize=False,
            batch_size=bi.Batches(SIZE, **options), store=store, max_excess=9.0, progress=False,
        )  # fmt: skip

    whole, parts = run(9), run(4)
    run(9, parts)
    for group in ("train", "query"):
        assert np.array_equal(whole.values(group).values, parts.values(group).values)
    assert np.ptp(whole.values("train").values) > 0
    assert whole.commit_facts["checks"] == parts.commit_facts["checks"]


def test_one_way_to_say_it(task):
    for kind, default in (("tilted", "checkpoint"), ("plain", "none")):
        target = posterior(task, kind)
        for same in (4, np.int64(4), bi.Batches(4), bi.Batches(4, anchor=default)):
            assert normalise(same, target).config() == 4
        for full in (None, 12, bi.Batches(12)):
            assert normalise(full, target) is None
        made = normalise(bi.Batches(4, anchor="moving", every=3, strata="loss"), target)
        assert made.config() == {
            "size": 4, "anchor": "moving", "every": 3, "strata": "loss", "quantiles": 8,
        }  # fmt: skip
    one = bi.Batches(4, probabilities=np.arange(12.0)).config()
    assert one == bi.Batches(4, probabilities=torch.arange(12.0)).config()
    assert one != bi.Batches(4, probabilities=np.arange(12.0) ** 2).config()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"probabilities": "loss", "strata": "label"}, "by probabilities or by strata; got both"),
        ({"probabilities": "label"}, r"probabilities must be one of .*'gradient'.*got 'label'"),
        ({"strata": "gradient"}, r"strata must be one of \('label', 'loss'\).*got 'gradient'"),
        ({"probabilities": "loss", "floor": 0}, r"floor must lie in \(0, 1\]; got 0"),
        ({"strata": "loss", "quantiles": 1}, "quantiles must be at least 2; got 1"),
        ({"anchor": "center"}, "anchor must be one of .*'moving'.*got 'center'"),
        ({"anchor": "moving"}, "needs every=.*got anchor='moving', every=None"),
        ({"every": 5}, "needs every=.*got anchor=None, every=5"),
        ({"anchor": "moving", "every": 0}, "at least 1.*every=0"),
        ({"probabilities": [1.0]}, r"probabilities must have one value for each of the 12"),
        ({"strata": np.zeros((12, 2))}, r"strata must have one value .*got shape \(12, 2\)"),
        ({"probabilities": -np.ones(12)}, "none negative and not all 0; got values from -1"),
        ({"probabilities": np.zeros(12)}, "not all 0; got values from 0 to 0"),
        ({"probabilities": np.full(12, np.inf)}, "must be finite"),
        ({"strata": np.arange(12)}, "batch of 4 cannot hold one example of each of 12 strata"),
    ],
)
def test_errors(task, options, match):
    with pytest.raises(ValueError, match=match):
        batching(task, **options)


def test_labels_must_be_labels():
    with pytest.raises(ValueError, match=r"one integer target per example; got torch.float64"):
        batching(BY_NAME["mlp-gaussian"].task(), strata="label")


@pytest.mark.parametrize("size", [0, 13])
def test_sizes_that_cannot_be_are_refused(task, size):
    with pytest.raises(ValueError, match=f"between 1 and the 12 training examples.*got {size}"):
        normalise(bi.Batches(size), posterior(task))
