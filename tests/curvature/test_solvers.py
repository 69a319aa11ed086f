"""Conjugate gradients, Neumann series and ASTRA against direct solves."""

import warnings
from dataclasses import dataclass, field

import pytest
import torch

import bayesinf as bi
from bayesinf.curvature import NotPositiveDefiniteError
from bayesinf.curvature._astra import astra
from bayesinf.curvature._conjugate_gradient import conjugate_gradient
from bayesinf.curvature._deflation import deflate
from bayesinf.curvature._fixed_point import chebyshev_coefficients
from bayesinf.curvature._lanczos import Spectrum
from bayesinf.curvature._neumann import neumann
from bayesinf.curvature._operator import multiply
from bayesinf.curvature._products import GaussNewtonProduct, HessianProduct
from bayesinf.curvature._solvers import SolverDivergenceError, SolverWarning
from tests import exact
from tests.layered_cases import LAYERED_BY_NAME

DAMPING = 0.02


@dataclass
class Dense:
    """A matrix that counts its products."""

    matrix: torch.Tensor
    calls: list[int] = field(default_factory=list)

    @property
    def shape(self):
        return tuple(self.matrix.shape)

    def apply(self, rows):
        self.calls.append(rows.shape[0])
        return rows @ self.matrix.to(rows)

    def __matmul__(self, v):
        return multiply(self, v)


@dataclass
class Mean(Dense):
    """The mean of ``n`` matrices."""

    parts: torch.Tensor | None = None

    @property
    def n(self):
        return len(self.parts)

    def on(self, index):
        return Dense(self.parts[index].mean(0))


def spread(rng, d=30, low=1e-3, high=10.0):
    """A matrix with eigenvalues at equal ratios from low to high."""
    q = torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=torch.float64))[0]
    return q @ torch.diag(torch.logspace(0, 1, d, dtype=torch.float64).sub(1) / 9) @ q.T * (
        high - low
    ) + low * torch.eye(d, dtype=torch.float64)


def solve(matrix, rhs, damping=DAMPING):
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    return torch.linalg.solve(matrix + damping * eye, rhs.T).T


