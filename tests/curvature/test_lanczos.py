"""Eigenpairs and bounds of spectra against full decompositions."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import bayesinf as bi
from bayesinf.curvature import _lanczos
from bayesinf.curvature._lanczos import estimate_spectrum, top_eigenpairs
from bayesinf.curvature._operator import multiply
from bayesinf.curvature._products import GaussNewtonProduct, HessianProduct
from tests import exact
from tests.layered_cases import LAYERED_BY_NAME


@dataclass
class Dense:
    matrix: torch.Tensor

    @property
    def shape(self):
        return tuple(self.matrix.shape)

    @property
    def dtype(self):
        return self.matrix.dtype

    def apply(self, rows):
        return rows @ self.matrix

    def __matmul__(self, v):
        return multiply(self, v)


def random_matrix(rng, d, low=-1.0):
    q = torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=torch.float64))[0]
    values = torch.linspace(low, 5, d, dtype=torch.float64) ** 3
    return q @ torch.diag(values) @ q.T


def reference(matrix, k, which):
    values = torch.linalg.eigvalsh(matrix).flip(0)
    low = {"LA": 0, "SA": k, "BE": k // 2}[which]
    return torch.cat([values[: k - low], values[len(values) - low :]])


@pytest.mark.parametrize("which", ["LA", "SA", "BE"])
@pytest.mark.parametrize(("d", "k"), [(5, 2), (5, 5), (64, 7), (120, 7), (120, 1), (70, 60)])
def test_eigenpairs_of_a_matrix(which, d, k, rng):
    matrix = random_matrix(rng, d)
    found = top_eigenpairs(Dense(matrix), k, which=which, tolerance=1e-12)
    exact.close(found.values, reference(matrix, k, which), 1e-10)
    assert bool((found.values[:-1] >= found.values[1:]).all())
    exact.close(found.vectors @ found.vectors.T, torch.eye(k), 1e-10)
    exact.close(found.vectors @ matrix, found.values[:, None] * found.vectors, 1e-8)
    assert float(found.residuals.max()) < 1e-7
    assert found.products >= k


@pytest.mark.parametrize("kind", [GaussNewtonProduct, HessianProduct])
def test_eigenpairs_of_a_network(kind):
    task = LAYERED_BY_NAME["cnn"].task()
    dense = {GaussNewtonProduct: exact.gauss_newton, HessianProduct: exact.loss_hessian}[kind]
    operator = kind(task)
    which = "LA" if kind is GaussNewtonProduct else "BE"  # its smallest eigenvalue is manifold
    found = top_eigenpairs(operator, 6, which=which, damping=0.1, tolerance=1e-10)
    damped = dense(task) + 0.1 * torch.eye(task.dimension, dtype=torch.float64)
    exact.close(found.values, reference(damped, 6, which), 1e-9)
    assert found.products == operator.products


def test_residuals_are_what_they_say(rng):
    matrix = random_matrix(rng, 120)
    found = top_eigenpairs(Dense(matrix), 4, tolerance=0.1)
    own = (found.vectors @ matrix - found.values[:, None] * found.vectors).norm(dim=1)
    exact.close(found.residuals, own, 1e-9)
    true = torch.linalg.eigvalsh(matrix)
    gaps = (found.values[:, None] - true).abs().min(1).values
    assert bool((gaps <= found.residuals + 1e-9).all())


def test_of_the_preconditioned_operator():
    task = LAYERED_BY_NAME["mlp-categorical"].task()
    root = bi.fit_curvature(task, fisher="enumerated").inverse(0.01).sqrt()
    w = root.dense()
    damped = exact.gauss_newton(task) + 0.01 * torch.eye(task.dimension, dtype=torch.float64)
    for k in (3, 41):  # by Lanczos, and by the matrix
        found = top_eigenpairs(
            GaussNewtonProduct(task), k, preconditioner_root=root, damping=0.01, which="BE",
            tolerance=1e-10,
        )  # fmt: skip
        exact.close(found.values, reference(w @ damped @ w, k, "BE"), 1e-9)


def test_precision_is_that_of_the_operator(rng):
    matrix = random_matrix(rng, 120).float()
    found = top_eigenpairs(Dense(matrix), 3, tolerance=1e-5)
    assert found.vectors.dtype == torch.float32
    assert found.values.dtype == torch.float64
    exact.close(found.values, reference(matrix.double(), 3, "LA"), 1e-5)


def test_the_seed_decides(rng):
    operator = Dense(random_matrix(rng, 120))
    runs = [top_eigenpairs(operator, 2, tolerance=0.1, seed=seed).vectors for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_errors_say_what_to_do(rng):
    operator = Dense(random_matrix(rng, 120))
    for k, which in ((0, "LA"), (121, "LA"), (3, "LM")):
        with pytest.raises(ValueError, match=r"1 ≤ k ≤ 120"):
            top_eigenpairs(operator, k, which=which)
    with pytest.raises(ValueError, match=r"root is \(3, 3\) and the operator \(120, 120\)"):
        top_eigenpairs(operator, 2, preconditioner_root=Dense(torch.eye(3)))
    with pytest.raises(ValueError, match="not finite"):
        top_eigenpairs(Dense(torch.full((3, 3), float("nan"))), 1)
    with pytest.raises(RuntimeError, match=r"of 30 eigenpairs converged.*more iterations"):
        top_eigenpairs(operator, 30, which="SA", iterations=1, tolerance=1e-12)


def test_pairs_that_have_converged_may_be_taken(rng):
    """An isolated end and a crowded one: the first is found to the last digit, not all are."""
    values = torch.cat([torch.linspace(0, 1, 290), torch.linspace(20, 40, 10)]).double()
    q = torch.linalg.qr(torch.randn(300, 300, generator=rng, dtype=torch.float64))[0]
    operator = Dense(q * values @ q.T)
    options = {"which": "BE", "tolerance": 1e-10, "iterations": 2}
    with pytest.raises(RuntimeError, match=r"of 30 eigenpairs converged"):
        top_eigenpairs(operator, 30, **options)
    found = top_eigenpairs(operator, 30, partial=True, **options)
    assert 10 <= len(found.values) < 30
    exact.close(found.values[:10], values.flip(0)[:10], 1e-9)
    exact.close(found.vectors @ found.vectors.T, torch.eye(len(found.values)), 1e-9)
    assert float(found.residuals.max()) < 1e-8
    with pytest.raises(RuntimeError, match=r"0 of 5 eigenpairs converged"):
        top_eigenpairs(
            Dense(random_matrix(rng, 120)), 5, which="SA", iterations=1, tolerance=1e-12,
            partial=True,
        )  # fmt: skip


# ---------------------------------------------------------------- bounds


@pytest.mark.parametrize("preconditioned", [False, True])
def test_bounds_of_a_spectrum(preconditioned, rng):
    d = 90
    matrix = random_matrix(rng, d, low=0.5)
    m = torch.diag(torch.rand(d, generator=rng, dtype=torch.float64) + 0.1)
    true = torch.linalg.eigvals(m @ matrix if preconditioned else matrix).real
    precondition = (lambda rows: rows @ m) if preconditioned else None
    start = torch.randn(1, d, generator=rng, dtype=torch.float64)
    for steps in (5, 20, d):
        found = estimate_spectrum(
            lambda rows: rows @ matrix, start, precondition=precondition, steps=steps
        )
        assert found.low >= float(true.min()) * (1 - 1e-9)
        assert found.high >= float(true.max()) * (0.9 if steps == 5 else 1 - 1e-9)
        assert found.high <= 1.5 * float(true.max())
    np.testing.assert_allclose([found.low, found.high], [true.min(), true.max()], rtol=1e-6)


def test_one_eigenvalue_takes_one_product(rng):
    calls = []
    matrix = random_matrix(rng, 20, low=0.5)
    inverse = torch.linalg.inv(matrix)

    def product(rows):
        calls.append(len(rows))
        return rows @ matrix

    start = torch.randn(1, 20, generator=rng, dtype=torch.float64)
    found = estimate_spectrum(product, start, precondition=lambda rows: rows @ inverse)
    np.testing.assert_allclose([found.low, found.high], [1, 1], rtol=1e-9)
    assert calls == [1]


def test_a_start_vector_that_is_an_eigenvector(rng):
    matrix = torch.diag(torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64))
    found = estimate_spectrum(lambda rows: rows @ matrix, torch.eye(3, dtype=torch.float64)[:1])
    assert (found.low, found.high) == (3.0, 3.0)
    assert _lanczos.Spectrum(3.0, 3.0) == found
