"""``sample_jax``: pytrees, precision, going on, failures, stores and what reads them."""

import re
import warnings

import numpy as np
import pytest
import torch

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import bayesinf as bi  # noqa: E402
from bayesinf import _run  # noqa: E402
from bayesinf.interop.jax import _chains, _programs, sample_jax  # noqa: E402
from tests import quadratic  # noqa: E402
from tests.interop.jax import small  # noqa: E402
from tests.samplers import jax_kernels  # noqa: E402

TRAIN, QUERY, PARAMS = small.data("train"), small.data("query"), small.params()


def run(kernel="SGLD", *, loss=small.loss, params=PARAMS, train=TRAIN, query=QUERY, **options):
    kernel = small.KERNELS[kernel] if isinstance(kernel, str) else kernel
    return sample_jax(loss, params, train, query, kernel, **{**small.OPTIONS, **options})


def contents(traces):
    tree = traces.tree.load()
    return {
        f"{group}/{name}": values.values
        for group in tree.children
        for name, values in tree[group].to_dataset().variables.items()
    }


def same(one, other):
    one, other = contents(one), contents(other)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    assert np.isfinite(one["train/loss"]).all()


# ---------------------------------------------------------------- the same law as torch


def moments(traces):
    """Means and variances of all losses within each chain, ``(C, 34)``."""
    parts = [traces.values(group).values.astype(np.float64) for group in ("train", "query")]
    x = np.concatenate(parts, axis=2)
    return np.concatenate([x.mean(1), x.var(1)], axis=1)


def apart(one, other):
    error = one.var(0, ddof=1) / len(one) + other.var(0, ddof=1) / len(other)
    return float((np.abs(one.mean(0) - other.mean(0)) / error**0.5).max())


SLOW = pytest.mark.slow  # what they take is the compilation of one more kernel


@pytest.mark.parametrize(
    "kernel",
    ["RMSpropSGLD", pytest.param("SGLD", marks=SLOW), pytest.param("Underdamped", marks=SLOW)],
)
def test_the_law_is_that_of_torch_chains(kernel):
    """Two samples of 32 independent chains with minibatches, on a loss that is not quadratic.

    Welch's z of 34 numbers a kernel, with about 62 degrees of freedom, is refused beyond 6: 1e-7
    each, a false-alarm rate of 1e-5 for the three. Variances larger by 40 % must be refused.
    """
    options = {"draws": 150, "warmup": 100, "chains": 32, "superchains": 32, "batch_size": 4}
    ours = moments(run(kernel, seed=1, potential="plain", **options))
    theirs = moments(
        bi.sample(
            small.posterior("plain"), small.KERNELS[kernel], seed=2, max_excess=10.0, thin=2,
            progress=False, **options,
        )
    )  # fmt: skip
    assert apart(ours, theirs) < 6
    assert apart(ours * np.repeat([1, 1.4], 17), theirs) > 6


def test_influence_is_the_exact_one_of_a_gaussian():
    """SGLD's own law on a linear regression; every pair within 5 standard errors (2e-4 of all)."""
    problem = quadratic.make(weight_decay=0.05)
    p = problem.posterior
    train, query = (
        tuple(part.numpy() for part in problem.task.examples(split).batch())
        for split in ("train", "query")
    )
    traces = sample_jax(
        jax_kernels.loss, {"w": problem.w0.numpy().astype("float32")}, train, query,
        bi.SGLD(0.004), n_beta=p.n_beta, gamma=p.gamma, weight_decay=p.weight_decay, chains=32,
        draws=250, warmup=100, thin=5, progress=False, train_ids=[f"é{i}" for i in range(30)],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bi.ConvergenceWarning)
        scores = bi.bif(traces)
    exact = problem.influence(problem.covariance(0.004)).numpy()
    assert float(np.abs((scores.influence - exact) / scores.mcse).max()) < 5
    assert np.corrcoef(scores.influence.values.ravel(), exact.ravel())[0, 1] > 0.99
    assert scores.train.values[3] == "é3"
    report = bi.diagnose(traces)
    assert report.attrs["ok"], report.attrs["verdict"]
    found = bi.llc(traces)  # of a Gaussian: half of tr[(H/nβ)·Σ]·nβ, here by its definition
    loss = 0.5 * p.n_beta / 30 * np.trace(train[0] @ problem.covariance(0.004).numpy() @ train[0].T)
    assert float(found.llc) == pytest.approx(loss, abs=5 * float(found.mcse))
    tree = traces.to_arviz()
    np.testing.assert_allclose(tree["log_likelihood"].loss, -2 * traces.values("train"), rtol=1e-6)


# ---------------------------------------------------------------- parameters in their structure