def normal(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


@pytest.fixture(scope="module")
def network():
    """A network, its Gauss–Newton matrix, EK-FAC, and gradients to solve for."""
    task = LAYERED_BY_NAME["mlp-categorical"].task()
    curvature = bi.fit_curvature(task, fisher="enumerated")
    return task, exact.gauss_newton(task), curvature, exact.gradients(task, "query")


SOLVERS = {
    "cg": lambda o, b, m, **k: conjugate_gradient(o, b, preconditioner=m, block=False, **k),
    "block-cg": lambda o, b, m, **k: conjugate_gradient(o, b, preconditioner=m, **k),
    "astra": lambda o, b, m, **k: astra(o, b, preconditioner=m, **k),
    "astra-momentum": lambda o, b, m, **k: astra(o, b, preconditioner=m, momentum=0.8, **k),
    "astra-constant": lambda o, b, m, **k: astra(o, b, preconditioner=m, momentum=0.0, **k),
    "neumann": lambda o, b, m, **k: neumann(o, b, **k),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_solutions_are_the_direct_solves(solver, network):
    task, matrix, curvature, rhs = network
    operator = GaussNewtonProduct(task)
    solution = SOLVERS[solver](
        operator, rhs, curvature.inverse(DAMPING), damping=DAMPING, tolerance=1e-11,
        iterations=5000,
    )  # fmt: skip
    exact.close(solution.x, solve(matrix, rhs), 1e-9)
    assert bool(solution.converged.all())
    damped = matrix + DAMPING * torch.eye(len(matrix), dtype=matrix.dtype)
    own = (solution.x @ damped - rhs).norm(dim=1) / rhs.norm(dim=1)
    assert float((solution.residual - own).abs().max()) < 1e-14
    assert solution.products == pytest.approx(operator.products)
    assert solution.products_per_row == pytest.approx(operator.products / len(rhs))
    assert solution.products >= solution.iterations


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_the_residual_promises(solver, network):
    """Stopped early, the residual is still the true one, and the rows that missed are named."""
    task, matrix, curvature, rhs = network
    with pytest.warns(SolverWarning, match=r"5 of 5 right-hand sides missed.*1e-12.*worst resid"):
        solution = SOLVERS[solver](
            GaussNewtonProduct(task), rhs, curvature.inverse(DAMPING), damping=DAMPING,
            tolerance=1e-12, iterations=3,
        )  # fmt: skip
    damped = matrix + DAMPING * torch.eye(len(matrix), dtype=matrix.dtype)
    own = (solution.x @ damped - rhs).norm(dim=1) / rhs.norm(dim=1)
    exact.close(solution.residual, own, 1e-9)
    assert solution.iterations == 3
    assert not bool(solution.converged.any())


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_of_zeros_and_rows_of_other_sizes(solver, rng):
    matrix = spread(rng, low=0.1)
    rhs = normal(rng, 4, 30) * torch.tensor([[1e-12], [1.0], [0.0], [1e9]], dtype=torch.float64)
    solution = SOLVERS[solver](
        Dense(matrix), rhs, Dense(torch.eye(30)), damping=DAMPING, tolerance=1e-9, iterations=5000
    )
    assert bool((solution.x[2] == 0).all())
    assert float(solution.residual[2]) == 0
    for row in (0, 1, 3):
        exact.close(solution.x[row], solve(matrix, rhs)[row], 1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_right_hand_side(solver, rng):
    operator = Dense(spread(rng))
    solution = SOLVERS[solver](
        operator, torch.zeros(0, 30).double(), Dense(torch.eye(30)), damping=DAMPING
    )
    assert solution.x.shape == (0, 30)
    assert solution.products_per_row == solution.products


# ---------------------------------------------------------------- conjugate gradients


@pytest.mark.parametrize("block", [False, True])
def test_as_many_iterations_as_eigenvalues(block, rng):
    q = torch.linalg.qr(normal(rng, 30, 30))[0]
    values = torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64).repeat(10)
    matrix = q @ torch.diag(values) @ q.T
    rhs = normal(rng, 2, 30)
    solution = conjugate_gradient(Dense(matrix), rhs, damping=DAMPING, tolerance=1e-10, block=block)
    assert solution.iterations == 3
    exact.close(solution.x, solve(matrix, rhs), 1e-9)


@pytest.mark.parametrize("block", [False, True])
def test_an_exact_preconditioner_takes_one_iteration(block, rng):
    matrix = spread(rng)
    inverse = torch.linalg.inv(matrix + DAMPING * torch.eye(30, dtype=torch.float64))
    rhs = normal(rng, 3, 30)
    solution = conjugate_gradient(
        Dense(matrix), rhs, damping=DAMPING, preconditioner=Dense(inverse), tolerance=1e-9,
        block=block,
    )  # fmt: skip
    assert solution.iterations == 1
    assert solution.products == 2 * 3  # the iteration, and the residual


def test_a_block_of_one_row_is_the_usual_iteration(rng):
    matrix, rhs = spread(rng), normal(rng, 1, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolverWarning)
        one, block = (
            conjugate_gradient(Dense(matrix), rhs, damping=DAMPING, iterations=6, block=block)
            for block in (False, True)
        )
    exact.close(block.x, one.x, 1e-9)


def test_each_row_minimises_its_energy_over_its_krylov_space(rng):
    """``‖x_j − x‖_A`` is that of the Galerkin solution in ``span{b, Ab, …}``, in a block of all."""
    matrix, rhs, j = spread(rng), normal(rng, 2, 30), 4
    damped = matrix + DAMPING * torch.eye(30, dtype=torch.float64)
    for block in (False, True):
        with pytest.warns(SolverWarning):
            x = conjugate_gradient(Dense(matrix), rhs, damping=DAMPING, iterations=j, block=block).x
        for row in range(2):
            vectors = rhs if block else rhs[row : row + 1]
            space = torch.cat([vectors @ torch.linalg.matrix_power(damped, p) for p in range(j)])
            q = torch.linalg.qr(space.T)[0]
            best = q @ torch.linalg.solve(q.T @ damped @ q, q.T @ rhs[row])
            exact.close(x[row], best, 1e-6)


@pytest.mark.parametrize("rows", [8, 45])
def test_blocks_with_dependent_rows(rows, rng):
    """More right-hand sides than dimensions, and rows that repeat or combine others."""
    matrix, rhs = spread(rng), normal(rng, rows, 30)
    rhs[3] = rhs[0]
    rhs[5] = rhs[1] - 2 * rhs[2]
    solution = conjugate_gradient(Dense(matrix), rhs, damping=DAMPING, tolerance=1e-10)
    exact.close(solution.x, solve(matrix, rhs), 1e-8)


def test_rows_that_are_done_cost_nothing_more(rng):
    """The first row is an eigenvector, one iteration away."""
    matrix = spread(rng)
    first = torch.linalg.eigh(matrix)[1][:, 7]
    rhs = torch.stack([first, *normal(rng, 2, 30)])
    operator = Dense(matrix)
    conjugate_gradient(operator, rhs, damping=DAMPING, block=False, tolerance=1e-8)
    assert operator.calls[0] == 3
    assert set(operator.calls[1:-1]) == {1, 2} or set(operator.calls[1:-1]) == {2}
    assert operator.calls[-1] == 3  # the residual of all


def test_a_block_needs_fewer_products(rng):
    matrix, rhs = spread(rng, d=300, low=1e-4), normal(rng, 20, 300)
    options = {"damping": 1e-4, "tolerance": 1e-6, "iterations": 1000}
    rows, block = (
        conjugate_gradient(Dense(matrix), rhs, block=block, **options) for block in (False, True)
    )
    assert block.products < 0.6 * rows.products


@pytest.mark.parametrize("block", [False, True])
def test_float32_does_not_lie(block, rng):
    """Recurrences fall below 1e-9; the residuals that are told are true, and said to miss it."""
    matrix, rhs = spread(rng, low=1e-3, high=1000), normal(rng, 3, 30)
    with pytest.warns(SolverWarning, match=r"torch.float32 arithmetic ends here.*float64"):
        solution = conjugate_gradient(
            Dense(matrix.float()), rhs.float(), damping=1e-3, tolerance=1e-9, block=block,
            iterations=1000,
        )  # fmt: skip
    damped = matrix.float().double() + 1e-3 * torch.eye(30, dtype=torch.float64)
    true = (solution.x.double() @ damped - rhs).norm(dim=1) / rhs.norm(dim=1)
    assert float(true.max()) > 1e-8
    ratio = solution.residual.double() / true
    assert 1 / 3 < float(ratio.min()) <= float(ratio.max()) < 3
    assert solution.iterations < 1000
    assert solution.x.dtype == torch.float32


@dataclass
class WrongOnce(Dense):
    """A matrix whose third product is not quite right."""

    def apply(self, rows):
        out = super().apply(rows)
        return out + 0.01 * rows if len(self.calls) == 3 else out


@pytest.mark.parametrize("block", [False, True])
def test_what_a_recurrence_forgot_is_made_good(block, rng):
    matrix, rhs = spread(rng, low=0.5), normal(rng, 2, 30)
    solution = conjugate_gradient(
        WrongOnce(matrix), rhs, damping=DAMPING, tolerance=1e-8, block=block
    )
    exact.close(solution.x, solve(matrix, rhs), 1e-7)
    right = conjugate_gradient(Dense(matrix), rhs, damping=DAMPING, tolerance=1e-8, block=block)
    assert solution.iterations > right.iterations


@pytest.mark.parametrize("block", [False, True])
def test_indefinite_curvature_is_found(block):
    task = LAYERED_BY_NAME["mlp-categorical"].task()
    low = float(torch.linalg.eigvalsh(exact.loss_hessian(task))[0])
    rhs = exact.gradients(task)
    with pytest.raises(NotPositiveDefiniteError, match=r"curvature -.*damping=0\.001") as caught:
        conjugate_gradient(HessianProduct(task), rhs, damping=0.001, block=block)
    assert low + 0.001 <= caught.value.lambda_min <= 0
    solution = conjugate_gradient(
        HessianProduct(task), rhs, damping=0.1 - low, block=block, tolerance=1e-10
    )
    exact.close(solution.x, solve(exact.loss_hessian(task), rhs, 0.1 - low), 1e-8)


@pytest.mark.parametrize("block", [False, True])
def test_a_preconditioner_that_is_not_positive(block, rng):
    bad = Dense(-torch.eye(30, dtype=torch.float64))
    with pytest.raises(NotPositiveDefiniteError, match=r"preconditioner.*rᵀMr = -"):
        conjugate_gradient(
            Dense(spread(rng)), normal(rng, 2, 30), damping=1.0, preconditioner=bad, block=block
        )


# ---------------------------------------------------------------- ASTRA and Neumann


def test_an_exact_preconditioner_takes_one_iteration_of_step_one(rng):
    matrix, rhs = spread(rng), normal(rng, 3, 30)
    inverse = Dense(torch.linalg.inv(matrix + DAMPING * torch.eye(30, dtype=torch.float64)))
    expected = solve(matrix, rhs)
    for options in ({"step": 1.0}, {"momentum": 0.0}, {}):
        solution = astra(
            Dense(matrix), rhs, damping=DAMPING, preconditioner=inverse, tolerance=1e-10,
            start=normal(rng, 3, 30), **options,
        )  # fmt: skip
        assert solution.iterations == 1
        exact.close(solution.x, expected, 1e-9)
    solution = astra(Dense(matrix), rhs, damping=DAMPING, preconditioner=inverse, tolerance=1e-10)
    assert solution.iterations == 0  # where it starts


def test_an_iteration_is_the_formula(network):
    task, matrix, curvature, rhs = network
    m = curvature.inverse(DAMPING).dense()
    damped = matrix + DAMPING * torch.eye(len(matrix), dtype=matrix.dtype)
    x = previous = rhs @ m
    for _ in range(5):
        x, previous = x + 0.1 * (rhs - x @ damped) @ m + 0.9 * (x - previous), x
    with pytest.warns(SolverWarning, match="astra"):
        solution = astra(
            GaussNewtonProduct(task), rhs, damping=DAMPING, iterations=5, step=0.1, momentum=0.9,
            preconditioner=curvature.inverse(DAMPING), tolerance=1e-12,
        )  # fmt: skip
    exact.close(solution.x, x, 1e-10)
    assert solution.step == 0.1
    assert solution.spectrum is None
    assert solution.products == 6 * 5  # five iterations and the first residual, of five rows


def test_the_neumann_series_is_its_sum(rng):
    matrix, rhs, step = spread(rng), normal(rng, 2, 30), 0.05
    factor = torch.eye(30, dtype=torch.float64) * (1 - step * DAMPING) - step * matrix
    with pytest.warns(SolverWarning, match="condition number"):
        solution = neumann(Dense(matrix), rhs, damping=DAMPING, step=step, iterations=7)
    total = sum(torch.linalg.matrix_power(factor, j) for j in range(7))
    exact.close(solution.x, step * rhs @ total, 1e-12)


def test_chebyshev_keeps_its_bound(rng):
    """Residuals within ``1/T_j((high + low)/(high − low))`` of the first, on the exact interval."""
    matrix, rhs, j = spread(rng, low=0.1), normal(rng, 4, 30), 12
    low, high = 0.1 + DAMPING, 10.0 + DAMPING
    start = torch.zeros_like(rhs)
    with pytest.warns(SolverWarning):
        solution = astra(
            Dense(matrix), rhs, damping=DAMPING, preconditioner=Dense(torch.eye(30)),
            spectrum=(low, high), iterations=j, tolerance=1e-12, start=start,
        )  # fmt: skip
    bound = 1 / torch.cosh(
        j * torch.acosh(torch.tensor((high + low) / (high - low), dtype=torch.float64))
    )
    assert float(solution.residual.max()) <= float(bound) * (1 + 1e-9)
    assert solution.spectrum == (low, high)
    assert bool((start == 0).all())  # the caller's, not changed
    plain = 1 - 2 * low / (high + low)
    assert float(bound) < 0.3 * plain**j


def test_chebyshev_on_a_point_is_newton():
    steps = chebyshev_coefficients(Spectrum(2.0, 2.0))
    assert [next(steps) for _ in range(3)] == [(0.5, 0.0)] * 3


def test_automatic_steps_are_half_of_what_is_stable(rng):
    matrix, rhs = spread(rng, low=0.5), normal(rng, 2, 30)
    top = 10 + DAMPING
    solution = neumann(Dense(matrix), rhs, damping=DAMPING)
    assert solution.step == pytest.approx(1 / top, rel=0.01)
    assert solution.spectrum == pytest.approx((0.5 + DAMPING, top), rel=0.05)
    solution = astra(
        Dense(matrix), rhs, damping=DAMPING, preconditioner=Dense(torch.eye(30)), momentum=0.6
    )
    assert solution.step == pytest.approx(1.6 / top, rel=0.01)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_a_step_that_is_too_large_is_told_from_one_that_is_not(momentum, rng):
    matrix, rhs = spread(rng, low=0.5), normal(rng, 2, 30)
    limit = 2 * (1 + momentum) / (10 + DAMPING)
    options = {"damping": DAMPING, "preconditioner": Dense(torch.eye(30)), "momentum": momentum}
    with pytest.raises(
        SolverDivergenceError, match=r"Steps below 0\.\d+ are stable here"
    ) as caught:
        astra(Dense(matrix), rhs, step=1.05 * limit, iterations=2000, **options)
    assert caught.value.stable_step == pytest.approx(limit, rel=0.01)
    solution = astra(Dense(matrix), rhs, step=0.95 * limit, iterations=2000, **options)
    assert bool(solution.converged.all())


def test_a_spectrum_that_is_too_narrow(rng):
    with pytest.raises(
        SolverDivergenceError, match=r"reaches beyond the 3 .*wider spectrum=\(0\.5, 6\)"
    ):
        astra(
            Dense(spread(rng, low=0.5)), normal(rng, 2, 30), damping=DAMPING,
            preconditioner=Dense(torch.eye(30)), spectrum=(0.5, 3.0),
        )  # fmt: skip


def test_products_that_are_not_finite(rng):
    broken = Dense(torch.full((30, 30), float("nan"), dtype=torch.float64))
    with pytest.raises(ValueError, match="not finite"):
        conjugate_gradient(broken, normal(rng, 2, 30), damping=1.0)
    with pytest.raises(ValueError, match="not finite"):
        conjugate_gradient(broken, normal(rng, 2, 30), damping=1.0, block=False)
    with pytest.raises(ValueError, match="not finite"):
        neumann(broken, normal(rng, 2, 30), damping=1.0)


def test_an_estimated_spectrum_that_reaches_zero():
    task = LAYERED_BY_NAME["mlp-categorical"].task()
    rhs = exact.gradients(task)
    curvature = bi.fit_curvature(task, fisher="enumerated")
    with pytest.raises(NotPositiveDefiniteError, match=r"not positive definite: C \+ λI has"):
        neumann(HessianProduct(task), rhs, damping=0.001)
    with pytest.raises(NotPositiveDefiniteError, match=r"\(P \+ λ\)⁻¹\(C \+ λI\) has"):
        astra(HessianProduct(task), rhs, damping=0.001, preconditioner=curvature.inverse(0.001))


# ---------------------------------------------------------------- minibatches


def minibatched(rng, n=20, d=6):
    rows = normal(rng, n, 2, d)
    parts = rows.transpose(1, 2) @ rows
    return Mean(parts.mean(0), parts=parts), parts


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_minibatches_change_nothing_in_the_mean(momentum, rng):
    """120 independent runs: their mean is within 5.5 standard errors of the run on all examples.

    12 statistics in each of two tests: false alarms below 24 · 3e-7 = 1e-5. A single run misses by
    far more.
    """
    operator, parts = minibatched(rng)
    rhs = normal(rng, 2, 6)
    preconditioner = Dense(torch.diag(1 / parts.mean(0).diagonal()))

    def run(batch_size, iterations, seed=0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SolverWarning)
            return astra(
                operator, rhs, damping=0.5, preconditioner=preconditioner, momentum=momentum,
                step=0.3 * (1 - momentum), batch_size=batch_size, iterations=iterations,
                tolerance=1e-12, seed=seed, check_every=1000,
            ).x.flatten()  # fmt: skip

    expected = run(20, 40)
    draws = torch.stack([run(4, 40, seed) for seed in range(120)])
    standard = draws.std(0) / 120**0.5
    assert float(((draws.mean(0) - expected) / standard).abs().max()) < 5.5
    assert float((draws - expected).abs().max()) > 10 * float(standard.max())
    exact.close(run(20, 400), solve(parts.mean(0), rhs, 0.5).flatten(), 1e-5)


def test_minibatches_average_what_they_iterate(rng, monkeypatch):
    """Against the same iteration written out, its batches drawn from the same generator."""
    operator, parts = minibatched(rng)
    rhs, step = normal(rng, 2, 6), 0.05
    generator = torch.Generator().manual_seed(3)
    x = torch.zeros_like(rhs)
    iterates = []
    for _ in range(9):
        batch = torch.randperm(20, generator=generator)[:4]
        x = x + step * (rhs - x @ (parts[batch].mean(0) + 0.5 * torch.eye(6).double()))
        iterates.append(x)
    average = iterates[0]
    for t, x in enumerate(iterates[1:], 2):
        average = (1 - 4 / (t + 3)) * average + 4 / (t + 3) * x
    with pytest.warns(SolverWarning):
        found = neumann(
            operator, rhs, damping=0.5, step=step, batch_size=4, iterations=9, seed=3,
            check_every=4, tolerance=1e-12,
        )  # fmt: skip
    exact.close(found.x, average, 1e-12)
    assert found.products == pytest.approx(2 * (9 * 4 / 20 + 1 + 3))  # first, two checks, last


def test_minibatches_of_a_network_reach_their_tolerance(network):
    task, matrix, curvature, rhs = network
    operator = GaussNewtonProduct(task)
    solution = astra(
        operator, rhs, damping=0.3, preconditioner=curvature.inverse(0.3), batch_size=4,
        tolerance=0.02, iterations=3000,
    )  # fmt: skip
    assert bool(solution.converged.all())
    assert solution.iterations < 3000
    assert solution.iterations % 15 == 0  # five passes over 12 examples
    assert solution.products == pytest.approx(operator.products)
    error = (solution.x - solve(matrix, rhs, 0.3)).norm() / solve(matrix, rhs, 0.3).norm()
    assert float(error) < 0.03
    whole = neumann(operator, rhs, damping=0.3, batch_size=12, tolerance=1e-6)
    exact.close(whole.x, solve(matrix, rhs, 0.3), 1e-5)


def test_minibatches_that_diverge(rng):
    operator, _ = minibatched(rng)
    with pytest.raises(SolverDivergenceError, match="stable here") as caught:
        neumann(operator, normal(rng, 2, 6), damping=0.5, step=1.0, batch_size=4)
    with pytest.warns(SolverWarning, match="right-hand sides missed"):
        neumann(
            operator, normal(rng, 2, 6), damping=0.5, step=caught.value.stable_step / 2,
            batch_size=4, iterations=200, tolerance=1e-12,
        )  # fmt: skip


# ---------------------------------------------------------------- what they refuse


@pytest.mark.parametrize("solver", SOLVERS)
def test_errors_say_what_to_do(solver, rng):
    run, operator, eye = SOLVERS[solver], Dense(spread(rng)), Dense(torch.eye(30))
    with pytest.raises(ValueError, match=r"rows \(k, 30\).*One vector is rhs\[None\]"):
        run(operator, normal(rng, 30), eye, damping=1.0)
    with pytest.raises(ValueError, match=r"got torch.float64 of shape \(30, 2\)"):
        run(operator, normal(rng, 30, 2), eye, damping=1.0)
    for damping in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="damping must be finite and ≥ 0"):
            run(operator, normal(rng, 2, 30), eye, damping=damping)
    rhs = normal(rng, 3, 30)
    rhs[1, 4] = float("nan")
    with pytest.raises(ValueError, match=r"1 right-hand side.*not finite, the first in row 1"):
        run(operator, rhs, eye, damping=1.0)
    if solver != "neumann":
        with pytest.raises(ValueError, match=r"preconditioner is \(4, 4\).*\(30, 30\)"):
            run(operator, normal(rng, 2, 30), Dense(torch.eye(4)), damping=1.0)


def test_options_that_cannot_be(rng):
    operator, rhs, eye = Dense(spread(rng)), normal(rng, 2, 30), Dense(torch.eye(30))
    mean, _ = minibatched(rng)
    for momentum in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\)"):
            astra(operator, rhs, damping=1.0, preconditioner=eye, momentum=momentum)
    for step in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="step must be positive"):
            neumann(operator, rhs, damping=1.0, step=step)
    for spectrum in ((0.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="0 < μ_min ≤ μ_max"):
            astra(operator, rhs, damping=1.0, preconditioner=eye, spectrum=spectrum)
    with pytest.raises(ValueError, match=r"start must be \(2, 30\)"):
        astra(operator, rhs, damping=1.0, preconditioner=eye, start=rhs[:1])
    with pytest.raises(TypeError, match=r"GaussNewtonProduct\(task\); Dense has none"):
        neumann(operator, rhs, damping=1.0, batch_size=4)
    for batch_size in (0, 21):
        with pytest.raises(ValueError, match="between 1 and the 20 examples"):
            neumann(mean, normal(rng, 2, 6), damping=1.0, batch_size=batch_size)


# ---------------------------------------------------------------- digits


def test_digits_within_fifty_products():
    """Where EK-FAC is off by half, both solvers come within 1e-3 of the exact solution.

    That solution is certified by its residual: the error is at most ``‖r‖/λ``.
    """
    from benchmarks.tasks import get_task

    bench = get_task("digits-mlp")
    train, query = bench.data()
    task = bi.Task(bench.checkpoint(), bench.likelihood, train=train, query=query)
    damping, count = 0.003, 20
    with torch.no_grad():
        losses = lambda params: task.losses(params, task.query.batch(slice(0, count)))  # noqa: E731
        rhs = task.flatten(torch.func.jacrev(losses)(task.params)).detach()
    wide = task.to(dtype=torch.float64)
    double = GaussNewtonProduct(wide, batch_size=500)
    curvature = bi.fit_curvature(task, fisher="enumerated")
    inverse = curvature.inverse(damping)
    reference = conjugate_gradient(
        double, rhs.double(), damping=damping, tolerance=2e-5,
        preconditioner=bi.fit_curvature(wide, fisher="enumerated").inverse(damping),
    )  # fmt: skip
    norms = reference.x.norm(dim=1)
    assert float((reference.residual * rhs.norm(dim=1) / damping / norms).max()) < 1e-4

    def error(x):
        return float(((x.double() - reference.x).norm(dim=1) / norms).max())

    operator = GaussNewtonProduct(task, batch_size=500)
    assert error(inverse.apply(rhs)) > 0.5
    options = {"damping": damping, "tolerance": 3e-4}
    block = conjugate_gradient(operator, rhs, preconditioner=inverse, **options)
    assert error(block.x) < 1e-3
    assert block.products_per_row < 50
    deflated = deflate(curvature, operator, damping=damping, rank=40, tolerance=0.3)
    solution = astra(operator, rhs, preconditioner=deflated, **options)
    assert error(solution.x) < 1e-3
    assert solution.products_per_row + deflated.products / count < 50
