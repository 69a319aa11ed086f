"""devinterp on the small GPT-NeoX, run by an interpreter that has devinterp.

``python _devinterp_language.py --out DIR`` samples as the peers' own ``devinterp_lm.py`` does with
its defaults (which see), keeps the draws, and computes covariances of a block of sequences ×
sequences, and of their tokens. It leaves ``devinterp_language.json`` like the peers' programs, and

* ``devinterp_language.npz``: ``losses (chain, draw, sequence, token)`` of the observed sequences,
  queries first, in float32 as it stored them, and ``sequence (k, k)``, the covariances of its
  token **means** of the block;
* ``devinterp_language.npy``: of the tokens, ``(k', k', token, token)``, every ``--keep``-th
  sequence of both sides.

The block's rows are the first ``--block`` of the observed sequences, its columns the next ones.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.remove(str(Path(__file__).resolve().parent))  # modules there hide packages' names

import numpy as np
import torch
from datasets import (  # type: ignore[import-not-found]
    Dataset,
    disable_progress_bars,
)
from devinterp.slt.bif import compute_bif  # type: ignore[import-not-found]
from devinterp.slt.sampling import sample  # type: ignore[import-not-found]
from transformers import GPTNeoXForCausalLM

NAME = "devinterp_language"
_STATUS = Path("/proc/self/status")


def _memory(field: str) -> float:
    """A line of the process's status, in MiB."""
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    found = [int(line.split()[1]) / 1024 for line in lines if line.startswith(field)]
    return found[0] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def _stage(stages: dict[str, Any], name: str) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    stages[name] = {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "peak_rss_mb": _memory("VmHWM:"),
    }


def _sample(args: argparse.Namespace, path: Path, stages: dict[str, Any]) -> Any:
    model = GPTNeoXForCausalLM.from_pretrained(args.out / "lm", attn_implementation=args.attention)
    with np.load(args.out / "lm_ids.npz") as saved:
        train, query = (
            Dataset.from_dict({"input_ids": saved[name].tolist()}).with_format("torch")
            for name in ("train", "query")
        )
    with _stage(stages, "sample"):
        return sample(
            model.eval(), train,
            {
                "query": (query, min(args.n_query, len(query)) // args.batch),
                "train": (train, args.n_train // args.batch),
            },
            lr=args.lr, n_beta=args.nbeta, localization=args.localization, num_chains=args.chains,
            num_draws=args.draws, num_steps_bw_draws=args.steps, num_burnin_steps=args.burnin,
            batch_size=args.batch, num_init_loss_batches=4, device="cpu", output_path=path,
        )  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--threads", type=int, default=1)
    add("--attention", default="eager")
    for name, value in {
        "chains": 2, "draws": 20, "steps": 2, "burnin": 20, "batch": 32, "n-train": 1024,
        "n-query": 32, "block": 256, "keep": 4,
    }.items():  # fmt: skip
        add(f"--{name}", type=int, default=value)
    for name, number in {"lr": 1e-5, "nbeta": 1000.0, "localization": 1000.0}.items():
        add(f"--{name}", type=float, default=number)
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bars()
    resident, stages = _memory("VmRSS:"), {}  # type: tuple[float, dict[str, Any]]
    scratch = Path(tempfile.mkdtemp(dir=args.out))
    try:
        tree = _sample(args, scratch / "draws.zarr", stages)
        k = args.block
        pairs = {
            "compute_covariance": True,
            "batch_index_range_1": list(range(k)),
            "batch_index_range_2": list(range(k, 2 * k)),
        }
        with _stage(stages, "sequence"):
            sequence = compute_bif(tree, correlation_method="sequence", **pairs)
        with _stage(stages, "token"):
            token = compute_bif(tree, correlation_method="token", **pairs)
        kept = token["influences"].values[:: args.keep, :: args.keep]
        losses = np.concatenate([tree[f"loss_{name}"].values for name in ("query", "train")], 2)
        np.save(args.out / f"{NAME}.npy", kept)
        np.savez(args.out / f"{NAME}.npz", losses=losses, sequence=sequence["influences"].values)
    finally:
        shutil.rmtree(scratch)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    report = {
        "name": NAME,
        "settings": settings,
        "rss_after_import_mb": resident,
        "stages": stages,
        "token_shape": list(token["influences"].shape),
    }
    (args.out / f"{NAME}.json").write_text(json.dumps(report, indent=1))
    print(json.dumps({"name": NAME}))


if __name__ == "__main__":
    main()
