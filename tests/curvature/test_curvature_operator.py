"""A curvature as a linear operator, against its dense matrix."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf import NotPositiveDefiniteError, fit_curvature
from bayesinf.curvature._operator import SymmetricOperator
from tests import exact
from tests.layered_cases import LAYERED, LAYERED_BY_NAME

FORMS = {
    "mlp-categorical": "ekfac",
    "conv-groups": {"4": "dense"},
    "conv-depthwise": "kfac",
    "cnn": {"0": "diagonal", "2": "kfac", "5": "identity"},
    "layer-norm": {"1": "ekfac"},
    "raw": "ekfac",
    "decoder-tied": "ekfac",
    "decoder-transposed": {"block.*": "kfac"},
}
NAMES = list(FORMS)


def fitted(name, **options):
    task = LAYERED_BY_NAME[name].task()
    return task, fit_curvature(task, fisher="enumerated", form=FORMS[name], **options)


def block_diagonal(task, curvature):
    """The matrix in the order of the task's parameters, from the blocks alone."""
    d = task.dimension
    out = torch.zeros(d, d, dtype=torch.float64)
    for block in curvature.blocks:
        where = exact.index(task, block.layer)
        out[where[:, None], where] = block.dense()
    return out


def solve(matrix, damping, v):
    return torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype), v)


