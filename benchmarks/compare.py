"""Every method of the registry on every task: ``python -m benchmarks.compare [TASK …]``.

What a method leaves open is chosen on the tuning subsets, from the few settings below and the first
100 queries; the evaluation subsets judge what was chosen, once. Dampings are multiples of the mean
eigenvalue of the Fisher matrix: of each layer for methods of layers (``relative_damping``), of all
parameters together for the others (``times``). Solvers of one linear system take the damping that
was chosen for the cheapest of them, conjugate gradients.

A row is a process of its own, and costs what that process spent on the chosen setting, a recorded
training run included. Rows are kept in ``OUT/TASK/ROW.json``: a killed run goes on there. Printed
are LDS with 95 % intervals by task, and costs on the first task; a method that does not run, or
takes longer than ``--limit``, is listed with the reason. ``OUT/compare.md``, ``OUT/compare.png``
and ``OUT/compare.html`` hold the table, the figure, and everything by task.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

import bayesinf as bi
from bayesinf._measuring import measured
from bayesinf.attribution._entry_points import find_method
from bayesinf.plots import plot_lds, report
from benchmarks.tasks import TASKS, BenchmarkTask, get_task

__all__ = ["ROWS", "Row", "choose", "main", "run_row", "table_of", "text_of"]

_QUERIES = 100
_LAYERS = tuple({"relative_damping": r} for r in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0))
_WHOLE = tuple({"times": r} for r in (3.0, 10.0, 30.0, 100.0, 300.0))
_PROJECTED = tuple({"relative_damping": r} for r in (0.001, 0.01, 0.03, 0.1, 0.3, 1.0))


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes
    ----------
    label, method
        What it is called here and in the registry.
    grid
        Settings to choose from.
    like
        Row whose setting is taken instead.
    """

    label: str
    method: str
    grid: tuple[Mapping[str, Any], ...] = ({},)
    like: str | None = None


def _each(name: str, *values: Any) -> tuple[dict[str, Any], ...]:
    return tuple({name: value} for value in values)


