"""The peers' language-model task: our scores against an independent one with their conventions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import bayesinf as bi
from benchmarks import parity
from benchmarks._peer_lm import load_lm_task, token_grid
from benchmarks._peer_programs import Peers
from tests.benchmarks.lm_reference import reference_scores, write_folder

N, QUERIES, LENGTH = 12, 3, 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path, N, QUERIES, LENGTH)
    return tmp_path


def test_both_forms_of_the_task_have_the_same_losses(folder: Path) -> None:
    losses = []
    for whole in (True, False):
        task = load_lm_task(folder, whole=whole, dtype=torch.float64)
        assert sum("bias" in name for name in task.params) == 8
        assert len(task.params) == 16
        losses.append(task.losses(task.params, task.train.batch()))
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    assert len(load_lm_task(folder, n_train=4, n_query=2).query) == 2


@pytest.mark.parametrize("whole", [True, False], ids=["kronfluence", "bergson"])
def test_sequence_scores_have_the_peers_conventions(folder: Path, whole: bool) -> None:
    task = load_lm_task(folder, whole=whole, dtype=torch.float64)
    got = bi.ekfac(task, fisher="empirical", relative_damping=0.1, batch_size=5)
    expected = reference_scores(folder, whole=whole).sum(-1)
    np.testing.assert_allclose(parity.to_peer(got), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("whole", [True, False], ids=["kronfluence", "bergson"])
def test_token_scores_have_the_peers_conventions(folder: Path, whole: bool) -> None:
    task = load_lm_task(folder, whole=whole, dtype=torch.float64)
    settings = {"fisher": "empirical", "relative_damping": 0.1, "batch_size": 5}
    got = token_grid(bi.ekfac(task, **settings, train_tokens="position"), LENGTH)
    expected = reference_scores(folder, whole=whole)
    np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-10)


def test_the_two_conventions_differ(folder: Path) -> None:
    """What the peers' difference from each other comes from: the last position's inputs in A."""
    whole, short = (reference_scores(folder, whole=flag) for flag in (True, False))
    difference = parity.relative_difference(whole, short)
    assert difference > 1e-2
    assert bool((whole[:, :, -1] == 0).all())
    assert bool((short[:, :, -1] == 0).all())


def test_token_scores_are_laid_out_as_theirs() -> None:
    flat = xr.Dataset(
        {"influence": (("query", "train_token"), [[1.0, 2.0, 3.0]])},
        coords={
            "train": ("train_token", [0, 1, 1]),
            "train_position": ("train_token", [0, 0, 2]),
        },
    )
    expected = [[[-2.0, 0, 0, 0], [-4.0, 0, -6.0, 0]]]
    np.testing.assert_array_equal(token_grid(flat, 4), expected)


class FakePeers(Peers):
    """Its programs have run."""

    def run(self, program: str, *options: str) -> dict[str, object]:
        return {}


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (1.001, 1)])
@pytest.mark.parametrize("part", ["sequences", "tokens"])
def test_parity_judges_the_rows_of_the_language_model(
    folder: Path, part: str, factor: float, status: int
) -> None:
    for peer, whole in (("kronfluence", True), ("bergson", False)):
        scores = factor * reference_scores(folder, whole=whole)
        np.save(folder / f"{peer}_lm_ekfac_emp.npy", scores.sum(-1))
        np.save(folder / f"{peer}_lm_ekfac_emp_token_scores.npy", scores)
    there = parity.Finished(FakePeers(folder, "python", None))
    argv = [str(folder), "--only", part]
    assert parity.main(argv, lambda case, _: parity.compare(case, there)) == status


def test_parity_needs_the_right_convention(folder: Path) -> None:
    """bergson's scores are ours on shortened sequences, not on whole ones."""
    np.save(folder / "bergson_lm_ekfac_emp.npy", reference_scores(folder, whole=False).sum(-1))
    there = parity.Finished(FakePeers(folder, "python", None))
    case = next(c for c in parity.CASES if c.name == "GPT-NeoX, bergson, sequences")
    wrong = replace(case, ours=lambda f: parity.our_lm(f, whole=True, tokens=False))
    assert parity.compare(case, there) < case.bar < parity.compare(wrong, there)


def test_missing_task_says_who_makes_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"lm_train\.py"):
        load_lm_task(tmp_path)
