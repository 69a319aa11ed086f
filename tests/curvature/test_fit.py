"""Every form of a block against the dense Fisher, and what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf import fit_curvature
from bayesinf.curvature import _fit, _kronecker, _kronecker_sums, _spool
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._bases import DenseBasis, KroneckerBasis, StandardBasis
from tests import exact
from tests.layered_cases import LAYERED, LAYERED_BY_NAME

FISHERS = ["enumerated", "empirical"]
grid = pytest.mark.parametrize("case", LAYERED, ids=lambda c: c.name)
fishers = pytest.mark.parametrize("fisher", FISHERS)


def vectors(block):
    """``U`` ``(P·M, P·M)``, a basis vector a column."""
    eye = torch.eye(block.layer.size, dtype=block.eigenvalues.dtype)
    return block.basis.unrotate(eye.view(-1, *block.layer.shape)).flatten(1).T


@fishers
@grid
def test_forms_in_the_standard_basis(case, fisher):
    task, truth = case.task(), exact.fisher(case, fisher)
    dense, diagonal, identity = (
        fit_curvature(task, fisher=fisher, form=form, batch_size=4)
        for form in ("dense", "diagonal", "identity")
    )
    for one, two, three in zip(dense.blocks, diagonal.blocks, identity.blocks, strict=True):
        expected = exact.block(truth, task, one.layer)
        size = len(expected)
        assert (one.form, two.form, three.form) == ("dense", "diagonal", "identity")
        exact.close_or_zero(one.dense(), expected, 1e-10)
        exact.close_or_zero(two.dense(), expected.diagonal().diag(), 1e-10)
        scaled = torch.eye(size, dtype=truth.dtype) * expected.trace() / size
        exact.close_or_zero(three.dense(), scaled, 1e-10)


@fishers
@grid
def test_ekfac_is_the_diagonal_of_the_fisher_in_its_basis(case, fisher):
    task, truth = case.task(), exact.fisher(case, fisher)
    ekfac, kfac = (fit_curvature(task, fisher=fisher, form=form) for form in ("ekfac", "kfac"))
    assert ekfac.trace() == pytest.approx(float(truth.trace()), rel=1e-10)
    for block, plain in zip(ekfac.blocks, kfac.blocks, strict=True):
        expected = exact.block(truth, task, block.layer)
        u = vectors(block)
        assert float((u.T @ u - torch.eye(len(u), dtype=u.dtype)).abs().max()) < 1e-12
        exact.close_or_zero(block.eigenvalues.flatten(), (u.T @ expected @ u).diagonal(), 1e-10)
        assert block.trace() == pytest.approx(float(expected.trace()), rel=1e-10)
        error, worse = ((b.dense() - expected).norm() for b in (block, plain))
        assert float(error) <= float(worse) + 1e-12 * float(expected.norm())
        if block.form == "dense":
            exact.close_or_zero(block.dense(), expected, 1e-10)
        else:
            assert (block.form, plain.form) == ("ekfac", "kfac")
            assert torch.equal(vectors(plain), u)


@fishers
@grid
def test_norms_and_vectors_in_every_form(case, fisher):
    """Kronecker forms are for matrices unless they are asked for by name."""
    task, truth = case.task(), exact.fisher(case, fisher)
    for block in fit_curvature(task, fisher=fisher, form={"*": "ekfac"}).blocks:
        assert block.form == "ekfac"
        expected = exact.block(truth, task, block.layer)
        u = vectors(block)
        exact.close_or_zero(block.eigenvalues.flatten(), (u.T @ expected @ u).diagonal(), 1e-10)


# ---------------------------------------------------------------- Kronecker factors


def positions_that_count(task, layer, a):
    """``(n, T)``: not masked, and not padding of an embedding."""
    inputs = task.train.batch()[0]
    keep = torch.ones(a.shape[:2], dtype=torch.bool)
    if isinstance(inputs, dict):
        mask = inputs["attention_mask"].bool()
        keep = mask.repeat(1, a.shape[1] // mask.shape[1])
    if layer.kind == "embedding":
        keep = keep & (a.sum((2, 3)) > 0)
    return keep


def kronecker(task, layer, fisher):
    """``S ⊗ A`` by setting, from inputs and perturbations of outputs; of matrices, from gradients.

    One output derivative serves both settings.
    """
    if layer.kind in ("free", "tied"):
        return dict.fromkeys(("expand", "reduce"), of_matrices(task, layer, fisher))
    a, ds = exact.signals(task, layer, fisher)
    keep = positions_that_count(task, layer, a)
    found = {"expand": covariances(a * keep[:, :, None, None], ds * keep[:, None, :, None, None])}
    found["expand"] = [(s / keep.sum(), a / task.n) for s, a in found["expand"]]
    if layer.kind == "embedding":
        found["expand"] = [(a, s) for s, a in found["expand"]]
        found["reduce"] = found["expand"]
    else:
        weights = keep.to(a) / keep.sum(1, keepdim=True)
        mean = torch.einsum("nt,ntgm->ngm", weights, a).unsqueeze(1)
        found["reduce"] = [
            (s / task.n, a / task.n) for s, a in covariances(mean, ds.sum(2, keepdim=True))
        ]
    return {
        name: torch.block_diag(*[torch.kron(s, a) for s, a in pairs])
        for name, pairs in found.items()
    }


def covariances(a, ds):
    """Sums over examples and positions, ``(S, A)`` of every group."""
    inputs = torch.einsum("ntgi,ntgj->gij", a, a)
    outputs = torch.einsum("nktgp,nktgq->gpq", ds, ds)
    return list(zip(outputs, inputs, strict=True))


def of_matrices(task, layer, fisher):
    truth = exact.block(exact.FISHER[fisher](task), task, layer)
    p, m = layer.shape
    moment = truth.view(p, m, p, m)
    s, a = torch.einsum("imjm->ij", moment), torch.einsum("iaib->ab", moment)
    return torch.kron(s, a) / (truth.trace() or 1.0)


@fishers
@grid
def test_kronecker_factors_are_input_and_output_covariances(case, fisher):
    task = case.task()
    fits = {
        sequence: fit_curvature(
            task, fisher=fisher, form={"*": "kfac"}, sequence=sequence, batch_size=4
        )
        for sequence in ("expand", "reduce")
    }
    for layer in fits["expand"].layers:
        if case.name == "idle" and layer.name != "used":
            assert not fits["expand"][layer.name].eigenvalues.any()
            continue
        for sequence, expected in kronecker(task, layer, fisher).items():
            got = fits[sequence][layer.name].dense()
            if (case.name, layer.name, sequence) == ("instance-norm", "0", "reduce"):
                assert float(got.norm() + expected.norm()) < 1e-25  # derivatives sum to 0
            else:
                exact.close(got, expected, 1e-10)
        assert fits[sequence].info["sequence"] == sequence


@pytest.mark.parametrize("name", ["mlp-categorical", "conv-groups", "words"])
def test_sides_that_are_too_large_keep_the_identity(name):
    task, case = LAYERED_BY_NAME[name].task(), LAYERED_BY_NAME[name]
    truth = exact.fisher(case, "empirical")
    curvature = fit_curvature(task, fisher="empirical", max_factor=3)
    sides = [block.layer.shape for block in curvature.blocks]
    assert max(max(shape) for shape in sides) > 3
    for block in curvature.blocks:
        assert isinstance(block.basis, KroneckerBasis)
        rows, columns = block.layer.shape[0] // block.layer.groups, block.layer.shape[1]
        assert (block.basis.q_s is None) == (rows > 3 or block.layer.kind == "embedding")
        assert (block.basis.q_a is None) == (columns > 3)
        u = vectors(block)
        expected = (u.T @ exact.block(truth, task, block.layer) @ u).diagonal()
        exact.close(block.eigenvalues.flatten(), expected, 1e-10)


# ---------------------------------------------------------------- where theory says exact


def linear_task(rng, model, likelihood=None, *, n=9, features=(4,), classes=None):
    x = torch.randn(n, *features, generator=rng, dtype=torch.float64)
    if classes:
        y = torch.randint(classes, (n,), generator=rng)
    else:
        y = torch.randn(n, 3, generator=rng, dtype=torch.float64)
    return bi.Task(model.double(), likelihood or bi.Gaussian(), train=(x, y), query=(x[:2], y[:2]))


def deep_linear():
    return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in [(4, 5), (5, 3)]))


def exactly(task, **options):
    truth = exact.gauss_newton(task)
    for form in ("kfac", "ekfac"):
        for block in fit_curvature(task, fisher="enumerated", form=form, **options).blocks:
            exact.close(block.dense(), exact.block(truth, task, block.layer), 1e-10)


def test_deep_linear_network_with_squared_loss(rng):
    exactly(linear_task(rng, deep_linear()))


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = deep_linear()

    def forward(self, x):
        return self.layers(x).mean(1)


def test_deep_linear_network_with_pooled_positions_and_reduce(rng):
    """Eschenhagen et al. 2023, Proposition 2; "expand" is not exact there."""
    task = linear_task(rng, Pooled(), features=(3, 4))
    exactly(task, sequence="reduce")
    truth = exact.gauss_newton(task)
    for block in fit_curvature(task, fisher="enumerated", form="kfac").blocks:
        expected = exact.block(truth, task, block.layer)
        assert float((block.dense() - expected).norm()) > 0.01 * float(expected.norm())


def test_a_single_input(rng):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    exactly(linear_task(rng, model, bi.Categorical(), n=1, classes=3))


def test_an_embedding_in_isolation(rng):
    """One token an example and a linear map after it: ``diag(frequency) ⊗ WᵀW``."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    ids = torch.randint(5, (9,), generator=rng)
    y = torch.randn(9, 3, generator=rng, dtype=torch.float64)
    task = bi.Task(
        model.double(), bi.Gaussian(), train=(ids, y), query=(ids, y), parameters="0.weight"
    )
    exactly(task)
    block = fit_curvature(task, fisher="enumerated")["0"]
    w = model[1].weight.detach()
    expected = torch.kron((torch.bincount(ids, minlength=5).double() / 9).diag(), w.T @ w)
    exact.close(block.dense(), expected, 1e-12)