@pytest.mark.parametrize("name", NAMES)
def test_products(name, rng):
    task, curvature = fitted(name)
    matrix = block_diagonal(task, curvature)
    d = task.dimension
    assert isinstance(curvature, SymmetricOperator)
    assert curvature.shape == (d, d)
    assert (curvature.dtype, curvature.device) == (torch.float64, torch.device("cpu"))
    exact.close(curvature.dense(), matrix, 1e-12)
    v = torch.randn(d, 3, generator=rng, dtype=torch.float64)
    exact.close(curvature @ v, matrix @ v, 1e-12)
    exact.close(curvature @ v[:, 0], matrix @ v[:, 0], 1e-12)
    exact.close(curvature.apply(v.T), (matrix @ v).T, 1e-12)
    exact.close(curvature.apply(v.T[None]), (matrix @ v).T[None], 1e-12)
    exact.close(curvature.apply(v[:, 0]), matrix @ v[:, 0], 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_functions_of_the_matrix(name, rng):
    task, curvature = fitted(name)
    matrix = block_diagonal(task, curvature)
    v = torch.randn(task.dimension, 2, generator=rng, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrix)
    assert curvature.trace() == pytest.approx(float(matrix.trace()), rel=1e-12)
    for lam in (1e-3, 2.0):
        damped = curvature.damped(lam)
        exact.close(damped @ v, matrix @ v + lam * v, 1e-12)
        assert damped.logdet() == pytest.approx(float((values + lam).log().sum()), rel=1e-9)
        exact.close(curvature.inverse(lam) @ v, solve(matrix, lam, v), 1e-9)
        exact.close(curvature.inverse(lam) @ (damped @ v), v, 1e-9)
    root = curvature.sqrt()
    exact.close(root @ (root @ v), matrix @ v, 1e-9)
    exact.close(root.dense(), root.dense().T, 1e-12)
    expected = (vectors * values.clamp_min(0).exp()) @ vectors.T
    exact.close(curvature.map(torch.exp).dense(), expected, 1e-9)
    assert curvature.info == root.info


@pytest.mark.parametrize("name", NAMES)
def test_blocks(name, rng):
    _, curvature = fitted(name)
    assert curvature.layers == tuple(block.layer for block in curvature.blocks)
    for block in curvature.blocks:
        assert curvature[block.layer.name] is block
        v = torch.randn(2, *block.layer.shape, generator=rng, dtype=torch.float64)
        exact.close(block.apply(v).flatten(1), v.flatten(1) @ block.dense(), 1e-12)
        assert block.mean_eigenvalue() == pytest.approx(block.trace() / block.layer.size)


@pytest.mark.parametrize("case", LAYERED, ids=lambda c: c.name)
def test_the_inverse_solves_the_dense_system(case, rng):
    task = case.task()
    curvature = fit_curvature(task, fisher="empirical")
    v = torch.randn(task.dimension, 2, generator=rng, dtype=torch.float64)
    expected = solve(block_diagonal(task, curvature), 0.02, v)
    exact.close(curvature.inverse(0.02) @ v, expected, 1e-9)


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize("name", ["mlp-categorical", "conv-groups", "decoder-tied"])
def test_draws_have_the_covariance(name, rng):
    """Whitened by a Cholesky factor of the dense matrix, draws are standard normal.

    Three statistics, each a sum of at least 46 chi-squares with mean 0 and variance 1: trace of the
    covariance, squares off its diagonal, length of the mean. One beyond 6.5 comes in fewer than
    10⁻⁶ of all seeds.
    """
    task, curvature = fitted(name)
    inverse = curvature.inverse(0.1)
    count, matrix = 4000, inverse.dense()
    draws = inverse.sample(count, rng)
    assert draws.shape == (count, task.dimension)
    root = torch.linalg.cholesky(matrix)
    white = torch.linalg.solve_triangular(root, draws.T, upper=False)  # identity covariance
    d = task.dimension
    found = white @ white.T / count
    diagonal = (found.diagonal().sum() - d) / math.sqrt(2 * d / count)
    off = found - found.diagonal().diag()
    pairs = d * (d - 1) / 2
    spread = (off.square().sum() / 2 * count - pairs) / math.sqrt(2 * pairs)
    mean = (white.mean(1).square().sum() * count - d) / math.sqrt(2 * d)
    assert max(abs(float(z)) for z in (diagonal, spread, mean)) < 6.5


def test_draws_come_from_the_generator_alone():
    _, curvature = fitted("mlp-categorical")
    state = torch.random.get_rng_state()
    one, two = (curvature.sample(3, torch.Generator().manual_seed(5)) for _ in range(2))
    exact.same(one, two)
    assert torch.equal(torch.random.get_rng_state(), state)


# ---------------------------------------------------------------- damping


def test_damping_by_layer(rng):
    task, curvature = fitted("cnn")
    lam = {"0": 0.1, "2": 0.02, "5": 3.0}
    assert curvature.dampings(lam) == lam
    assert curvature.dampings(0.5) == dict.fromkeys(lam, 0.5)
    added = torch.zeros(task.dimension, dtype=torch.float64)
    for layer in curvature.layers:
        added[exact.index(task, layer)] = lam[layer.name]
    matrix = block_diagonal(task, curvature) + added.diag()
    exact.close(curvature.damped(lam).dense(), matrix, 1e-12)
    v = torch.randn(task.dimension, generator=rng, dtype=torch.float64)
    exact.close(curvature.inverse(lam) @ v, torch.linalg.solve(matrix, v), 1e-9)


def test_relative_damping_is_a_multiple_of_the_mean_eigenvalue():
    task, curvature = fitted("cnn")
    matrix = block_diagonal(task, curvature)
    expected = {}
    for layer in curvature.layers:
        where = exact.index(task, layer)
        expected[layer.name] = 0.1 * float(matrix.diagonal()[where].mean())
    assert curvature.relative_damping(0.1) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("damping", "message"),
    [
        (-1.0, r"damping must be a finite number ≥ 0; got -1\.0 \(0\)"),
        (float("nan"), "damping must be a finite number ≥ 0; got nan"),
        (math.inf, "damping must be a finite number ≥ 0; got inf"),
        (
            {"0": 1.0, "2": 1.0},
            r"exactly the layers \['0', '2', '5'\]; missing or unknown: \['5'\]",
        ),
        ({"0": 1.0, "2": 1.0, "5": 1.0, "6": 1.0}, r"missing or unknown: \['6'\]"),
        ({"0": 1.0, "2": 1.0, "5": -1.0}, r"got -1\.0 \(5\)"),
    ],
)
def test_bad_damping(damping, message):
    _, curvature = fitted("cnn")
    with pytest.raises(ValueError, match=message):
        curvature.inverse(damping)