def _product(*grids: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    found: list[dict[str, Any]] = [{}]
    for grid in grids:
        found = [{**a, **b} for a in found for b in grid]
    return tuple(found)


ROWS = (
    Row("BIF", "bif", ({"error": 0.02},)),
    Row("EK-FAC", "ekfac", _LAYERS),
    Row("K-FAC", "kfac", _LAYERS),
    Row("EK-FAC, deflated", "deflated_ekfac", _WHOLE),
    Row("conjugate gradients", "conjugate_gradient", _WHOLE),
    Row("ASTRA", "astra", like="conjugate gradients"),
    Row("LiSSA", "lissa", like="conjugate gradients"),
    Row("Gauss–Newton, dense", "gauss_newton", like="conjugate gradients"),
    Row("Hessian, dense", "hessian", like="conjugate gradients"),
    Row("SOURCE", "source", _each("segments", 1, 2, 3, 6)),
    Row("TracIn", "tracin", _each("order", "expected", "recorded")),
    Row("LoGra", "logra", _product(_each("basis", "pca", "random"), _LAYERS)),
    Row("TRAK", "trak", _PROJECTED),
    Row("Arnoldi", "arnoldi", _product(_each("rank", 50, 100), _WHOLE[:4])),
    Row("Nyström", "nystrom", _product(_each("rank", 50, 100), _WHOLE[:4])),
    Row("DataInf", "datainf", _each("relative_damping", 0.1, 1.0, 10.0)),
    Row("M-FAC", "mfac", _each("times", 0.3, 1.0, 3.0, 10.0, 30.0)),
    Row("GradDot", "grad_dot"),
    Row("GradCos", "grad_cos", _each("per_layer", False, True)),
    Row("representation similarity", "representation_similarity"),
    Row("k nearest neighbours", "knn_shapley", _each("k", 1, 5, 20)),
    Row("BM25", "bm25", _product(_each("k1", 0.9, 1.5, 2.5), _each("b", 0.25, 0.75))),
    Row("TF-IDF", "tf_idf"),
    Row("loss", "train_loss"),
    Row("random, same class", "same_class_random"),
    Row("random", "random_scores"),
)
_FIXED: dict[str, dict[str, Any]] = {
    "logra": {"rank": 16},
    "lissa": {"iterations": 300, "minibatch": 100},
}
"""Settings that are no choice: 256 numbers of a layer are kept; as many products as CG takes."""


class _Scorer:
    """Scores a task by name, with what a row's settings mean on it."""

    def __init__(self, benchmark: BenchmarkTask, row: Row, queries: int | None, folder: Path):
        train, (x, y) = benchmark.data()
        query = x[:queries], y[:queries]
        self.benchmark, self.row, self.folder = benchmark, row, folder
        self.task = bi.Task(benchmark.checkpoint(), benchmark.likelihood, train=train, query=query)
        bank = benchmark.bank()
        self.task.train.ids = bank["train"].values
        self.task.query.ids = bank["query"].values[:queries]
        self.shared: dict[str, Any] = {}

    def options(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Options of :func:`bayesinf.attribute`, without what can be shared by a sweep."""
        method = find_method(self.row.method)
        given = {**_FIXED.get(self.row.method, {}), **setting}
        if "times" in given:
            given["damping"] = given.pop("times") * self._mean_eigenvalue()
        if "fisher" in method.takes:
            given["fisher"] = self.benchmark.fisher
        if "weight_decay" in method.takes:
            given["weight_decay"] = self.benchmark.weight_decay
        if "checkpoints" in method.required:
            if "run" not in self.shared:
                self.shared["run"] = self.benchmark.record(self.folder)
            given["checkpoints"] = self.shared["run"]
        return given

    def sweep(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        """The same, with a curvature, features or a recorded run that were computed once."""
        given, method = self.options({**setting}), find_method(self.row.method)
        if {"curvature", "fisher"} <= method.takes:
            given.pop("fisher")
            given["curvature"] = self._curvature()
        if "features" in method.takes:
            if "features" not in self.shared:
                self.shared["features"] = bi.trak_features(self.task)
            given["features"] = self.shared["features"]
        return given

    def __call__(self, options: Mapping[str, Any]) -> xr.Dataset:
        return bi.attribute(self.task, self.row.method, **options)

    def _curvature(self) -> bi.Curvature:
        if "curvature" not in self.shared:
            self.shared["curvature"] = bi.fit_curvature(self.task, fisher=self.benchmark.fisher)
        held: bi.Curvature = self.shared["curvature"]
        return held

    def _mean_eigenvalue(self) -> float:
        return self._curvature().trace() / self.task.dimension


def choose(benchmark: BenchmarkTask, row: Row, bank: xr.Dataset, folder: Path) -> dict[str, Any]:
    """Setting of a row's grid with the highest LDS on the tuning subsets, by LDS of all.

    Parameters
    ----------
    benchmark, row
        What is scored, and how.
    bank
        The tuning subsets.
    folder
        Scratch space.

    Returns
    -------
    dict
        ``setting``, and ``tried``: pairs of setting and LDS.
    """
    grid = ROWS_BY_LABEL[row.like].grid if row.like else row.grid
    if len(grid) == 1:
        return {"setting": dict(grid[0]), "tried": []}
    scorer = _Scorer(benchmark, row, _QUERIES, folder)
    part = bank.isel(query=slice(_QUERIES))
    tried = []
    for setting in grid:
        try:
            value = float(bi.lds(scorer(scorer.sweep(setting)), part)["lds"])
        except bi.SolverDivergenceError:
            continue
        tried.append((dict(setting), value))
    if not tried:
        raise ValueError("no setting of the grid has an answer")
    return {"setting": max(tried, key=lambda pair: pair[1])[0], "tried": tried}


def run_row(
    benchmark: BenchmarkTask, row: Row, out: Path, tuning: xr.Dataset, bank: xr.Dataset
) -> dict[str, Any]:
    """Choose, score, judge: what a row's file says."""
    with tempfile.TemporaryDirectory() as folder:
        chooser = ROWS_BY_LABEL[row.like] if row.like else row
        held = out / benchmark.name / f"{_stem(chooser.label)}.json"
        if row.like and held.exists() and "setting" in json.loads(held.read_text()):
            found = {"setting": json.loads(held.read_text())["setting"], "tried": []}
        else:
            found = choose(benchmark, chooser, tuning, Path(folder) / "choosing")
        scorer = _Scorer(benchmark, row, None, Path(folder) / "run")
        with measured() as before:
            options = scorer.options(found["setting"])
        spent = before.cpu if "checkpoints" in options else 0.0
        scores = scorer(options)
        judged = bi.lds(scores, bank)
        attrs = scores.attrs
        return {
            **found,
            "lds": float(judged["lds"]),
            "lower": float(judged["lower"]),
            "upper": float(judged["upper"]),
            "cpu": attrs["processor_seconds"] + spent,
            "seconds": sum(json.loads(attrs["seconds"]).values()),
            "peak_memory": attrs["peak_memory"],
            "disk": attrs["disk"] + _size(Path(folder) / "run"),
            "forward_examples": attrs.get("forward_examples", 0),
            "backward_examples": attrs.get("backward_examples", 0),
        }


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


ROWS_BY_LABEL = {row.label: row for row in ROWS}


def _stem(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label.lower())


def _row_file(out: Path, task: str, label: str) -> Path:
    return out / task / f"{_stem(label)}.json"


# ---------------------------------------------------------------- all rows


def _run_all(tasks: Sequence[str], rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Rows that have no file yet, each in a process; those that follow another come last."""
    jobs = [
        (task, row)
        for row in sorted(rows, key=lambda row: row.like is not None)
        for task in tasks
        if not _row_file(options.out, task, row.label).exists()
    ]
    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(lambda job: _run_apart(job[0], job[1], options), jobs))


def _run_apart(task: str, row: Row, options: argparse.Namespace) -> None:
    path = _row_file(options.out, task, row.label)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.compare", task]
    command += ["--rows", row.label, "--out", str(options.out), "--here"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=options.limit, check=False
        )
        failed = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except subprocess.TimeoutExpired:
        failed = [f"took more than {options.limit:g} seconds"]
    if failed:
        path.write_text(json.dumps({"reason": failed[0]}))
    print(f"{task}: {row.label}: {path.read_text()[:160]}", file=sys.stderr, flush=True)


def _run_here(task: str, row: Row, out: Path) -> None:
    benchmark = get_task(task)
    method = find_method(row.method)
    path = _row_file(out, task, row.label)
    train, query = benchmark.data()
    one = bi.Task(benchmark.checkpoint(), benchmark.likelihood, train=train, query=query)
    reasons = method.missing(one)
    if reasons:
        found: dict[str, Any] = {"reason": "; ".join(reasons)}
    else:
        with _quiet():
            found = run_row(benchmark, row, out, benchmark.bank("tuning"), benchmark.bank())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


# ---------------------------------------------------------------- table and figure


def table_of(task: str, out: Path) -> tuple[xr.Dataset, dict[str, str]]:
    """Rows of a task by ``scorer``, as :func:`bayesinf.lds_table` has them, and who did not run."""
    found, reasons = {}, {}
    for row in ROWS:
        path = _row_file(out, task, row.label)
        if not path.exists():
            continue
        held = json.loads(path.read_text())
        if "reason" in held:
            reasons[row.label] = held["reason"]
        else:
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
        table["ceiling"] = bi.noise_ceiling(bank)["ceiling"].mean()
    return table, reasons


def _said(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in setting.items())


def text_of(tables: Mapping[str, xr.Dataset]) -> str:
    """One line a method in Markdown: LDS on every task, and costs on the first."""
    first = next(iter(tables.values()))
    header = ["method", *tables, "CPU s", "passes forward / backward", "MiB", "disk MiB"]
    lines = [header, ["---"] * len(header)]
    average = {
        row.label: np.mean([float(t["lds"].sel(scorer=row.label)) for t in tables.values()
                            if row.label in t["scorer"].values] or [-1.0])
        for row in ROWS
    }  # fmt: skip
    for label in sorted(average, key=lambda name: -average[name]):
        held = [
            table.sel(scorer=label) if label in table["scorer"].values else None
            for table in tables.values()
        ]
        if not any(row is not None for row in held):
            continue
        cells = [
            "–" if row is None else f"{float(row['lds']):.3f} ± {_half(row):.3f}" for row in held
        ]
        if label in first["scorer"].values:
            own = first.sel(scorer=label)
            cells += [
                f"{float(own['cpu']):.2g}",
                f"{int(own['forward_examples']):,} / {int(own['backward_examples']):,}",
                f"{float(own['peak_memory']) / 2**20:.0f}",
                f"{float(own['disk']) / 2**20:.1f}",
            ]
        else:
            cells += [""] * 4
        lines.append([label, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
    add("--limit", type=float, default=3600.0, help="seconds of a row (default: %(default)s)")
    add("--here", action="store_true", help="one row of one task, in this process")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    tasks = options.tasks or known
    if unknown := set(tasks) - set(TASKS):
        parser.error(f"unknown task {', '.join(sorted(unknown))}")
    rows = [ROWS_BY_LABEL[label] for label in options.rows or ROWS_BY_LABEL]
    if options.here:
        _run_here(tasks[0], rows[0], options.out)
        return
    _run_all(tasks, rows, options)
    judged = {task: table_of(task, options.out) for task in tasks}
    tables = {task: table for task, (table, _) in judged.items() if table.sizes["scorer"]}
    text = text_of(tables)
    print(text)
    for task, (_, reasons) in judged.items():
        for label, why in reasons.items():
            print(f"not run on {task}: {label}: {why}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "compare.md").write_text(text + "\n")
    _figure(tables, options.out / "compare.png")
    report(
        {f"LDS on {task}": table for task, table in tables.items()},
        title="Every method on every task",
        figures={"LDS": options.out / "compare.png"},
        configuration={"rows": {row.label: row.method for row in rows}},
    ).save(options.out / "compare.html")


if __name__ == "__main__":
    main()