def test_softmax_regression_only_ekfac_has_the_right_trace(rng):
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.mul_(6)  # confident on long inputs: |a|² and tr ∇² are far from independent
    task = linear_task(rng, model, bi.Categorical(), classes=3)
    truth = exact.gauss_newton(task)
    ekfac, kfac = (fit_curvature(task, fisher="enumerated", form=f) for f in ("ekfac", "kfac"))
    assert ekfac.trace() / float(truth.trace()) == pytest.approx(1, abs=1e-12)
    assert abs(kfac.trace() / float(truth.trace()) - 1) > 0.05


# ---------------------------------------------------------------- sampled labels


def standard_errors(name, seeds, draws):
    """z of every entry of the sampled Fisher's blocks against the enumerated one's."""
    task = LAYERED_BY_NAME[name].task()
    truth = fit_curvature(task, fisher="enumerated", form="dense")
    found = [
        fit_curvature(task, fisher="sampled", form="dense", draws=draws, seed=seed).dense()
        for seed in range(seeds)
    ]
    sampled, truth = torch.stack(found), truth.dense()
    sd = sampled.std(0)
    varies = sd > 1e-9 * truth.diagonal().max()
    assert int(varies.sum()) > len(truth)
    assert torch.allclose(sampled.mean(0)[~varies], truth[~varies], rtol=0, atol=1e-9)
    return ((sampled.mean(0) - truth) / sd * seeds**0.5)[varies]


