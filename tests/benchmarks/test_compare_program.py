"""The comparison of all methods on its smallest task, with the cheapest rows."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import pytest
import xarray as xr

import bayesinf as bi
from benchmarks import _compared
from benchmarks import compare as program
from benchmarks.tasks import BenchmarkTask, get_task

pytest.importorskip("matplotlib.pyplot")

GRID = ({"relative_damping": 0.01}, {"relative_damping": 1.0})
NAME = "diabetes-mlp"


@pytest.fixture(scope="module")
def benchmark_task() -> BenchmarkTask:
    return get_task(NAME)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """EK-FAC and K-FAC choose between two dampings; a row follows; children run in this process."""
    rows = _compared.ROWS_BY_LABEL
    monkeypatch.setitem(rows, "EK-FAC", _compared.Row("EK-FAC", "ekfac", GRID))
    monkeypatch.setitem(rows, "K-FAC", _compared.Row("K-FAC", "kfac", GRID, queries=25))
    monkeypatch.setitem(rows, "DataInf", _compared.Row("DataInf", "datainf", like="EK-FAC"))

    def here(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        program.main(command[command.index("benchmarks.compare") + 1 :])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(program.subprocess, "run", here)


def direct(benchmark: BenchmarkTask, name: str, **options: object) -> xr.Dataset:
    """Scores of all queries by one plain call."""
    train, query = benchmark.data()
    task = bi.Task(benchmark.checkpoint(), benchmark.likelihood, train=train, query=query)
    bank = benchmark.bank()
    task.train.ids, task.query.ids = bank["train"].values, bank["query"].values
    return bi.attribute(task, name, **options)


def row(out: Path, label: str) -> dict[str, object]:
    return json.loads(_compared.row_file(out, NAME, label).read_text())


@pytest.mark.parametrize(
    ("label", "method", "queries"), [("EK-FAC", "ekfac", 100), ("K-FAC", "kfac", 25)]
)
def test_the_tuning_subsets_choose(
    label: str, method: str, queries: int, benchmark_task, tmp_path
) -> None:
    tuning = benchmark_task.bank("tuning")
    found = _compared.choose(
        benchmark_task, _compared.ROWS_BY_LABEL[label], tuning, tmp_path / "scratch"
    )
    judged = []
    for setting in GRID:
        scores = direct(benchmark_task, method, fisher="enumerated", **setting)
        some = slice(queries)
        value = bi.lds(scores.isel(query=some), tuning.isel(query=some))["lds"]
        judged.append(float(value))
    assert [setting for setting, _ in found["tried"]] == list(GRID)
    assert [value for _, value in found["tried"]] == pytest.approx(judged, abs=1e-6)
    assert found["setting"] == GRID[judged.index(max(judged))]


@pytest.mark.parametrize(
    ("patience", "values", "tried", "best"),
    [
        (None, (0.1, 0.3, 0.2, 0.1, 0.4), 5, 4),
        (2, (0.1, 0.3, 0.2, 0.1, 0.4), 4, 1),
        (2, (0.1, 0.3, 0.2, 0.4, 0.1), 5, 3),  # worse once is not worse twice
        (1, (0.1, None, 0.2, 0.1, 0.4), 4, 2),  # no answer is not a worse one
    ],
)
def test_a_patient_row_ends_where_it_falls(
    patience, values, tried, best, benchmark_task, tmp_path, monkeypatch
) -> None:
    grid = tuple({"relative_damping": float(k)} for k in range(len(values)))
    asked: list[int] = []

    def attribute(*_: object, relative_damping: float, **__: object) -> float:
        asked.append(int(relative_damping))
        found = values[asked[-1]]
        if found is None:
            raise bi.SolverDivergenceError("diverged", 0.1)
        return found

    monkeypatch.setattr(bi, "attribute", attribute)
    monkeypatch.setattr(bi, "lds", lambda scores, _: {"lds": scores})
    row = _compared.Row("EK-FAC", "ekfac", grid, patience=patience)
    found = _compared.choose(benchmark_task, row, benchmark_task.bank("tuning"), tmp_path)
    assert asked == list(range(tried))
    assert found["tried"] == list(zip(grid[:tried], values[:tried], strict=True))
    assert found["setting"] == grid[best]


def test_minibatches_are_a_tenth_of_small_tasks(benchmark_task, tmp_path) -> None:
    row = _compared.ROWS_BY_LABEL["LiSSA"]
    for benchmark, size in ((benchmark_task, 34), (get_task("digits-mlp"), 100)):
        scorer = _compared._Scorer(benchmark, row, 5, tmp_path)
        assert scorer.options({"damping": 0.1})["minibatch"] == size


def test_a_setting_without_an_answer_is_never_chosen(benchmark_task, tmp_path, monkeypatch) -> None:
    real = bi.attribute

    def attribute(task: bi.Task, name: str, **options: object) -> xr.Dataset:
        if options["relative_damping"] in diverging:
            raise bi.SolverDivergenceError("diverged", 0.1)
        return real(task, name, **options)

    monkeypatch.setattr(bi, "attribute", attribute)
    chosen = _compared.ROWS_BY_LABEL["EK-FAC"]
    tuning = benchmark_task.bank("tuning")
    diverging = {1.0}
    found = _compared.choose(benchmark_task, chosen, tuning, tmp_path)
    assert found["setting"] == GRID[0]
    assert found["tried"][1] == (GRID[1], None)
    diverging = {0.01, 1.0}
    with pytest.raises(ValueError, match="no setting of the grid has an answer"):
        _compared.choose(benchmark_task, chosen, tuning, tmp_path)


def test_one_command(benchmark_task, tmp_path, capsys, monkeypatch) -> None:
    labels = ["DataInf", "EK-FAC", "GradDot", "random", "random, same class"]
    command = [NAME, "--out", str(tmp_path), "--rows", *labels]
    program.main(command)
    chosen = row(tmp_path, "EK-FAC")["setting"]
    assert row(tmp_path, "DataInf")["setting"] == chosen
    assert row(tmp_path, "DataInf")["tried"] == []
    for label, name, options in (
        ("EK-FAC", "ekfac", {"fisher": "enumerated", **chosen}),
        ("DataInf", "datainf", chosen),
        ("GradDot", "grad_dot", {}),
        ("random", "random_scores", {}),
    ):
        scores = direct(benchmark_task, name, **options)
        judged, held = bi.lds(scores, benchmark_task.bank()), row(tmp_path, label)
        for key in ("lds", "lower", "upper"):
            assert held[key] == pytest.approx(float(judged[key]), abs=1e-6)
        for key in ("forward_examples", "backward_examples"):
            assert held[key] == scores.attrs.get(key, 0)

    printed = capsys.readouterr().out.strip()
    text = (tmp_path / "compare.md").read_text().strip()
    assert text == printed
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    order = [line[0].removeprefix("| ") for line in lines]
    assert order == sorted(labels[:4], key=lambda name: -row(tmp_path, name)["lds"])
    held = row(tmp_path, order[0])
    half = (held["upper"] - held["lower"]) / 2
    assert lines[0][1] == f"{held['lds']:.3f} ± {half:.3f}"
    reason = row(tmp_path, "random, same class")["reason"]
    assert reason.startswith("targets are ")
    assert f"- not run: {NAME}: random, same class: {reason}" in text
    assert (tmp_path / "compare.png").stat().st_size > 5_000
    assert f"LDS on {NAME}" in (tmp_path / "compare.html").read_text()

    table, reasons = program.table_of(NAME, tmp_path)
    assert set(reasons) == {"random, same class"}
    ceiling = bi.lds_table(scores, benchmark_task.bank())["ceiling"]
    assert float(table["ceiling"]) == pytest.approx(float(ceiling))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("computed twice")

    monkeypatch.setattr(program.subprocess, "run", never)
    program.main(command)
    assert capsys.readouterr().out.strip() == text


def test_rows_that_end_badly_are_listed(tmp_path, capsys, monkeypatch) -> None:
    def end(command: list[str], *, timeout: float, **_: object) -> object:
        """By time, with a message, by a signal."""
        label = command[command.index("--rows") + 1]
        if label == "random":
            raise subprocess.TimeoutExpired(command, timeout)
        said = "Traceback …\nMemoryError: too large\n" if label == "GradDot" else ""
        return subprocess.CompletedProcess(command, 1 if said else -9, "", said)

    monkeypatch.setattr(program.subprocess, "run", end)
    labels = ["random", "GradDot", "TF-IDF"]
    program.main([NAME, "--out", str(tmp_path), "--limit", "7", "--rows", *labels])
    printed = capsys.readouterr().out
    assert f"{NAME}: random: took more than 7 seconds" in printed
    assert f"{NAME}: GradDot: MemoryError: too large" in printed
    assert f"{NAME}: TF-IDF: exit status -9" in printed
    assert not (tmp_path / "compare.png").exists()


def test_a_row_is_ended_at_the_limit(tmp_path, monkeypatch) -> None:
    monkeypatch.undo()
    options = argparse.Namespace(out=tmp_path, limit=0.01, error=0.02, chains=16)
    program._run_apart(NAME, _compared.ROWS_BY_LABEL["random"], options)
    assert row(tmp_path, "random") == {"reason": "took more than 0.01 seconds"}


def test_an_unknown_task_is_refused(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        program.main(["nowhere", "--out", str(tmp_path)])
    assert "unknown task nowhere" in capsys.readouterr().err


def test_error_and_chains_of_the_bif_reach_its_row(tmp_path, monkeypatch) -> None:
    seen = []

    def run_row(benchmark, row, *_: object) -> dict[str, object]:
        seen.append((benchmark.name, row.method, row.grid))
        return {"reason": "not asked"}

    monkeypatch.setattr(program, "run_row", run_row)
    arguments = [NAME, "--rows", "BIF", "K-FAC", "--out", str(tmp_path)]
    program.main([*arguments, "--error", "0.3", "--chains", "4"])
    dampings = _compared.ROWS_BY_LABEL["K-FAC"].grid
    assert seen == [(NAME, "bif", ({"error": 0.3, "chains": 4},)), (NAME, "kfac", dampings)]
