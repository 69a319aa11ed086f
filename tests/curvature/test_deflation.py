"""The deflated inverse against dense algebra."""

import pytest
import torch

import bayesinf as bi
from bayesinf.curvature import NotPositiveDefiniteError
from bayesinf.curvature._deflation import deflate
from bayesinf.curvature._operator import SymmetricOperator
from bayesinf.curvature._products import GaussNewtonProduct, HessianProduct
from tests import exact
from tests.layered_cases import LAYERED_BY_NAME

DAMPING = 0.01


@pytest.fixture(scope="module")
def task():
    return LAYERED_BY_NAME["mlp-categorical"].task()


@pytest.fixture(scope="module")
def curvature(task):
    return bi.fit_curvature(task, fisher="enumerated")


@pytest.fixture(scope="module")
def damped(task):
    return exact.gauss_newton(task) + DAMPING * torch.eye(task.dimension, dtype=torch.float64)


def make(curvature, task, rank, **options):
    options = {"tolerance": 1e-12, "iterations": 1000} | options
    return deflate(curvature, GaussNewtonProduct(task), damping=DAMPING, rank=rank, **options)


def dense(inverse):
    return inverse.apply(torch.eye(inverse.shape[0], dtype=torch.float64))


def spectrum(matrix, damped):
    root = torch.linalg.cholesky(damped)
    return torch.linalg.eigvalsh(root.T @ matrix @ root)