@pytest.mark.parametrize(
    "name", ["softmax-regression", "mlp-bernoulli", "linear-gaussian-2", "tagging"]
)
def test_sampled_labels_average_to_the_enumerated_fisher(name):
    """750 entries in all, t with 59 degrees of freedom: a false alarm in 2·10⁻⁴ of all seeds."""
    z = standard_errors(name, seeds=60, draws=3)
    assert float(z.abs().max()) < 5.8


def test_sampled_tokens_average_to_the_enumerated_fisher():
    """260 entries, t with 29 degrees of freedom: a false alarm in 3·10⁻⁵ of all seeds."""
    z = standard_errors("decoder-left", seeds=30, draws=8)
    assert float(z.abs().max()) < 7


def test_more_draws_are_closer():
    task = LAYERED_BY_NAME["mlp-categorical"].task()
    truth = fit_curvature(task, fisher="enumerated", form="dense").dense()

    def distance(draws):
        fits = (
            fit_curvature(task, fisher="sampled", form="dense", draws=draws, seed=s).dense()
            for s in range(10)
        )
        return float(sum((fit - truth).square().sum() for fit in fits))

    # 16 times less in expectation; 20 such ratios of other seeds are 8.7 to 26.8, and log-normal
    # with their spread one below 4 has a chance below 10⁻⁵
    assert distance(1) > 4 * distance(16)


