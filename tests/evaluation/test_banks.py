"""The resumable store and banks on disk."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from torch import nn

import bayesinf as bi
from bayesinf.evaluation import (
    SGDRecipe,
    _retraining,
    open_bank,
    random_subsets,
    retrain,
    save_bank,
)

SUBSETS = random_subsets(20, count=8, seed=0)


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def fill(store: Path | str | None, pause: float = 0.0, **options: object) -> xr.Dataset:
    """A bank of 8 subsets × 3 seeds in groups of 5 rows, ``pause`` seconds at each."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 3, generator=g), torch.randint(0, 2, (20,), generator=g)

    def make() -> nn.Module:
        time.sleep(pause)
        return make_model()

    arguments = {
        "recipe": SGDRecipe(epochs=2, batch_size=3, lr=0.1),
        "train": (x, y),
        "query": (x[:4], y[:4]),
        "subsets": SUBSETS,
        "seeds": [5, 6, 7],
        "group_size": 5,
        **options,
    }
    return retrain(make, bi.Categorical(), store=store, **arguments)


def count_groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    train: Callable = _retraining._train

    def counted(problem: object, group: list, inputs: object) -> torch.Tensor:
        sizes.append(len(group))
        return train(problem, group, inputs)

    monkeypatch.setattr(_retraining, "_train", counted)
    return sizes


def test_store_and_memory_agree_and_a_finished_store_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = count_groups(monkeypatch)
    first = fill(tmp_path / "store")
    assert sizes == [5, 5, 5, 5, 4]
    xr.testing.assert_identical(first, fill(None))
    sizes.clear()
    xr.testing.assert_identical(first, fill(tmp_path / "store"))
    assert sizes == []


def test_unmarked_rows_are_trained_again_in_their_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fill(tmp_path / "store")
    group = zarr.open_group(tmp_path / "store", mode="r+")
    group["done"][2, 1] = 0  # row 7: killed between its data and its mark
    group["loss"][2, 1] = 123.0
    sizes = count_groups(monkeypatch)
    xr.testing.assert_identical(expected, fill(tmp_path / "store"))
    assert sizes == [5]


def test_a_row_is_marked_after_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write of data that fails leaves the row without a mark."""
    from bayesinf.evaluation import _rows

    write = _rows.ZarrRows.write

    def failing(self: _rows.ZarrRows, subset: int, seed: int, row: dict) -> None:
        if (subset, seed) == (1, 0):
            self._values["margin"] = None  # type: ignore[assignment]
        write(self, subset, seed, row)

    monkeypatch.setattr(_rows.ZarrRows, "write", failing)
    with pytest.raises(TypeError):
        fill(tmp_path / "store")
    done = zarr.open_group(tmp_path / "store", mode="r")["done"][:]
    assert done.sum() == 3
    assert done[1, 0] == 0
    monkeypatch.setattr(_rows.ZarrRows, "write", write)
    xr.testing.assert_identical(fill(tmp_path / "store"), fill(None))


def test_killed_and_resumed_is_bitwise_undisturbed(tmp_path: Path) -> None:
    """SIGKILL twice at whatever moment; rows that were marked keep their data untouched."""
    store = tmp_path / "store"
    root = Path(__file__).parents[2]
    code = (
        "import sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[2]); "
        "import test_banks; test_banks.fill(sys.argv[1], pause=0.03)"
    )
    command = [sys.executable, "-c", code, str(store), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    marked = 0
    for _ in range(2):
        process = subprocess.Popen(command, env=environment)
        deadline = time.monotonic() + 60
        while _marks(store) <= marked and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        marked = _marks(store)
        assert 0 < marked < 24
    times = {p: p.stat().st_mtime_ns for p in (store / "loss").rglob("0") if p.is_file()}
    xr.testing.assert_identical(fill(store), fill(None))
    assert _marks(store) == 24
    kept = sum(p.stat().st_mtime_ns == before for p, before in times.items())
    assert kept >= 5 * (marked // 5)  # whole groups that were done were not trained again


def _marks(store: Path) -> int:
    return sum(1 for p in (store / "done").rglob("c/*/*") if p.name.isdigit())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": SGDRecipe(epochs=2, batch_size=3, lr=0.2)}, r"another recipe.*0\.1.*0\.2"),
        ({"subsets": random_subsets(20, count=8, seed=1)}, "another subsets"),
        ({"seeds": [5, 6, 8]}, r"seeds: \[5, 6, 7\] there, \[5, 6, 8\] now"),
        ({"query": (torch.zeros(4, 3), torch.zeros(4).long())}, "another query"),
        ({"measurements": ("loss",)}, "another measurements"),
    ],
)
def test_a_store_of_another_setting_is_refused(tmp_path: Path, options: dict, message: str) -> None:
    fill(tmp_path / "store", seeds=[5, 6, 7])
    before = sorted(p for p in (tmp_path / "store").rglob("*"))
    with pytest.raises(ValueError, match=message):
        fill(tmp_path / "store", **options)
    assert sorted(p for p in (tmp_path / "store").rglob("*")) == before


def test_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not a retraining store"):
        fill(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty")


def test_bank_round_trip(tmp_path: Path) -> None:
    names = np.array([f"id {i}" for i in range(20)])
    bank = fill(None, subsets=SUBSETS.assign_coords(train=names), query_ids=["q", "ö", "s", "t"])
    save_bank(bank, tmp_path / "bank.zarr")
    xr.testing.assert_identical(open_bank(tmp_path / "bank.zarr"), bank)
    root = zarr.open_group(tmp_path / "bank.zarr", mode="r")
    assert root.metadata.zarr_format == 3
    assert root["loss"].chunks == root["loss"].shape
    assert root["query"].dtype != object
    files = [p for p in (tmp_path / "bank.zarr").rglob("*") if p.is_file()]
    assert len(files) == 15  # 7 arrays of one chunk each, and the group
    save_bank(open_bank(tmp_path / "bank.zarr"), tmp_path / "again.zarr")


def test_bank_refusals(tmp_path: Path) -> None:
    bank = fill(tmp_path / "store")
    save_bank(bank, tmp_path / "bank.zarr")
    with pytest.raises(FileExistsError, match="never overwritten"):
        save_bank(bank, tmp_path / "bank.zarr")
    with pytest.raises(FileNotFoundError, match="there is no bank at"):
        open_bank(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="it has no `subset_mask`"):
        open_bank(tmp_path / "store")
    with pytest.raises(ValueError, match="is not a bank"):
        open_bank(tmp_path)
