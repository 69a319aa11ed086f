"""The store: layout, identity, what is refused, failed chains, and ArviZ."""

import json
import re
import warnings

import arviz_stats
import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from torch import nn

import bayesinf as bi
from bayesinf._rng import starting_points
from tests.cases import BY_NAME

CASE = BY_NAME["softmax-regression"]
OPTIONS = {"draws": 30, "warmup": 10, "batch_size": 4, "progress": False, "vectorize": False}


def run(task=None, sampler=None, posterior=None, **options):
    posterior = posterior or bi.LocalPosterior(task or CASE.task(), n_beta=10.0, gamma=5.0)
    return bi.sample(posterior, sampler or bi.SGLD(0.02), **{**OPTIONS, **options})


def quietly(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bi.ConvergenceWarning)
        warnings.simplefilter("ignore", bi.FailedChainsWarning)
        return function(*args, **options)


# ---------------------------------------------------------------- layout


@pytest.mark.parametrize("text", [False, True])
def test_layout_opens_with_plain_xarray(tmp_path, text):
    ids = {"train_ids": [f"é{i}" for i in range(12)], "query_ids": [f"q{i}" for i in range(5)]}
    path = tmp_path / "traces.zarr"
    task = CASE.task(**(ids if text else {}))
    traces = run(task, store=path, measurements=["margin"], chains=8)
    with xr.open_datatree(path, engine="zarr", consolidated=False) as tree:
        tree.load()
    assert {group: set(tree[group].data_vars) for group in tree.children} == {
        "train": {"loss"},
        "query": {"loss", "margin"},
        "sample_stats": {"lp", "step_size", "diverging", "distance", "acceptance_rate"},
    }
    for group, n in (("train", 12), ("query", 5)):
        assert tree[group].loss.dims == ("chain", "draw", group)
        assert tree[group].loss.shape == (8, 30, n)
        assert tree[group].loss.dtype == np.float32
        assert tree[group][group].values.tolist() == task.examples(group).ids.tolist()
        assert tree[group].chain.values.tolist() == list(range(8))
        assert tree[group].draw.values.tolist() == list(range(30))
        np.testing.assert_array_equal(tree[group].loss, traces.values(group))
    assert tree.sample_stats.lp.dims == ("chain", "draw")
    assert tree.attrs["config"]["posterior"] == bi.LocalPosterior(task, 10.0, 5.0).config()
    assert tree.attrs["config"]["task"]["checkpoint"] == task.fingerprint()["checkpoint"]
    assert tree.attrs["config"]["sampler"] == {
        "kernel": "SGLD",
        "step_size": 0.02,
        "preconditioner": None,
    }
    assert zarr.open_group(path, mode="r").metadata.zarr_format == 3
    assert zarr.open_array(path / "train" / "loss", mode="r").chunks[0] == 1
    assert bi.open_traces(path).draws == 30
    assert traces.superchains.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert repr(traces) == f"<TraceStore {path}: 8 chains × 30 draws>"
    scores = quietly(bi.bif, bi.open_traces(path))
    assert scores.train.values.tolist() == task.train.ids.tolist()


def test_recorded_values_are_those_of_the_positions(tmp_path):
    """Without steps to speak of, every draw is the starting point: all numbers are known."""
    task = CASE.task()
    posterior = bi.LocalPosterior(task, n_beta=10.0, gamma=5.0)
    traces = run(posterior=posterior, sampler=bi.SGLD(1e-14), jitter=0, measurements=["margin"])
    exact = task.losses(task.params, task.train.batch()).numpy()
    margin = task.measure("margin", task.params, task.query.batch()).numpy()
    tree = traces.tree.load()
    np.testing.assert_allclose(tree["train"].loss[2, 7], exact, rtol=1e-4)
    np.testing.assert_allclose(tree["query"].margin[1, 9], margin, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tree["sample_stats"].lp, -10 * exact.mean(), rtol=1e-5)
    assert float(tree["sample_stats"].distance.max()) < 1e-4
    assert (tree["sample_stats"].step_size == 1e-14).all()
    assert not tree["sample_stats"].diverging.any()