def test_sampled_labels_come_from_the_seed_alone():
    for name in ("mlp-gaussian", "mlp-bernoulli", "cnn", "decoder-tied"):
        task = LAYERED_BY_NAME[name].task()
        state = torch.random.get_rng_state()
        one, two, other = (fit_curvature(task, fisher="sampled", seed=seed) for seed in (3, 3, 4))
        assert torch.equal(torch.random.get_rng_state(), state)
        for first, second, third in zip(one.blocks, two.blocks, other.blocks, strict=True):
            exact.same(first.eigenvalues, second.eigenvalues)
            assert not torch.equal(first.eigenvalues, third.eigenvalues)
        assert (one.info["seed"], one.info["draws"]) == (3, 1)


# ---------------------------------------------------------------- how it is computed


TOKENS = ["mlp-categorical", "cnn", "sequence", "called-twice", "tied", "positions-vector", "raw",
          "segmentation", "decoder-tied", "decoder-left"]  # fmt: skip


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("fisher", ["enumerated", "sampled", "empirical"])
def test_the_curvature_does_not_depend_on_the_batch_size(name, fisher):
    task = LAYERED_BY_NAME[name].task()
    options = {"fisher": fisher, "seed": 4, "draws": 2}
    whole = fit_curvature(task, batch_size=99, **options).dense()
    for size in (1, 4):
        exact.close(fit_curvature(task, batch_size=size, **options).dense(), whole, 1e-9)


@pytest.mark.parametrize("name", ["cnn", "decoder-tied"])
@pytest.mark.parametrize("fisher", ["enumerated", "sampled"])
def test_kept_gradients_are_the_computed_ones(name, fisher, monkeypatch):
    task = LAYERED_BY_NAME[name].task()
    again = Costs()
    options = {"fisher": fisher, "draws": 2, "batch_size": 4}
    expected = fit_curvature(task, spool_limit=0, costs=again, **options)
    found, costs = {}, {}
    monkeypatch.setattr(_spool, "_MEMORY", 1 << 10)  # to a file
    for limit in (1.0, 2e-5):  # room for all, or for some batches
        costs[limit] = Costs()
        found[limit] = fit_curvature(task, spool_limit=limit, costs=costs[limit], **options)
        for block, other in zip(found[limit].blocks, expected.blocks, strict=True):
            exact.close(block.eigenvalues, other.eigenvalues, 1e-13)
    assert costs[1.0].forward_examples < again.forward_examples
    assert costs[1.0].forward_examples <= costs[2e-5].forward_examples


