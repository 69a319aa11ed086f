"""Projections: the linear map they are, in whatever form rows come, and unbiased inner products."""

import numpy as np
import pytest
import torch

from bayesinf.curvature import _projections as projections
from bayesinf.curvature import find_layers
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._projections import (
    Coordinates,
    KroneckerProjection,
    RandomProjection,
    plain_layer,
    random_sides,
)
from bayesinf.curvature._rows import Explicit, flat_rows
from bayesinf.curvature._sources import GradientSource
from tests import exact
from tests.layered_cases import LAYERED_BY_NAME

KINDS = ("rademacher", "normal", "sjlt")
NAMES = ("mlp-categorical", "sequence", "conv-groups", "words", "decoder-tied", "raw")


def gradients(name):
    task = LAYERED_BY_NAME[name].task()
    layers = find_layers(task)
    with GradientSource(task, layers, Costs()) as source:
        return layers, source.gradients("train", slice(0, task.n), task.train.batch())


def explicit(rows):
    return [Explicit(layer.matrices()) for layer in rows]


def identity(layers):
    """Rows that are the unit vectors."""
    d = sum(layer.size for layer in layers)
    parts = torch.eye(d, dtype=torch.float64).split([layer.size for layer in layers], dim=1)
    return [Explicit(p.view(d, 1, *la.shape)) for p, la in zip(parts, layers, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_random_projections_are_one_matrix_for_all_forms_of_rows(name, kind, monkeypatch):
    """In one block or in many, kept or made again, of all examples or of some."""
    layers, rows = gradients(name)
    for block in (2**22, 70):
        monkeypatch.setattr(projections, "_BLOCK", block)
        kept = RandomProjection(kind, 7, layers, (3, 1))
        again = RandomProjection(kind, 7, layers, (3, 1), keep=0)
        matrix = kept(identity(layers))[0].flat()
        expected = flat_rows(rows) @ matrix
        for made in (kept, again):
            exact.close(made(rows)[0].flat(), expected, 1e-12)
            exact.close(made(explicit(rows))[0].flat(), expected, 1e-12)
        some = [layer.part(slice(2, 4)) for layer in rows]
        exact.close(kept(some)[0].flat(), expected[2:4], 1e-12)
        assert kept(rows)[0].matrix_shape == kept.layers[0].shape == (1, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_entries_of_random_matrices(kind):
    """What is stated of them; other seeds give others, and single precision is no other matrix."""
    layers = (plain_layer("a", (6, 5)), plain_layer("b", (3, 4)))
    matrix = RandomProjection(kind, 16, layers, (0,))(identity(layers))[0].flat()
    assert matrix.shape == (42, 16)
    if kind == "rademacher":
        assert set(matrix.abs().flatten().tolist()) == {0.25}
    if kind == "sjlt":
        assert set((2 * matrix).flatten().tolist()) <= {-2.0, -1.0, 0.0, 1.0, 2.0}
        assert bool(((matrix != 0).sum(1) <= 4).all())
    assert np.linalg.matrix_rank(matrix) == 16
    other = RandomProjection(kind, 16, layers, (1,))(identity(layers))[0].flat()
    assert float((matrix - other).norm()) > 1
    single = [row.to(torch.float32) for row in identity(layers)]
    low = RandomProjection(kind, 16, layers, (0,))(single)[0]
    assert low.values.dtype == torch.float32
    exact.close(low.flat(), matrix, 1e-6)


def standard_scores(project, layers, seeds):
    """Standard scores of the mean of ``⟨Pg, Pg'⟩`` over seeds, of two vectors and of one."""
    g = torch.Generator().manual_seed(5)
    rows = [torch.randn(2, 1, *la.shape, generator=g, dtype=torch.float64) for la in layers]
    rows = [Explicit(torch.stack([r[0], 0.5 * r[0] + r[1]])) for r in rows]
    whole = flat_rows(rows)
    truth = whole @ whole.T
    found = torch.stack([(f := flat_rows(project(seed)(rows))) @ f.T for seed in range(seeds)])
    error = found.std(0) / seeds**0.5
    return ((found.mean(0) - truth) / error).abs(), found.std(0), truth


@pytest.mark.parametrize("kind", [*KINDS, "kronecker"])
def test_inner_products_are_right_on_average(kind):
    """400 seeds, three pairs: 4.5 standard errors, a false alarm in about 5e4 runs.

    Their spread over seeds says that a false factor of 1.2 would be found.
    """
    layers = (plain_layer("a", (6, 5)), plain_layer("b", (1, 7)))
    like = torch.zeros((), dtype=torch.float64)

    def project(seed):
        if kind == "kronecker":
            return KroneckerProjection(layers, random_sides(layers, (3, 2), seed, like))
        return RandomProjection(kind, 8, layers, (seed,))

    scores, spread, truth = standard_scores(project, layers, 400)
    assert float(scores.max()) < 4.5
    assert float((spread / 20 / truth.abs()).max()) < 0.2 / 4.5


@pytest.mark.parametrize("name", NAMES)
def test_kronecker_projections_of_all_forms_of_rows(name):
    layers, rows = gradients(name)
    like = torch.zeros((), dtype=torch.float64)
    sides = random_sides(layers, (2, 3), 4, like)
    projection = KroneckerProjection(layers, sides)
    for layer, row, found, (left, right) in zip(layers, rows, projection(rows), sides, strict=True):
        p, m = layer.shape
        k_o, k_i = min(p, 2), min(m, 3)
        assert (left.shape, right.shape) == ((p, k_o), (m, k_i))
        exact.close(left.T @ left, p / k_o * np.eye(k_o), 1e-12)
        exact.close(right.T @ right, m / k_i * np.eye(k_i), 1e-12)
        exact.close_or_zero(found.matrices(), left.T @ row.matrices() @ right, 1e-12)
    shapes = [layer.shape for layer in projection.layers]
    assert shapes == [row.matrix_shape for row in projection(rows)]
    assert [la.name for la in projection.layers] == [la.name for la in layers]


def test_coordinates():
    layers, rows = gradients("mlp-categorical")
    d = sum(layer.size for layer in layers)
    vectors = torch.linalg.qr(torch.randn(d, 5, dtype=torch.float64))[0]
    found = Coordinates(vectors)(rows)
    assert len(found) == 1
    exact.close(found[0].flat(), flat_rows(rows) @ vectors, 1e-12)


def test_refusals():
    layers = (plain_layer("a", (2, 2)),)
    with pytest.raises(ValueError, match=r"projection must be one of .*; got 'gauss'"):
        RandomProjection("gauss", 3, layers, (0,))
    for size in (0, 2.0, True):
        with pytest.raises(ValueError, match=r"dimension must be a positive integer; got"):
            RandomProjection("normal", size, layers, (0,))
