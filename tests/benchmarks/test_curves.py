"""Curves against processor time, on a network of 31 weights with a made-up ground truth."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import bayesinf as bi
from benchmarks import _staged, curve, frontier

TRAIN, QUERY = 40, 6


def data() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(TRAIN + QUERY, 3, generator=g)
    y = (x[:, :1] * x[:, 1:2]).tanh() + 0.1 * torch.randn(len(x), 1, generator=g)
    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))


RECIPE = bi.SGDRecipe(epochs=30, batch_size=10, lr=0.1, weight_decay=1e-3)


def bank(name: str = "evaluation") -> xr.Dataset:
    """Halves and their losses, linear in the first training examples, with noise."""
    rng = np.random.default_rng(len(name))
    masks = rng.random((30, TRAIN)) < 0.5
    effects = rng.standard_normal((TRAIN, QUERY))
    losses = masks @ effects + rng.standard_normal((2, 30, QUERY))
    return xr.Dataset(
        {
            "subset_mask": (("subset", "train"), masks),
            "loss": (("seed", "subset", "query"), losses),
        },
        coords={"train": np.arange(TRAIN), "query": np.arange(QUERY), "subset": np.arange(30)},
    ).transpose("subset", "seed", ...)


def tiny() -> Any:
    checkpoint = bi.train_one(network, bi.Gaussian(), RECIPE, train=data()[0], seed=0)
    return SimpleNamespace(
        name="tiny", data=data, checkpoint=lambda: checkpoint, likelihood=bi.Gaussian(),
        recipe=RECIPE, weight_decay=RECIPE.weight_decay, bank=bank,
    )  # fmt: skip


class Clock:
    """Calibration takes 5 seconds, a draw 0.1, warm-up 1, scoring 2; nothing is computed."""

    def __init__(self) -> None:
        self.now = 0.0

    def process_time(self) -> float:
        return self.now

    def calibrate(self, *_: Any, **__: Any) -> Any:
        self.now += 5.0
        return SimpleNamespace(posterior=None, sampler=None, options={"chains": 4})

    def sample(self, *_: Any, store: Any = None, draws: int, **__: Any) -> Any:
        before = 0 if store is None else store.draws
        self.now += 0.1 * (draws - before) + (store is None)
        return SimpleNamespace(draws=draws)

    def bif(self, traces: Any) -> Any:
        self.now += 2.0
        return traces.draws


def test_stages_spend_their_budgets_and_go_on_from_the_same_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(_staged, "bi", clock)
    monkeypatch.setattr(_staged, "time", clock)
    stages = list(_staged.staged_bif(None, [4.0, 20.0, 60.0]))  # type: ignore[arg-type]
    assert [stage.seconds for stage in stages] == pytest.approx([20, 60], rel=0.05)
    assert clock.now == pytest.approx(stages[-1].seconds)
    # 5 + 1 + 2 for the calibration, the warm-up and the rehearsal, 2 for each scoring
    for scorings, stage in enumerate(stages, start=1):
        assert stage.scores == pytest.approx((stage.seconds - 8 - 2 * scorings) / 0.1)  # draws


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::bayesinf.ConvergenceWarning")
def test_the_frontier_of_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontier, "DAMPINGS", (0.1, 1.0))
    monkeypatch.setattr(frontier, "RELATIVE", (0.1,))
    monkeypatch.setattr(frontier, "STAGES", 2)
    found = frontier.run(tiny(), 15.0)
    names = {point["method"] for point in found["points"]}
    assert names == {"EK-FAC", "conjugate gradients", "BIF", "BIF, shrunk", "hybrid"}
    for point in found["points"]:
        assert -1 <= point["lower"] <= point["lds"] <= point["upper"] <= 1
    last = {point["method"]: point["lds"] for point in found["points"]}
    gap = found["differences"]["hybrid − conjugate gradients"]["difference"]
    assert gap == pytest.approx(last["hybrid"] - last["conjugate gradients"], abs=1e-9)
    text = frontier.format_points(found)
    assert len(re.findall(r"^hybrid ", text, flags=re.MULTILINE)) >= 2
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "frontier.json").write_text(json.dumps(found))
    assert frontier.draw(tmp_path).stat().st_size > 10_000
    with pytest.raises(FileNotFoundError, match="run the tasks first"):
        frontier.draw(folder)


def test_the_best_damping_is_that_of_the_tuning_bank() -> None:
    rng = np.random.default_rng(0)

    def scores(value: np.ndarray) -> xr.Dataset:
        return bi.make_scores(
            value, query=np.arange(QUERY), train=np.arange(TRAIN), method="x", estimand="influence"
        )

    tuning = bank("tuning")
    effects = np.random.default_rng(len("tuning"))
    effects.random((30, TRAIN))
    right = scores(effects.standard_normal((TRAIN, QUERY)).T)
    wrong = scores(rng.standard_normal((QUERY, TRAIN)))
    found, seconds, name = frontier._best({"a": lambda: wrong, "b": lambda: right}, tuning)
    assert name == "b"
    assert found is right
    assert seconds >= 0


@pytest.mark.filterwarnings("ignore::bayesinf.ConvergenceWarning")
def test_the_curve_beside_a_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()  # a second at every look at the clock: busy machines are no slower
    clock = SimpleNamespace(process_time=lambda: float(next(ticks)))
    monkeypatch.setattr(_staged, "time", clock)
    torch.manual_seed(0)
    layers = {"fc1": nn.Linear(4, 6), "fc2": nn.Linear(6, 5), "fc3": nn.Linear(5, 3)}
    weights = {
        f"{layer}.{key}": value
        for layer, module in layers.items()
        for key, value in module.state_dict().items()
    }
    pairs = [(torch.randn(k, 4), torch.randint(3, (k,))) for k in (TRAIN, QUERY)]
    torch.save({"state_dict": weights, "data": (*pairs[0], *pairs[1])}, tmp_path / "digits.pt")
    rng = np.random.default_rng(0)
    losses = rng.normal(size=(2, 16, 3, QUERY))
    masks = rng.random((16, TRAIN)) < 0.5
    np.savez(tmp_path / "lds_truth.npz", masks=masks, losses=losses[0], margins=losses[1])
    rows = curve.curve(tmp_path, unit=6.0, multiples=(1,))
    assert [row[0] for row in rows] == [
        "conjugate gradients", "BIF", "BIF, shrunk", "hybrid", "BIF, shrunk",
    ]  # fmt: skip
    plain, hybrid = rows[1], rows[3]
    assert float(hybrid[2]) >= float(plain[2])  # it pays for its parent
    assert all(-1 <= float(row[4]) <= 1 for row in rows[:-1])
    assert rows[-1][-1] == "MISSED"  # made-up losses have no influence to find
