"""The program that reads other libraries' scores, with stand-ins for their programs."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from bayesinf.scores import from_array
from benchmarks import read_peers
from benchmarks._peer_digits import bank_from_truth

Q, N, M = 7, 40, 16

KRONFLUENCE = """
import argparse, json, tempfile
from pathlib import Path
import numpy as np, torch
from safetensors.torch import save_file
p = argparse.ArgumentParser()
p.add_argument("--out", type=Path)
p.add_argument("--threads")
a = p.parse_args()
scores = torch.randn(%d, %d, generator=torch.Generator().manual_seed(0))
with tempfile.TemporaryDirectory() as tmp:
    folder = Path(tmp) / "digits" / "scores_s"
    folder.mkdir(parents=True)
    save_file({"all_modules": scores}, folder / "pairwise_scores.safetensors")
name = "kronfluence_ekfac"
np.save(a.out / f"{name}.npy", scores.numpy())
(a.out / f"{name}.json").write_text("{}")
print(json.dumps({"name": name}))
"""
LDS = """
import json, sys
from pathlib import Path
import numpy as np
from scipy.stats import spearmanr
out = Path(sys.argv[2])
d, found = np.load(out / "lds_truth.npz"), {}
truth = {"loss": d["losses"].mean(1), "margin": -d["margins"].mean(1)}
for f in sorted(out.glob("*.npy")):
    s = np.load(f)
    p = -(d["masks"].astype(float) @ s.T.astype(float))
    found[f.stem] = {
        k: float(np.mean([spearmanr(p[:, q], t[:, q])[0] for q in range(len(s))]))
        for k, t in truth.items()
    }
(out / "lds.json").write_text(json.dumps(found))
(out / "lds_digits.json").write_text("{}")
print(json.dumps({"name": "lds_digits"}))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    masks = np.stack([rng.permutation(N) < N // 2 for _ in range(M)])
    losses, margins = rng.normal(size=(2, M, 3, Q))
    np.savez(tmp_path / "lds_truth.npz", masks=masks, losses=losses, margins=margins)
    (tmp_path / "digits.pt").touch()
    return tmp_path


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "kronfluence_digits.py").write_text(KRONFLUENCE % (Q, N))
    (tmp_path / "programs" / "lds_digits.py").write_text(LDS)
    return tmp_path / "programs"


def test_what_a_library_wrote_is_kept_read_and_judged(
    folder: Path,
    programs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Independent random scores and truths: what agrees is the arithmetic and the sign."""
    monkeypatch.setattr(read_peers, "CASES", (read_peers.CASES[0], read_peers.CASES[4]))
    np.save(folder / "another.npy", np.random.default_rng(1).normal(size=(Q, N)))
    common = ["--peers-python", sys.executable, "--peers-programs", str(programs)]
    assert read_peers.main([str(folder), *common]) == 0
    table = capsys.readouterr().out
    for name in ("read_kronfluence", "read_quanda"):
        assert name in table
    assert "bergson_graddot" in table
    assert "not run: no bergson_digits.py in --peers-programs" in table
    assert any("another" in line and "met" in line for line in table.splitlines())
    assert "MISSED" not in table
    (kept,) = (folder / "native" / "kronfluence_ekfac").glob("*/digits/scores_s")
    assert (kept / "pairwise_scores.safetensors").exists()

    np.save(folder / "kronfluence_ekfac.npy", np.random.default_rng(2).normal(size=(Q, N)))
    assert read_peers.main([str(folder), *common, "--reuse", "--only", "kronfluence_ekfac"]) == 1
    lines = capsys.readouterr().out.splitlines()
    missed = [line for line in lines if "MISSED" in line]
    assert len(missed) == 1
    assert "read_kronfluence" in missed[0]


def test_a_gap_is_seen_in_either_measurement(folder: Path) -> None:
    bank = bank_from_truth(folder / "lds_truth.npz")
    matrix = np.random.default_rng(3).normal(size=(Q, N))

    def read(measurement: str, sign: str = "helpful"):
        return from_array(matrix, query=None, train=None, sign=sign, measurement=measurement)

    ours, gap = read_peers.gaps(read, bank, {"loss": 0.0, "margin": 0.0})
    assert gap == max(abs(value) for value in ours.values())
    assert read_peers.gaps(read, bank, ours)[1] == 0.0
    flipped, gap = read_peers.gaps(lambda m: read(m, "harmful"), bank, ours)
    assert flipped == pytest.approx({name: -value for name, value in ours.items()})
    assert gap > 0.01


def test_without_peers_it_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read_peers.main([str(tmp_path)])
    assert "lacks digits.pt or lds_truth.npz" in capsys.readouterr().err
