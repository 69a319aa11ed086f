"""Our side of :mod:`benchmarks.language_speed`, in a process of its own.

``python -m benchmarks._own_language JOB DIR``, with the job ``sample`` (per-token losses at every
draw, traces to a store on disk, as the peer's), ``sample-bfloat16`` (the same network in bfloat16
with float32 masters, and how far its scores are from those of the last ``sample``) or ``bif``
(scores of the peer's own draws). Prints
one line of JSON with the fields of the peers' reports. Imports, the reading of model and data and
the making of a store from the peer's arrays come before the clock.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bayesinf as bi
from bayesinf._axes import Axis
from bayesinf._measuring import peak_mb, resident_mb

__all__ = ["NAME", "SETTINGS", "main", "store_of"]

NAME = "devinterp_language"
SETTINGS: dict[str, float] = {
    "chains": 2, "draws": 20, "steps": 2, "burnin": 20, "batch": 32, "n_train": 1024,
    "n_query": 32, "lr": 1e-5, "nbeta": 1000.0, "localization": 1000.0,
}  # fmt: skip
"""Those of the peer's program. Its ``nbeta`` goes with the mean over a sequence's tokens."""

_ROWS = 16
"""Query sequences whose token scores are held at a time."""


@contextmanager
def _stage(stages: dict[str, Any], name: str) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    stages[name] = {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "peak_rss_mb": peak_mb(),
    }


def store_of(losses: np.ndarray, block: int, path: Path) -> bi.TraceStore:
    """Traces of someone else's draws.

    Parameters
    ----------
    losses
        ``(chain, draw, sequence, token)``.
    block
        The first sequences are the queries, the next ones the train sequences.
    path
        Where the store goes.

    Returns
    -------
    TraceStore
        With ``n_beta = n = 1``, so that influence is minus the covariance.
    """
    chains, draws, _, tokens = losses.shape
    config = {
        "chains": chains, "warmup": 0, "thin": 1, "seed": 0, "batch_size": None,
        "superchains": chains,
        "posterior": {"n_beta": 1.0, "gamma": 1.0, "weight_decay": 0.0, "potential": "plain"},
        "task": {"n": 1, "checkpoint": ""}, "sampler": {"name": "devinterp"},
        "measurements": {"train": ["loss"], "query": ["loss"]},
    }  # fmt: skip
    ids, position = np.arange(block), np.tile(np.arange(1, tokens + 1), block)
    axes = {
        group: Axis(group, ids, tokens * np.arange(block + 1), position, None)
        for group in ("query", "train")
    }
    measured = {group: ["loss"] for group in axes}
    store = bi.TraceStore.create(path, config, dict.fromkeys(axes, ids), measured, draws, axes)
    values = {
        f"{group}_token/loss": losses[:, :, first : first + block].reshape(chains, draws, -1)
        for group, first in (("query", 0), ("train", block))
    }
    store.append(values, b"", {"seconds": 0.0})
    return store


def _task(folder: Path, settings: dict[str, float], half: bool) -> bi.Task:
    from bayesinf.interop import huggingface as hf

    importlib.import_module("transformers").utils.logging.disable_progress_bar()
    given: Any = {"attn_implementation": "sdpa", "chunked_head": True}
    given |= {"dtype": torch.bfloat16} if half else {}
    model = hf.from_pretrained(folder / "lm", **given)
    with np.load(folder / "lm_ids.npz") as saved:
        sets = {
            name: torch.as_tensor(saved[name][: int(settings[f"n_{name}"])].astype(np.int64))
            for name in ("train", "query")
        }
    train, query = ({"input_ids": ids, "labels": ids} for ids in sets.values())
    return bi.Task(model, bi.CausalLM(), train=train, query=query)


def _sample(
    folder: Path, settings: dict[str, float], stages: dict[str, Any], half: bool
) -> dict[str, float]:
    """Sample; a network in bfloat16 says how far that moves the scores, as a share of them."""
    task = _task(folder, settings, half)
    predicted = task.train.batch(slice(0, 1))[1].shape[1] - 1
    posterior = bi.LocalPosterior(
        task,
        n_beta=settings["nbeta"] / predicted,
        gamma=settings["localization"],
        potential="plain",
    )
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        with _stage(stages, "sample"):
            traces = bi.sample(
                posterior, bi.SGLD(settings["lr"]), draws=int(settings["draws"]),
                warmup=int(settings["burnin"]), thin=int(settings["steps"]),
                chains=int(settings["chains"]), batch_size=int(settings["batch"]), jitter=0.0,
                tokens="both", store=Path(scratch) / "draws.zarr", progress=False,
            )  # fmt: skip
        scores = bi.bif(traces, errors=False)["influence"].values
    kept = folder / "own_scores.npy"
    if not half:
        np.save(kept, scores)
        return {}
    full = np.load(kept)
    return {"moved": float(np.linalg.norm(scores - full) / np.linalg.norm(full))}


def _bif(folder: Path, block: int, keep: int, stages: dict[str, Any]) -> dict[str, Any]:
    """Both matrices, and how far they are from the peer's, relative to its largest value."""
    with np.load(folder / f"{NAME}.npz") as saved:
        losses, expected = saved["losses"], saved["sequence"]
    kept = np.load(folder / f"{NAME}.npy", mmap_mode="r")
    tokens, worst = losses.shape[3], 0.0
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        store = store_of(losses, block, Path(scratch) / "draws.zarr")
        del losses
        with _stage(stages, "diagnosis"):  # once a store, whatever is then asked of it
            bi.bif(store, query=0, train=0, center="grand")
        with _stage(stages, "sequence with errors"):
            bi.bif(store, center="grand")
        with _stage(stages, "sequence"):
            scores = bi.bif(store, center="grand", errors=False)
        gap = np.abs(scores["influence"].values + tokens**2 * expected).max()
        found = {"sequence": float(gap / (tokens**2 * np.abs(expected).max()))}
        parts: list[dict[str, Any]] = []
        for start in range(0, block, _ROWS):
            parts.append({})
            ids = np.arange(start, min(start + _ROWS, block))
            with _stage(parts[-1], "token with errors"):
                bi.bif(store, tokens="both", query=ids, center="grand")
            with _stage(parts[-1], "token"):
                scores = bi.bif(store, tokens="both", query=ids, center="grand", errors=False)
            ours = scores["influence"].values.reshape(len(ids), tokens, block, tokens)
            ours = ours[(-start) % keep :: keep, :, ::keep].transpose(0, 2, 1, 3)
            first = -(-start // keep)
            gap = np.abs(ours + kept[first : first + len(ours)]).max(initial=0.0)
            worst = max(worst, float(gap))
            del scores, ours
    for stage, keys in parts[0].items():
        stages[stage] = {
            key: (max if key == "peak_rss_mb" else sum)(part[stage][key] for part in parts)
            for key in keys
        }
    return {**found, "token": worst / float(np.abs(kept).max())}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run a job; prints and returns its report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks._own_language", description=__doc__)
    add = parser.add_argument
    add("job", choices=("sample", "sample-bfloat16", "bif"))
    add("folder", type=Path)
    add("--threads", type=int, default=1)
    add("--block", type=int, default=256)
    add("--keep", type=int, default=4)
    for name, value in SETTINGS.items():
        add(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    for module in ("torch._dynamo", "transformers.models.gpt_neox.modeling_gpt_neox"):
        importlib.import_module(module)
    stages: dict[str, Any] = {}
    report: dict[str, Any] = {"rss_after_import_mb": resident_mb(), "stages": stages}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether these chains have mixed is not the question
        if args.job == "bif":
            report["differences"] = _bif(args.folder, args.block, args.keep, stages)
        else:
            settings = {name: getattr(args, name) for name in SETTINGS}
            report |= _sample(args.folder, settings, stages, half=args.job != "sample")
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    main()
