"""Every method of the registry on every task: ``python -m benchmarks.compare [TASK …]``.

What a method leaves open is chosen on the tuning subsets, from the few settings of
``benchmarks/_compared.py`` and the first 100 queries (25 where each is a linear system to solve);
the evaluation subsets judge what was chosen, once. Dampings are multiples of the mean eigenvalue of
the Fisher matrix: of each layer for methods of layers (``relative_damping``), of all parameters
together for the others (``times``). Where each costs a solve or a deflation they go from large to
small, and end after two that are worse than the best. The other solvers of one linear system take
the damping that was chosen for the cheapest of them, conjugate gradients.

A row is a process of its own, and costs what that process spent on the chosen setting, a recorded
training run included. Rows are kept in ``OUT/TASK/ROW.json``, those that did not run too: a killed
run goes on there, and a row whose file is deleted is computed again. Printed are LDS with 95 %
intervals by task, best on the first task first, and costs there; a method that does not run, or
takes longer than ``--limit``, is listed with the reason. ``OUT/compare.md``, ``OUT/compare.png``
and ``OUT/compare.html`` hold the table, the figure, and everything by task.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

import bayesinf as bi
from bayesinf.plots import plot_lds, report
from benchmarks._compared import ROWS, ROWS_BY_LABEL, Row, read_row, row_file, run_row, write_row
from benchmarks._methods import add_bif_arguments, bif_options
from benchmarks.tasks import TASKS, get_task

__all__ = ["main", "table_of", "text_of"]

# ---------------------------------------------------------------- all rows


def _run_all(tasks: Sequence[str], rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Rows that have no file yet, each in a process; those that follow others, after them."""
    for follows in (False, True):
        jobs = [
            (task, row)
            for row in rows
            for task in tasks
            if (row.like is not None) == follows
            and not row_file(options.out, task, row.label).exists()
        ]
        with ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(lambda job: _run_apart(job[0], job[1], options), jobs))


def _run_apart(task: str, row: Row, options: argparse.Namespace) -> None:
    path = row_file(options.out, task, row.label)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.compare", task]
    command += ["--rows", row.label, "--out", str(options.out), "--here"]
    command += ["--error", str(options.error), "--chains", str(options.chains)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=options.limit, check=False
        )
    except subprocess.TimeoutExpired:
        write_row(path, {"reason": f"took more than {options.limit:g} seconds"})
    else:
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            write_row(path, {"reason": said[-1]})
    print(f"{task}: {row.label}: {path.read_text()[:160]}", file=sys.stderr, flush=True)


def _run_here(task: str, row: Row, out: Path) -> None:
    benchmark = get_task(task)
    found = run_row(benchmark, row, out, benchmark.bank("tuning"), benchmark.bank())
    write_row(row_file(out, task, row.label), found)


# ---------------------------------------------------------------- table and figure


def table_of(task: str, out: Path) -> tuple[xr.Dataset, dict[str, str]]:
    """Rows of a task by ``scorer``, as :func:`bayesinf.lds_table` has them, and who did not run."""
    found, reasons = {}, {}
    for row in ROWS:
        held = read_row(row_file(out, task, row.label))
        if "reason" in held:
            reasons[row.label] = held["reason"]
        elif held:
            found[row.label] = held
    columns = (
        "lds", "lower", "upper", "cpu", "seconds", "peak_memory", "disk", "forward_examples",
        "backward_examples",
    )  # fmt: skip
    table = xr.Dataset(
        {key: ("scorer", np.array([row[key] for row in found.values()])) for key in columns}
        | {"setting": ("scorer", [_said(row["setting"]) for row in found.values()])},
        coords={"scorer": list(found)},
        attrs={"task": task, "confidence": 0.95, "correlation": "spearman"},
    )
    bank = get_task(task).bank()
    if bank.sizes["seed"] > 1:
        table["ceiling"] = bi.noise_ceiling(bank)["ceiling"]
    return table, reasons


def _said(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in setting.items())