def test_parameters_come_in_the_structure_they_were_given_in():
    """Equinox, nested dicts as of Flax, and what in them is no weight; losses are those there."""
    eqx = pytest.importorskip("equinox")
    module = eqx.nn.MLP(4, 3, 5, 1, activation=jax.nn.softplus, key=jax.random.key(0))
    nested = {"params": {"dense": (PARAMS["first"], [PARAMS["second"]])}, "step": np.int32(7)}

    def of_module(net, batch):
        assert isinstance(net, eqx.nn.MLP)
        assert net.in_size == 4
        x, y = batch["x"], batch["label"]
        scores = jax.nn.log_softmax(jax.vmap(net)(x))
        return -jnp.take_along_axis(scores, y[:, None], axis=1)[:, 0]

    def of_nested(variables, batch):
        first, (second,) = variables["params"]["dense"]
        assert variables["step"].dtype == jnp.int32
        return small.loss({"first": first, "second": second}, batch) + 0 * variables["step"]

    still = {"jitter": 0.0, "draws": 1, "warmup": 0, "potential": "plain"}
    named = [{"x": x, "label": y} for x, y in (TRAIN, QUERY)]
    for loss, params, train, query in (
        (of_module, module, *named),
        (of_nested, nested, TRAIN, QUERY),
    ):
        traces = run(bi.SGLD(1e-20), loss=loss, params=params, train=train, query=query, **still)
        exact = loss(params, jax.tree.map(jnp.asarray, query))
        for row in traces.values("query").values[:, 0]:
            np.testing.assert_allclose(row, exact, rtol=1e-5)
    assert traces.config["task"]["dtype"] == "float32"


def test_half_precision_is_sampled_in_float32_and_rounded_in_the_loss():
    lower = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), PARAMS)
    seen = []

    def loss(p, batch):
        seen.append((p["first"].dtype, batch[0].dtype))
        return small.loss(p, batch).astype(jnp.bfloat16)

    traces = run(loss=loss, params=lower, draws=4, warmup=2)
    assert {str(t) for pair in seen for t in pair} == {"bfloat16", "float32"}
    assert traces.config["task"]["dtype"] == "bfloat16"
    assert traces.commit_facts["checks"]["swallowed_perturbations"] < 0.1
    assert (traces.values("train").std(("chain", "draw")) > 0).all()
    with pytest.warns(bi.PrecisionWarning, match="bfloat16, in which the network computes"):
        run(bi.SGLD(1e-12), loss=loss, params=lower, draws=4, warmup=2, jitter=1e-4)


def test_precision_follows_the_parameters_in_either_mode():
    with pytest.raises(ValueError, match=r"(?s)params\['first'\] is float64 .*jax_enable_x64', Tr"):
        run(params=small.params("float64"))
    alone = run(draws=3, potential="plain").values("train")
    with jax.enable_x64(True):
        beside = run(draws=3, potential="plain")
    assert beside.config["task"]["dtype"] == "float32"
    np.testing.assert_allclose(beside.values("train"), alone, rtol=1e-5)


# ---------------------------------------------------------------- one program, going on


@pytest.mark.parametrize(
    "kernel",
    [
        "RMSpropSGLD",
        "Underdamped",
        "MALA",
        *(pytest.param(name, marks=SLOW) for name in ("SGLD", "SGHMC", "SGNHT")),
    ],
)
def test_every_kernel_goes_on_where_it_stopped(tmp_path, kernel):
    """Bit for bit, on disk, and other settings, checkpoints or more draws compile nothing."""
    if kernel == "MALA":
        pytest.importorskip("blackjax")
    whole = run(kernel)
    assert (whole.values("train").std("draw") > 1e-3).all()
    rate = whole.tree["sample_stats"].acceptance_rate.values
    assert (rate.mean() > 0.3 and rate.mean() < 1) if kernel == "MALA" else np.isnan(rate).all()
    programs = _programs.advance._cache_size(), _programs.observe._cache_size()
    for draws in (1, 7, 20):
        parts = run(kernel, store=tmp_path / "t.zarr", draws=draws)
    same(parts, whole)
    changed = {name: 1.1 * w for name, w in PARAMS.items()}
    other = type(small.KERNELS[kernel])(**{**vars(small.KERNELS[kernel]), "step_size": 0.003})
    run(other, params=changed, n_beta=10.0, gamma=3.0, warmup=70, thin=3, seed=5)
    assert programs == (_programs.advance._cache_size(), _programs.observe._cache_size())