def test_inputs_are_kept_once_for_all_directions(monkeypatch):
    """Three classes: derivatives three times, inputs and patches once."""
    task, sizes = LAYERED_BY_NAME["cnn-no-bias"].task(), []
    original = _spool.Spool.__exit__

    def noted(self, *error):
        sizes.append(self._end)
        original(self, *error)

    monkeypatch.setattr(_spool.Spool, "__exit__", noted)
    fit_curvature(task, fisher="enumerated")
    inputs = 25 * 18 + 9 * 27 + 36  # positions times patches
    derivatives = 25 * 3 + 9 * 4 + 3
    assert sizes == [8 * task.n * (inputs + 3 * derivatives)]


def test_sums_in_tiles_are_the_same(monkeypatch):
    for name in ("cnn", "sequence", "decoder-tied", "conv-groups"):
        task = LAYERED_BY_NAME[name].task()
        expected = fit_curvature(task, fisher="empirical").dense()
        monkeypatch.setattr(_kronecker, "_TILE", 20)
        monkeypatch.setattr(_kronecker_sums, "_BLOCK", 2)
        exact.close(fit_curvature(task, fisher="empirical").dense(), expected, 1e-12)


def test_float32_follows_float64():
    for name in ("cnn", "layer-norm", "decoder-tied"):
        task = LAYERED_BY_NAME[name].task()
        single = fit_curvature(task.to(dtype=torch.float32), fisher="enumerated")
        assert single.dtype == torch.float32
        assert all(
            t.dtype == torch.float32 for b in single.blocks for t in b.basis.tensors().values()
        )
        exact.close(single.dense(), fit_curvature(task, fisher="enumerated").dense(), 1e-4)


def test_costs_count_passes_and_seconds():
    task, costs = LAYERED_BY_NAME["mlp-categorical"].task(), Costs()
    fit_curvature(task, fisher="enumerated", costs=costs)
    check, n, classes = 12, 12, 3
    assert costs.forward_examples == check + check // 2 + n
    assert costs.backward_examples == check + n * classes
    assert set(costs.seconds) == {"covariance", "eigendecomposition", "eigenvalue correction"}
    assert all(spent > 0 for spent in costs.seconds.values())
    costs = Costs()
    fit_curvature(task, fisher="sampled", form="kfac", draws=2, costs=costs)
    assert costs.backward_examples == check + n * 2
    assert "eigenvalue correction" not in costs.seconds


# ---------------------------------------------------------------- forms by layer


def test_forms_by_name_and_pattern(monkeypatch):
    task = LAYERED_BY_NAME["decoder-transposed"].task()
    chosen = {"block.qkv": "dense", "block.*": "diagonal", "w*": "identity", "*orm": "kfac"}
    forms = {
        block.layer.name: (block.form, type(block.basis))
        for block in fit_curvature(task, fisher="empirical", form=chosen).blocks
    }
    assert forms == {
        "words": ("identity", StandardBasis),
        "places": ("ekfac", KroneckerBasis),
        "block.norm": ("diagonal", StandardBasis),
        "block.qkv": ("dense", DenseBasis),
        "block.out": ("diagonal", StandardBasis),
        "norm": ("kfac", KroneckerBasis),
        "head": ("ekfac", KroneckerBasis),
    }
    norms = ("block.norm", "norm")
    for general in ("ekfac", "kfac"):
        blocks = fit_curvature(task, fisher="empirical", form=general).blocks
        assert {b.form for b in blocks if b.layer.name in norms} == {"dense"}
        assert {b.form for b in blocks if b.layer.name not in norms} == {general}
    monkeypatch.setattr(_fit, "_DENSE", 3)  # "norm" has 3 parameters, "block.norm" 6
    blocks = fit_curvature(task, fisher="empirical").blocks
    assert [b.form for b in blocks if b.layer.name in norms] == ["diagonal", "dense"]
    raw = fit_curvature(LAYERED_BY_NAME["raw"].task(), fisher="empirical")
    assert [b.form for b in raw.blocks] == ["ekfac", "dense", "dense", "ekfac"]


