"""``logra``, ``arnoldi``, ``nystrom``, ``datainf`` and ``mfac`` against dense matrices."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf.attribution import _projected
from bayesinf.attribution._arnoldi import arnoldi
from bayesinf.attribution._datainf import datainf
from bayesinf.attribution._logra import logra
from bayesinf.attribution._mfac import mfac
from bayesinf.attribution._nystrom import nystrom
from bayesinf.attribution._registry import METHODS
from bayesinf.curvature import GaussNewtonProduct, NotPositiveDefiniteError, find_layers
from bayesinf.curvature._arnoldi import arnoldi_eigenpairs
from bayesinf.curvature._capture import Capture
from bayesinf.curvature._nystrom import nystrom_approximation
from tests import exact
from tests.layered_cases import LAYERED_BY_NAME

NAMES = (
    "mlp-categorical", "conv-groups", "tied", "words", "layer-norm", "raw",
    "decoder-tied",
)  # fmt: skip
LAM = 0.05


def make(name="mlp-categorical", **options):
    return LAYERED_BY_NAME[name].task(**options)


# ---------------------------------------------------------------- equal to dense matrices


@pytest.mark.parametrize("name", NAMES)
def test_logra_with_square_projections_is_the_dense_fisher_of_every_layer(name):
    task = make(name)
    for fisher, basis in (("empirical", "random"), ("enumerated", "pca"), ("sampled", "random")):
        dense = bi.fit_curvature(task, fisher=fisher, form="dense", seed=3)
        expected = bi.ekfac(task, curvature=dense, damping=LAM).influence
        scores = logra(task, fisher=fisher, basis=basis, rank=99, damping=LAM, seed=3, batch_size=4)
        exact.close(scores.influence, expected, 1e-9)
        assert scores.attrs["numbers"] == task.dimension


@pytest.mark.parametrize("name", NAMES)
def test_mfac_is_the_dense_empirical_fisher(name):
    task = make(name)
    expected = exact.influence(task, exact.empirical_fisher(task), LAM)
    exact.close(mfac(task, damping=LAM, batch_size=5).influence, expected, 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_datainf_swaps_mean_and_inverse_layer_by_layer(name):
    task = make(name)
    g, q = exact.gradients(task), exact.gradients(task, "query")
    expected = 0
    for layer in find_layers(task):
        where = exact.index(task, layer)
        eye = torch.eye(len(where), dtype=torch.float64)
        inverses = [torch.linalg.inv(torch.outer(v, v) + LAM * eye) for v in g[:, where]]
        mean = sum(inverses) / len(inverses)
        expected = expected - q[:, where] @ mean @ g[:, where].T / task.n
    exact.close(datainf(task, damping=LAM, batch_size=5).influence, expected, 1e-10)


def test_datainf_of_one_example_is_exact(rng):
    """And at n > 1 it is not; the relative damping is the paper's."""
    x = torch.randn(3, 4, generator=rng, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    one = bi.Task(model, bi.Categorical(), train=(x[:1], torch.tensor([1])),
                  query=(x, torch.tensor([0, 1, 1])))  # fmt: skip
    dense = bi.fit_curvature(one, fisher="empirical", form="dense")
    expected = bi.ekfac(one, curvature=dense, damping=LAM).influence
    exact.close(datainf(one, damping=LAM).influence, expected, 1e-10)
    task = make()
    scores = datainf(task, relative_damping=0.1)
    lam = json.loads(scores.attrs["damping"])
    g = exact.gradients(task)
    for layer in find_layers(task):
        where = exact.index(task, layer)
        mean = float(g[:, where].square().sum() / (task.n * len(where)))
        assert lam[layer.name] == pytest.approx(0.1 * mean)
    exact.close(datainf(task, damping=lam).influence, scores.influence, 1e-12)
    dense = bi.fit_curvature(task, fisher="empirical", form="dense")
    apart = bi.ekfac(task, curvature=dense, damping=lam).influence - scores.influence
    assert np.linalg.norm(apart) > 0.05 * np.linalg.norm(scores.influence)


@pytest.mark.parametrize("name", NAMES)
def test_full_rank_nystrom_and_arnoldi_are_the_dense_gauss_newton_matrix(name):
    task = make(name)
    expected = exact.influence(task, exact.gauss_newton(task), LAM)
    rank = task.dimension
    exact.close(nystrom(task, damping=LAM, rank=rank, batch_size=5).influence, expected, 1e-8)
    exact.close(arnoldi(task, damping=LAM, rank=rank, batch_size=5).influence, expected, 1e-8)


def test_arnoldi_of_the_hessian():
    task = make()
    h = exact.loss_hessian(task)
    low = float(torch.linalg.eigvalsh(h)[0])
    damping = 0.05 - low
    scores = arnoldi(task, damping=damping, rank=task.dimension, of="hessian")
    exact.close(scores.influence, exact.influence(task, h, damping), 1e-8)
    with pytest.raises(NotPositiveDefiniteError, match=r"θ \+ λ = .* must exceed") as caught:
        arnoldi(task, damping=0.0, rank=task.dimension, of="hessian")
    assert caught.value.lambda_min == pytest.approx(low)


# ---------------------------------------------------------------- below full rank


class Matrix:
    """A dense matrix as an operator."""

    dtype, device = torch.float64, "cpu"

    def __init__(self, matrix):
        self.matrix, self.shape = matrix, tuple(matrix.shape)

    def apply(self, rows):
        return rows @ self.matrix


def psd(rng, values):
    d = len(values)
    q = torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=torch.float64))[0]
    return q * torch.tensor(values, dtype=torch.float64) @ q.T


