"""The mean of a kept set is additive over it: exact scores have LDS 1, flipped ones −1.

θ(S) is the mean of S, so that the sum of dθ/db_i = (y_i − ȳ)/n over S is (θ(S) − ȳ)|S|/n: it
orders θ(S) without error where subsets have one size, with or without the whole set among them.
φ_q = c_q θ, with c of either sign, tells queries apart.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from bayesinf.evaluation import (
    disjoint_subsets,
    lds,
    leave_one_out,
    listed_subsets,
    random_subsets,
)
from bayesinf.scores import (
    from_array,
    read_bergson,
    read_dattri,
    read_kronfluence,
    read_npy,
    read_quanda,
)
from tests.score_formats import write_bergson, write_explanations, write_kronfluence

N = 24
TRAIN = [f"t{i}" for i in range(N)]
QUERY = ["up", "down", "weak"]
SLOPES = np.array([1.0, -2.0, 0.25])
CLASSES = np.arange(N) % 3
VALUES = np.random.default_rng(1).standard_normal(N) + CLASSES
INFLUENCE = SLOPES[:, None] * (VALUES - VALUES.mean()) / N
IDS = {"query": QUERY, "train": TRAIN, "measurement": "value"}

DESIGNS = {
    f"random {fraction}": random_subsets(TRAIN, fraction=fraction, count=30, seed=4)
    for fraction in (0.1, 0.25, 0.5, 0.75, 0.9)
} | {
    "leave 12.5 % out": random_subsets(TRAIN, fraction=1 - 0.125, count=30, seed=5),
    "stratified": random_subsets(TRAIN, fraction=0.5, count=30, seed=6, labels=CLASSES),
    "one of 8 parts": disjoint_subsets(TRAIN, parts=8, seed=7, kept="part"),
    "all but one of 12 parts": disjoint_subsets(TRAIN, parts=12, seed=8),
    "stratified parts": disjoint_subsets(TRAIN, parts=4, seed=9, labels=CLASSES),
    "leave one out": leave_one_out(TRAIN),
    "leave some out": leave_one_out(TRAIN, TRAIN[3:9]),
    "lists": listed_subsets(TRAIN, [TRAIN[i : i + 6] for i in range(12)], kept=True),
}


def bank_of(subsets: xr.DataArray) -> xr.Dataset:
    """Retrained φ of every subset, in closed form, the same with two seeds."""
    kept = subsets.transpose("subset", "train").values
    sizes = kept.sum(axis=1)
    assert len(set(sizes[sizes < N].tolist())) == 1
    theta = kept @ VALUES / sizes
    value = np.repeat((theta[:, None] * SLOPES)[:, None], 2, axis=1)
    return xr.Dataset(
        {"value": (("subset", "seed", "query"), value), "subset_mask": subsets},
        coords={"seed": [0, 1], "query": QUERY},
    )


def by_array(folder: Path, scores: np.ndarray) -> xr.Dataset:
    """Our own sign: positive raises φ."""
    return from_array(scores, **IDS, sign="raises", factor=1.0)


def by_npy(folder: Path, scores: np.ndarray) -> xr.Dataset:
    """As TRAK writes them: train × query."""
    np.save(folder / "s.npy", -N * scores.T)
    return read_npy(folder / "s.npy", **IDS, sign="lowers", dims=("train", "query"), n=N)


def by_kronfluence(folder: Path, scores: np.ndarray) -> xr.Dataset:
    """By module, ``+∇φᵀ(C + λI)⁻¹∇ℓ``."""
    write_kronfluence(folder / "s.safetensors", {"a": -N * scores / 4, "b": -N * scores * 3 / 4})
    return read_kronfluence(folder / "s.safetensors", **IDS, sign="lowers", n=N)


def by_bergson(folder: Path, scores: np.ndarray) -> xr.Dataset:
    """In single precision, train × query."""
    write_bergson(folder / "b", -N * scores.T)
    return read_bergson(folder / "b", **IDS, sign="lowers", n=N)


def by_dattri(folder: Path, scores: np.ndarray) -> xr.Dataset:
    """A tensor, train × query."""
    torch.save(torch.from_numpy(-N * scores.T), folder / "s.pt")
    return read_dattri(folder / "s.pt", **IDS, sign="lowers", n=N)


def by_quanda(folder: Path, scores: np.ndarray) -> xr.Dataset:
    """A cache of batches of two queries."""
    write_explanations(folder / "q", -N * scores, 2)
    return read_quanda(folder / "q", **IDS, sign="lowers", n=N)


READERS = [by_array, by_npy, by_kronfluence, by_bergson, by_dattri, by_quanda]


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("read", READERS)
def test_exact_scores_have_lds_one_and_flipped_ones_minus_one(
    tmp_path: Path, read: Callable[[Path, np.ndarray], xr.Dataset], design: str
) -> None:
    bank = bank_of(DESIGNS[design])
    scores = read(tmp_path, INFLUENCE)
    np.testing.assert_allclose(scores["influence"], INFLUENCE, rtol=1e-6, atol=1e-8)
    for made, expected in ((scores, 1.0), (read(tmp_path, -INFLUENCE), -1.0)):
        result = lds(made, bank, measurement="value")
        np.testing.assert_allclose(result["lds_query"], expected, atol=1e-14)
        assert float(result["lds"]) == pytest.approx(expected, abs=1e-14)
