"""The programs that judge us against other libraries, without any of them installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from benchmarks import parity, peers
from benchmarks._own_digits import main as own
from benchmarks._peer_digits import (
    bank_from_truth,
    load_task,
    relative_difference,
    to_influence,
    to_peer,
)
from benchmarks._peer_programs import MissingPeerError, Peers, Seconds, stage_seconds
from benchmarks._table import format_table, verdict

TRAIN, QUERY, INPUTS, CLASSES = 100, 7, 4, 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with a tiny network, data and truth of the peers' layout."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, bias in (("digits.pt", True), ("digits_nobias.pt", False)):
            layers = {
                "fc1": nn.Linear(INPUTS, 6, bias=bias),
                "fc2": nn.Linear(6, 5, bias=bias),
                "fc3": nn.Linear(5, CLASSES, bias=bias),
            }
            weights = {
                f"{layer}.{key}": value
                for layer, module in layers.items()
                for key, value in module.state_dict().items()
            }
            data = (
                torch.randn(TRAIN, INPUTS),
                torch.randint(CLASSES, (TRAIN,)),
                torch.randn(QUERY, INPUTS),
                torch.randint(CLASSES, (QUERY,)),
            )
            torch.save({"state_dict": weights, "data": data, "meta": {}}, tmp_path / name)
    rng = np.random.default_rng(0)
    losses, margins = rng.normal(size=(2, 16, 3, QUERY))
    np.savez(
        tmp_path / "lds_truth.npz",
        masks=rng.random((16, TRAIN)) < 0.5,
        losses=losses,
        margins=margins,
    )
    return tmp_path


DIGITS = [case for case in parity.CASES if case.needs.startswith("digits")]


def fake_peer(folder: Path, factor: float) -> None:
    """What programs leave: our own scores, times a factor."""
    for case in DIGITS:
        np.save(folder / f"{case.report}.npy", factor * case.ours(folder))


class FakePeers(Peers):
    """Counts its programs, whose scores are there already."""

    def run(self, program: str, *options: str) -> dict[str, object]:
        with (self.folder / "runs.txt").open("a") as runs:
            runs.write(" ".join([program, *options]) + "\n")
        return {}


@pytest.mark.parametrize(
    ("factor", "status"), [(1.0, 0), (-1.0, 1), (2.0, 1), (1 / TRAIN, 1), (1 + 1e-2, 1)]
)
def test_parity_fails_what_is_off(folder: Path, factor: float, status: int) -> None:
    fake_peer(folder, factor)
    there = parity.Finished(FakePeers(folder, "python", None))
    argv = [str(folder), "--only", "digits"]
    assert parity.main(argv, lambda case, _: parity.compare(case, there)) == status
    runs = (folder / "runs.txt").read_text().splitlines()
    assert len(runs) == len(set(runs)) == len(DIGITS)
    assert sum("--no-bias" in run for run in runs) == 2


def test_parity_reuses_scores_on_request(folder: Path) -> None:
    fake_peer(folder, 1.0)
    assert parity.main([str(folder), "--only", "digits", "--reuse"]) == 0
    again = parity.Finished(FakePeers(folder, "python", None), reuse=True)
    assert parity.compare(DIGITS[0], again) == 0
    assert not (folder / "runs.txt").exists()


def test_parity_names_a_missing_peer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "lm_ids.npz").touch()
    assert parity.main([str(folder)]) == 0
    assert capsys.readouterr().out.count("not run: no --peers-python") == len(parity.CASES)


@pytest.mark.parametrize(
    ("python", "program", "message"),
    [
        (None, "x.py", "no --peers-python"),
        ("python", "x.py", "no x.py in --peers-programs"),
        ("/no/such/python", "there.py", "--peers-python does not exist"),
        ("python", "there.py", "nowhere_to_be_found is not installed"),
    ],
)
def test_missing_peers_are_told_apart(
    folder: Path, python: str | None, program: str, message: str
) -> None:
    (folder / "there.py").write_text("import nowhere_to_be_found\n")
    with pytest.raises(MissingPeerError, match=message):
        Peers(folder, python, folder).run(program)


def test_a_failing_program_is_an_error(folder: Path) -> None:
    (folder / "broken.py").write_text("raise SystemExit('out of luck')\n")
    with pytest.raises(RuntimeError, match="out of luck"):
        Peers(folder, "python", folder).run("broken.py")


def test_a_program_leaves_a_report_and_scores(folder: Path) -> None:
    stages = {"a": {"cpu_s": 1.0, "wall_s": 2.0}, "b": {"cpu_s": 3.0, "wall_s": 5.0}}
    (folder / "fine.json").write_text(json.dumps({"name": "fine", "stages": stages}))
    np.save(folder / "fine.npy", np.eye(2))
    (folder / "fine.py").write_text("print('noise')\nprint('{\"name\": \"fine\"}')\n")
    found = Peers(folder, "python", folder)
    report = found.run("fine.py", "--option")
    assert stage_seconds(report, ["a", "b"]) == Seconds(cpu=4.0, wall=7.0)
    np.testing.assert_array_equal(found.scores(report), np.eye(2))


def test_orientation_is_inverted_exactly() -> None:
    scores = np.random.default_rng(1).normal(size=(QUERY, TRAIN))
    influence = to_influence(scores, "peer")
    assert float(influence["influence"][2, 3]) == pytest.approx(-scores[2, 3] / TRAIN)
    assert relative_difference(to_peer(influence), scores) < 1e-15


def test_lds_of_a_matrix_is_the_peers_own_number(folder: Path) -> None:
    """Peers predict a loss by minus the sum of the scores of what is kept."""
    scores = np.random.default_rng(2).normal(size=(QUERY, TRAIN))
    with np.load(folder / "lds_truth.npz") as truth:
        predicted = -(truth["masks"].astype(float) @ scores.T)
        outcome = truth["losses"].mean(1)
    single = [spearmanr(predicted[:, q], outcome[:, q]).statistic for q in range(QUERY)]
    found = peers.score_lds(scores, bank_from_truth(folder / "lds_truth.npz"), "random")
    assert found == pytest.approx(float(np.mean(single)), abs=1e-12)


def test_missing_task_says_who_makes_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"digits_train\.py"):
        load_task(tmp_path)
    with pytest.raises(SystemExit):
        peers.main([str(tmp_path)])


def test_own_half_leaves_scores(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--chains", "4", "--draws", "6", "--scores", "--name", "bif"]
    report = own(["sample", str(folder), *options])
    assert np.load(folder / "bif.npy").shape == (QUERY, TRAIN)
    assert report["cpu_s"] > 0
    own(["ekfac", str(folder), "--no-bias", "--float64", "--fisher", "enumerated", "--name", "e"])
    assert np.load(folder / "e.npy").dtype == np.float64
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["name"] == "e"


@pytest.mark.parametrize(("ours", "status"), [(1.0, 0), (9.0, 1)])
def test_speed_is_judged_by_medians(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ours: float,
    status: int,
) -> None:
    stage = {"cpu_s": 6.0, "wall_s": 6.0}
    stages = dict.fromkeys(["sample_with_observables", *peers._FACTORS], stage)
    monkeypatch.setattr(Peers, "run", lambda *_: {"name": "x", "stages": stages})
    turns = iter([*[ours] * 4, *[1000.0] * 4, *[ours] * 4])  # one slow turn of each job
    monkeypatch.setattr(
        peers, "run_own", lambda *_: dict.fromkeys(("cpu_s", "wall_s"), next(turns))
    )
    assert peers.main([str(folder), "--only", "speed", "--repeats", "3"]) == status
    assert ("MISSED" in capsys.readouterr().out) == bool(status)


def test_speed_without_peers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "run_own", lambda *_: {"cpu_s": 1.0, "wall_s": 1.0})
    assert peers.main([str(folder), "--only", "speed", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("not run: no --peers-python") == 2 * len(peers.SPEED)


def test_table_aligns() -> None:
    table = format_table(("a", "b"), [("long name", verdict(True)), ("x", verdict(False))])
    assert table.splitlines()[2:] == ["long name     met", "x          MISSED"]
    assert verdict(None) == ""
