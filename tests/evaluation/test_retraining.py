"""Training by the recipe, against PyTorch's own optimiser, looped and vectorised."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from torch import Tensor, nn

import bayesinf as bi
from bayesinf._data import Examples
from bayesinf.evaluation import (
    AdamWRecipe,
    SGDRecipe,
    _filling,
    _retraining,
    random_subsets,
    retrain,
    train_one,
)
from bayesinf.evaluation._problem import Problem
from bayesinf.evaluation._rows import Row
from bayesinf.evaluation._training import (
    choose_group_size,
    row_seeds,
    train_looped,
    train_stacked,
)

RECIPE = SGDRecipe(epochs=4, batch_size=4, lr=0.2, weight_decay=0.01)
SUBSETS = random_subsets(31, count=5, seed=0)  # 16 members: 4 batches; 15 give a smaller last one


def make_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def make_cnn() -> nn.Module:
    layers = [nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(nn.Unflatten(1, (1, 1, 5)), nn.ZeroPad2d((0, 0, 1, 0)), *layers).double()


def make_noisy() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(0.3), nn.Linear(7, 3)
    ).double()


def draw(kind: str = "categorical") -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(31, 5, generator=g, dtype=torch.float64)
    if kind == "categorical":
        return x, torch.randint(0, 3, (31,), generator=g)
    return x, torch.randn(31, 3, generator=g, dtype=torch.float64)


def plain_torch(
    mask: np.ndarray,
    seed: int,
    recipe: SGDRecipe | AdamWRecipe,
    loss: Callable[..., Tensor],
    y: Tensor,
) -> nn.Module:
    """The same run by torch.optim.SGD or AdamW and their schedulers."""
    x, _ = draw()
    first, second = row_seeds(mask, seed)
    with torch.random.fork_rng():
        torch.manual_seed(first)
        model = make_mlp()
    members = torch.from_numpy(np.flatnonzero(mask))
    g = torch.Generator().manual_seed(second)
    batches = -(-len(members) // recipe.batch_size)
    total = recipe.epochs * batches
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    if isinstance(recipe, SGDRecipe):
        optimiser = torch.optim.SGD(
            model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total)
    else:
        optimiser = torch.optim.AdamW(
            model.parameters(),
            lr=recipe.lr,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
        )
        rises = round(recipe.warmup * total)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser,
            lambda t: (
                (1.0 if t + 1 >= rises else (t + 1) / rises)
                * (0.5 + 0.5 * np.cos(np.pi * t / total) if recipe.schedule == "cosine" else 1.0)
            ),
        )
    for _ in range(recipe.epochs):
        order = members[torch.randperm(len(members), generator=g)]
        for batch in order.split(recipe.batch_size):
            optimiser.zero_grad()
            loss(model(x[batch]), y[batch]).backward()
            optimiser.step()
            if recipe.schedule == "cosine" or isinstance(recipe, AdamWRecipe):
                schedule.step()
    return model


def half_square(outputs: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (outputs - target).square().sum(1).mean()


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        SGDRecipe(epochs=3, batch_size=5, lr=0.05, momentum=0.5, schedule="constant"),
        AdamWRecipe(epochs=4, batch_size=5, lr=0.05, betas=(0.8, 0.95), eps=1e-3,
                    weight_decay=0.3, warmup=0.25),
        AdamWRecipe(epochs=3, batch_size=4, lr=0.01, schedule="constant"),
    ],
)  # fmt: skip
def test_equal_to_plain_torch(kind: str, recipe: SGDRecipe | AdamWRecipe) -> None:
    x, y = draw(kind)
    likelihood = bi.Categorical() if kind == "categorical" else bi.Gaussian()
    loss = nn.functional.cross_entropy if kind == "categorical" else half_square
    data = Examples((x, y), None, "train", torch.device("cpu"), torch.float64)
    masks, seeds = SUBSETS.values[:3], [4, 5, 4]
    keys = [row_seeds(m, s) for m, s in zip(masks, seeds, strict=True)]
    members = [torch.from_numpy(np.flatnonzero(m)) for m in masks]
    stacked = train_stacked(make_mlp, likelihood, recipe, data, members, keys)(x).detach()
    for k, (mask, seed) in enumerate(zip(masks, seeds, strict=True)):
        expected = plain_torch(mask, seed, recipe, loss, y)
        own = train_one(make_mlp, likelihood, recipe, train=(x, y), seed=seed, subset=mask)
        for a, b in zip(own.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        torch.testing.assert_close(stacked[k], expected(x).detach(), rtol=0, atol=1e-10)


def bank(make: Callable[[], nn.Module] = make_mlp, **options: object) -> xr.Dataset:
    x, y = draw()
    arguments = {
        "train": (x, y),
        "query": (x[:6], y[:6]),
        "subsets": SUBSETS,
        "seeds": [3, 4],
        **options,
    }
    return retrain(make, bi.Categorical(), RECIPE, **arguments)


def make_unbiased() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.GELU(), nn.Linear(7, 3)).double()


def make_nested() -> nn.Module:
    return nn.Sequential(make_mlp(), nn.LayerNorm(3)).double()


@pytest.mark.parametrize("make", [make_mlp, make_cnn, make_unbiased, make_nested])
def test_vectorised_equals_looped(make: Callable[[], nn.Module]) -> None:
    looped = bank(make, group_size=1)
    for size in (2, 3, 10):
        vectorised = bank(make, group_size=size)
        for name in ("loss", "margin"):  # trained in float64, stored in float32
            np.testing.assert_allclose(vectorised[name], looped[name], rtol=2e-7)


def test_a_row_is_the_model_of_its_subset_and_seed() -> None:
    x, y = draw()
    whole = bank()
    assert whole["loss"].dims == ("subset", "seed", "query")
    assert whole["loss"].dtype == np.float32
    for j, s in ((0, 0), (3, 1)):
        seed = [3, 4][s]
        model = train_one(
            make_mlp, bi.Categorical(), RECIPE, train=(x, y), seed=seed, subset=SUBSETS[j]
        )
        with torch.no_grad():
            outputs = model(x[:6])
        loss = nn.functional.cross_entropy(outputs, y[:6], reduction="none")
        odds = torch.logit(outputs.softmax(1)[torch.arange(6), y[:6]])
        np.testing.assert_allclose(whole["loss"][j, s], loss, rtol=1e-6)
        np.testing.assert_allclose(whole["margin"][j, s], odds, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 4])
def test_rows_do_not_depend_on_the_others(size: int) -> None:
    """The same rows, of other subsets in another order: to rounding, and bitwise alone."""
    whole = bank(group_size=size)
    part = bank(subsets=SUBSETS.isel(subset=[4, 1]), seeds=[4], group_size=size)
    np.testing.assert_allclose(
        part["loss"].sel(seed=4), whole["loss"].sel(seed=4, subset=[4, 1]), rtol=2e-7
    )
    xr.testing.assert_identical(whole, bank(group_size=size))
    seeds_differ = whole["loss"].values[:, 0] != whole["loss"].values[:, 1]
    assert seeds_differ.all()


def test_dropout_and_batch_norm_are_trained_one_by_one_and_measured_in_eval_mode() -> None:
    assert choose_group_size(make_noisy()) == 1
    first = bank(make_noisy)
    torch.manual_seed(99)
    np.testing.assert_array_equal(first["loss"], bank(make_noisy)["loss"])
    x, y = draw()
    model = train_one(make_noisy, bi.Categorical(), RECIPE, train=(x, y), seed=0)
    assert not any(m.training for m in model.modules())
    assert torch.equal(model(x), model(x))
    assert int(model[1].num_batches_tracked) == 4 * 8  # trained in train mode


def test_group_size_by_architecture() -> None:
    assert choose_group_size(make_mlp()) == 30
    assert choose_group_size(make_cnn()) == 1
    assert choose_group_size(nn.Linear(784, 256)) == 1


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    bank(make_noisy, seeds=[1], subsets=SUBSETS[:1])
    bank(seeds=[1])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_unequal_subsets_frozen_weights_and_dict_data() -> None:
    def make() -> nn.Module:
        model = make_mlp()
        model[0].bias.requires_grad_(False)
        return model

    masks = SUBSETS.copy()
    masks[1] = SUBSETS[1].values & (np.arange(31) > 9)
    looped, grouped = (bank(make, subsets=masks, group_size=size) for size in (1, 6))
    np.testing.assert_allclose(grouped["loss"], looped["loss"], rtol=2e-7)
    x, y = draw()
    first = row_seeds(np.ones(31, dtype=bool), 2)[0]
    with torch.random.fork_rng():
        torch.manual_seed(first)
        untrained = make()
    trained = train_one(make, bi.Categorical(), RECIPE, train=(x, y), seed=2)
    assert torch.equal(trained[0].bias, untrained[0].bias)
    assert not torch.equal(trained[0].weight, untrained[0].weight)
    as_dict = bank(train={"input": x, "label": y}, query={"input": x[:6], "label": y[:6]})
    np.testing.assert_array_equal(as_dict["loss"], bank()["loss"])


def test_labels_and_attrs() -> None:
    names = [f"t{i}" for i in range(31)]
    masks = random_subsets(names, fraction=0.5, count=2, seed=8)
    result = bank(subsets=masks, query_ids=list("abcdef"))
    assert result["train"].values.tolist() == names
    assert result["query"].values.tolist() == list("abcdef")
    assert result["seed"].values.tolist() == [3, 4]
    np.testing.assert_array_equal(result["subset_mask"], masks)
    assert json.loads(result.attrs["recipe"]) == RECIPE.as_dict()
    assert result.attrs["fraction"] == 16 / 31
    assert (result.attrs["n"], result.attrs["subset_seed"]) == (31, 8)
    assert str(result.attrs["torch_version"]).split("+")[0] == torch.__version__.split("+")[0]
    x, y = draw("gaussian")
    plain = retrain(
        make_mlp,
        bi.Gaussian(),
        RECIPE,
        train=(x, y),
        query=(x, y),
        subsets=masks,
        seeds=[0],
    )
    assert set(plain.data_vars) == {"loss", "subset_mask"}


def test_train_looped_uses_only_the_members() -> None:
    x, y = draw()
    members = torch.arange(10)
    data = Examples((x, y), None, "train", torch.device("cpu"), torch.float64)
    other = x.clone()
    other[10:] = 1e6
    changed = Examples((other, y), None, "train", torch.device("cpu"), torch.float64)
    a, b = (
        train_looped(make_mlp, bi.Categorical(), RECIPE, d, members, (1, 2))
        for d in (data, changed)
    )
    assert torch.equal(a[0].weight, b[0].weight)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"subsets": SUBSETS.transpose()}, ValueError, "dims \\('subset', 'train'\\)"),
        ({"subsets": SUBSETS.astype(int)}, ValueError, "got int64"),
        ({"subsets": SUBSETS & False}, ValueError, "keeps no example"),
        ({"subsets": SUBSETS[:, :30]}, ValueError, "holds 31 examples, but 30 train ids"),
        ({"query_ids": [1, 2]}, ValueError, "holds 6 examples, but 2 query ids"),
        ({"seeds": [1, 1]}, ValueError, "distinct integers"),
        ({"seeds": []}, ValueError, "at least one; got \\[\\]"),
        ({"group_size": 0}, ValueError, "group_size must be at least 1"),
        ({"worker": (2, 2)}, ValueError, "0 ≤ k < K"),
        ({"worker": (0, 2)}, ValueError, "need a common store="),
        ({"measurements": ("loss", "flops")}, NotImplementedError, "no method 'flops'"),
    ],
)
def test_refusals(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bank(**options)


def test_a_diverged_run_is_named() -> None:
    x, y = draw("gaussian")
    wild = SGDRecipe(epochs=60, batch_size=4, lr=1e3)

    def make() -> nn.Module:
        return nn.Linear(5, 3)

    arguments = {"train": (x, y), "query": (x, y), "subsets": SUBSETS, "seeds": [9]}
    with pytest.raises(ValueError, match="subset 0 with seed 9 gave a loss that is not finite"):
        retrain(make, bi.Gaussian(), wild, **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "step"}, "schedule must be one of"),
        ({"lr": 0.0}, "must be positive"),
        ({"momentum": 1.0}, "momentum must lie in"),
    ],
)
def test_recipe_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SGDRecipe(**{"epochs": 1, "batch_size": 1, "lr": 0.1, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "step"}, "schedule must be one of"),
        ({"epochs": 0}, "must be positive"),
        ({"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\)"),
        ({"warmup": 2.0}, r"warmup in \[0, 1\]"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"weight_decay": -1.0}, "weight_decay ≥ 0"),
    ],
)
def test_adamw_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamWRecipe(**{"epochs": 1, "batch_size": 1, "lr": 0.1, **options})


def test_a_step_of_adamw_by_hand() -> None:
    """Two steps written out in NumPy, from gradients that are given."""
    recipe = AdamWRecipe(1, 1, lr=1.0, betas=(0.7, 0.9), eps=0.01, weight_decay=0.2)
    w = np.array([0.5, -2.0])
    parameter = torch.tensor(w, requires_grad=True)
    step = recipe.optimizer([parameter])
    m = v = np.zeros(2)
    for t, (g, rate) in enumerate(((np.array([0.3, -1.0]), 0.1), (np.array([-2.0, 0.4]), 0.05)), 1):
        step([torch.tensor(g)], rate)
        m, v = 0.7 * m + 0.3 * g, 0.9 * v + 0.1 * g**2
        corrected = (m / (1 - 0.7**t)) / (np.sqrt(v / (1 - 0.9**t)) + 0.01)
        w = (1 - rate * 0.2) * w - rate * corrected
        np.testing.assert_allclose(parameter.detach(), w, rtol=1e-12)


def test_learning_rates_of_adamw() -> None:
    recipe = AdamWRecipe(epochs=5, batch_size=4, lr=0.2, warmup=0.4)
    rates = recipe.learning_rates(7)  # 10 steps, 4 of warm-up
    falling = 0.1 * (1 + np.cos(np.pi * np.arange(10) / 10))
    np.testing.assert_allclose(rates, falling * np.minimum(1, np.arange(1, 11) / 4), rtol=1e-12)
    assert recipe.as_dict() == {
        "optimizer": "adamw", "epochs": 5, "batch_size": 4, "lr": 0.2, "betas": [0.9, 0.999],
        "eps": 1e-8, "weight_decay": 0.0, "schedule": "cosine", "warmup": 0.4,
    }  # fmt: skip


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Rows in the order in which they are trained."""
    rows: list[Row] = []
    real = _retraining._outcomes

    def outcomes(problem: Problem, group: list[Row]) -> list[dict[str, np.ndarray]]:
        rows.extend(group)
        return real(problem, group)

    monkeypatch.setattr(_retraining, "_outcomes", outcomes)
    return rows


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_ranks_train_their_own_rows_and_wait_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[Row], by: str
) -> None:
    banks: list[xr.Dataset] = []

    def run(rank: int) -> xr.Dataset:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        options = {"worker": (rank, 2)} if by == "argument" else {}
        return bank(store=tmp_path / "rows", group_size=1, **options)

    def sleep(seconds: float) -> None:  # while rank 0 waits, rank 1 comes
        assert len(trained) == 5
        banks.append(run(1))

    monkeypatch.setattr(_filling.time, "sleep", sleep)
    banks.append(run(0))
    assert trained == [(j, 0) for j in range(5)] + [(j, 1) for j in range(5)]  # every other row
    xr.testing.assert_identical(*banks)
    monkeypatch.undo()
    np.testing.assert_array_equal(banks[0]["loss"], bank(group_size=1)["loss"])