@pytest.mark.parametrize("potential", ["tilted", "plain"])
def test_distance_and_density_of_a_start(potential):
    """One step of no size: the draw is the starting point, ``z/√(γ + nβ·wd)`` from ``w0``."""
    task = CASE.task()
    posterior = bi.LocalPosterior(task, 10.0, 5.0, weight_decay=0.3, potential=potential)
    traces = run(posterior=posterior, sampler=bi.SGLD(1e-20), draws=1, warmup=0, jitter=0.5)
    stats = traces.tree["sample_stats"].load()
    center, batch = task.flatten(task.params), task.train.batch()
    for c, w in enumerate(starting_points(center, 4, 4, lambda z: 0.5 / 8**0.5 * z, 0)):
        away = w - center
        assert float(stats.distance[c, 0]) == pytest.approx(float(away.norm()), rel=1e-6)

        def objective(w):
            loss = task.losses(task.unflatten(w), batch).mean()
            return 10 * loss + 0.5 * 10 * 0.3 * w.square().sum()

        expected = objective(w) + 0.5 * 5 * away.square().sum()
        if potential == "tilted":  # up to a constant
            slope = torch.func.grad(objective)(center)
            expected += 0.5 * 10 * 0.3 * (-center.square().sum()) - slope @ away
        assert -float(stats.lp[c, 0]) == pytest.approx(float(expected), rel=1e-6)


def test_a_named_subset_is_observed():
    task = CASE.task(train_ids=[f"t{i}" for i in range(12)])
    every = run(task).values("train")
    some = run(task, observe={"train": ["t7", "t2"], "query": [4]})
    assert some.values("train").train.values.tolist() == ["t7", "t2"]
    np.testing.assert_allclose(some.values("train"), every.sel(train=["t7", "t2"]), rtol=1e-6)
    assert some.values("query").shape == (4, 30, 1)
    assert bool(np.isnan(some.tree["sample_stats"].lp).all())


def test_a_measurement_of_the_users_own():
    class Twice:
        def __call__(self, task, params, batch):
            return 2 * task.losses(params, batch)

    def plain(task, params, batch):
        return -task.losses(params, batch)

    traces = run(measurements={"twice": Twice(), "minus": plain})
    loss = traces.values("query")
    np.testing.assert_allclose(traces.values("query", "twice"), 2 * loss, rtol=1e-6)
    np.testing.assert_allclose(traces.values("query", "minus"), -loss, rtol=1e-6)
    base = quietly(bi.bif, traces)
    flipped = quietly(bi.bif, traces, measurement="minus")
    np.testing.assert_allclose(flipped.influence, -base.influence, rtol=1e-5, atol=1e-9)
    names = traces.config["measurements"]["query"]
    assert names["twice"].endswith("Twice")
    assert names["minus"].endswith("plain")


def test_tree_ends_at_the_committed_draws(tmp_path):
    path = tmp_path / "traces.zarr"
    traces = run(store=path)
    traces.grow(50)
    assert traces._root["sample_stats/lp"].shape[1] == 50
    again = bi.open_traces(path)
    assert again.draws == 30
    for node in again.tree.children.values():
        assert node.draw.values.tolist() == list(range(30))
    assert not np.isnan(again.tree["train"].loss).any()
    assert again.values("train").sizes["draw"] == 30
    xr.testing.assert_identical(again.tree["query"].to_dataset().load().loss,
                                traces.tree["query"].to_dataset().load().loss)  # fmt: skip


# ---------------------------------------------------------------- identity and refusals


def test_other_settings_are_refused_with_both_values(tmp_path):
    path = tmp_path / "traces.zarr"
    kept = run(store=path).values("train").values
    task = CASE.task()
    posterior = bi.LocalPosterior(task, 11.0, 5.0)
    cases = {
        "warmup: store has 10, asked for 11": {"warmup": 11},
        "seed: store has 0, asked for 1": {"seed": 1},
        "thin: store has 1, asked for 2": {"thin": 2},
        "chains: store has 4, asked for 8": {"chains": 8},
        "batch_size: store has 4, asked for None": {"batch_size": None},
        "jitter: store has 1.0, asked for 0.5": {"jitter": 0.5},
        "superchains: store has 4, asked for 2": {"superchains": 2},
        "observed.train: store has '12 examples": {"observe": {"train": [1]}},
        "measurements.query.margin: store has None, asked for 'margin'": {
            "measurements": ["margin"]
        },
        "posterior.n_beta: store has 10.0, asked for 11.0": {"posterior": posterior},
        "sampler.step_size: store has 0.02, asked for 0.03": {"sampler": bi.SGLD(0.03)},
        "sampler.kernel: store has 'SGLD', asked for 'RMSpropSGLD'": {
            "sampler": bi.RMSpropSGLD(0.02)
        },
        "task.query: store has": {"task": CASE.task(query_ids=range(1, 6))},
    }
    for words, options in cases.items():
        with pytest.raises(bi.StoreError, match=re.escape(words)) as caught:
            run(store=path, **options)
        assert str(path) in str(caught.value)
        assert "Use these settings, or another store" in str(caught.value)
    np.testing.assert_array_equal(bi.open_traces(path).values("train"), kept)
    memory = run()
    with pytest.raises(bi.StoreError, match=r"(?s)the store in memory .*seed: store has 0"):
        run(store=memory, seed=3)


