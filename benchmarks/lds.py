"""LDS of attribution methods on a benchmark task: ``python -m benchmarks.lds TASK``.

Trains the task's checkpoint, scores it with each method, judges the scores against the retrained
models that ship with the repository, prints one table, and saves scores, table, figure and
report (``report.html``, and the same as data in ``report.zarr``) under ``results/TASK``. A method
that cannot run on the task is named with its reason.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

import bayesinf as bi
from bayesinf.evaluation._tables import COSTS
from bayesinf.plots import plot_lds_time, report
from benchmarks._methods import METHODS, BenchmarkMethod, add_bif_arguments, bif_options
from benchmarks.retrain import make_banks
from benchmarks.tasks import TASKS, BenchmarkTask, get_task

__all__ = ["main", "run"]

_REFUSALS = (
    ValueError,
    MemoryError,
    NotImplementedError,
    bi.DivergenceError,
    bi.SolverDivergenceError,
)
_HEADER = (
    "method",
    "LDS [95 %]",
    "LDS/ceiling",
    "seconds by stage",
    "CPU s",
    "MiB",
    "examples forward / backward",
)


def run(
    benchmark: BenchmarkTask,
    methods: list[BenchmarkMethod],
    bank: xr.Dataset,
    device: str = "cpu",
) -> tuple[dict[str, xr.Dataset], dict[str, str]]:
    """Score a task's checkpoint with each method.

    Parameters
    ----------
    benchmark
        The task.
    methods
        Rows.
    bank
        Ground truth.
    device
        Where the scores are computed.

    Returns
    -------
    scores, refused
        By method name; ``refused`` says why a method could not run.
    """
    train, query = benchmark.data()
    task = bi.Task(
        benchmark.checkpoint(), benchmark.likelihood, train=train, query=query, device=device
    )
    task.train.ids, task.query.ids = bank["train"].values, bank["query"].values
    scores: dict[str, xr.Dataset] = {}
    refused: dict[str, str] = {}
    for method in methods:
        print(f"… {method.name}", flush=True)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                scores[method.name] = method.scores(task, benchmark)
        except _REFUSALS as error:
            refused[method.name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        for warning in caught:
            if issubclass(warning.category, UserWarning):
                print(f"  {warning.category.__name__}: {warning.message}", flush=True)
    return scores, refused


def format_table(table: xr.Dataset, scores: dict[str, xr.Dataset]) -> str:
    """One line a method, best first, in Markdown."""
    rows = [_HEADER, tuple("---" for _ in _HEADER)]
    for k in np.argsort(-table["lds"].values):
        own = table.isel(scorer=int(k))
        name = str(own["scorer"].values)
        stages = json.loads(scores[name].attrs["seconds"])
        rows.append(
            (
                name,
                f"{float(own['lds']):.3f} [{float(own['lower']):.3f}, {float(own['upper']):.3f}]",
                f"{float(own['relative']):.2f}" if "relative" in own else "",
                ", ".join(f"{stage} {_short(seconds)}" for stage, seconds in stages.items()),
                f"{float(own['processor_seconds']):.1f}",
                f"{float(own['peak_memory']) / 2**20:.0f}",
                f"{_short(float(own['forward_examples']))} / "
                f"{_short(float(own['backward_examples']))}",
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _short(number: float) -> str:
    """Two significant digits, thousands as k and M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return (
                f"{number / size:.2g}{unit}"
                if number < 100 * size
                else f"{number / size:.0f}{unit}"
            )
    return f"{number:.2g}" if number < 100 else f"{number:.0f}"


def _differences(scores: dict[str, xr.Dataset], bank: xr.Dataset) -> xr.Dataset:
    """Paired differences of the first method with every other, by ``scorer``."""
    first, *others = scores
    if not others:
        return xr.Dataset()
    rows = [bi.lds_difference(scores[first], scores[other], bank) for other in others]
    pairs = [f"{first} − {other}" for other in others]
    return xr.concat(rows, "scorer", combine_attrs="drop_conflicts").assign_coords(scorer=pairs)