def test_ranks_without_a_store_do_not_share(
    monkeypatch: pytest.MonkeyPatch, trained: list[Row]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    bank()
    assert len(trained) == 10


def test_a_rank_that_waits_in_vain_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def others(seconds: float) -> None:
        bank(store=tmp_path / "rows", group_size=1, worker=(0, 1))

    monkeypatch.setattr(_filling, "PATIENCE", 0.0)
    monkeypatch.setattr(_filling.time, "sleep", others)
    with pytest.warns(RuntimeWarning, match=r"rank 1 of 2 .* waits for 5 of the others"):
        bank(store=tmp_path / "rows", group_size=1, worker=(1, 2))


def test_rows_that_are_there_are_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[Row]
) -> None:
    """A group that was cut short is trained as it was, and only what is missing written."""
    from bayesinf.evaluation._rows import ZarrRows

    expected = bank(store=tmp_path / "rows", group_size=4)
    rows = zarr.open_group(tmp_path / "rows", mode="r+")
    rows["done"][1, 0] = 0
    written: list[Row] = []
    real = ZarrRows.write

    def write(self: ZarrRows, subset: int, seed: int, row: dict[str, np.ndarray]) -> None:
        written.append((subset, seed))
        real(self, subset, seed, row)

    monkeypatch.setattr(ZarrRows, "write", write)
    trained.clear()
    xr.testing.assert_identical(bank(store=tmp_path / "rows", group_size=4), expected)
    assert trained == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert written == [(1, 0)]


def test_arguments_that_another_process_cannot_have() -> None:
    with pytest.raises(ValueError, match="at the top level of a module"):
        bank(lambda: make_mlp(), group_size=1, workers=2)
    with pytest.raises(ValueError, match="workers must be at least 1; got 0"):
        bank(workers=0)


def test_train_one_refuses_a_wrong_mask() -> None:
    with pytest.raises(ValueError, match="mask of shape \\(31,\\)"):
        train_one(make_mlp, bi.Categorical(), RECIPE, train=draw(), seed=0, subset=np.ones(3, bool))