def text_of(tables: Mapping[str, xr.Dataset]) -> str:
    """One line a method in Markdown, best on the first task first: LDS by task, costs there."""
    header = ["method", *tables, "CPU s", "passes forward / backward", "MiB", "disk MiB"]
    held = {
        row.label: [
            table.sel(scorer=row.label) if row.label in table["scorer"].values else None
            for table in tables.values()
        ]
        for row in ROWS
    }
    ranks = {
        label: next((-k, float(own["lds"])) for k, own in enumerate(found) if own is not None)
        for label, found in held.items()
        if any(own is not None for own in found)
    }
    lines = [header, ["---"] * len(header)]
    for label in sorted(ranks, key=lambda name: ranks[name], reverse=True):
        judged = [
            "–" if own is None else f"{float(own['lds']):.3f} ± {_half(own):.3f}"
            for own in held[label]
        ]
        lines.append([label, *judged, *_costs(held[label][0])])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _costs(own: xr.Dataset | None) -> list[str]:
    if own is None:
        return [""] * 4
    return [
        f"{seconds:,.0f}" if (seconds := float(own["cpu"])) >= 10 else f"{seconds:.2g}",
        f"{int(own['forward_examples']):,} / {int(own['backward_examples']):,}",
        f"{float(own['peak_memory']) / 2**20:.0f}",
        f"{float(own['disk']) / 2**20:.1f}",
    ]


def _half(row: xr.Dataset) -> float:
    return float(row["upper"] - row["lower"]) / 2


def _figure(tables: Mapping[str, xr.Dataset], path: Path) -> None:
    import matplotlib.pyplot as plt

    most = max(table.sizes["scorer"] for table in tables.values())
    figure, axes = plt.subplots(
        1, len(tables), figsize=(4.2 * len(tables), 1.0 + 0.24 * most), squeeze=False
    )
    for (task, table), ax in zip(tables.items(), axes[0], strict=True):
        plot_lds(table, ax=ax)
        ax.set_title(task)
        ax.tick_params(axis="y", labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ["digits-mlp", "digits-cnn", "diabetes-mlp", "mnist-mlp", "pydoc-gpt"]
    add = parser.add_argument
    add("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}; default: {known}")
    add("--rows", nargs="+", choices=list(ROWS_BY_LABEL), metavar="ROW", help="default: all")
    add("--out", type=Path, default=Path("results/compare"), help="default: %(default)s")
    add("--workers", type=int, default=1, help="rows at a time (default: %(default)s)")
    add("--limit", type=float, default=14400.0, help="seconds of a row (default: %(default)s)")
    add_bif_arguments(parser)
    add("--here", action="store_true", help="one row of one task, in this process")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    tasks = options.tasks or known
    if unknown := set(tasks) - set(TASKS):
        parser.error(f"unknown task {', '.join(sorted(unknown))}")
    rows = [
        replace(row, grid=(bif_options(options),)) if row.method == "bif" else row
        for row in map(ROWS_BY_LABEL.__getitem__, options.rows or ROWS_BY_LABEL)
    ]
    if options.here:
        _run_here(tasks[0], rows[0], options.out)
        return
    _run_all(tasks, rows, options)
    judged = {task: table_of(task, options.out) for task in tasks}
    tables = {task: table for task, (table, _) in judged.items() if table.sizes["scorer"]}
    refused = {
        f"{task}: {label}": why
        for task, (_, reasons) in judged.items()
        for label, why in reasons.items()
    }
    _save(tables, refused, options.out)


def _save(tables: Mapping[str, xr.Dataset], refused: Mapping[str, str], out: Path) -> None:
    """Print the table, and write it, the figure and the report."""
    parts = [text_of(tables)] if tables else []
    parts += ["\n".join(f"- not run: {which}: {why}" for which, why in refused.items())]
    text = "\n\n".join(filter(None, parts))
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.md").write_text(text + "\n")
    if not tables:
        return
    _figure(tables, out / "compare.png")
    report(
        {f"LDS on {task}": table for task, table in tables.items()},
        title="Every method on every task",
        figures={"LDS": out / "compare.png"},
        configuration={"rows": {row.label: row.method for row in ROWS}, "not run": dict(refused)},
    ).save(out / "compare.html")


if __name__ == "__main__":
    main()