def test_what_does_not_decide_a_draw_is_no_identity(tmp_path):
    path = tmp_path / "traces.zarr"
    first = run(store=path)
    again = run(
        store=path, draws=np.int64(30), seed=np.int64(0), vectorize=True, chunk_size=3,
        divergence_bound=1e9, on_divergence="drop",
    )  # fmt: skip
    np.testing.assert_array_equal(again.values("train"), first.values("train"))
    fewer = run(store=path, draws=5)
    assert fewer.draws == 30


def test_numbers_of_numpy_are_settings(tmp_path):
    posterior = bi.LocalPosterior(CASE.task(), np.float32(10), np.float64(5))
    options = {"batch_size": np.int64(4), "warmup": np.int32(10), "chains": np.int64(4)}
    got = run(posterior=posterior, sampler=bi.SGLD(np.float32(0.25)), max_excess=1.0, **options)
    expected = run(sampler=bi.SGLD(0.25), max_excess=1.0)
    np.testing.assert_array_equal(got.values("train"), expected.values("train"))
    assert json.loads(json.dumps(got.config)) == expected.config


def test_what_is_no_store_is_refused_and_left_alone(tmp_path):
    group = tmp_path / "scores.zarr"
    quietly(bi.bif, run()).to_zarr(group, zarr_format=3, consolidated=False)
    array, text, folder = tmp_path / "array.zarr", tmp_path / "a.txt", tmp_path / "folder"
    zarr.create_array(array, shape=(2,), dtype="int64")[:] = 7
    text.write_text("mine")
    folder.mkdir()
    (folder / "precious").write_text("mine")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(bi.StoreError, match="holds no traces of bayesinf"):
        run(store=group)
    for path in (array, text, folder):
        with pytest.raises(bi.StoreError, match="exists and is no trace store"):
            run(store=path)
    with pytest.raises(bi.StoreError, match=r"there is no trace store at .*sample\(\.\.\., store="):
        bi.open_traces(tmp_path / "nothing.zarr")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_what_was_not_recorded_is_named():
    traces = run()
    with pytest.raises(KeyError, match=r"'margin' of 'query' was not recorded; this store has"):
        traces.values("query", "margin")
    with pytest.raises(KeyError, match="'loss' of 'test' was not recorded"):
        traces.values("test")
    empty = bi.TraceStore.create(
        None, traces.config, {"train": np.arange(2)}, {"train": ["loss"]}, 3
    )
    assert (empty.draws, empty.payload, empty.commit_facts) == (0, None, {"draws_written": 0})
    assert repr(empty) == "<TraceStore in memory: 4 chains × 0 draws>"
    with pytest.raises(bi.StoreError, match="holds no draw yet"):
        empty.values("train")


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("draws must be at least 1; got 0", {"draws": 0}),
        ("warmup must be at least 0; got -1", {"warmup": -1}),
        ("chains must be at least 1; got 0", {"chains": 0}),
        ("thin must be at least 1; got 0", {"thin": 0}),
        ("chains=4 must be a multiple of superchains=3", {"superchains": 3}),
        (r"observe\['query'\] is empty", {"observe": {"query": []}}),
        (r"knows 'train' and 'query'; got \['test'\]", {"observe": {"test": None}}),
        ("batch_size must lie between 1 and the 12", {"batch_size": 13}),
    ],
)
def test_arguments_out_of_range(words, options):
    with pytest.raises(ValueError, match=words):
        run(**options)


def test_no_prior_needs_no_jitter():
    posterior = bi.LocalPosterior(CASE.task(), n_beta=10.0, gamma=0.0)
    with pytest.raises(ValueError, match="gamma > 0, or start all chains at w0 with jitter=0"):
        run(posterior=posterior)
    assert run(posterior=posterior, jitter=0).draws == 30


