"""Judges by intervention on a classifier: ``python -m benchmarks.interventions [TASK]``.

Three parts, each a table in Markdown and a figure, with what the scores cost:

* ``mislabels``: a tenth of the training labels is replaced by other classes, the network is trained
  on them, and values of training examples (self-influence by EK-FAC and by the BIF, GraNd, EL2N,
  VoG, the plain loss) are judged by how they put the replaced ones first;
* ``removal``: for queries that the network gets right, the most helpful examples by each method are
  removed and the network is trained anew, beside random removal of all and of the query's class;
* ``pruning``: networks trained on the share of the examples that a value would keep, the hardest
  or the easiest; and, for each method, the examples most helpful to one half of the queries, judged
  on the other half.

Seconds are those of the scores alone; training checkpoints that they need comes on top. Tables and
retrained outcomes are kept under ``OUT/TASK/interventions``: a killed run goes on there.
``OUT/TASK/interventions.html`` is a page of all tables and figures.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

import bayesinf as bi
from bayesinf.attribution._difficulty import el2n, example_loss, grand, vog
from bayesinf.attribution._self_variance import self_variance
from bayesinf.evaluation import (
    Recipe,
    mislabel_detection,
    pruning_curve,
    removal_counterfactual,
    train_one,
)
from bayesinf.plots import plot_curves, plot_mislabels, report
from benchmarks._compared import chosen_scores
from benchmarks._methods import ERROR, METHODS
from benchmarks.lds import run
from benchmarks.tasks import TASKS, BenchmarkTask, get_task

__all__ = ["PARTS", "difficulty", "flip_labels", "main"]

PARTS = ("mislabels", "removal", "pruning")
SHARE = 0.1
COUNTS, FRACTIONS = (10, 20, 40, 80), (0.1, 0.2, 0.4, 0.6, 0.8)
SEEDS, QUERIES, EARLY = (0, 1, 2), 20, 5
"""Seeds of retrainings, queries of a removal, seeds of GraNd and EL2N early in training."""
QUICK: dict[str, Any] = {}
"""Options of :func:`bayesinf.sample` to override (tests do)."""


# ---------------------------------------------------------------------------- values


@dataclass
class _Recorded:
    """A recipe that keeps the weights at the end of some epochs; it trains as the recipe does."""

    recipe: Recipe
    examples: int
    epochs_kept: Sequence[int]
    kept: list[list[Tensor]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.recipe, name)

    def optimizer(self, params: Sequence[Tensor]) -> Callable[..., None]:
        """Start the recipe's optimiser, and count its steps."""
        inner, taken = self.recipe.optimizer(params), 0
        per_epoch = self.recipe.steps(self.examples) // self.recipe.epochs

        def step(grads: Sequence[Tensor], rate: float) -> None:
            nonlocal taken
            inner(grads, rate)
            taken += 1
            if taken % per_epoch == 0 and taken // per_epoch in self.epochs_kept:
                self.kept.append([p.detach().clone() for p in params])

        return step


