"""The README's example runs, its commands install what is there, its names exist."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import bayesinf as bi

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_examples_run_and_their_chains_are_good(tmp_path: Path) -> None:
    first, errors, second, _, judging, named, others = _blocks("python")
    assert len([line for line in first.splitlines() if line.strip()]) <= 16
    examples = "\n".join((first, errors, second, judging, named, others))
    code = f"import torch\ntorch.set_num_threads(1)\n{examples}\n" + (
        "import numpy as np\n"
        "def correlation(a, b):\n"
        "    return np.corrcoef(a.influence.values.ravel(), b.influence.values.ravel())[0, 1]\n"
        "assert scores.influence.shape == (50, 250)\n"
        "assert correlation(scores, classical) > 0.5\n"
        "assert correlation(shrunk, scores) > 0.9\n"
        "assert hybrid.attrs['hybrid'] == 'bif + ekfac'\n"
        "assert bool((best.certain <= best.possible).all())\n"
        "assert classes.influence.shape == (50, 2)\n"
        "assert len(sweep) == 3\n"
        "assert correlation(sweep['of the posterior'], exact) > 0.9\n"
        "assert exact.attrs['unconverged'] == 0\n"
        "assert laplace.shape == (5, task.dimension)\n"
        "assert bi.load_curvature('digits.curvature').trace() == curvature.trace()\n"
        "assert top.influence.shape == (50, 2, 3)\n"
        "assert (table.lower < table.lds).all() and float(table.lds.sel(scorer='BIF')) > 0.1\n"
        "assert abs(float(table.lds[0] - table.lds[1] - paired.difference)) < 1e-12\n"
        "assert float(chance.p_value.max()) < 0.05\n"
        "assert correlation(theirs, scores) > 0.999999\n"
        "assert both.sizes['scorer'] == 2\n"
        "assert named.attrs['method'] == 'logra' and named.influence.shape == (50, 250)\n"
        "assert ranking.sizes['scorer'] == 4 and ranking.attrs['not_run'] == '{}'\n"
        "assert float(ranking.lds.sel(scorer='SOURCE')) > 0.1\n"
        "assert len(picture.axes) == 2\n"
        "assert influence.influence.shape == (1, 30)\n"
        "assert bool((removed.pareto_k < 0.7).all())\n"
        "assert bi.bif(chains).influence.shape == (30, 30)\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "no sign of trouble" in done.stdout


TEXTS = """
train_texts = [f"the {a} {v} the {b}" for a in ("cat", "dog") for v in ("sees", "likes")
               for b in ("bird", "tree", "fox, and runs")]
query_texts = ["the cat sees the tree", "the dog likes the bird"]
"""
CHECKPOINT = """
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)
byte = pre_tokenizers.ByteLevel
tokens = Tokenizer(models.BPE())
tokens.pre_tokenizer, tokens.decoder = byte(add_prefix_space=False), decoders.ByteLevel()
tokens.train_from_iterator(train_texts, trainers.BpeTrainer(
    vocab_size=290, special_tokens=["<end>"], initial_alphabet=byte.alphabet(),
    show_progress=False))
PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<end>").save_pretrained("checkpoint")
torch.manual_seed(0)
GPTNeoXForCausalLM(GPTNeoXConfig(
    vocab_size=290, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=16, max_position_embeddings=128, use_cache=False,
)).save_pretrained("checkpoint")
import bayesinf as bi
"""


def test_the_language_model_example_runs_on_a_checkpoint_on_disk(tmp_path: Path) -> None:
    (example,) = (block for block in _blocks("python") if "from_pretrained" in block)
    code = (
        TEXTS
        + CHECKPOINT
        + example
        + (
            "import numpy as np\n"
            "whole = bi.bif(traces).influence.values\n"
            "token = scores.influence.values\n"
            "one = scores['query'].values == 0\n"
            "summed = token[one].sum()\n"
            "assert abs(summed - whole[0].sum()) < 1e-5 * abs(whole[0]).sum(), (summed, whole)\n"
            "assert scores.influence.shape == classical.influence.shape\n"
        )
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "<!doctype html>" in (tmp_path / "influence.html").read_text().lower()


@pytest.mark.parametrize("extra", ["bench", "test"])
def test_the_commands_install_extras_that_exist(extra: str) -> None:
    commands = [block for block in _blocks("bash") if f"'.[{extra}]'" in block]
    assert len(commands) == 1
    assert commands[0].count("\n") == 1  # one command, one line
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra in project["optional-dependencies"]


def test_every_function_of_the_method_table_exists() -> None:
    rows = re.findall(r"^\| (`.*?) \|", README, flags=re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert set(bi.METHODS) | {"bif", "shrink"} == names
    assert all(callable(getattr(bi, name)) for name in names)


def test_files_that_it_names_are_there() -> None:
    paths = re.findall(r"`((?:tutorials|benchmarks)/[\w./-]+)`|\]\(([\w./-]+\.png)\)", README)
    named = [a or b for a, b in paths]
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []
