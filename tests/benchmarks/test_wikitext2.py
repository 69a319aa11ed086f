"""The WikiText-2 task on a small folder of the same format, and banks made elsewhere."""

from pathlib import Path

import numpy as np
import pytest
import torch

import bayesinf as bi
from benchmarks import import_bank
from benchmarks.tasks import get_task, wikitext2_gpt2

transformers = pytest.importorskip("transformers")

ROWS = ["", " = Lobster = \n", "", " The lobster is blue , often .\n"] * 300


def text_folder(folder: Path, kind: str) -> Path:
    pyarrow = pytest.importorskip("pyarrow") if kind in ("parquet", "arrow", "saved") else None
    for split, rows in (("train", ROWS), ("validation", ROWS[:400])):
        if kind == "parquet":
            from pyarrow import parquet

            path = folder / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(exist_ok=True, parents=True)
            parquet.write_table(pyarrow.table({"text": rows}), path)
        elif kind in ("arrow", "saved"):
            name = f"wikitext-{split}.arrow" if kind == "arrow" else f"{split}/data-00000.arrow"
            path = folder / name
            path.parent.mkdir(exist_ok=True, parents=True)
            table = pyarrow.table({"text": rows})
            sink = pyarrow.OSFile(str(path), "wb")
            with sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        else:
            name = f"wiki.{'train' if split == 'train' else 'valid'}.raw"
            folder.mkdir(exist_ok=True)
            (folder / name).write_text("".join(row or " \n" for row in rows))
    return folder


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved", "raw"])
def test_rows_of_every_format(tmp_path: Path, kind: str) -> None:
    folder = text_folder(tmp_path / "text", kind)
    assert wikitext2_gpt2.read_rows(folder, "train") == ROWS
    assert wikitext2_gpt2.read_rows(folder, "validation") == ROWS[:400]


def test_a_folder_without_the_text(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no train file of WikiText-2.*\['notes.txt'\]"):
        wikitext2_gpt2.read_rows(tmp_path, "train")


def test_sequences_are_cut_a_thousand_rows_at_a_time() -> None:
    """1,200 rows of 3 tokens: 46 × 64 of the first 3,000, 9 × 64 of the last 600."""

    def tokenizer(rows: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[3 * int(row) + k for k in range(3)] for row in rows]}

    ids = wikitext2_gpt2.sequences([str(i) for i in range(1200)], tokenizer, 64)
    assert ids.shape == (46 + 9, 64)
    assert ids[:46].flatten().tolist() == list(range(46 * 64))
    assert ids[46:].flatten().tolist() == list(range(3000, 3000 + 9 * 64))


def gpt2_folder(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={p: k for k, p in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=512, n_embd=8, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_the_task_from_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAYESINF_WIKITEXT2", str(text_folder(tmp_path / "text", "raw")))
    monkeypatch.setenv("BAYESINF_GPT2", str(gpt2_folder(tmp_path / "gpt2")))
    benchmark = get_task("wikitext2-gpt2")
    (train, target), (query, _) = benchmark.data()
    text = "".join(ROWS).encode()
    lengths = [len("".join(ROWS[:1000]).encode()), len("".join(ROWS[1000:]).encode())]
    assert train.shape == (sum(n // 512 for n in lengths), 512)
    assert torch.equal(train, target)
    assert query.shape == (len("".join(ROWS[:400]).encode()) // 512, 512)
    assert (train[0] == train[0][0]).sum() == text[:512].count(b" ")  # one token a byte
    model = benchmark.make_model()
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    short = (train[:4, :16], train[:4, :16])
    task = bi.Task(model, benchmark.likelihood, train=short, query=short)
    before = task.losses(task.params, task.train.batch()).mean()
    trained = bi.train_one(
        benchmark.make_model, benchmark.likelihood, benchmark.recipe, train=short, seed=0
    )
    after = bi.Task(trained, benchmark.likelihood, train=short, query=short)
    assert after.losses(after.params, after.train.batch()).mean() < before
    assert benchmark.recipe.rate(0, 100) == benchmark.recipe.rate(99, 100) == 3e-5
    assert benchmark.recipe.steps(4656) == 3 * 582


@pytest.mark.parametrize("kind", ["pt", "tensor", "npy", "npz"])
def test_import(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    masks, losses = rng.random((5, 12)) < 0.5, rng.standard_normal((5, 3))
    paths = []
    for name, array in (("masks", masks.astype(np.int64)), ("losses", losses)):
        path = tmp_path / f"{name}.{'pt' if kind == 'tensor' else kind}"
        if kind == "npy":
            np.save(path, array)
        elif kind == "npz":
            np.savez(path, array)
        else:
            torch.save(array if kind == "pt" else torch.from_numpy(array), path)
        paths.append(str(path))
    import_bank.main(["wikitext2-gpt2", *paths, "--out", str(tmp_path / "truth")])
    assert "5 subsets of 12 examples × 1 seeds, 3 queries" in capsys.readouterr().out
    bank = get_task("wikitext2-gpt2").bank("evaluation", tmp_path / "truth")
    np.testing.assert_array_equal(bank["subset_mask"], masks)
    np.testing.assert_allclose(bank["loss"][:, 0], losses, rtol=1e-6)
    scores = bi.make_scores(
        rng.standard_normal((3, 12)), query=np.arange(3), train=np.arange(12), method="any",
        estimand="similarity",
    )  # fmt: skip
    assert np.isfinite(float(bi.lds(scores, bank)["lds"]))