def _checkpoints(
    benchmark: BenchmarkTask, train: tuple[Tensor, Tensor], seed: int, epochs: Sequence[int]
) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The trained network, and its weights at the end of some epochs."""
    recorded = _Recorded(benchmark.recipe, len(train[0]), epochs)
    model = train_one(
        benchmark.make_model, benchmark.likelihood, recorded, train=train, seed=seed
    )  # fmt: skip
    names = [name for name, _ in model.named_parameters()]
    return model, [dict(zip(names, weights, strict=True)) for weights in recorded.kept]


def difficulty(
    benchmark: BenchmarkTask, train: tuple[Tensor, Tensor], query: Any
) -> dict[str, xr.Dataset]:
    """Values of the training examples, all from networks trained on these data.

    Parameters
    ----------
    benchmark
        Network and recipe.
    train, query
        Examples.

    Returns
    -------
    dict[str, xr.Dataset]
        By name, high = hard.
    """
    epochs = benchmark.recipe.epochs
    steps = sorted({max(1, round(epochs * k / 10)) for k in range(1, 11)})
    model, run_of = _checkpoints(benchmark, train, benchmark.seed, steps)
    early = max(1, epochs // 5)
    seeds = [_checkpoints(benchmark, train, 50 + s, [early])[1][0] for s in range(EARLY)]
    task = bi.Task(model, benchmark.likelihood, train=train, query=query)
    began = time.perf_counter()
    curvature = bi.fit_curvature(task, fisher=benchmark.fisher)
    fitted = time.perf_counter() - began
    own = bi.ekfac(task, curvature=curvature, relative_damping=0.1, pairs="self")
    own.attrs["seconds"] = json.dumps({"fit": fitted, **json.loads(own.attrs["seconds"])})
    found = bi.calibrate(
        task, weight_decay=benchmark.weight_decay, error=ERROR, curvature=curvature
    )
    traces = bi.sample(found.posterior, found.sampler, progress=False, **found.options | QUICK)
    name = f"epoch {early}, {EARLY} seeds"
    return {
        "loss": example_loss(task),
        "EK-FAC self-influence": own,
        "BIF self-variance": self_variance(traces),
        "GraNd": grand(task),
        "EL2N": el2n(task),
        f"GraNd, {name}": grand(task, seeds),
        f"EL2N, {name}": el2n(task, seeds),
        "VoG": vog(task, run_of),
    }


def flip_labels(labels: Tensor, share: float, classes: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """Replace a share of the labels by other classes; returns them and the positions changed."""
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(labels))[: round(share * len(labels))])
    changed = labels.clone()
    shift = torch.from_numpy(rng.integers(1, classes, len(chosen)))
    changed[chosen] = (labels[chosen] + shift) % classes
    return changed, chosen


# ---------------------------------------------------------------------------- parts


def mislabels(benchmark: BenchmarkTask, options: argparse.Namespace) -> str:
    """Judge values on flipped labels; returns the table."""
    (x, y), query = benchmark.data()
    labels, chosen = flip_labels(y, SHARE, int(y.max()) + 1, seed=0)
    values = difficulty(benchmark, (x, labels), query)
    table = mislabel_detection(values, chosen)
    _keep(table, options, benchmark, "mislabels")
    axes = plot_mislabels(table, variable="average_precision")
    _save(axes, options.figures / f"mislabels-{benchmark.name}.png", options)
    rows = [
        (
            name,
            _cell(table, "auroc", scorer=name),
            _cell(table, "auroc_difference", signed=True, scorer=name),
            _cell(table, "average_precision", scorer=name),
            _cell(table, "recall", scorer=name, inspected=0.1),
            _cost(table, name),
        )
        for name in _ordered(table, table["auroc"])
    ]
    header = ("value", "AUROC", "less the loss's", "average precision", "recall at 10 %", "seconds")
    title = f"{table.attrs['mislabelled']} of {table.attrs['examples']} labels replaced"
    return f"{title}\n\n{_markdown(header, rows)}"


def _scores(benchmark: BenchmarkTask, options: argparse.Namespace) -> dict[str, xr.Dataset]:
    """Scores of the chosen methods on the benchmark's own checkpoint; named if they cannot run."""
    if options.compared is not None:
        found = chosen_scores(benchmark, options.compared)
        return {name: own for name, own in found.items() if not name.startswith("random")}
    chosen = [
        m for m in METHODS
        if m.fits(benchmark)
        and {"all", m.family, m.name, "core" if m.core else m.name} & set(options.methods)
    ]  # fmt: skip
    scores, refused = run(benchmark, chosen, benchmark.bank())
    for name, why in refused.items():
        print(f"not run: {name}: {why}", flush=True)
    return scores


def removal(
    benchmark: BenchmarkTask, options: argparse.Namespace, scores: dict[str, xr.Dataset]
) -> str:
    """Remove the most helpful examples of some queries; returns the tables."""
    train, query = benchmark.data()
    model = benchmark.checkpoint()
    with torch.no_grad():
        right = (model(query[0]).argmax(1) == query[1]).numpy()
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(right))[: options.queries]
    table = removal_counterfactual(
        {name: own.sel(query=np.sort(chosen)) for name, own in scores.items()},
        benchmark.make_model, benchmark.likelihood, benchmark.recipe, train=train, query=query,
        counts=COUNTS, seeds=SEEDS, store=_store(options, benchmark, "removal", scores),
    )  # fmt: skip
    _keep(table, options, benchmark, "removal")
    for variable in ("change", "flipped", "brittle"):
        path = options.figures / f"removal-{variable}-{benchmark.name}.png"
        _save(plot_curves(table, variable, along="count"), path, options)
    control = str(table["control"].values[-1])
    parts = [_summary(table, benchmark)]
    for variable, signed, what in (
        ("change", True, "rise of the query's loss"),
        ("excess", True, f"the same less that of “{control}”"),
        ("brittle", False, "share of stable queries that the removal flips in most networks"),
    ):
        own = table.sel(control=control) if variable == "excess" else table
        rows = [
            (
                name,
                *(_cell(own, variable, signed, scorer=name, count=k) for k in COUNTS),
                _cost(table, name),
            )
            for name in _ordered(table, table["change"].sel(count=COUNTS[-1]))
        ]
        header = (what, *(f"{k} removed" for k in COUNTS), "seconds")
        parts.append(_markdown(header, rows))
    return "\n\n".join(parts)


def _summary(table: xr.Dataset, benchmark: BenchmarkTask) -> str:
    return (
        f"{table.sizes['query']} queries of {benchmark.name} that the checkpoint gets right "
        f"({int(table['stable'].sum())} stable over seeds), {len(SEEDS)} seeds, "
        f"{table.attrs['networks']} networks in {table.attrs['seconds_retraining']:.0f} s"
    )