@pytest.mark.parametrize("after", [0, 3])
def test_a_run_that_is_killed_goes_on(tmp_path, monkeypatch, after):
    class Kill(BaseException):
        pass

    original, left = _chains.JaxChains.observe, [after]

    def observe(chains):
        left[0] -= 1
        if left[0] < 0:
            raise Kill
        return original(chains)

    with monkeypatch.context() as broken:
        broken.setattr(_chains.JaxChains, "observe", observe)
        broken.setattr(_run, "_COMMIT_SECONDS", 0.0)
        with pytest.raises(Kill):
            run("RMSpropSGLD", store=tmp_path / "t.zarr")
    assert bi.open_traces(tmp_path / "t.zarr").draws == after
    same(run("RMSpropSGLD", store=tmp_path / "t.zarr"), run("RMSpropSGLD"))


def test_how_it_is_computed_does_not_matter():
    whole = run().values("train")
    few = run(chains=2, superchains=2, chunk_size=12).values("train")  # one after the other
    np.testing.assert_allclose(few, whole[:2], rtol=1e-4)
    assert not np.allclose(run(seed=1).values("train"), whole)
    ends = [run(thin=t, draws=120 // t, warmup=0).values("train")[:, -1] for t in (1, 40)]
    np.testing.assert_array_equal(*ends)


def test_some_are_observed_and_sums_are_kept():
    every = run(train_ids=[f"t{i}" for i in range(12)], measurements={"margin": small.margin})
    ids = {"train": ["t7", "t2"], "query": [4]}
    some = run(train_ids=[f"t{i}" for i in range(12)], observe=ids)
    expected = every.values("train").sel(train=["t7", "t2"])
    np.testing.assert_allclose(some.values("train"), expected, rtol=1e-5)
    assert bool(np.isnan(some.tree["sample_stats"].lp).all())
    sums = bi.StreamingCovariance()
    run(store=sums, train_ids=[f"t{i}" for i in range(12)], measurements={"margin": small.margin})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bi.ConvergenceWarning)
        for name in ("loss", "margin"):
            kept, traced = (bi.bif(t, measurement=name).influence for t in (sums, every))
            np.testing.assert_allclose(kept, traced, rtol=1e-4, atol=1e-7)
    assert not np.allclose(every.values("query", "margin"), every.values("query"))


def test_other_settings_are_refused(tmp_path):
    def other(p, batch):
        return small.loss(p, batch)

    path = tmp_path / "t.zarr"
    run(store=path, draws=2)
    for options, said in (
        ({"seed": 1}, "seed: store has 0, asked for 1"),
        ({"loss": other}, r"task.likelihood: store has 'jax, tests.interop.jax.small.loss'"),
        ({"params": {k: 2 * v for k, v in PARAMS.items()}}, "task.checkpoint"),
        ({"train": (TRAIN[0] + 1, TRAIN[1])}, "task.train"),
        ({"kernel": "SGHMC"}, "sampler.kernel: store has 'SGLD', asked for 'SGHMC'"),
    ):
        with pytest.raises(bi.StoreError, match=f"(?s)made with other settings.*{said}"):
            run(store=path, **options)
    with pytest.raises(bi.StoreError, match=r"task\.likelihood"):
        bi.sample(
            small.posterior(), small.KERNELS["SGLD"], store=path, draws=3, warmup=10, thin=2,
            progress=False,
        )  # fmt: skip


# ---------------------------------------------------------------- failures


def test_chains_that_fail_are_dropped_and_named():
    """The first weight of one chain starts beyond where the loss is defined."""
    peak = run(bi.SGLD(1e-20), draws=1, warmup=0).values("train").mean("train")[:, 0].values
    order = np.argsort(peak)
    options = {"divergence_bound": float(peak[order[-2:]].mean()), "draws": 4, "warmup": 0}
    worst = int(order[-1])
    said = rf"chain {worst}: its mean loss exceeded the bound .* at step 2"
    with pytest.raises(bi.DivergenceError, match=rf"1 of 4 chains diverged:\n  {said}"):
        run(bi.SGLD(1e-20), **options)
    with pytest.warns(bi.FailedChainsWarning, match=re.escape(f"chains [{worst}] diverged")):
        traces = run(bi.SGLD(1e-20), on_divergence="drop", **options)
    assert worst not in traces.healthy
    assert len(traces.healthy) == 3
    tree = traces.tree.load()
    assert np.isnan(tree["train"].loss[worst]).all()
    assert tree["sample_stats"].diverging[worst].all()
    assert np.isfinite(tree["train"].loss[traces.healthy]).all()
    assert float(tree["sample_stats"].distance[traces.healthy].min()) > 0.1


def test_a_step_that_is_too_long():
    with pytest.raises(bi.DivergenceError, match=r"its weights are not finite at step 50"):
        run(bi.SGLD(100.0), warmup=60)


def test_an_example_without_a_loss_is_named():
    broken = QUERY[0].copy()
    broken[3] = np.nan
    with pytest.raises(bi.DivergenceError, match="query/loss of example 'q3' is not finite"):
        run(query=(broken, QUERY[1]), query_ids=[f"q{i}" for i in range(5)])


def test_noise_of_small_batches_is_measured_and_warned_of():
    options = {"potential": "plain", "n_beta": 4000.0, "gamma": 2000.0, "batch_size": 1}
    with pytest.warns(bi.GradientNoiseWarning, match="gradient noise heats the directions"):
        traces = run(bi.SGLD(2e-4), **options, max_excess=0.05)
    assert traces.commit_facts["checks"]["excess_temperature"]["typical"] > 0.05
    assert run().commit_facts["checks"]["excess_temperature"] is None


# ---------------------------------------------------------------- errors that teach


def mean_loss(p, batch):
    return small.loss(p, batch).mean()


def two_columns(p, batch):
    return jnp.stack([small.loss(p, batch)] * 2, axis=1)


ERRORS = {
    "mean": ({"loss": mean_loss}, ValueError, r"\(3,\).*got shape \(\)\. Usual cause: a mean"),
    "columns": ({"loss": two_columns}, ValueError, r"got shape \(3, 2\)\. Sum over the outputs"),
    "of one": ({"loss": lambda p, b: jnp.zeros(1)}, ValueError, r"got shape \(1,\).*jax\.vmap\("),
    "pair": ({"loss": lambda p, b: (b[0], b[1])}, ValueError, "got a tuple"),
    "integers": ({"loss": lambda p, b: b[1]}, TypeError, "floating-point numbers; got int32"),
    "rows": (
        {"train": (TRAIN[0], TRAIN[1][:5])}, ValueError,
        r"first dimensions differ.*train\[0\]': \(12, 4\), 'train\[1\]': \(5,\)",
    ),
    "text": ({"query": (QUERY[0], np.array(list("abcde")))}, TypeError, r"query\[1\] must .*<U1"),
    "a number": ({"train": {"x": 3.0}}, TypeError, r"train\['x'\] must be an array .*got float"),
    "nothing": ({"train": (TRAIN[0][:0], TRAIN[1][:0])}, ValueError, "train= holds no examples"),
    "empty": ({"train": ()}, ValueError, "or there is no array"),
    "ids": ({"query_ids": list("aabcd")}, ValueError, "query_ids must be unique: 'a' occurs 2"),
    "unknown": ({"observe": {"train": [3, 99]}}, KeyError, r"unknown train ids \[99\]"),
    "no weights": (
        {"params": {"first": np.arange(3), "second": 1.0}}, TypeError,
        "no floating-point array among its 2 leaves: nothing to sample",
    ),
    "complex": ({"params": {"w": np.ones(2, np.complex64)}}, TypeError, "complex64; weights"),
    "kernel": ({"kernel": bi.HMC(0.1, 3)}, TypeError, "kernels MALA, RMSpropSGLD, .*got HMC"),
    "batches": ({"batch_size": bi.Batches(4)}, TypeError, "got Batches. Weighted and stratified"),
    "size": ({"batch_size": 13}, ValueError, "batch_size must lie between 1 and the 12"),
    "MALA": ({"kernel": bi.MALA(0.1), "batch_size": 4}, ValueError, "MALA takes no minibatches"),
    "chunk": ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1; got 0"),
    "measurement": ({"measurements": {"loss": small.loss}}, ValueError, "other than 'loss'"),
    "measured": (
        {"measurements": {"mean": mean_loss}}, ValueError, "measurement 'mean' must give one number"
    ),
    "warm-up": ({"kernel": "RMSpropSGLD", "warmup": 0}, ValueError, "during warm-up and had none"),
    "gamma": ({"gamma": -1.0}, ValueError, "gamma must be finite and ≥ 0; got -1"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_teach(name):
    options, kind, said = ERRORS[name]
    kernel = options.get("kernel", "SGLD")
    options = {k: v for k, v in options.items() if k != "kernel"}
    with pytest.raises(kind, match=f"(?s){said}"):
        run(kernel, **options)


def test_preconditioners_are_torchs():
    task = small.torch_task()
    inverse = bi.fit_curvature(task, fisher="enumerated").inverse(0.5)
    with pytest.raises(TypeError, match=r"sample_jax has none; got SGLD with one\. Leave it out"):
        run(bi.SGLD(0.1, bi.Preconditioner(inverse, small.N_BETA)))


def test_the_caller_is_named_by_warnings():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(bi.SGLD(2e-4), potential="plain", n_beta=4000.0, batch_size=1, max_excess=1e-9)
    assert {w.filename for w in caught} == {__file__}
    assert torch.is_grad_enabled()
