"""The LDS program on its smallest task, with few draws."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import bayesinf as bi
from bayesinf.evaluation import lds
from bayesinf.evaluation._tables import COSTS
from benchmarks import _methods
from benchmarks import lds as program
from benchmarks._methods import METHODS, top_curvature
from benchmarks.tasks import get_task

QUICK = {"CHAINS": 4, "DRAWS": 20, "WARMUP": 20, "THIN": 2, "ERROR": 0.1}


@pytest.fixture(scope="module")
def scored() -> tuple[dict[str, xr.Dataset], dict[str, str], xr.Dataset]:
    benchmark = get_task("diabetes-mlp")
    bank = benchmark.bank()
    chosen = ("BIF, Laplace draws", "Hessian, dense")
    small = [
        replace(m, options={"error": 0.1, "chains": 4}) if m.name == "BIF" else m
        for m in METHODS
        if m.fits(benchmark) and (m.core or m.name in chosen or "RMSprop" in m.name)
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUICK.items():
            patch.setattr(_methods, name, value)
        return *program.run(benchmark, small, bank), bank


def test_every_method_scores_every_pair(scored) -> None:
    scores, refused, bank = scored
    assert {m.name for m in METHODS if m.core and not m.text} <= set(scores)
    for dataset in scores.values():
        assert set(COSTS) <= set(dataset.attrs)
        assert dataset["influence"].shape == (100, 342)
        np.testing.assert_array_equal(dataset["query"], bank["query"])
    assert all(name == "Hessian, dense" for name in refused)
    assert not set(scores) & {"BM25", "TF-IDF", "representation similarity"}


def test_ek_fac_beats_gradient_similarity_on_the_ground_truth(scored) -> None:
    scores, _, bank = scored
    good, plain = (float(lds(scores[name], bank)["lds"]) for name in ("EK-FAC", "GradDot"))
    assert good > 0.45
    assert good > plain + 0.1


def test_table_has_a_line_a_method_best_first(scored) -> None:
    scores, _, bank = scored
    table = bi.lds_table(scores, bank)
    lines = program.format_table(table, scores).splitlines()
    assert len(lines) == 2 + len(scores)
    printed = [float(line.split("|")[2].split("[")[0]) for line in lines[2:]]
    assert printed == sorted(printed, reverse=True)
    assert printed[0] == pytest.approx(float(table["lds"].max()), abs=5e-4)


def test_program_prints_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program.main(["diabetes-mlp", "--out", str(tmp_path), "--methods", "EK-FAC", "GradDot"])
    out = capsys.readouterr().out
    assert "noise ceiling 0.94" in out
    assert "EK-FAC − GradDot: +" in out
    folder = tmp_path / "diabetes-mlp"
    assert (folder / "lds.png").stat().st_size > 10_000
    assert "EK-FAC" in (folder / "table.md").read_text()
    saved = xr.open_zarr(folder / "scores-ek-fac.zarr", consolidated=False)
    assert saved["influence"].shape == (100, 342)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 1
    report = xr.open_datatree(folder / "report.zarr", engine="zarr", consolidated=False)
    assert set(report.children) == {"LDS", "Paired differences of LDS", "Noise ceiling"}
    bank = get_task("diabetes-mlp").bank()
    np.testing.assert_array_equal(
        report["LDS"]["lds"].sel(scorer="EK-FAC"), lds(saved.load(), bank)["lds"]
    )
    difference = report["Paired differences of LDS"].sel(scorer="EK-FAC − GradDot")
    between = float(report["LDS"]["lds"][0] - report["LDS"]["lds"][1])
    assert float(difference["difference"]) == pytest.approx(between)


def test_a_method_that_cannot_run_is_named_with_its_reason() -> None:
    benchmark = get_task("diabetes-mlp")

    def refuse(*_: object) -> xr.Dataset:
        raise ValueError("too large for this\nsecond line")

    method = program.BenchmarkMethod("broken", refuse)
    scores, refused = program.run(benchmark, [method], benchmark.bank())
    assert not scores
    assert refused == {"broken": "ValueError: too large for this"}


def test_top_curvature_is_that_of_the_dense_hessian() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=g, dtype=torch.float64) * torch.tensor([1.0, 2.0, 4.0])
    model = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    y = torch.zeros(50, 1, dtype=torch.float64)
    task = bi.Task(model, bi.Gaussian(), train=(x, y), query=(x, y))
    exact = float(torch.linalg.eigvalsh(x.T @ x / 50)[-1])
    assert top_curvature(task) == pytest.approx(exact, rel=1e-6)


def test_measured_sees_seconds_and_memory() -> None:
    """In a process of its own: in one that has held more, freed memory would serve it."""
    program = """
import numpy as np
from bayesinf._measuring import measured
with measured() as cost:
    total = float(np.ones(40 << 17).sum())  # 40 MiB
print(total, cost.memory, cost.cpu, cost.wall)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    total, memory, cpu, wall = map(float, done.stdout.split())
    assert total == 40 << 17
    assert 30 < memory < 80
    assert 0 < cpu <= wall + 0.5


def test_the_error_of_the_bif_is_an_option(tmp_path, monkeypatch):
    seen = []

    class Enough(Exception):
        pass

    def run(benchmark, chosen, bank, device):
        seen.extend((m.name, m.options) for m in chosen)
        raise Enough

    monkeypatch.setattr(program, "run", run)
    arguments = ["diabetes-mlp", "--methods", "BIF", "GradDot", "--out", str(tmp_path)]
    with pytest.raises(Enough):
        program.main([*arguments, "--error", "0.1"])
    assert seen == [("BIF", {"error": 0.1, "chains": 16}), ("GradDot", {})]
