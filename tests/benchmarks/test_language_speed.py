"""The program that compares with devinterp, without it: verdicts, and scores of given draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import bayesinf as bi
from benchmarks import _own_language as own
from benchmarks import language_speed as program
from benchmarks._peer_programs import MissingPeerError, Peers
from benchmarks._table import verdict
from tests.benchmarks.lm_reference import write_folder

CHAINS, DRAWS, BLOCK, TOKENS, KEEP = 2, 14, 6, 3, 2


def stages(*names: str, seconds: float = 1.0, peak: float = 100.0) -> dict[str, dict[str, float]]:
    return {name: {"cpu_s": seconds, "wall_s": seconds, "peak_rss_mb": peak} for name in names}


def ours(seconds: float = 7.0, peak: float = 100.0) -> dict[str, object]:
    return {"stages": stages("sample", seconds=seconds, peak=peak), "rss_after_import_mb": 50.0}


def theirs() -> dict[str, object]:
    return {
        "stages": stages("sample", "sequence", "token", seconds=10.0, peak=200.0),
        "rss_after_import_mb": 50.0,
        "token_shape": [4, 4, 3, 3],
    }


SCORING = ("diagnosis", "sequence", "sequence with errors", "token", "token with errors")


def scored(seconds: float = 1.9, sequence: float = 1e-6, token: float = 1e-7) -> dict[str, object]:
    return {
        "stages": stages(*SCORING, seconds=seconds),
        "rss_after_import_mb": 50.0,
        "differences": {"sequence": sequence, "token": token},
    }


@pytest.mark.parametrize(
    ("sampled", "scores", "missed"),
    [
        (ours(), scored(), 0),
        (ours(seconds=8.1), scored(), 1),
        (ours(peak=126.0), scored(), 1),  # 76 MiB of 150
        (ours(), scored(seconds=2.1), 2),
        (ours(), scored(sequence=2e-5), 1),
        (ours(), scored(token=2e-5), 1),
    ],
)
def test_verdicts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sampled: dict[str, object],
    scores: dict[str, object],
    missed: int,
) -> None:
    (tmp_path / "lm_ids.npz").touch()
    given = {"sample": sampled, "sample-bfloat16": {**ours(seconds=20.0), "moved": 0.25}}
    given["bif"] = scores
    monkeypatch.setattr(program, "run_own", lambda job, *_, **__: given[job])
    monkeypatch.setattr(Peers, "run", lambda *_: theirs())
    assert program.main([str(tmp_path), "--repeats", "2"]) == int(missed > 0)
    out = capsys.readouterr().out
    assert out.count(verdict(False)) == missed
    assert out.count(verdict(True)) == 6 - missed
    reports = json.loads((tmp_path / "language_speed.json").read_text())
    own_runs = {"sample": 2, "sample-bfloat16": 2}
    assert {key: len(runs) for key, runs in reports.items()} == {**own_runs, "peer": 2}
    (moved,) = [line for line in out.splitlines() if "share by which they move" in line]
    assert moved.split()[-1] == "0.250"


def test_a_missing_peer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lm_ids.npz").touch()
    monkeypatch.setattr(program, "run_own", lambda *_, **__: ours())
    assert program.main([str(tmp_path), "--repeats", "1"]) == 0
    assert "not run: no --peers-python" in capsys.readouterr().out


def test_without_data_and_peers_nothing_runs(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        program.main([str(tmp_path)])


def test_the_same_settings_go_to_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, tuple[str, ...]] = {}
    monkeypatch.setattr(
        program, "run_own", lambda job, _, __, *options, **___: seen.setdefault(job, options)
    )

    def absent(_: Peers, name: str, *options: str) -> None:
        seen[name] = options
        raise MissingPeerError("not run")

    monkeypatch.setattr(Peers, "run", absent)
    runs = program.programs(Peers(tmp_path, None, None), own.SETTINGS, 8)
    runs["sample"]()
    with pytest.raises(MissingPeerError):
        runs["peer"]()
    assert seen["sample"] == seen[program._PEER]
    assert "--n-train" in seen["sample"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # these chains are short
def test_sampling_in_half_precision_says_how_far_scores_move(tmp_path: Path) -> None:
    write_folder(tmp_path, 12, 3, 6)
    options = {"draws": 8, "burnin": 2, "batch": 4, "n_train": 12, "n_query": 3}
    given = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    full = own.main(["sample", str(tmp_path), *given])
    half = own.main(["sample-bfloat16", str(tmp_path), *given])
    assert "moved" not in full
    assert 1e-4 < half["moved"] < 1.0
    assert set(full["stages"]) == set(half["stages"]) == {"sample"}


# ---------------------------------------------------------------- scores of given draws


@pytest.fixture
def draws() -> np.ndarray:
    """Losses of 2·BLOCK + 1 sequences, so correlated that no covariance is near 0."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=(CHAINS, DRAWS, 1, 1))
    noise = rng.normal(size=(CHAINS, DRAWS, 2 * BLOCK + 1, TOKENS))
    return (2.5 + 1e-3 * (3 * common + noise)).astype(np.float32)


def covariance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of columns, chains pooled, with ``ddof = 1``."""
    a, b = (v.reshape(CHAINS * DRAWS, -1).astype(np.float64) for v in (a, b))
    return np.cov(a.T, b.T)[: a.shape[1], a.shape[1] :]


@pytest.mark.filterwarnings("ignore::bayesinf.ConvergenceWarning")  # draws are few
def test_a_store_of_given_draws(draws: np.ndarray, tmp_path: Path) -> None:
    store = own.store_of(draws, BLOCK, tmp_path / "draws.zarr")
    rows, columns = draws[:, :, :BLOCK], draws[:, :, BLOCK : 2 * BLOCK]
    scores = bi.bif(store, tokens="both", center="grand")
    np.testing.assert_allclose(scores["influence"], -covariance(rows, columns), rtol=1e-6)
    assert scores["train_position"].values.tolist() == [1, 2, 3] * BLOCK
    scores = bi.bif(store, center="grand")
    np.testing.assert_allclose(
        scores["influence"], -covariance(rows.sum(3), columns.sum(3)), rtol=1e-3, atol=1e-9
    )


@pytest.mark.parametrize("rows", [2, 3, 16])
@pytest.mark.parametrize("wrong", [None, "sequence", "token"])
def test_differences_from_the_peers_matrices(
    draws: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    wrong: str | None,
) -> None:
    """Equal matrices differ by rounding; one wrong entry in what is kept is seen."""
    monkeypatch.setattr(own, "_ROWS", rows)
    wide = draws.astype(np.float64)
    left, right = wide[:, :, :BLOCK], wide[:, :, BLOCK : 2 * BLOCK]
    matrices = {
        "sequence": covariance(left.mean(3), right.mean(3)),
        "token": covariance(left, right).reshape(BLOCK, TOKENS, BLOCK, TOKENS),
    }
    kept = matrices["token"].transpose(0, 2, 1, 3)[::KEEP, ::KEEP].copy()
    if wrong == "token":
        kept[-1, -1, 0, 1] *= 2
    if wrong == "sequence":
        matrices["sequence"][2, 3] *= 2
    np.save(tmp_path / f"{own.NAME}.npy", kept)
    np.savez(tmp_path / f"{own.NAME}.npz", losses=draws, sequence=matrices["sequence"])
    report = own.main(["bif", str(tmp_path), "--block", str(BLOCK), "--keep", str(KEEP)])
    for name, difference in report["differences"].items():
        assert (difference > 0.01) == (name == wrong)
        assert difference < 1e-5 or name == wrong
    assert set(report["stages"]) == set(SCORING)