@pytest.mark.parametrize("which", ["BE", "LA", "SA"])
@pytest.mark.parametrize("rank", [1, 6, 14])
def test_deflated_directions_have_eigenvalue_one_and_the_others_stay(
    which, rank, curvature, task, damped
):
    before = spectrum(curvature.inverse(DAMPING).dense(), damped)
    inverse = make(curvature, task, rank, which=which)
    low = {"LA": 0, "SA": rank, "BE": rank // 2}[which]
    rest = before[low : len(before) - (rank - low)]
    after = torch.cat([rest, torch.ones(rank, dtype=torch.float64)]).sort().values
    exact.close(spectrum(dense(inverse), damped), after, 1e-9)


def test_of_full_rank_it_is_the_inverse(curvature, task, damped):
    inverse = make(curvature, task, task.dimension)
    exact.close(dense(inverse), torch.linalg.inv(damped), 1e-9)
    assert inverse.logdet() == pytest.approx(-float(torch.logdet(damped)), rel=1e-10)


def test_it_is_the_formula(curvature, task, rng):
    inverse = make(curvature, task, 5)
    w, u = curvature.inverse(DAMPING).sqrt().dense(), inverse.vectors
    middle = (
        torch.eye(task.dimension, dtype=torch.float64)
        + u.T @ torch.diag(1 / inverse.values - 1) @ u
    )
    exact.close(dense(inverse), w @ middle @ w, 1e-11)
    v = torch.randn(task.dimension, 3, generator=rng, dtype=torch.float64)
    exact.close(inverse @ v, w @ middle @ w @ v, 1e-11)
    exact.close(inverse @ v[:, 0], w @ middle @ w @ v[:, 0], 1e-11)
    assert inverse.logdet() == pytest.approx(float(torch.logdet(dense(inverse))), rel=1e-10)
    assert isinstance(inverse, SymmetricOperator)
    assert inverse.shape == (task.dimension, task.dimension)


def test_draws_have_it_as_their_covariance(curvature, task):
    """Whitened by the covariance they are standard normal: each of 2 d statistics within 5.5 σ.

    Their false alarm rate together is below 2 · 74 · 4e-8 = 6e-6.
    """
    inverse = make(curvature, task, 12)
    generator = torch.Generator().manual_seed(0)
    draws = inverse.sample(4000, generator)
    white = torch.linalg.solve(torch.linalg.cholesky(dense(inverse)), draws.T)
    means = white.mean(1) * 4000**0.5
    squares = (white.square().mean(1) - 1) * (4000 / 2) ** 0.5
    assert task.dimension == 83
    assert float(means.abs().max()) < 5.5
    assert float(squares.abs().max()) < 5.5
    directions = (draws @ torch.linalg.inv(inverse.root.dense()) @ inverse.vectors.T).var(0)
    assert float(((directions * inverse.values).log().abs()).max()) < 5.5 * (2 / 4000) ** 0.5
    again = inverse.sample(4000, torch.Generator().manual_seed(0))
    assert torch.equal(draws, again)


def test_rough_eigenpairs_do_nearly_as_well(task, curvature, damped):
    rough = make(curvature, task, 20, tolerance=0.3)
    exactly = make(curvature, task, 20)
    condition = {}
    for name, inverse in (("rough", rough), ("exact", exactly)):
        values = spectrum(dense(inverse), damped)
        condition[name] = float(values[-1] / values[0])
    before = spectrum(curvature.inverse(DAMPING).dense(), damped)
    assert condition["rough"] < 1.5 * condition["exact"] < 0.5 * float(before[-1] / before[0])


def test_precision_is_that_of_the_curvature(task):
    single = task.to(dtype=torch.float32)
    curvature = bi.fit_curvature(single, fisher="enumerated")
    inverse = deflate(curvature, GaussNewtonProduct(task), damping=DAMPING, rank=6, tolerance=1e-4)
    assert inverse.dtype == torch.float32
    assert inverse.sample(2, torch.Generator().manual_seed(0)).dtype == torch.float32
    reference = make(bi.fit_curvature(task, fisher="enumerated"), task, 6)
    exact.close(inverse.apply(torch.eye(task.dimension)), dense(reference), 1e-4)


def test_directions_that_do_not_converge_are_left(rng):
    """Few restarts: fewer directions, each of which has the eigenvalue one; the others stay."""
    x = torch.randn(60, 12, generator=rng, dtype=torch.float64)
    net = torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.Tanh(), torch.nn.Linear(12, 6))
    labels = torch.arange(60) % 6
    task = bi.Task(net.double(), bi.Categorical(), train=(x, labels), query=(x[:3], labels[:3]))
    curvature = bi.fit_curvature(task, fisher="enumerated")
    damped = exact.gauss_newton(task) + DAMPING * torch.eye(task.dimension, dtype=torch.float64)
    inverse = make(curvature, task, 40, iterations=1, tolerance=1e-9)
    count = len(inverse.values)
    assert 0 < count < 40
    before = spectrum(curvature.inverse(DAMPING).dense(), damped)
    after = spectrum(dense(inverse), damped)
    ones = int(((after - 1).abs() < 1e-6).sum())
    assert ones == count + int(((before - 1).abs() < 1e-6).sum())
    scores = bi.deflated_ekfac(task, damping=DAMPING, curvature=curvature, deflate=40)
    assert 0 < scores.attrs["deflated"] <= scores.attrs["deflate"] == 40


def test_a_hessian_that_is_not_positive_is_refused(curvature, task):
    low = float(torch.linalg.eigvalsh(exact.loss_hessian(task))[0])
    assert low < -DAMPING
    with pytest.raises(NotPositiveDefiniteError, match=r"eigenvalue.*Gauss–Newton") as caught:
        deflate(curvature, HessianProduct(task), damping=DAMPING, rank=4)
    assert caught.value.lambda_min < 0
    positive = deflate(curvature, HessianProduct(task), damping=1 - low, rank=task.dimension)
    hessian = exact.loss_hessian(task) + (1 - low) * torch.eye(task.dimension, dtype=torch.float64)
    exact.close(dense(positive), torch.linalg.inv(hessian), 1e-9)


def test_ranks_that_cannot_be(curvature, task):
    with pytest.raises(ValueError, match=r"1 ≤ k ≤ 83"):
        make(curvature, task, 0)
