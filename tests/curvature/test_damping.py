"""Dampings from a training recipe and from a posterior."""

import math

import numpy as np
import pytest
import torch

import bayesinf as bi
from tests.cases import BY_NAME


def test_a_constant_rate_gives_one_over_eta_k():
    assert bi.source_damping([0.03] * 250) == pytest.approx(1 / (0.03 * 250), rel=1e-14)
    assert bi.source_damping([0.03] * 250, momentum=0.9) == pytest.approx(0.1 / 7.5, rel=1e-13)


def test_it_matches_unrolled_gradient_descent_at_both_ends_and_within_a_third_between():
    """Steps w ← w − η(σw + g) from 0 answer to g by −(1 − (1 − ησ)^K)/σ."""
    rates = np.full(400, 0.02)
    lam = bi.source_damping(rates)
    for sigma, most in ((1e-6, 1e-4), (20.0, 0.02)):
        unrolled = (1 - np.prod(1 - rates * sigma)) / sigma
        assert (sigma + lam) * unrolled == pytest.approx(1, abs=most)
    for sigma in np.geomspace(1e-3, 10, 40):
        unrolled = (1 - np.prod(1 - rates * sigma)) / sigma
        assert 1 - 1e-9 < (sigma + lam) * unrolled < 1.32


def test_the_recipe_knows_its_rates():
    recipe = bi.SGDRecipe(epochs=3, batch_size=4, lr=0.2, momentum=0.5)
    rates = recipe.learning_rates(10)
    assert len(rates) == 9
    assert rates[0] == 0.2
    assert rates[3] == pytest.approx(0.1 * (1 + math.cos(math.pi / 3)))
    lam = bi.source_damping(rates, momentum=recipe.momentum)
    assert lam == pytest.approx(0.5 / sum(rates), rel=1e-13)


def test_gamma_is_the_inverse_of_the_posteriors_damping():
    task = BY_NAME["mlp-gaussian"].task()
    gamma = bi.gamma_from_damping(0.07, 250.0, weight_decay=0.02)
    posterior = bi.LocalPosterior(task, n_beta=250.0, gamma=gamma, weight_decay=0.02)
    assert posterior.damping == pytest.approx(0.07, rel=1e-14)


def test_a_sweep_of_dampings_equals_dense_inverses(rng):
    task = BY_NAME["mlp-gaussian"].task()
    curvature = bi.fit_curvature(task, fisher="enumerated")
    dense = curvature.dense()
    v = torch.randn(task.dimension, generator=rng, dtype=torch.float64)
    for lam in (1e-3, 0.1, 10.0):
        damped = dense + lam * torch.eye(len(dense), dtype=dense.dtype)
        expected = torch.linalg.solve(damped, v)
        assert torch.allclose(curvature.inverse(lam) @ v, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bi.source_damping([]), "rates of all steps"),
        (lambda: bi.source_damping([0.0, 0.0]), "one at least positive"),
        (lambda: bi.source_damping([0.1, -0.1]), "non-negative"),
        (lambda: bi.source_damping([0.1], momentum=1.0), r"momentum must lie in \[0, 1\)"),
        (lambda: bi.gamma_from_damping(0.1, -1.0), "n_beta must be finite and ≥ 0"),
        (lambda: bi.gamma_from_damping(0.1, 1.0, weight_decay=0.2), "would need γ < 0"),
    ],
)
def test_bad_numbers_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