def test_info_says_how_it_was_made():
    task = LAYERED_BY_NAME["linear-gaussian"].task()
    info = fit_curvature(task, fisher="enumerated").info
    marks = task.fingerprint()
    assert info == {
        "fisher": "enumerated", "sequence": "expand", "n": 12, "checkpoint": marks["checkpoint"],
        "train": marks["train"], "likelihood": marks["likelihood"],
    }  # fmt: skip


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher": "true"}, r"fisher must be one of \('enumerated', .*got 'true'"),
        ({"form": "full"}, r"form must be one of \('ekfac', 'kfac', .*got 'full'"),
        ({"form": {"*": "full"}}, r"form must be one of .*got 'full'"),
        ({"sequence": "sum"}, r"sequence must be one of \('expand', 'reduce'\); got 'sum'"),
        ({"draws": 0}, "draws must be a positive integer; got 0"),
        ({"draws": True}, "draws must be a positive integer; got True"),
        ({"batch_size": 2.5}, r"batch_size must be a positive integer; got 2\.5"),
        ({"max_factor": -1}, "max_factor must be a positive integer; got -1"),
        (
            {"form": {"0": "kfac", "body.*": "dense"}},
            r"form= names no layer with \['body\.\*'\]; layers are \['0', '2', '4'\]\.",
        ),
    ],
)
def test_bad_arguments(options, message):
    task = LAYERED_BY_NAME["mlp-categorical"].task()
    with pytest.raises(ValueError, match=message):
        fit_curvature(task, **{"fisher": "empirical", **options})


def test_the_list_of_names_is_cut():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(13)])
    x = torch.eye(2)
    task = bi.Task(model, bi.Gaussian(), train=(x, x), query=(x, x))
    with pytest.raises(ValueError, match=r"'11'\] …\."):
        fit_curvature(task, fisher="empirical", form={"x": "kfac"})


class OnlyLoss:
    def loss(self, outputs, target):
        return (outputs - target).abs().sum(1)


@pytest.mark.parametrize(
    ("fisher", "part"), [("enumerated", "fisher_factor"), ("sampled", "sample")]
)
def test_a_likelihood_without_the_part_says_which(fisher, part):
    x = torch.ones(3, 2)
    task = bi.Task(nn.Linear(2, 2), OnlyLoss(), train=(x, 2 * x), query=(x, x))
    with pytest.raises(NotImplementedError, match=f"fisher='{fisher}' needs `{part}`"):
        fit_curvature(task, fisher=fisher)
    assert len(fit_curvature(task, fisher="empirical").blocks) == 1


def test_a_gradient_that_is_not_finite_is_named():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2, bias=False)

        def forward(self, x):
            return self.fc(x).abs().sqrt()

    x = torch.ones(40, 2)
    x[33] = 0.0
    ids = [f"row-{i}" for i in range(40)]
    task = bi.Task(Root(), bi.Gaussian(), train=(x, x), query=(x[:1], x[:1]), train_ids=ids)
    with pytest.raises(ValueError, match=r"layer 'fc': .* train example 'row-33' is NaN"):
        fit_curvature(task, fisher="empirical", batch_size=16)


class Steep:
    def loss(self, outputs, target):
        return 1e10 * outputs.sum(1)


@pytest.mark.parametrize("form", ["ekfac", "dense", "diagonal"])
def test_overflowing_products_are_told_apart(form):
    x = torch.full((3, 2), 1e15)
    task = bi.Task(nn.Linear(2, 2), Steep(), train=(x, x), query=(x, x))
    with pytest.raises(ValueError, match=r"are finite, but their products overflow torch\.float32"):
        fit_curvature(task, fisher="empirical", form=form)


def test_the_spectrum_is_not_negative():
    """Dead units: rounding must not leave eigenvalues below 0."""
    task = LAYERED_BY_NAME["idle"].task()
    for form in ("ekfac", "kfac", "dense", "diagonal", "identity"):
        curvature = fit_curvature(task, fisher="empirical", form=form)
        assert all(float(block.eigenvalues.min()) >= 0 for block in curvature.blocks)
        assert np.isfinite(curvature.trace())