def _difference_lines(differences: xr.Dataset) -> str:
    lines = []
    for pair in differences.get("scorer", ()):
        d = differences.sel(scorer=pair)
        low, high = float(d["lower"]), float(d["upper"])
        lines.append(f"  {pair.item()}: {float(d['difference']):+.3f} [{low:+.3f}, {high:+.3f}]")
    return "\n".join(lines)


def _save(folder: Path, table: xr.Dataset, scores: dict[str, xr.Dataset], text: str) -> None:
    """Write scores, table and figure."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text + "\n")
    for name, dataset in scores.items():
        stem = "".join(c if c.isalnum() else "-" for c in name.lower())
        path = folder / f"scores-{stem}.zarr"
        dataset.to_zarr(path, mode="w", zarr_format=3, consolidated=False)
    axes = plot_lds_time(table)
    axes.set_title(f"{table.attrs['task']}: LDS against time")
    axes.figure.get_figure(root=True).savefig(folder / "lds.png", dpi=150)


def _report(
    folder: Path,
    table: xr.Dataset,
    differences: xr.Dataset,
    bank: xr.Dataset,
    scores: dict[str, xr.Dataset],
    settings: dict[str, Any],
) -> None:
    """Write the report beside what :func:`_save` has written."""
    tables = {"LDS": table}
    if differences:
        tables["Paired differences of LDS"] = differences
    if bank.sizes["seed"] > 1:
        tables["Noise ceiling"] = bi.noise_ceiling(bank)
    made = report(
        tables,
        title=f"LDS on {table.attrs['task']}",
        figures={"LDS against time": folder / "lds.png"},
        configuration=settings | {name: _settings(own) for name, own in scores.items()},
    )
    made.save(folder / "report.html")
    made.dataset.to_zarr(folder / "report.zarr", mode="w", zarr_format=3, consolidated=False)


def _settings(scores: xr.Dataset) -> dict[str, Any]:
    """Attributes of scores without costs and versions, which the report shows elsewhere."""
    return {
        key: value
        for key, value in scores.attrs.items()
        if key not in COSTS and not key.endswith("_version")
    }


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lds", description=__doc__)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=["core", "classical", "bayesian", "all", *(m.name for m in METHODS)],
        default=["core"],
        metavar="METHOD",
        help="core (default), classical, bayesian, all, or names of methods",
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="default: %(default)s")
    parser.add_argument(
        "--retrain", action="store_true", help="make the ground truth anew under OUT/ground_truth"
    )
    add_bif_arguments(parser)
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    benchmark = get_task(args.task)
    root = args.out / "ground_truth" if args.retrain else None
    if root is not None:
        make_banks(benchmark, root)
    bank = benchmark.bank("evaluation", root)
    chosen = [
        replace(m, options=bif_options(args)) if m.method == "bif" else m
        for m in METHODS
        if m.fits(benchmark)
        and {"all", m.family, m.name, "core" if m.core else m.name} & set(args.methods)
    ]
    scores, refused = run(benchmark, chosen, bank, args.device)
    table = bi.lds_table(scores, bank)
    differences = _differences(scores, bank)
    text = format_table(table, scores)
    ceiling = f"{float(table['ceiling']):.3f}" if "ceiling" in table else "unknown"
    print(
        f"\n{args.task}: {bank.sizes['subset']} halves × {bank.sizes['seed']} seeds, "
        f"{bank.sizes['query']} queries, noise ceiling {ceiling}, "
        f"{args.threads} thread(s)\n\n{text}\n\npaired differences (95 % intervals):\n"
        f"{_difference_lines(differences)}"
    )
    for name, why in refused.items():
        print(f"not run: {name}: {why}")
    folder = args.out / args.task
    _save(folder, table, scores, text)
    settings = {"task": args.task, "ground truth": bank.attrs, "threads": args.threads} | (
        {"not run": refused} if refused else {}
    )
    _report(folder, table, differences, bank, scores, settings)
    print(f"\nscores, table, figure and report.html are in {folder}")


if __name__ == "__main__":
    main()