def test_nystrom_is_the_largest_matrix_with_the_products(rng):
    """``Ĉ = Yᵀ(ΩYᵀ)⁺Y``: rank k, below C, equal to it on the range of Ω; exact at C's own rank."""
    c = psd(rng, [5.0, 3.0, 1.0, 0.5, 0.1, 0.01])
    found = nystrom_approximation(Matrix(c), 3, seed=1)
    dense = found.vectors.T @ (found.values[:, None] * found.vectors)
    gap = torch.linalg.eigvalsh(c - dense)
    assert int((gap.abs() < 1e-12).sum()) == 3  # the range of Ω
    assert float(gap[-1]) > 1e-3
    assert float(gap[0]) > -1e-12
    rows = torch.randn(2, 6, generator=rng, dtype=torch.float64)
    eye = torch.eye(6, dtype=torch.float64)
    exact.close(found.solve(rows, 0.2), rows @ torch.linalg.inv(dense + 0.2 * eye), 1e-10)
    low = psd(rng, [5.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    found = nystrom_approximation(Matrix(low), 4)
    assert len(found.values) == 2
    exact.close(found.vectors.T @ (found.values[:, None] * found.vectors), low, 1e-10)


def test_arnoldi_finds_the_ends_of_a_spectrum(rng):
    values = [*np.linspace(0, 1, 57), -6.0, 8.0, 10.0]
    c = psd(rng, values)
    pairs = arnoldi_eigenpairs(Matrix(c), 3, iterations=25)
    np.testing.assert_allclose(pairs.values, [10.0, 8.0, -6.0], rtol=1e-9)
    exact.close(pairs.vectors @ pairs.vectors.T, np.eye(3), 1e-10)
    assert float(pairs.residuals.max()) < 1e-6
    assert pairs.products == 25
    rough = arnoldi_eigenpairs(Matrix(c), 3, iterations=4)
    residual = rough.vectors @ c - rough.values[:, None] * rough.vectors
    exact.close(rough.residuals, residual.norm(dim=1), 1e-9)
    assert float(rough.residuals.max()) > 1e-2
    few = arnoldi_eigenpairs(Matrix(psd(rng, [2.0, 2.0, 1.0, 0.0, 0.0, 0.0])), 6, iterations=6)
    np.testing.assert_allclose(few.values, [2, 2, 1, 0, 0, 0], atol=1e-10)  # its spaces close


def test_arnoldi_drops_what_nystrom_divides_by_the_damping():
    task, k = make(), 5
    g, q = exact.gradients(task), exact.gradients(task, "query")
    operator = GaussNewtonProduct(task)
    pairs = arnoldi_eigenpairs(operator, k, iterations=20, seed=2)
    kept = (q @ pairs.vectors.T / (pairs.values + LAM)) @ (g @ pairs.vectors.T).T
    scores = arnoldi(task, damping=LAM, rank=k, iterations=20, seed=2)
    exact.close(scores.influence, -kept / task.n, 1e-9)
    assert scores.attrs["products"] == 20
    assert 0 < scores.attrs["worst_residual"] < 1
    found = nystrom_approximation(operator, k, seed=2)
    scores = nystrom(task, damping=LAM, rank=k, seed=2)
    exact.close(scores.influence, -found.solve(q, LAM) @ g.T / task.n, 1e-9)
    assert (scores.attrs["found_rank"], scores.attrs["products"]) == (k, k)


def test_sweeps_of_the_damping_take_the_curvature_that_was_found():
    """The same scores, without a product; not of another network, nor beside a rank."""
    task, other = make(), make("words")
    operator = GaussNewtonProduct(task)
    pairs = arnoldi_eigenpairs(operator, 5, iterations=10)
    found = nystrom_approximation(operator, 5)
    for method, name, given in ((arnoldi, "eigenpairs", pairs), (nystrom, "approximation", found)):
        for damping in (0.01, 1.0):
            swept = method(task, damping=damping, **{name: given})
            expected = method(task, damping=damping, rank=5)
            exact.close(swept.influence, expected.influence, 1e-12)
            assert (swept.attrs["products"], swept.attrs["rank"]) == (0, 5)
            assert expected.attrs["products"] > 0
        with pytest.raises(ValueError, match=f"needs exactly one of rank= and {name}=.*got both"):
            method(task, damping=1.0, rank=5, **{name: given})
        with pytest.raises(ValueError, match=f"one of rank= and {name}=.*got neither"):
            method(task, damping=1.0)
        words = f"{name} is of {task.dimension:,} parameters and the task selects"
        with pytest.raises(ValueError, match=words):
            method(other, damping=1.0, **{name: given})


def test_logra_below_full_rank():
    """Pairs of leading eigenvectors of both factors, or random ones, and a curvature for them."""
    task = make()
    factors = bi.fit_curvature(task, fisher="empirical", form="kfac")
    g, q = exact.gradients(task), exact.gradients(task, "query")
    expected = 0
    for block in factors.blocks:
        where = exact.index(task, block.layer)
        p = torch.kron(block.basis.q_s[:, -2:], block.basis.q_a[:, -3:])  # ascending
        a, b = g[:, where] @ p, q[:, where] @ p
        inverse = torch.linalg.inv(a.T @ a / task.n + LAM * torch.eye(a.shape[1]).double())
        expected = expected - b @ inverse @ a.T / task.n
    scores = logra(task, fisher="empirical", basis="pca", rank=(2, 3), damping=LAM)
    exact.close(scores.influence, expected, 1e-9)
    whole = bi.ekfac(
        task, curvature=bi.fit_curvature(task, fisher="enumerated", form="dense"), damping=LAM
    ).influence
    apart = [
        np.linalg.norm(logra(task, fisher="enumerated", rank=k, damping=LAM).influence - whole)
        for k in (1, 3, 5, 7)
    ]
    assert apart[0] > apart[1] > apart[2] > apart[3]
    assert apart[3] < 1e-9
    some = logra(task, fisher="empirical", rank=2, damping=LAM, modules=True)
    assert some.module.values.tolist() == [layer.name for layer in find_layers(task)]
    exact.close(some.influence_by_module.sum("module"), some.influence, 1e-12)


def test_mfac_with_some_of_the_gradients():
    task = make()
    scores = mfac(task, damping=LAM, examples=4, seed=2)
    chosen = np.random.default_rng(2).permutation(12)[:4]
    g = exact.gradients(task)[np.sort(chosen)]
    exact.close(scores.influence, exact.influence(task, g.T @ g / 4, LAM), 1e-10)
    single = bi.Task(
        make().module.float(), bi.Categorical(),
        train=(task.train.batch()[0].float(), task.train.batch()[1]),
        query=(task.query.batch()[0].float(), task.query.batch()[1]), parameters=".*",
    )  # fmt: skip
    assert mfac(single, damping=LAM).influence.dtype == np.float64
    exact.close(mfac(single, damping=LAM).influence, mfac(task, damping=LAM).influence, 1e-4)


# ---------------------------------------------------------------- what holds for all of them


RUNS = {
    "logra": lambda task, **o: logra(task, fisher="enumerated", rank=99, damping=LAM, **o),
    "arnoldi": lambda task, **o: arnoldi(task, damping=LAM, rank=min(9, task.dimension), **o),
    "nystrom": lambda task, **o: nystrom(task, damping=LAM, rank=min(9, task.dimension), **o),
    "datainf": lambda task, **o: datainf(task, damping=LAM, **o),
    "mfac": lambda task, **o: mfac(task, damping=LAM, **o),
}


@pytest.mark.parametrize("name", RUNS)
def test_sign_and_size_against_removals_from_ridge_regression(name, rng):
    """Gauss–Newton methods: exact but for the leverage. Empirical Fisher: the sign of most."""
    n = 20
    x = torch.randn(n, 3, generator=rng, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=x.dtype)
    y = y + torch.randn(n, 1, generator=rng, dtype=x.dtype)
    z, out = x[:6] + 0.1, y[:6]

    def fit(keep):
        gram = x[keep].T @ x[keep] + n * LAM * torch.eye(3, dtype=x.dtype)
        return torch.linalg.solve(gram, x[keep].T @ y[keep])

    every = torch.arange(n)
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(fit(every).T)
    task = bi.Task(model, bi.Gaussian(), train=(x, y), query=(z, out))
    inverse = torch.linalg.inv(x.T @ x + n * LAM * torch.eye(3, dtype=x.dtype))
    leverage = torch.einsum("nd,de,ne->n", x, inverse, x)
    moves = torch.cat([z @ (fit(every[every != t]) - fit(every)) for t in range(n)], dim=1)
    removed = moves * (z @ fit(every) - out) * (1 - leverage)  # of the loss, to first order
    scores = RUNS[name](task).influence.values
    if name in ("logra", "arnoldi", "nystrom"):
        exact.close(-scores, removed, 1e-8)
    else:
        clear = removed.abs().numpy() > 0.01
        assert (np.sign(-scores) == np.sign(removed.numpy()))[clear].mean() > 0.8


@pytest.mark.parametrize("name", RUNS)
def test_order_batches_and_stores_do_not_matter(name, tmp_path):
    task, run = make("tied"), RUNS[name]
    scores = run(task).influence
    exact.close(run(task, batch_size=1, query_batch_size=2).influence, scores, 1e-9)
    x, y = task.train.batch()
    order = [3, 0, 5, 1, 4, 2]
    other = bi.Task(task.module, task.likelihood, train=(x[order], y[order]),
                    query=task.query.batch(), train_ids=order, parameters=".*")  # fmt: skip
    exact.close(run(other).influence.sel(train=scores.train), scores, 1e-9)
    stored = run(task, store=tmp_path / "s")
    exact.close(stored.influence, scores, 1e-12)
    top = run(task, top_k=2)
    exact.close(top.influence[:, 0, 0], scores.min("train"), 1e-12)
    own = run(task, pairs="self").influence
    assert own.dims == ("train",)
    assert bool((own < 0).all())


@pytest.mark.parametrize("name", RUNS)
def test_tokens_sum_to_examples(name):
    task, run = make("decoder-tied"), RUNS[name]
    whole = run(task).influence
    for kind in ("position", "loss"):
        found = run(task, train_tokens=kind, query_tokens=kind).influence
        assert found.dims == ("query_token", "train_token")
        values = found.groupby("train").sum().groupby("query").sum()
        exact.close(values.transpose("query", "train"), whole, 1e-9)


def test_attributes():
    task = make()
    wanted = {"arnoldi": "gauss_newton", "nystrom": None, "datainf": "empirical",
              "mfac": "empirical", "logra": "enumerated"}  # fmt: skip
    for name, run in RUNS.items():
        attrs = run(task).attrs
        assert (attrs["method"], attrs["estimand"], attrs["damping"]) == (name, "influence", LAM)
        assert METHODS[name].estimand == "influence"
        assert attrs.get("of", attrs.get("fisher")) == wanted[name]
        assert json.loads(attrs["seconds"])
        assert attrs["backward_examples"] >= task.n


# ---------------------------------------------------------------- gradients on disk


def count_passes(monkeypatch):
    passes = []
    original = Capture.record

    def record(self, batch):
        passes.append(len(batch[1]))
        return original(self, batch)

    monkeypatch.setattr(Capture, "record", record)
    return passes


@pytest.mark.parametrize("basis", ["random", "pca"])
def test_gradients_on_disk_serve_other_queries(basis, tmp_path, monkeypatch):
    """Neither the training set nor the curvature is gone through again."""
    task, path = make(), tmp_path / "kept"
    options = {"fisher": "enumerated", "basis": basis, "rank": 3, "damping": LAM}
    memory = logra(task, **options)
    exact.close(logra(task, gradients=path, **options).influence, memory.influence, 1e-10)
    x, y = task.train.batch()
    other = bi.Task(task.module, task.likelihood, train=(x, y), query=(x[4:6] + 1, y[4:6]),
                    parameters=".*")  # fmt: skip
    expected = logra(other, **options).influence
    passes = count_passes(monkeypatch)
    found = logra(other, gradients=str(path), **options)
    exact.close(found.influence, expected, 1e-10)
    assert passes == [12, 2]  # layers are checked; two queries
    assert found.attrs["backward_examples"] < memory.attrs["backward_examples"]
    for changed in ({"rank": 2}, {"seed": 1}):
        with pytest.raises(ValueError, match=r"gradients='.*' holds gradients of another run"):
            logra(other, gradients=path, **{**options, **changed})
    if basis == "random":  # another curvature of the same gradients
        changed = {**options, "fisher": "empirical", "damping": 1.0}
        found = logra(other, gradients=path, **changed)
        exact.close(found.influence, logra(other, **changed).influence, 1e-10)


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    """Blocks of three examples; the second run computes what the first did not."""
    task = make()
    options = {"fisher": "empirical", "rank": 2, "damping": LAM, "batch_size": 2}
    memory = logra(task, **options).influence
    monkeypatch.setattr(_projected, "_ELEMENTS", 3 * 12)
    original = Capture.record
    left = [5]

    def record(self, batch):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Capture, "record", record)
        with pytest.raises(KeyboardInterrupt):
            logra(task, gradients=tmp_path / "g", **options)
    held = json.loads((tmp_path / "g" / "gradients" / "progress.json").read_text())
    assert 0 < len(held["done"]) < 4
    found = logra(task, gradients=tmp_path / "g", **options).influence
    exact.close(found, memory, 1e-12)
    held = json.loads((tmp_path / "g" / "gradients" / "progress.json").read_text())
    assert len(held["done"]) == 4


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (logra, {"fisher": "empirical"}, "exactly one of damping= and relative_damping=; got nei"),
        (logra, {"fisher": "none", "damping": 1.0}, r"fisher must be one of .*; got 'none'"),
        (logra, {"fisher": "empirical", "damping": 1.0, "basis": "svd"}, "basis must be one of"),
        (logra, {"fisher": "empirical", "damping": 1.0, "rank": (2,)}, r"a pair .* got \(2,\)"),
        (logra, {"fisher": "empirical", "damping": 1.0, "rank": 0}, "a positive integer .* got 0"),
        (logra, {"fisher": "empirical", "damping": 1.0, "memory_limit": 1e-9}, "a smaller rank"),
        (logra, {"fisher": "empirical", "damping": 1.0, "rank": 1, "memory_limit": 2e-7},
         r"12 training examples with 3 numbers each needs .* Keep them on disk"),
        (arnoldi, {"damping": 1.0, "rank": 2.0}, r"rank must be an integer; got 2\.0"),
        (arnoldi, {"damping": 1.0, "rank": 5, "iterations": 4}, "got rank=5 and iterations=4"),
        (arnoldi, {"damping": 1.0, "rank": 84}, "1 ≤ rank ≤ iterations ≤ 83"),
        (arnoldi, {"damping": -1.0, "rank": 2}, "damping must be a number ≥ 0"),
        (arnoldi, {"damping": 1.0, "rank": 2, "of": "fisher"}, r"of must be one of .* got 'fisher"),
        (arnoldi, {"damping": 1.0, "rank": 2, "memory_limit": 1e-9}, "Use fewer iterations"),
        (arnoldi, {"damping": 1.0, "rank": 2, "modules": True}, "arnoldi has no modules=: its dir"),
        (nystrom, {"damping": 0.0, "rank": 2}, "damping must be a positive number"),
        (nystrom, {"damping": 1.0, "rank": 84}, r"rank must be an integer from 1 to the 83 par"),
        (nystrom, {"damping": 1.0, "rank": 2, "memory_limit": 1e-9}, "Use a smaller rank"),
        (datainf, {}, "exactly one of damping= and relative_damping=; got neither"),
        (datainf, {"damping": 0.0}, "damping must be a positive number"),
        (datainf, {"damping": {"0": 0.0, "2": 1.0, "4": 1.0}}, r"it is 0 in \['0'\]"),
        (mfac, {"damping": 0.0}, "damping must be a positive number"),
        (mfac, {"damping": 1.0, "examples": 13}, "from 1 to the 12 training examples; got 13"),
        (mfac, {"damping": 1.0, "memory_limit": 1e-9}, r"mfac \(d=83 parameters, 12 gradients\)"),
    ],
    ids=lambda v: getattr(v, "__name__", None) or str(v)[:40],
)  # fmt: skip
def test_bad_arguments(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(make(), **options)


def test_products_that_are_not_finite():
    bad = Matrix(torch.full((3, 3), torch.inf, dtype=torch.float64))
    for run in (nystrom_approximation, lambda c, k: arnoldi_eigenpairs(c, k, iterations=2)):
        with pytest.raises(ValueError, match="a product with the operator is not finite"):
            run(bad, 2)
