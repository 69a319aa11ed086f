"""The program that times retraining, on a task of milliseconds, and its test of distributions."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from bayesinf import Categorical
from bayesinf.evaluation import SGDRecipe
from benchmarks import retraining_speed as program
from benchmarks.tasks import BankPlan, BenchmarkTask
from benchmarks.tasks._task import Data


def data() -> Data:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, generator=g), torch.randint(0, 2, (40,), generator=g)
    return (x[:32], y[:32]), (x[32:], y[32:])


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


TINY = BenchmarkTask(
    name="tiny",
    make_model=make_model,
    likelihood=Categorical(),
    data=data,
    recipe=SGDRecipe(epochs=3, batch_size=5, lr=0.1, weight_decay=0.01),
    banks={"evaluation": BankPlan(subsets=12, subset_seed=1, seeds=(1, 2, 3))},
)


def test_the_loop_and_retraining_have_one_distribution() -> None:
    """By the program's own test, whose chance of a false alarm is 1 %; seeds are fixed here."""
    found = program.compare(TINY, 12, 3)
    assert found.networks == 36
    assert found.vectorised.shape == found.loop.shape == (12, 3, 8)
    assert min(found.vectorised_s, found.loop_s, found.loader_s) > 0
    assert min(program.same_distribution(found.vectorised, found.loop).values()) > 0.01


def test_the_loop_follows_the_recipe() -> None:
    """One step by hand: a full batch, where momentum and the schedule do nothing yet."""
    recipe = SGDRecipe(epochs=1, batch_size=32, lr=0.5, weight_decay=0.1)
    task = dataclasses.replace(TINY, recipe=recipe)
    (x, y), _ = data()
    torch.manual_seed(3)
    start = make_model()
    nn.functional.cross_entropy(start(x), y).backward()
    trained = program.train_plain(task, x, y, 3, program.indexed)
    for before, after in zip(start.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.5 * (before.grad + 0.1 * before))


@pytest.mark.parametrize("batches", [program.indexed, program.loaded])
def test_an_epoch_has_each_example_once(batches: program.Batches) -> None:
    (x, y), _ = data()
    seen = torch.cat([inputs for inputs, _ in batches(x, y, 5)])
    assert not torch.equal(seen, x)
    assert torch.equal(seen.sort(0).values, x.sort(0).values)


def draw(seed: int, shift: float = 0.0, scale: float = 1.0, query: float = 0.0) -> np.ndarray:
    """Losses (50, 6, 20) with an effect of the subset that both sides share."""
    rng = np.random.default_rng(seed)
    shared = np.random.default_rng(0).standard_normal((50, 1, 20))
    common = scale * rng.standard_normal((50, 6, 1))
    values = shared + common + 0.3 * rng.standard_normal((50, 6, 20)) + shift
    values[..., 0] += query
    return values


def test_differences_are_found_and_chance_is_not() -> None:
    """Of 200 pairs that are equal, at most 6 are rejected at 1 % (more: 0.5 % false alarm)."""
    assert program.same_distribution(draw(1, shift=0.5), draw(2))["mean"] < 0.01
    assert program.same_distribution(draw(1, scale=1.6), draw(2))["log_variance"] < 0.01
    assert program.same_distribution(draw(1, scale=0, query=0.3), draw(2, scale=0))["query"] < 0.01
    pairs = [program.same_distribution(draw(2 * k), draw(2 * k + 1)) for k in range(5, 205)]
    assert sum(min(p.values()) < 0.01 for p in pairs) <= 6


@pytest.mark.parametrize(
    ("seconds", "shift", "status"), [(2.5, 0.0, 0), (2.6, 0.0, 1), (2.5, 1.0, 1)]
)
def test_verdict_and_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seconds: float,
    shift: float,
    status: int,
) -> None:
    found = program.Comparison(300, seconds, 10.0, 20.0, draw(1, shift=shift), draw(2))
    monkeypatch.setattr(program, "compare", lambda task, subsets, seeds: found)
    assert program.main(["--subsets", "50"]) == status
    assert ("MISSED" in capsys.readouterr().out) == bool(status)
