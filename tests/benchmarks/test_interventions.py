"""The program of interventions on a small task, and what it trains on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bayesinf as bi
from bayesinf.evaluation import SGDRecipe, random_subsets, retrain, train_one
from benchmarks import interventions as program
from benchmarks._compared import row_file, write_row
from benchmarks.tasks import BankPlan, BenchmarkTask

plt = pytest.importorskip("matplotlib.pyplot")

RECIPE = SGDRecipe(epochs=10, batch_size=10, lr=0.2, weight_decay=1e-3)


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.stack([(y - 1).float(), (y == 1).float()], 1) * 2
    x = x + 0.5 * torch.randn(90, 2, generator=g)
    return (x[:60], y[:60]), (x[60:], y[60:])


class Small(BenchmarkTask):
    """With a bank of its own, of which only the ids count here."""

    def bank(self, name: str = "evaluation", root: Path | None = None) -> object:  # type: ignore[override]
        train, query = self.data()
        return retrain(
            self.make_model, self.likelihood, SGDRecipe(epochs=1, batch_size=30, lr=0.1),
            train=train, query=query, subsets=random_subsets(60, count=1, seed=0), seeds=[0],
        )  # fmt: skip


TASK = Small(
    "small", make_model, bi.Categorical(), data, RECIPE, banks={"evaluation": BankPlan(1, 1, (0,))}
)


def test_recorded_training_is_training() -> None:
    train, _ = data()
    model, kept = program._checkpoints(TASK, train, 3, [1, 5, 10])
    plain = train_one(make_model, bi.Categorical(), RECIPE, train=train, seed=3)
    for name, p in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], p)
        assert torch.equal(kept[-1][name], p)
    assert len(kept) == 3
    assert not torch.equal(kept[0]["0.weight"], kept[1]["0.weight"])


def test_flipped_labels_are_all_wrong() -> None:
    labels = torch.arange(200) % 7
    changed, chosen = program.flip_labels(labels, 0.1, 7, seed=0)
    np.testing.assert_array_equal(np.flatnonzero((changed != labels).numpy()), chosen)
    assert len(chosen) == 20
    assert int(changed.min()) >= 0
    assert int(changed.max()) <= 6


def test_program_prints_three_tables_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("COUNTS", (3, 6)), ("FRACTIONS", (0.3, 0.6)), ("SEEDS", (0, 1)), ("EARLY", 2),
        ("QUICK", {"chains": 2, "draws": 30, "warmup": 5}),
    ):  # fmt: skip
        monkeypatch.setattr(program, name, value)
    monkeypatch.setattr(program, "TASKS", {"small": TASK})
    monkeypatch.setattr(program, "get_task", lambda name: TASK)
    command = ["small", "--methods", "GradDot", "EK-FAC", "--queries", "4", "--out", str(tmp_path)]
    with pytest.warns(bi.ConvergenceWarning, match="chains in doubt"):  # 30 draws, and it says so
        program.main(command)
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("## ")] == [
        "## mislabels", "## removal", "## pruning",
    ]  # fmt: skip
    assert "6 of 60 labels replaced" in out
    for row in ("loss", "BIF self-variance", "VoG", "EK-FAC", "GradDot", "random, same class"):
        assert f"\n| {row} | " in out
    assert "| accuracy, easiest kept | 30 % | 60 % | seconds |" in out
    figures = sorted(p.name for p in (tmp_path / "small").glob("*.png"))
    assert figures == [
        "mislabels-small.png", "pruning-easiest-small.png", "pruning-hardest-small.png",
        "pruning-most-helpful-small.png", "removal-brittle-small.png",
        "removal-change-small.png", "removal-flipped-small.png",
    ]  # fmt: skip
    page = (tmp_path / "small" / "interventions.html").read_text()
    assert page.count('<table class="sortable"') >= 3
    assert page.count("data:image/png") == len(figures)


def test_methods_come_with_the_settings_that_were_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that did not run are left out, and so is chance, which every removal has beside it."""
    for name, value in (("COUNTS", (3,)), ("SEEDS", (0, 1)), ("TASKS", {"small": TASK})):
        monkeypatch.setattr(program, name, value)
    monkeypatch.setattr(program, "get_task", lambda name: TASK)
    command = ["small", "--parts", "removal", "--queries", "2", "--out", str(tmp_path / "out")]
    command += ["--compared", str(tmp_path)]
    with pytest.raises(SystemExit):
        program.main(command)
    said = capsys.readouterr().err
    assert "holds no rows of small. Make them first: python -m benchmarks.compare" in said
    setting = {"setting": {"relative_damping": 3.0}}
    for label, held in (
        ("K-FAC", setting), ("DataInf", {"reason": "no"}), ("random", {"setting": {}}),
        ("GradDot", {"setting": {}}),
    ):  # fmt: skip
        write_row(row_file(tmp_path, "small", label), held)
    given = {}
    real = program.removal_counterfactual

    def removal_counterfactual(scores, *args, **options):
        given.update(scores)
        return real(scores, *args, **options)

    monkeypatch.setattr(program, "removal_counterfactual", removal_counterfactual)
    program.main(command)
    assert set(given) == {"K-FAC", "GradDot"}
    assert float(given["K-FAC"].attrs["relative_damping"]) == 3.0
    table = capsys.readouterr().out
    assert "| K-FAC | " in table
    assert "| random | " in table
