"""Curves against processor time, on a network of 31 weights with a made-up ground truth."""

from __future__ import annotations

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
from benchmarks import curve, frontier
from benchmarks._staged import staged_bif

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
        recipe=RECIPE, bank=bank,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::bayesinf.ConvergenceWarning")
def test_stages_spend_their_budgets_and_go_on_from_the_same_draws() -> None:
    train, query = data()
    task = bi.Task(tiny().checkpoint(), bi.Gaussian(), train=train, query=query)
    stages = list(staged_bif(task, [1e-3, 20.0, 21.0], weight_decay=1e-3))
    draws = [stage.scores.attrs["draws"] for stage in stages]
    assert draws == sorted(draws)
    assert len(stages) >= 2  # nothing can be scored within a millisecond
    assert 0.9 * 20 < stages[0].seconds < 2 * 20
    assert stages[-1].seconds >= 0.97 * 21


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
def test_the_curve_beside_a_peer(tmp_path: Path) -> None:
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
    rows = curve.curve(tmp_path, unit=15.0, multiples=(1,))
    assert [row[0] for row in rows] == [
        "conjugate gradients", "BIF", "BIF, shrunk", "hybrid", "BIF, shrunk",
    ]  # fmt: skip
    plain, hybrid = rows[1], rows[3]
    assert float(hybrid[2]) >= float(plain[2])  # it pays for its parent
    assert all(-1 <= float(row[4]) <= 1 for row in rows[:-1])
    assert rows[-1][-1] == "MISSED"  # made-up losses have no influence to find
