"""Rows of :mod:`benchmarks.compare`: what each method leaves open, how it is chosen and judged."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr

import bayesinf as bi
from bayesinf._measuring import measured
from bayesinf.attribution._entry_points import find_method
from benchmarks._methods import task_options
from benchmarks.tasks import BenchmarkTask

__all__ = [
    "ROWS", "ROWS_BY_LABEL", "Row", "choose", "chosen_scores", "read_row", "row_file", "run_row",
    "write_row",
]  # fmt: skip

_LAYERS = tuple({"relative_damping": r} for r in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0))
_WHOLE = tuple({"times": r} for r in (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0))
_DESCENDING = (*_WHOLE[::-1], *({"times": r} for r in (1.0, 0.3, 0.1, 0.03)))
_PROJECTED = tuple({"relative_damping": r} for r in (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0))


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
    queries
        So many choose, the first ones.
    patience
        The grid, from its cheapest setting on, ends after so many in a row worse than the best.
    """

    label: str
    method: str
    grid: tuple[Mapping[str, Any], ...] = ({},)
    like: str | None = None
    queries: int = 100
    patience: int | None = None


def _each(name: str, *values: Any) -> tuple[dict[str, Any], ...]:
    return tuple({name: value} for value in values)


def _product(*grids: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    found: list[dict[str, Any]] = [{}]
    for grid in grids:
        found = [{**a, **b} for a in found for b in grid]
    return tuple(found)


ROWS = (
    Row("BIF", "bif"),
    Row("EK-FAC", "ekfac", _LAYERS),
    Row("K-FAC", "kfac", _LAYERS),
    Row("EK-FAC, deflated", "deflated_ekfac", _DESCENDING, patience=2),
    Row("conjugate gradients", "conjugate_gradient", _DESCENDING, queries=25, patience=2),
    Row("ASTRA", "astra", like="conjugate gradients"),
    Row("LiSSA", "lissa", like="conjugate gradients"),
    Row("Gauss–Newton, dense", "gauss_newton", like="conjugate gradients"),
    Row("Hessian, dense", "hessian", like="conjugate gradients"),
    Row("SOURCE", "source", _each("segments", 1, 2, 3, 6)),
    Row(
        "SOURCE, mean weights",
        "source",
        _product(_each("average", "parameters"), _each("segments", 1, 2, 3)),
    ),
    Row("TracIn", "tracin", _each("order", "expected", "recorded")),
    Row("LoGra", "logra", _product(_each("basis", "pca", "random"), _LAYERS)),
    Row("TRAK", "trak", _PROJECTED),
    Row("Arnoldi", "arnoldi", _product(_each("rank", 50, 100, 200), _WHOLE)),
    Row("Nyström", "nystrom", _product(_each("rank", 50, 100, 200), _WHOLE)),
    Row("DataInf", "datainf", _each("relative_damping", 0.001, 0.01, 0.1, 1.0)),
    Row("M-FAC", "mfac", _each("times", 0.3, 1.0, *(setting["times"] for setting in _WHOLE))),
    Row("GradDot", "grad_dot"),
    Row("GradCos", "grad_cos", _each("per_layer", False, True)),
    Row("representation similarity", "representation_similarity"),
    Row("k nearest neighbours", "knn_shapley", _each("k", 1, 5, 20)),
    Row("BM25", "bm25", _product(_each("k1", 0.3, 0.9, 1.5, 2.5), _each("b", 0.0, 0.25, 0.75))),
    Row("TF-IDF", "tf_idf"),
    Row("loss", "train_loss"),
    Row("random, same class", "same_class_random"),
    Row("random", "random_scores"),
)
ROWS_BY_LABEL = {row.label: row for row in ROWS}
_FIXED: dict[str, Callable[[int], dict[str, Any]]] = {
    "logra": lambda n: {"rank": 16},
    "lissa": lambda n: {"iterations": 300, "minibatch": min(100, n // 10)},
}
"""Settings that are no choice, of ``n`` examples: 256 numbers of a layer are kept; about as many
products as CG takes."""
_SKETCHES: dict[str, dict[str, Any]] = {
    "arnoldi": {
        "eigenpairs": lambda c, k: bi.curvature.arnoldi_eigenpairs(
            c, k, iterations=min(2 * k, c.shape[0])
        )
    },
    "nystrom": {"approximation": bi.curvature.nystrom_approximation},
}
"""What does not depend on the damping, and so is found once for each rank."""


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
        self.shared: dict[Any, Any] = {}

    def options(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Options of :func:`bayesinf.attribute`, without what can be shared by a sweep."""
        name = self.row.method
        given = dict(task_options(name, self.benchmark))
        if name in _FIXED:
            given |= _FIXED[name](self.task.n)
        given |= setting
        if "times" in given:
            given["damping"] = given.pop("times") * self._mean_eigenvalue()
        if "checkpoints" in find_method(name).required:
            if "run" not in self.shared:
                self.shared["run"] = self.benchmark.record(self.folder)
            given["checkpoints"] = self.shared["run"]
        return given

    def sweep(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        """The same, with a curvature, features or a recorded run that were computed once."""
        given, method = self.options(setting), find_method(self.row.method)
        if {"curvature", "fisher"} <= method.takes:
            given.pop("fisher")
            given["curvature"] = self._curvature()
        for option, find in _SKETCHES.get(self.row.method, {}).items():
            rank = given.pop("rank")
            if (option, rank) not in self.shared:
                operator = bi.curvature.GaussNewtonProduct(self.task)
                self.shared[option, rank] = find(operator, rank)
            given[option] = self.shared[option, rank]
        if "features" in method.takes:
            if "features" not in self.shared:
                self.shared["features"] = bi.trak_features(self.task)
            given["features"] = self.shared["features"]
        return given

    def __call__(self, options: Mapping[str, Any]) -> xr.Dataset:
        return bi.attribute(self.task, self.row.method, **options)

    def _curvature(self) -> bi.Curvature:
        if "curvature" not in self.shared:
            self.shared["curvature"] = bi.fit_curvature(
                self.task,
                fisher=self.benchmark.fisher,
                form="kfac" if self.row.method == "kfac" else "ekfac",
            )
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
        ``setting``, and ``tried``: pairs of setting and LDS, None where a solver diverged.

    Raises
    ------
    ValueError
        If it diverged at all of them.
    """
    if len(row.grid) == 1:
        return {"setting": dict(row.grid[0]), "tried": []}
    scorer = _Scorer(benchmark, row, row.queries, folder)
    part = bank.isel(query=slice(row.queries))
    tried: list[tuple[dict[str, Any], float | None]] = []
    best, worse = -math.inf, 0
    for setting in row.grid:
        if worse == row.patience:
            break
        try:
            value = float(bi.lds(scorer(scorer.sweep(setting)), part)["lds"])
        except bi.SolverDivergenceError:
            value = None
        tried.append((dict(setting), value))
        if value is not None:
            worse = 0 if value > best else worse + 1
            best = max(best, value)
    answers = [(value, setting) for setting, value in tried if value is not None]
    if not answers:
        raise ValueError("no setting of the grid has an answer")
    return {"setting": max(answers, key=lambda pair: pair[0])[1], "tried": tried}


def run_row(
    benchmark: BenchmarkTask, row: Row, out: Path, tuning: xr.Dataset, bank: xr.Dataset
) -> dict[str, Any]:
    """Choose, score, judge: what a row's file says.

    Parameters
    ----------
    benchmark, row
        What is scored, and how.
    out
        Where the file of the row that it follows may be.
    tuning, bank
        Subsets that choose, and those that judge.

    Returns
    -------
    dict
        Setting, LDS and costs; or the ``reason`` why the method does not run on the task.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scorer = _Scorer(benchmark, row, None, folder / "run")
        if reasons := find_method(row.method).missing(scorer.task):
            return {"reason": "; ".join(reasons)}
        chooser = ROWS_BY_LABEL[row.like] if row.like else row
        held = read_row(row_file(out, benchmark.name, chooser.label)) if row.like else {}
        if "setting" in held:
            found = {"setting": held["setting"], "tried": []}
        else:
            found = choose(benchmark, chooser, tuning, folder / "choosing")
        with measured() as before:
            options = scorer.options(found["setting"])
        recorded = "checkpoints" in options
        scores = scorer(options)
        judged, attrs = bi.lds(scores, bank), scores.attrs
        return {
            **found,
            **{key: float(judged[key]) for key in ("lds", "lower", "upper")},
            "cpu": attrs["processor_seconds"] + recorded * before.cpu,
            "seconds": sum(json.loads(attrs["seconds"]).values()) + recorded * before.wall,
            "peak_memory": attrs["peak_memory"],
            "disk": attrs["disk"] + _size(folder / "run"),
            "forward_examples": attrs.get("forward_examples", 0),
            "backward_examples": attrs.get("backward_examples", 0),
        }


def chosen_scores(benchmark: BenchmarkTask, out: Path) -> dict[str, xr.Dataset]:
    """Scores of every row kept in ``out`` that ran on a task, at the setting chosen there."""
    found = {}
    for row in ROWS:
        held = read_row(row_file(out, benchmark.name, row.label))
        if "setting" in held:
            with tempfile.TemporaryDirectory() as name:
                scorer = _Scorer(benchmark, row, None, Path(name))
                found[row.label] = scorer(scorer.options(held["setting"]))
    return found


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def row_file(out: Path, task: str, label: str) -> Path:
    """Where a row is kept."""
    stem = "".join(c if c.isalnum() else "-" for c in label.lower())
    return out / task / f"{stem}.json"


def read_row(path: Path) -> dict[str, Any]:
    """What a row's file says; nothing if there is none."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def write_row(path: Path, found: Mapping[str, Any]) -> None:
    """All or nothing, if it is killed on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.replace(path)
