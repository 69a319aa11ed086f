"""The algebra of factored rows against explicit matrices, for every pair of kinds."""

import itertools

import pytest
import torch

from bayesinf.curvature import _inner, _rows
from bayesinf.curvature._bases import (
    DenseBasis,
    KroneckerBasis,
    StandardBasis,
    precondition,
    rotate_rows,
)
from bayesinf.curvature._inner import gram, inner, squared_norms
from bayesinf.curvature._rows import (
    Explicit,
    Factored,
    Grouped,
    Indexed,
    concatenate,
    flat_rows,
    mixed,
    stack,
    unstack,
    widen,
)

P, M, T, G = 6, 4, 3, 2


def draw(*shape, seed=0):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def tokens(b, t, seed=0):
    return torch.randint(P, (b, t), generator=torch.Generator().manual_seed(seed))


MAKE = {
    "explicit": lambda b, k, s: Explicit(draw(b, k, P, M, seed=s)),
    "outer": lambda b, k, s: Factored(draw(b, k, 1, P, seed=s), draw(b, 1, M, seed=s)),
    "factored": lambda b, k, s: Factored(draw(b, k, T, P, seed=s), draw(b, T, M, seed=s)),
    "grouped": lambda b, k, s: Grouped(draw(b, k, T, G, P // G, seed=s), draw(b, T, G, M, seed=s)),
    "indexed": lambda b, k, s: Indexed(draw(b, k, T, M, seed=s), tokens(b, T, s), P),
    "mixed": lambda b, k, s: mixed([MAKE["indexed"](b, k, s), MAKE["factored"](b, k, s + 1)]),
}
kinds = pytest.mark.parametrize("kind", MAKE)


def explicit(rows):
    """``(B, K, P, M)``, written out with loops over examples, rows and positions."""
    if isinstance(rows, Explicit):
        return rows.values
    if hasattr(rows, "parts"):
        return sum(explicit(part) for part in rows.parts)
    b, k = rows.values.shape[:2]
    out = torch.zeros(b, k, P, M, dtype=rows.values.dtype)
    for i, j, t in itertools.product(range(b), range(k), range(rows.values.shape[2])):
        v = rows.values[i, j, t]
        if isinstance(rows, Factored):
            out[i, j] += torch.outer(v, rows.a[i, t])
        elif isinstance(rows, Indexed):
            out[i, j, rows.index[i, t]] += v
        else:
            for g in range(G):
                where = slice(g * P // G, (g + 1) * P // G)
                out[i, j, where] += torch.outer(v[g], rows.a[i, t, g])
    return out


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture(params=[None, 1, 40], ids=["whole", "single", "chunks"])
def chunks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(_inner, "CHUNK", request.param)
        monkeypatch.setattr(_inner, "_TILE", request.param)
        monkeypatch.setattr(_rows._Rows.chunks, "__defaults__", (request.param,))


@kinds
def test_matrices(kind):
    rows = MAKE[kind](5, 2, 0)
    expected = explicit(rows)
    assert (rows.shape, rows.matrix_shape) == ((5, 2), (P, M))
    close(rows.matrices(), expected)
    close(rows.flat(), expected.reshape(10, P * M))
    close(rows.compact().matrices(), expected)
    mask = torch.tensor([True, False, True, True, False])
    for where in (slice(1, 4), mask):
        close(rows.part(where).matrices(), expected[where])
    single = rows.to(torch.float32)
    assert single.matrices().dtype == torch.float32
    torch.testing.assert_close(single.matrices().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("chunks")
@kinds
def test_gram(kind):
    for right, (b, k, c, j) in itertools.product(MAKE, [(5, 2, 3, 1), (1, 1, 4, 2), (2, 3, 1, 1)]):
        x, y = MAKE[kind](b, k, 0), MAKE[right](c, j, 9)
        other = Explicit(draw(b, k, 2, 3)), Explicit(draw(c, j, 2, 3))
        expected = explicit(x).reshape(b * k, -1) @ explicit(y).reshape(c * j, -1).T
        close(gram([x], [y]), expected)
        expected = expected + other[0].flat() @ other[1].flat().T
        close(gram([x, other[0]], [y, other[1]]), expected)


def test_the_contraction_of_few_matrices_with_many_outer_products():
    """Both ways round: over the longer side first, whichever it is."""
    for p, m in ((40, 6), (6, 40)):
        x = Explicit(draw(3, 2, p, m))
        y = Factored(draw(9, 2, 1, p), draw(9, 1, m))
        assert _inner._contracts(x, y)
        close(gram([x], [y]), x.flat() @ y.flat().T)
        assert not _inner._contracts(Explicit(draw(30, 2, p, m)), y)


@kinds
def test_gram_in_another_precision(kind):
    x, y = MAKE[kind](4, 1, 0), MAKE["explicit"](3, 1, 5)
    rounded = x.to(torch.bfloat16)
    got = gram([rounded], [y], torch.float64)
    assert got.dtype == torch.float64
    expected = explicit(x).flatten(1) @ explicit(y).flatten(1).T
    torch.testing.assert_close(got, expected, rtol=0, atol=0.03 * float(expected.norm()))
    assert float((got - expected).abs().max()) > 1e-6  # it was rounded


@pytest.mark.usefixtures("chunks")
@kinds
def test_inner(kind):
    for right in MAKE:
        x, y = MAKE[kind](5, 2, 0), MAKE[right](5, 2, 9)
        expected = (explicit(x) * explicit(y)).sum((2, 3)).flatten()
        close(inner([x], [y]), expected)
        close(inner([x, y], [y, x]), 2 * expected)


@pytest.mark.usefixtures("chunks")
@kinds
def test_squared_norms(kind):
    x = MAKE[kind](5, 2, 0)
    expected = explicit(x).square().sum((2, 3)).flatten()
    close(squared_norms([x]), expected)
    close(squared_norms([x, x]), 2 * expected)


@kinds
def test_concatenate_and_stack(kind):
    x, y = MAKE[kind](5, 2, 0), MAKE[kind](3, 2, 4)
    joined = concatenate([x, y])
    assert type(joined) is type(x)
    close(joined.matrices(), torch.cat([explicit(x), explicit(y)]))
    close(stack([x, scaled(x, 2.0)]).matrices(), torch.cat([explicit(x), 2 * explicit(x)], dim=1))


def scaled(rows, factor):
    """Rows of the same examples in another direction."""
    if hasattr(rows, "parts"):
        return mixed(scaled(part, factor) for part in rows.parts)
    tensors = {name: getattr(rows, name) for name in ("a", "index", "size") if hasattr(rows, name)}
    return type(rows)(values=factor * rows.values, **tensors)


@kinds
def test_widen(kind):
    x = MAKE[kind](5, 2, 0)
    wide = widen(x, 4)
    assert (type(wide), wide.shape) == (type(x), (5, 4))
    close(wide.matrices()[:, :2], explicit(x))
    assert not wide.matrices()[:, 2:].any()
    close(widen(x, 2).matrices(), explicit(x))


@kinds
def test_unstack(kind):
    x = MAKE[kind](5, 2, 0)
    apart = unstack(x)
    assert (type(apart), apart.shape) == (type(x), (10, 1))
    close(apart.matrices(), explicit(x).reshape(10, 1, P, M))


@pytest.mark.parametrize("kind", ["factored", "grouped", "indexed", "mixed"])
@pytest.mark.parametrize("calls", [1, 2])
def test_split(kind, calls):
    """Each token with all calls of its layer, which follow one another."""
    parts = [MAKE[kind](4, 1, 7 * c) for c in range(calls)]
    rows = joined(parts)
    split = rows.split(T)
    assert split.shape == (4 * T, 1)
    close(split.matrices().view(4, T, P, M).sum(1), explicit(rows)[:, 0])
    for t in range(T):
        expected = sum(explicit(only(part, t)) for part in parts)[:, 0]
        close(split.matrices().view(4, T, P, M)[:, t], expected)
    with pytest.raises(ValueError, match=f"{calls * T} positions for 4 tokens"):
        rows.split(4)


def joined(parts):
    """Positions of calls one after another."""
    first = parts[0]
    if hasattr(first, "parts"):
        return mixed(joined(list(p)) for p in zip(*(part.parts for part in parts), strict=True))
    values = torch.cat([p.values for p in parts], dim=2)
    if isinstance(first, Indexed):
        return Indexed(values, torch.cat([p.index for p in parts], dim=1), P)
    return type(first)(values, torch.cat([p.a for p in parts], dim=1))


def only(rows, t):
    """One position."""
    if hasattr(rows, "parts"):
        return mixed(only(part, t) for part in rows.parts)
    where = slice(t, t + 1)
    if isinstance(rows, Indexed):
        return Indexed(rows.values[:, :, where], rows.index[:, where], P)
    return type(rows)(rows.values[:, :, where], rows.a[:, where])


def test_flat_rows_are_layer_after_layer():
    x, y = MAKE["factored"](3, 2, 0), Explicit(draw(3, 2, 1, 2))
    expected = torch.cat([explicit(x).reshape(6, -1), y.values.reshape(6, -1)], dim=1)
    close(flat_rows([x, y]), expected)


# ---------------------------------------------------------------- bases


def orthonormal(*shape):
    return torch.linalg.qr(draw(*shape))[0]


BASES = {
    "standard": StandardBasis(),
    "kronecker": KroneckerBasis(orthonormal(P, P), orthonormal(M, M)),
    "left": KroneckerBasis(orthonormal(P, P), None),
    "right": KroneckerBasis(None, orthonormal(M, M)),
    "neither": KroneckerBasis(None, None),
    "grouped": KroneckerBasis(orthonormal(G, P // G, P // G), orthonormal(G, M, M)),
    "grouped right": KroneckerBasis(None, orthonormal(G, M, M)),
    "grouped left": KroneckerBasis(orthonormal(G, P // G, P // G), None),
    "dense": DenseBasis(orthonormal(P * M, P * M)),
}


def dense(name, basis):
    """``U``, written out."""
    eye = {P: torch.eye(P).double(), M: torch.eye(M).double()}
    if isinstance(basis, StandardBasis):
        return torch.eye(P * M).double()
    if isinstance(basis, DenseBasis):
        return basis.vectors
    q_s, q_a = basis.q_s, basis.q_a
    if "grouped" in name:
        q_s = q_s if q_s is not None else torch.eye(P // G).double().expand(G, -1, -1)
        q_a = q_a if q_a is not None else torch.eye(M).double().expand(G, -1, -1)
        pairs = zip(q_s, q_a, strict=True)
        return torch.block_diag(*[torch.kron(s.contiguous(), a.contiguous()) for s, a in pairs])
    q_s, q_a = (eye[P] if q_s is None else q_s), (eye[M] if q_a is None else q_a)
    return torch.kron(q_s.contiguous(), q_a.contiguous())


@pytest.mark.parametrize("name", BASES)
def test_rotations(name):
    basis = BASES[name]
    u, v = dense(name, basis), draw(2, 3, P, M)
    close(basis.rotate(v).flatten(2), v.flatten(2) @ u)
    close(basis.unrotate(v).flatten(2), v.flatten(2) @ u.T)
    close(basis.unrotate(basis.rotate(v)), v)


@pytest.mark.parametrize("name", BASES)
def test_rows_in_a_basis(name):
    basis = BASES[name]
    u, factors = dense(name, basis), draw(P, M).abs()
    for kind in ("explicit", "grouped", "mixed") if "grouped" in name else MAKE:
        rows = MAKE[kind](4, 2, 0)
        flat = explicit(rows).flatten(2)
        close(rotate_rows(basis, rows).matrices().flatten(2), flat @ u)
        got = precondition(basis, factors, rows)
        close(got.matrices().flatten(2), (flat @ u * factors.flatten()) @ u.T)
        if kind == "indexed" and name in ("standard", "right", "neither"):
            assert isinstance(got, Indexed)
            assert isinstance(rotate_rows(basis, rows), Indexed)
