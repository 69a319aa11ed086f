"""The program that compares TRAK with its authors' library, without the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bayesinf.attribution._trak import trak
from bayesinf.evaluation import lds
from benchmarks import trak as program
from benchmarks._own_digits import main as own
from benchmarks._peer_digits import bank_from_truth, load_task
from benchmarks._peer_programs import MissingPeerError, Peers, Seconds
from benchmarks.peers import Measured

TRAIN, QUERY = 40, 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny network, data and retrainings in the peers' layout."""
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3))
    state = {f"fc{int(k[0]) + 1}{k[1:]}": v for k, v in net.state_dict().items()}
    x = torch.rand(TRAIN + QUERY, 4, generator=g)
    y = torch.randint(3, (TRAIN + QUERY,), generator=g)
    data = x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]
    torch.save({"state_dict": state, "data": data}, tmp_path / "digits.pt")
    rng = np.random.default_rng(0)
    masks = rng.permuted(np.tile(np.arange(TRAIN) < TRAIN // 2, (8, 1)), axis=1)
    losses = rng.random((8, 2, QUERY))
    np.savez(tmp_path / "lds_truth.npz", masks=masks, losses=losses, margins=-losses)
    return tmp_path


def test_the_ridge_of_the_peer_in_our_units() -> None:
    """Its features are ``√(k/d)`` times ours, and its ridge is added to their sum."""
    rng = np.random.default_rng(1)
    n, d, k, ridge = 9, 30, 6, 2.5
    g, p = rng.standard_normal((n, d)), rng.choice([-1.0, 1.0], (d, k))
    peer, ours = g / d**0.5 @ p, g @ p / k**0.5
    theirs = peer @ np.linalg.inv(peer.T @ peer + ridge * np.eye(k)) @ peer.T
    lam = program.damping_of(ridge, n=n, d=d, k=k)
    mine = ours @ np.linalg.inv(ours.T @ ours / n + lam * np.eye(k)) @ ours.T / n
    np.testing.assert_allclose(mine, theirs, rtol=1e-10)


def test_lds_by_ridge_and_seed(folder: Path) -> None:
    found = program.own_lds(folder, [0.5, 4.0], 8, 2)
    task, bank = load_task(folder), bank_from_truth(folder / "lds_truth.npz")
    lam = program.damping_of(4.0, n=TRAIN, d=task.dimension, k=8)
    scores = trak(task, damping=lam, dimension=8, seed=1)
    assert found[4.0][1] == pytest.approx(float(lds(scores, bank)["lds"]))
    assert found.keys() == {0.5, 4.0}


def test_rows_and_their_bars() -> None:
    rows = program.lds_rows({1.0: [0.4, 0.5], 2.0: [0.48, 0.48]}, {1.0: 0.46, 2.0: 0.44}, 0.25)
    assert rows[0] == ("1", "0.25", "0.4500", "0.1000", "0.4600", "-0.0100", "", "")
    assert rows[-1][0] == "best"
    assert rows[-1][2:] == ("0.4800", "", "0.4600", "+0.0200", "within 0.03", "met")
    assert program.lds_rows({1.0: [0.4]}, {1.0: 0.44}, 1.0)[-1][-1] == "MISSED"
    absent = program.lds_rows({1.0: [0.4]}, {1.0: "not run: no library"}, 1.0)
    assert absent[-1][4] == "not run: no library"
    assert absent[-1][-1] == ""

    def lacking() -> Seconds:
        raise MissingPeerError("not run: no library")

    quick, slow = (lambda: Seconds(1.0, 3.0)), (lambda: Seconds(2.0, 2.0))
    cpu, wall = program.speed_rows(Measured({"own": quick, "peer": slow}, 2))
    assert (cpu[3], cpu[-1], wall[3], wall[-1]) == ("0.500", "met", "1.500", "MISSED")
    cpu, _ = program.speed_rows(Measured({"own": quick, "peer": lacking}, 2))
    assert cpu[2] == "not run: no library"


def test_a_peer_that_is_not_there(folder: Path) -> None:
    found = program.peer_lds(Peers(folder, None, None), [1.0, 2.0], 8)
    assert found == dict.fromkeys([1.0, 2.0], "not run: no --peers-python")


def test_the_whole_program(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our runner within this process, which is quicker than a process of its own."""

    def run_own(job: str, where: Path, threads: int, *options: str) -> dict[str, Any]:
        return own([job, str(where), "--threads", str(threads), *options])

    monkeypatch.setattr(program, "run_own", run_own)
    arguments = ["--repeats", "1", "--seeds", "1", "--dimension", "8", "--ridges", "1", "10"]
    assert program.main([str(folder), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "ridge (peer's units)" in printed
    assert printed.count("not run: no --peers-python") >= 3