@pytest.mark.parametrize("fraction", [0.0, -0.1, float("nan"), math.inf, "0.1"])
def test_bad_relative_damping(fraction):
    _, curvature = fitted("cnn")
    with pytest.raises(ValueError, match="relative_damping must be a positive number"):
        curvature.relative_damping(fraction)


def idle():
    return fit_curvature(LAYERED_BY_NAME["idle"].task(), fisher="empirical")


def test_a_singular_block_is_named():
    message = (
        r"layer 'idle' \(ekfac\): the smallest eigenvalue is 0, .*Directions without curvature"
    )
    uses = (
        lambda c: c.inverse(0.0),
        lambda c: c.logdet(),
        lambda c: c.inverse({**c.dampings(1.0), "idle": 0.0}),
    )
    for use in uses:
        curvature = idle()
        used = curvature.map(lambda values: values + (values.max() > 0))  # dead layers only
        with pytest.raises(NotPositiveDefiniteError, match=message) as caught:
            use(used)
        assert caught.value.lambda_min == 0
    assert math.isfinite(idle().damped(0.1).logdet())
    assert idle().sqrt().trace() > 0


def test_a_root_of_negative_eigenvalues_is_refused():
    curvature = idle().map(lambda values: torch.full_like(values, -0.5))
    with pytest.raises(NotPositiveDefiniteError, match=r"the smallest eigenvalue is -0\.5"):
        curvature.sqrt()
    with pytest.raises(NotPositiveDefiniteError, match="the smallest eigenvalue is nan"):
        idle().map(lambda values: values * float("nan")).sqrt()


def test_relative_damping_of_a_flat_layer_is_refused():
    with pytest.raises(ValueError, match="layer 'idle' has zero curvature on the training set"):
        idle().relative_damping(0.1)


# ---------------------------------------------------------------- shapes, tasks, precision


@pytest.mark.parametrize("shape", [(6,), (3, 5), (5, 2, 1), ()])
def test_products_of_wrong_shapes(shape):
    curvature = fit_curvature(LAYERED_BY_NAME["linear-gaussian"].task(), fisher="empirical")
    message = r"expected a vector \(5,\) or a matrix \(5, k\); got .*task\.flatten\(named\)"
    with pytest.raises(ValueError, match=message):
        curvature @ torch.ones(shape, dtype=torch.float64)


def test_an_unknown_layer():
    _, curvature = fitted("cnn")
    with pytest.raises(KeyError, match=r"no layer 'head'; layers are \['0', '2', '5'\]"):
        curvature["head"]


def test_another_precision():
    for name in NAMES:
        _, curvature = fitted(name)
        single = curvature.to(dtype=torch.float32)
        tensors = [t for b in single.blocks for t in (b.eigenvalues, *b.basis.tensors().values())]
        assert {t.dtype for t in tensors} == {torch.float32}
        exact.close(single.dense(), curvature.dense(), 1e-5)
        exact.same(curvature.to("cpu").dense(), curvature.dense())


def model(*sizes):
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def test_a_curvature_of_other_parameters_is_refused(rng):
    x = torch.randn(4, 3, generator=rng)
    data = {"train": (x, x), "query": (x, x)}
    net = model(3, 3)
    task = bi.Task(net, bi.Gaussian(), **data)
    curvature = fit_curvature(task, fisher="empirical")
    curvature.require_task(task)
    wide = bi.Task(model(3, 2, 3), bi.Gaussian(), **data)
    with pytest.raises(ValueError, match=r"belongs to other parameters .*'0\.weight'.* differ"):
        curvature.require_task(wide)
    some = bi.Task(net, bi.Gaussian(), parameters="0.weight", **data)
    with pytest.raises(ValueError, match=r"belongs to other parameters .*'0\.bias'"):
        curvature.require_task(some)
    with torch.no_grad():
        net[0].weight.add_(1)
    moved = bi.Task(net, bi.Gaussian(), **data)
    here, there = (t.fingerprint()["checkpoint"] for t in (moved, task))
    with pytest.raises(ValueError, match=f"fitted at checkpoint {there} and the task is at {here}"):
        curvature.require_task(moved)
    with pytest.raises(ValueError, match="Fit one for this task"):
        bi.ekfac(moved, curvature=curvature, damping=0.1)