def pruning(
    benchmark: BenchmarkTask, options: argparse.Namespace, scores: dict[str, xr.Dataset]
) -> str:
    """Train on shares of the examples; returns the tables."""
    train, query = benchmark.data()
    half = len(query[0]) // 2
    values = difficulty(benchmark, train, query)
    ids = next(iter(scores.values()))["query"].values[:half]
    helpful = {
        name: xr.Dataset({"value": -own["influence"].sel(query=ids).mean("query")}, attrs=own.attrs)
        for name, own in scores.items()
    }
    test = query[0][half:], query[1][half:]
    parts = []
    for title, given, keep in (
        ("hardest kept", values, "high"),
        ("easiest kept", values, "low"),
        ("most helpful to other queries kept", helpful, "high"),
    ):
        table = pruning_curve(
            given, benchmark.make_model, benchmark.likelihood, benchmark.recipe, train=train,
            query=test, fractions=FRACTIONS, seeds=SEEDS, keep=keep,  # type: ignore[arg-type]
            store=_store(options, benchmark, title, given),
        )  # fmt: skip
        _keep(table, options, benchmark, title)
        file = f"pruning-{title.split(' kept')[0].split(' to')[0]}-{benchmark.name}.png"
        axes = plot_curves(table, "accuracy", along="fraction")
        axes.set_title(title)
        _save(axes, options.figures / file.replace(" ", "-"), options)
        rows = [
            (
                name,
                *(_cell(table, "accuracy", scorer=name, fraction=f) for f in FRACTIONS),
                _cost(table, name),
            )
            for name in _ordered(table, table["accuracy"].sel(fraction=FRACTIONS[1]))
        ]
        header = (f"accuracy, {title}", *(f"{100 * f:g} %" for f in FRACTIONS), "seconds")
        full = _cell(table, "full_accuracy")
        parts.append(f"{_markdown(header, rows)}\n\nall examples: {full}")
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------- output


def _store(
    options: argparse.Namespace, benchmark: BenchmarkTask, part: str, given: dict[str, Any]
) -> Path:
    """Where retrained networks' outcomes are kept; another choice of methods is another bank."""
    folder: Path = options.out / benchmark.name / "interventions"
    folder.mkdir(parents=True, exist_ok=True)
    count = f"-{len(given)}" if given else ""
    return folder / f"{part.replace(' ', '-')}{count}.zarr"


def _keep(table: xr.Dataset, options: argparse.Namespace, benchmark: Any, part: str) -> None:
    path = _store(options, benchmark, f"table {part}", {})
    table.to_zarr(path, mode="w", zarr_format=3, consolidated=False)
    options.tables[part] = table


def _ordered(table: xr.Dataset, by: xr.DataArray) -> list[str]:
    return [str(table["scorer"].values[k]) for k in np.argsort(-by.values, kind="stable")]


def _cell(table: xr.Dataset, name: str, signed: bool = False, **where: Any) -> str:
    point = table.sel(where)
    form = "+.3f" if signed else ".3f"
    value, low, high = (float(point[name + end]) for end in ("", "_lower", "_upper"))
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _cost(table: xr.Dataset, name: str) -> str:
    seconds = float(table["seconds"].sel(scorer=name))
    return "" if np.isnan(seconds) else f"{seconds:.2g}" if seconds < 100 else f"{seconds:.0f}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _save(axes: Any, path: Path, options: argparse.Namespace) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = axes.figure.get_figure(root=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    options.pictures[path.stem.replace("-", " ")] = path


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.interventions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("task", nargs="?", choices=sorted(TASKS), default="digits-mlp")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    add(
        "--methods",
        nargs="+",
        choices=["core", "classical", "bayesian", "all", *(m.name for m in METHODS)],
        default=["core"],
        metavar="METHOD",
        help="core (default), classical, bayesian, all, or names of methods",
    )
    add(
        "--compared",
        type=Path,
        metavar="DIR",
        help="instead: every method that `benchmarks.compare --out DIR` has on the task, with the "
        "settings that it chose",
    )
    add("--queries", type=int, default=QUERIES, help="of removals (default: %(default)s)")
    add("--out", type=Path, default=Path("results"), help="default: %(default)s")
    add("--figures", type=Path, help="default: OUT/TASK")
    add("--threads", type=int, default=1, help="default: %(default)s")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    options.figures = options.figures or options.out / options.task
    if options.compared is not None and not list((options.compared / options.task).glob("*.json")):
        parser.error(
            f"{options.compared} holds no rows of {options.task}. Make them first: "
            f"python -m benchmarks.compare {options.task} --out {options.compared}"
        )
    asked = {key: str(value) for key, value in vars(options).items()}
    options.tables, options.pictures = {}, {}
    benchmark = get_task(options.task)
    began, scores = time.perf_counter(), {}
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        if set(options.parts) & {"removal", "pruning"}:
            scores = _scores(benchmark, options)
        for part in options.parts:
            text = {
                "mislabels": lambda: mislabels(benchmark, options),
                "removal": lambda: removal(benchmark, options, scores),
                "pruning": lambda: pruning(benchmark, options, scores),
            }[part]()
            print(f"\n## {part}\n\n{text}", flush=True)
    page = report(
        options.tables,
        title=f"Interventions on {options.task}",
        figures=options.pictures,
        configuration=asked,
    ).save(options.out / options.task / "interventions.html")
    print(f"\n{time.perf_counter() - began:.0f} s in all, {options.threads} thread(s); see {page}")


if __name__ == "__main__":
    main()
