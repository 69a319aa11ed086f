"""The programs that judge time, memory and growth, without any peer installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import scaling, speed
from benchmarks._own_ekfac import main as own
from benchmarks._peer_programs import MissingPeerError, Peers
from benchmarks._table import verdict

OWN = {"cpu_s": 1.0, "wall_s": 1.0, "rss_after_import_mb": 100.0, "peak_rss_mb": 150.0}


def report(seconds: float, peak: float) -> dict[str, object]:
    """A peer's, with every stage that any entry counts and one that none does."""
    names = {stage for race in speed.RACES for entry in race.peers for stage in entry.stages}
    stage = {"cpu_s": seconds, "wall_s": seconds, "peak_rss_mb": peak}
    other = {"cpu_s": 1e6, "wall_s": 1e6, "peak_rss_mb": 1e6}
    stages = {**dict.fromkeys(names, stage), "prepare": other}
    return {"stages": stages, "rss_after_import_mb": 200.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("digits.pt", "lm_ids.npz"):
        (tmp_path / name).touch()
    return tmp_path


def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ours: dict[str, float], *options: str
) -> int:
    """Race against a kronfluence of 4 × 10 s and 100 MiB and a bergson of 4 × 1 s and 200 MiB."""
    reports = {"kronfluence": report(10.0, 300.0), "bergson": report(1.0, 400.0)}
    monkeypatch.setattr(speed, "run_own", lambda *_, **__: ours)
    monkeypatch.setattr(Peers, "run", lambda _, program, *__: reports[program.split("_")[0]])
    return speed.main([str(folder), "--repeats", "2", *options])


@pytest.mark.parametrize(
    ("change", "status", "missed"),
    [
        ({}, 0, 0),
        ({"cpu_s": 2.1}, 1, 2),  # above half of bergson's 4 s, below 0.7 of it
        ({"wall_s": 2.9}, 1, 3),
        ({"peak_rss_mb": 201.0}, 1, 3),  # above kronfluence's 100 MiB
        ({"peak_rss_mb": 199.0}, 0, 0),
    ],
)
def test_bars_are_against_the_better_peer(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, float],
    status: int,
    missed: int,
) -> None:
    assert run(folder, monkeypatch, {**OWN, **change}) == status
    out = capsys.readouterr().out
    assert out.count(verdict(False)) == missed
    assert len(out.splitlines()) == 2 + 3 * len(speed.RACES)
    saved = json.loads((folder / "speed.json").read_text())
    assert all(len(reports) == 2 for reports in saved.values())


def test_a_missing_peer_is_named_and_the_other_judged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def only_kronfluence(self: Peers, program: str, *options: str) -> dict[str, object]:
        if program.startswith("bergson"):
            raise MissingPeerError("not run: no bergson")
        return report(1.0, 400.0)

    monkeypatch.setattr(speed, "run_own", lambda *_, **__: {**OWN, "cpu_s": 3.0})
    monkeypatch.setattr(Peers, "run", only_kronfluence)
    assert speed.main([str(folder), "--only", "digits", "--repeats", "3"]) == 1
    out = capsys.readouterr().out
    assert out.count("not run: no bergson") == 3
    assert "0.750" in out


def test_without_peers_ours_is_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "run_own", lambda *_, **__: OWN)
    assert speed.main([str(folder), "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("not run: no --peers-python") == 6 * len(speed.RACES)


def test_without_data_and_peers_nothing_runs(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        speed.main([str(tmp_path)])


def test_costs_are_sums_of_stages_and_the_highest_peak() -> None:
    stages = {
        "a": {"cpu_s": 1.0, "wall_s": 2.0, "peak_rss_mb": 30.0},
        "b": {"cpu_s": 4.0, "wall_s": 8.0, "peak_rss_mb": 50.0},
        "c": {"cpu_s": 16.0, "wall_s": 32.0, "peak_rss_mb": 90.0},
    }
    found = speed.cost_of({"stages": stages, "rss_after_import_mb": 10.0}, ("a", "b"))
    assert found == {"cpu_s": 5.0, "wall_s": 10.0, "memory_mb": 40.0}
    assert speed.cost_of(OWN)["memory_mb"] == 50.0


def test_turns_start_one_later_each_time() -> None:
    order: list[str] = []
    runs = {key: lambda key=key: order.append(key) or {} for key in "abc"}
    turns = speed.take_turns(runs, 4)
    assert "".join(order) == "abcbcacababc"
    assert len(turns.reports["a"]) == 4


def test_medians_ignore_one_slow_turn() -> None:
    slow = {**OWN, "cpu_s": 100.0}
    turns = speed.Turns({"x": [OWN, slow, {**OWN, "cpu_s": 2.0}]}, {})
    found = turns.median("x")
    assert found is not None
    assert found["cpu_s"] == 2.0


def test_our_half_reports_what_is_compared(tmp_path: Path) -> None:
    layers = {
        f"fc{k}.{key}": value
        for k, layer in enumerate((nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)), start=1)
        for key, value in layer.state_dict().items()
    }
    data = (torch.randn(20, 4), torch.arange(20) % 3, torch.randn(2, 4), torch.arange(2))
    torch.save({"state_dict": layers, "data": data, "meta": {}}, tmp_path / "digits.pt")
    found = own(["digits", str(tmp_path), "--name", "ours"])
    assert np.load(tmp_path / "ours.npy").shape == (2, 20)
    assert speed.cost_of(found)["memory_mb"] >= 0
    assert found["wall_s"] > 0


# ---------------------------------------------------------------------------- growth


def cost(size: scaling.Size, width: float = 2.5) -> float:
    """A constant, which the larger sizes must outweigh, and powers of the sizes."""
    return 1e-9 + size.examples * size.queries * size.depth * size.width**width


@pytest.mark.parametrize(("width", "status"), [(2.5, 0), (3.1, 0), (3.4, 1)])
def test_exponents_are_found_and_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], width: float, status: int
) -> None:
    figure = tmp_path / "growth.png"
    assert scaling.main([str(figure)], lambda size: cost(size, width)) == status
    out = capsys.readouterr().out
    assert f"{width:.2f}" in out
    assert out.count("1.00") == 3
    assert figure.stat().st_size > 1000


def test_small_sizes_do_not_flatten_an_exponent() -> None:
    values = (1, 2, 4, 8, 16, 32)
    costs = [100.0, 100.0, 100.0, 8.0, 16.0, 32.0]
    power, level = scaling.exponent(values, costs)
    assert power == pytest.approx(1.0, abs=1e-12)
    assert level == pytest.approx(0.0, abs=1e-12)


def test_points_are_medians_and_shared_between_sweeps() -> None:
    seen: list[scaling.Size] = []
    costs = iter([99.0, *[1.0, 5.0] * 2, 7.0, 5.0])

    def timed(size: scaling.Size) -> float:
        seen.append(size)
        return next(costs)

    sweeps = (scaling.Sweep("depth", (1, 3), 1.0), scaling.Sweep("width", (96,), 1.0))
    found = scaling.measure(sweeps, 3, timed)
    assert list(found.values()) == [1.0, 5.0]
    assert len(seen) == 1 + 3 * 2


def test_a_small_problem_is_timed() -> None:
    assert scaling.seconds(scaling.Size(examples=20, queries=2, width=4, depth=1)) > 0