def test_a_batch_of_all_is_the_full_batch():
    full, all_of_them = run(batch_size=None), run(batch_size=12)
    np.testing.assert_array_equal(full.values("train"), all_of_them.values("train"))


def test_device_of_the_call():
    np.testing.assert_array_equal(run(device="cpu").values("train"), run().values("train"))


# ---------------------------------------------------------------- failed chains


class Explosive(nn.Linear):
    """NaN for the example that starts with 9, once the first weight exceeds 1."""

    def forward(self, x):
        broken = (x[:, :1] == 9) & (self.weight[0, 0] > 1)
        return torch.where(broken, float("nan"), super().forward(x))


def explosive(gamma=0.5):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, generator=g, dtype=torch.float64)
    x[7, 0] = 9
    y = torch.randint(3, (12,), generator=g)
    model = Explosive(4, 3).double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    ids = [f"t{i}" for i in range(12)]
    task = bi.Task(model, bi.Categorical(), train=(x, y), query=(x[:3], y[:3]), train_ids=ids)
    return bi.LocalPosterior(task, n_beta=1e-6, gamma=gamma)


def test_an_example_that_turns_nan_is_named():
    """Full-batch gradients would poison the weights: only observation sees this example first."""
    posterior = explosive()
    options = {"sampler": bi.SGLD(0.5), "warmup": 0, "batch_size": 1, "thin": 1, "seed": 1}
    with pytest.raises(bi.DivergenceError, match=r"chain \d: .*example 't7' is not finite at"):
        run(posterior=posterior, jitter=0, **options)


def test_divergence_raises_then_drops(tmp_path):
    path = tmp_path / "traces.zarr"
    undisturbed = run(draws=60, seed=0, sampler=bi.SGLD(0.05)).values("train")
    peak = undisturbed.mean("train").max("draw").values
    order = np.argsort(peak)
    bound = float(peak[order[1:3]].mean())  # between the second and the third
    fails = sorted(order[2:].tolist())
    options = {"draws": 60, "sampler": bi.SGLD(0.05), "divergence_bound": bound, "store": path}
    with pytest.raises(bi.DivergenceError) as caught:
        run(**options)
    message = str(caught.value)
    assert "Usual causes: step_size (0.05)" in message
    assert "on_divergence='drop'" in message
    first = int(np.argmax((undisturbed.mean("train") > bound).any("chain").values))
    assert f"exceeded the bound {bound:.4g} at step {10 + first + 1}" in message
    with pytest.raises(bi.DivergenceError, match="diverged"):  # and again, from the store alone
        run(**options)

    with pytest.warns(bi.FailedChainsWarning, match=re.escape(f"chains {fails} diverged")):
        traces = run(**options, on_divergence="drop")
    assert sorted(traces.failed) == fails
    assert traces.healthy == sorted(order[:2].tolist())
    assert traces.superchains.tolist() == [0, 1]
    with pytest.warns(bi.FailedChainsWarning, match=r"are left out; 2 of 4 chains remain"):
        values = traces.values("train")
    assert values.chain.values.tolist() == traces.healthy
    np.testing.assert_array_equal(values, undisturbed.isel(chain=traces.healthy))

    tree = traces.tree.load()
    assert tree["sample_stats"].diverging.any("draw").values.nonzero()[0].tolist() == fails
    for c in fails:
        stopped = tree["sample_stats"].diverging[c].values
        assert (np.isnan(tree["train"].loss[c]).all("train").values == stopped).all()
        assert np.isnan(tree["sample_stats"].lp[c].values[stopped]).all()
        assert stopped[-1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bi.ConvergenceWarning)
        with pytest.warns(bi.FailedChainsWarning, match="2 of 4 chains remain"):
            scores = bi.bif(traces, center="grand")
    assert scores.attrs["chains"] == 2
    x = undisturbed.isel(chain=traces.healthy).values.reshape(120, -1).astype(float)
    q = quietly(traces.values, "query").values.reshape(120, -1).astype(float)
    exact = -(10 / 12) * (q - q.mean(0)).T @ (x - x.mean(0)) / 119
    np.testing.assert_allclose(scores.influence, exact, rtol=1e-6, atol=1e-9)
    report = quietly(bi.diagnose, traces)
    alone = arviz_stats.rhat(undisturbed.isel(chain=traces.healthy).values[:, :, 0].astype(float))
    assert float(report.rhat_train[0]) == pytest.approx(float(alone), rel=1e-6)
    assert np.isfinite(report.rhat_train).all()


