"""Banks in the files of other libraries, written here in their formats."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import bayesinf as bi
from bayesinf.evaluation import (
    bank_from_bergson,
    bank_from_dattri,
    bank_from_kronfluence,
    bank_from_quanda,
    make_bank,
    open_bank,
    random_subsets,
    save_bank,
)
from bayesinf.evaluation._read_files import read_array, read_lists

N, M, Q = 12, 8, 3
MASKS = random_subsets(N, count=M, seed=0).values
EFFECTS = np.random.default_rng(0).standard_normal((Q, N)) / N
LOSSES = 5 + MASKS @ EFFECTS.T  # exact scores have LDS 1
KEPT = [np.flatnonzero(row) for row in MASKS]
LEFT_OUT = [np.flatnonzero(~row).tolist() for row in MASKS]
SCORES = bi.make_scores(
    EFFECTS, query=np.arange(Q), train=np.arange(N), method="exact", estimand="similarity"
)


def kronfluence(folder: Path) -> xr.Dataset:
    torch.save(MASKS.astype(np.int64), folder / "masks.pt")
    torch.save(torch.from_numpy(LOSSES), folder / "losses.pt")
    return bank_from_kronfluence(folder / "masks.pt", folder / "losses.pt")


def dattri(folder: Path) -> xr.Dataset:
    """The values that LDS is computed from are minus the losses."""
    torch.save(torch.from_numpy(np.stack(KEPT)), folder / "indices_lds.pt")
    torch.save(torch.from_numpy(-LOSSES).float(), folder / "target_values_lds.pt")
    return bank_from_dattri(folder / "indices_lds.pt", folder / "target_values_lds.pt", train=N)


def dattri_folder(folder: Path) -> xr.Dataset:
    for number, kept in enumerate(KEPT):
        (folder / str(number)).mkdir()
        (folder / str(number) / "indices.txt").write_text("\n".join(map(str, kept[::-1])))
    np.save(folder / "losses.npy", LOSSES)
    return bank_from_dattri(folder, folder / "losses.npy", train=N, negated=False)


def quanda(folder: Path) -> xr.Dataset:
    """Two classes: logits (0, z) with softplus(z) the loss of class 0."""
    lists = [kept.tolist() for kept in KEPT]
    text = "".join(
        f"{'- - ' if k == 0 else '  - '}{i}\n" for own in lists for k, i in enumerate(own)
    )
    (folder / "lds_subsets.yaml").write_text(text)
    (folder / "logits").mkdir()
    z = torch.from_numpy(np.log(np.expm1(LOSSES)))
    logits = torch.stack([torch.zeros_like(z), z], dim=2)
    for batch, own in enumerate((slice(0, 2), slice(2, 3))):
        torch.save({m: logits[m, own] for m in range(M)}, folder / "logits" / f"{batch}.pt")
    bank = bank_from_quanda(folder / "lds_subsets.yaml", folder / "logits", [0] * Q, train=N)
    np.testing.assert_allclose(bank["margin"][:, 0], -z, rtol=1e-6)
    return bank.drop_vars("margin")


def bergson(folder: Path) -> xr.Dataset:
    """Two runs that average to the losses; the lists are of what was left out."""
    for run, change in (("a", 0.5), ("b", -0.5)):
        cache = folder / run / "query_loss_cache"
        cache.mkdir(parents=True)
        (folder / run / "subsets.json").write_text(json.dumps(LEFT_OUT))
        blob = {
            "baseline": 0.0,
            "baseline_per_doc": torch.zeros(Q),
            "per_subset": torch.from_numpy(LOSSES + change),
        }
        torch.save(blob, cache / "losses_0123456789abcdef.pt")
    bank = bank_from_bergson([folder / "a", folder / "b"], train=N)
    np.testing.assert_allclose(bank["loss"][:, 1] - bank["loss"][:, 0], -1, atol=1e-6)
    return bank


READERS = (kronfluence, dattri, dattri_folder, quanda, bergson)


@pytest.mark.parametrize("read", READERS)
def test_exact_scores_have_an_lds_of_one(tmp_path: Path, read: Callable) -> None:
    bank = read(tmp_path)
    np.testing.assert_array_equal(bank["subset_mask"], MASKS)
    np.testing.assert_allclose(bank["loss"].mean("seed"), LOSSES, rtol=1e-6)
    assert bank["loss"].dims == ("subset", "seed", "query")
    assert bank["loss"].dtype == np.float32
    assert bank.attrs["source"] in read.__name__
    assert (bank.attrs["n"], bank.attrs["fraction"]) == (N, 0.5)
    assert float(bi.lds(SCORES, bank)["lds"]) == pytest.approx(1)
    save_bank(bank, tmp_path / "bank.zarr")
    xr.testing.assert_identical(open_bank(tmp_path / "bank.zarr"), bank)


def test_leave_one_out_of_dattri(tmp_path: Path) -> None:
    torch.save(torch.tensor([2.0, 5.0]), tmp_path / "indices_loo.pt")
    torch.save(torch.from_numpy(LOSSES[:2]), tmp_path / "values.pt")
    bank = bank_from_dattri(tmp_path / "indices_loo.pt", tmp_path / "values.pt", train=N)
    np.testing.assert_array_equal(~bank["subset_mask"], np.eye(N)[[2, 5]])
    np.testing.assert_allclose(bank["loss"][:, 0], LOSSES[:2], rtol=1e-6)


def test_a_bank_from_arrays_keeps_ids_seeds_and_attrs() -> None:
    names = [f"t{i}" for i in range(N)]
    design = random_subsets(names, count=M, seed=0)
    values = np.random.default_rng(1).standard_normal((M, 2, Q))
    bank = make_bank(
        {"loss": values, "own": values**2}, design, query=["a", "b", "c"], seeds=[7, 9],
        attrs={"note": "x"},
    )  # fmt: skip
    np.testing.assert_allclose(bank["own"].sel(seed=9, query="b"), values[:, 1, 1] ** 2, rtol=1e-6)
    assert bank["train"].values.tolist() == names
    assert bank.attrs == {
        "n": N, "subset_design": "random", "subset_seed": 0, "fraction": 0.5, "note": "x",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["[[0, 2], [1]]", "- - 0\n  - 2\n- - 1\n", "- [0, 2]\n- [1]\n"])
def test_lists_in_json_and_yaml(tmp_path: Path, text: str) -> None:
    (tmp_path / "lists").write_text(text)
    assert read_lists(tmp_path / "lists") == [[0, 2], [1]]


@pytest.mark.parametrize("text", ["{}", "[1, 2]", "  - 1\n", "a: 1\n", "[[0.5]]", "- 3\n"])
def test_what_is_no_list_of_lists(tmp_path: Path, text: str) -> None:
    (tmp_path / "lists").write_text(text)
    with pytest.raises(ValueError, match="a list of lists of positions"):
        read_lists(tmp_path / "lists")


class Trap:
    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (Path("sprung"),))


def test_files_cannot_run_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Trap(), tmp_path / "trap.pt")
    with pytest.raises(pickle.UnpicklingError):
        read_array(tmp_path / "trap.pt")
    np.save(tmp_path / "trap.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_array(tmp_path / "trap.npy")
    assert not (tmp_path / "sprung").exists()
    torch.save({"losses": torch.ones(2)}, tmp_path / "dict.pt")
    with pytest.raises(ValueError, match="one array of numbers; got dict"):
        read_array(tmp_path / "dict.pt")


@pytest.mark.parametrize(
    ("outcomes", "subsets", "options", "message"),
    [
        (np.ones((5, 2)), MASKS, {}, r"for 8 subsets; got \(5, 2\)"),
        (LOSSES, np.full((M, N), 0.5), {}, "masks of 0 and 1"),
        (LOSSES * np.nan, MASKS, {}, "loss is not finite for 24 of 24"),
        (LOSSES, MASKS, {"seeds": [1, 2]}, "one for each of 1 runs"),
        (LOSSES, MASKS, {"query": [1]}, "3 integers or strings"),
    ],
)
def test_arrays_that_are_no_bank(
    outcomes: np.ndarray, subsets: np.ndarray, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_bank({"loss": outcomes}, subsets, **options)
    with pytest.raises(ValueError, match="at least one measurement"):
        make_bank({}, MASKS)


def test_files_that_contradict_themselves(tmp_path: Path) -> None:
    dattri(tmp_path)
    files = (tmp_path / "indices_lds.pt", tmp_path / "target_values_lds.pt")
    with pytest.raises(ValueError, match=r"all losses are negative .*Pass negated=True"):
        bank_from_dattri(*files, train=N, negated=False)
    assert (
        bank_from_dattri(*files, train=N, negated=False, measurement="margin")["margin"] < 0
    ).all()
    quanda(tmp_path)
    (tmp_path / "logits" / "0.pt").rename(tmp_path / "logits" / "2.pt")
    with pytest.raises(ValueError, match=r"lacks 0\.pt .*not finished"):
        bank_from_quanda(tmp_path / "lds_subsets.yaml", tmp_path / "logits", [0] * Q, train=N)
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.pt"):
        bank_from_quanda(tmp_path / "lds_subsets.yaml", tmp_path / "0", [0] * Q, train=N)
    bergson(tmp_path)
    (tmp_path / "b" / "subsets.json").write_text(json.dumps(LEFT_OUT[::-1]))
    with pytest.raises(ValueError, match="left out different examples"):
        bank_from_bergson([tmp_path / "a", tmp_path / "b"], train=N)
    next((tmp_path / "a").rglob("*.pt")).unlink()
    with pytest.raises(FileNotFoundError, match="it has 0"):
        bank_from_bergson(tmp_path / "a", train=N)
