"""The command that makes ground truth, on a task of milliseconds."""

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import bayesinf as bi
from bayesinf.evaluation import SGDRecipe, open_bank, train_one
from benchmarks import retrain as program
from benchmarks.tasks import BankPlan, BenchmarkTask
from benchmarks.tasks._task import Data


def data() -> Data:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 3, generator=g), torch.randint(0, 2, (20,), generator=g)
    return (x[:16], y[:16]), (x[16:], y[16:])


def make_model() -> nn.Module:
    return nn.Linear(3, 2)


PLANS = {
    "evaluation": BankPlan(subsets=5, subset_seed=1, seeds=(100, 101)),
    "tuning": BankPlan(subsets=4, subset_seed=2, seeds=(200, 201)),
}
TINY = BenchmarkTask(
    name="tiny",
    make_model=make_model,
    likelihood=bi.Categorical(),
    data=data,
    recipe=SGDRecipe(epochs=2, batch_size=4, lr=0.1),
    banks=PLANS,
)


def test_make_banks(tmp_path: Path) -> None:
    paths = program.make_banks(TINY, tmp_path, progress=False)
    assert paths == {name: tmp_path / "tiny" / f"{name}.zarr" for name in PLANS}
    assert sorted(p.name for p in (tmp_path / "tiny").iterdir()) == [
        "evaluation.zarr",
        "tuning.zarr",
    ]
    bank = TINY.bank("tuning", tmp_path)
    assert (bank.attrs["task"], bank.attrs["bank"]) == ("tiny", "tuning")
    np.testing.assert_array_equal(bank["subset_mask"], PLANS["tuning"].masks(16))
    train, (x, y) = data()
    model = train_one(
        TINY.make_model,
        TINY.likelihood,
        TINY.recipe,
        train=train,
        seed=201,
        subset=bank["subset_mask"][3],
    )
    with torch.no_grad():
        expected = TINY.likelihood.loss(model(x), y)
    np.testing.assert_allclose(bank["loss"].sel(seed=201)[3], expected, rtol=1e-5)


def test_a_bank_that_is_there_is_left_alone_and_a_cut_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = program.make_banks(TINY, tmp_path / "whole", progress=False)
    calls: list[Path] = []
    real = program.save_bank

    def cut(bank: xr.Dataset, path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(bank, path)

    monkeypatch.setattr(program, "save_bank", cut)
    with pytest.raises(KeyboardInterrupt):
        program.make_banks(TINY, tmp_path / "cut", progress=False)
    kept = tmp_path / "cut" / "tiny" / "evaluation.zarr"
    before = kept.stat().st_mtime_ns
    again = program.make_banks(TINY, tmp_path / "cut", progress=False)
    assert len(calls) == 3
    assert kept.stat().st_mtime_ns == before
    for name in PLANS:
        xr.testing.assert_identical(open_bank(again[name]), open_bank(expected[name]))


@pytest.mark.slow  # as tests/evaluation/test_own_training.py on a smaller task
def test_workers_make_the_same_bank(tmp_path: Path) -> None:
    """A second process takes part; it starts in seconds, by when the first may be done."""
    alone = program.make_banks(TINY, tmp_path / "one", progress=False)
    shared = program.make_banks(TINY, tmp_path / "two", progress=False, workers=2)
    for name in PLANS:
        np.testing.assert_array_equal(open_bank(shared[name]).loss, open_bank(alone[name]).loss)
    assert not list((tmp_path / "two").rglob("*.partial"))


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "TASKS", {"tiny": TINY})
    monkeypatch.setattr(program, "get_task", lambda name: TINY)
    program.main(["tiny", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("noise ceiling of loss") == 2
    assert printed.count("noise ceiling of margin") == 2
    with pytest.raises(SystemExit):
        program.main(["nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