def test_dropping_from_the_start_is_the_same(tmp_path):
    undisturbed = run(draws=60, sampler=bi.SGLD(0.05)).values("train")
    peak = undisturbed.mean("train").max("draw").values
    bound = float(np.sort(peak)[2:].mean())
    with pytest.warns(bi.FailedChainsWarning, match=rf"chains \[{int(peak.argmax())}\] diverged"):
        traces = run(draws=60, sampler=bi.SGLD(0.05), divergence_bound=bound, on_divergence="drop")
    healthy = quietly(traces.values, "train")
    np.testing.assert_array_equal(healthy, undisturbed.isel(chain=traces.healthy))
    assert len(traces.healthy) == 3
    dead = traces.tree["train"].loss[int(peak.argmax())].load()
    alive = np.isfinite(dead).all("train").values
    exact = undisturbed[int(peak.argmax())].values
    np.testing.assert_array_equal(dead.values[alive], exact[alive])
    assert 0 < alive.sum() < 60


def test_when_every_chain_fails(tmp_path):
    options = {"store": tmp_path / "t.zarr", "divergence_bound": 0.0, "on_divergence": "drop"}
    with pytest.raises(bi.DivergenceError, match="4 of 4 chains diverged"):
        run(**options)
    with pytest.raises(bi.DivergenceError, match="4 of 4 chains diverged"):
        run(**options)
    assert bi.open_traces(tmp_path / "t.zarr").healthy == []


def test_a_step_too_large_fails_in_warm_up():
    with pytest.raises(bi.DivergenceError, match=r"its weights are not finite at step 200\n"):
        run(
            sampler=bi.SGLD(10.0),
            warmup=2000,
            posterior=bi.LocalPosterior(BY_NAME["linear-gaussian"].task(), 10.0, 5.0),
        )


# ---------------------------------------------------------------- ArviZ


def test_arviz_reads_it_without_a_warning():
    task = CASE.task()
    posterior = bi.LocalPosterior(task, n_beta=12.0, gamma=5.0)  # n_beta = n: loo means something
    traces = run(posterior=posterior, sampler=bi.SGLD(0.05), draws=400, thin=5, vectorize=True)
    tree = traces.to_arviz()
    loss = traces.values("train").values.astype(float)
    np.testing.assert_allclose(tree["log_likelihood"].loss, -loss, rtol=1e-6)
    rhat = arviz_stats.rhat(tree)
    ess = arviz_stats.ess(tree)
    report = bi.diagnose(traces)
    assert float(rhat.mean_train_loss) == pytest.approx(1, abs=0.05)
    assert 100 < float(ess.mean_query_loss) < 3000
    per_example = arviz_stats.rhat(tree["log_likelihood"].to_dataset()).loss
    np.testing.assert_allclose(per_example, report.rhat_train, atol=1e-4)
    loo = arviz_stats.loo(tree)
    lower = -loss.mean((0, 1)).sum() - 12
    assert lower < loo.elpd < float(-loss.mean((0, 1)).sum()) + 1
    assert np.isfinite(loo.p)
    np.testing.assert_allclose(tree["posterior"].mean_train_loss, loss.mean(2), rtol=1e-5)
    assert tree["sample_stats"].diverging.dtype == bool
    kept = {"lp", "step_size", "diverging", "acceptance_rate"}
    assert set(tree["sample_stats"].data_vars) == kept


@pytest.mark.parametrize("n_beta", [3.0, 24.0])
def test_covariances_with_the_log_likelihood_are_the_influence(n_beta):
    posterior = bi.LocalPosterior(CASE.task(), n_beta=n_beta, gamma=5.0)
    traces = run(posterior=posterior, draws=50)
    tree = traces.to_arviz()
    log_likelihood = tree["log_likelihood"].loss.values.reshape(200, -1).astype(float)
    phi = traces.values("query").values.reshape(200, -1).astype(float)
    centred = log_likelihood - log_likelihood.mean(0)
    exact = (phi - phi.mean(0)).T @ centred / 199
    scores = quietly(bi.bif, traces, center="grand")
    np.testing.assert_allclose(scores.influence, exact, rtol=1e-4, atol=1e-8)
