"""A picture by every function that draws scores: ``python -m benchmarks.gallery``.

Small real runs: the BIF of digits-mlp, the damping and temperature of diabetes-mlp, the Bayesian
logistic regression of the breast-cancer data. Takes a minute or two on one core and writes PNG
files of less than 60 kB to ``benchmarks/figures``.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

import bayesinf as bi
from bayesinf import plots
from bayesinf.bayesian import case_influence, case_summary, loss_map
from benchmarks._methods import DAMPING
from benchmarks._table import format_table, verdict
from benchmarks.case_influence import breast_cancer
from benchmarks.tasks import get_task

__all__ = ["Size", "main", "save"]

FIGURES = Path(__file__).parent / "figures"
LIMIT = 60_000
QUERIES = 5
DAMPINGS = tuple(10 ** (k / 2) for k in range(-6, 1))
TEMPERATURES = (1e3, 1e4, 1e5)

Figures = Iterator[tuple[str, Any]]
"""Name and what a function of ``bayesinf.plots`` returned."""


@dataclass(frozen=True)
class Size:
    """Draws of a chain: of digits, of diabetes at each temperature, of breast cancer."""

    digits: int = 120
    diabetes: int = 150
    cases: int = 500


def digits_figures(size: Size) -> Figures:
    """Chains, one query's examples, all influences by class, BIF against solvers, the map.

    Yields
    ------
    tuple
        Name and picture.
    """
    task, curvature, labels = _task("digits-mlp")
    traces = _traces(task, "digits-mlp", size.digits, curvature=curvature)
    ids = task.train.ids.tolist()
    for name in ("trace", "rank", "ess_evolution"):
        drawn = getattr(plots, f"plot_{name}")(traces, train=ids[:2])
        yield name.replace("_", "-"), drawn
    scores = bi.bif(traces)
    written = {i: f"{i}: a {y}" for i, y in zip(ids, labels["train"].tolist(), strict=True)}
    moved = _most_moved(scores)
    yield "forest", plots.plot_forest(scores, moved[0], k=8, labels=written)
    yield (
        "heat-map",
        plots.plot_heat_map(scores, train_classes=labels["train"], query_classes=labels["query"]),
    )
    damping = float(scores.attrs["damping"])
    solved = bi.conjugate_gradient(task, curvature=curvature, damping=damping)
    yield "agreement", plots.plot_agreement(solved.sel(query=moved), scores.sel(query=moved))
    found = loss_map(traces.to_arviz())
    yield "loss-map", plots.plot_loss_map(found, classes=labels["train"])


def diabetes_figures(size: Size) -> Figures:
    """LDS over the damping, and influences over the temperature at one damping.

    Yields
    ------
    tuple
        Name and picture.
    """
    task, curvature, _ = _task("diabetes-mlp")
    bank = get_task("diabetes-mlp").bank()
    tables = {}
    for damping in DAMPINGS:
        given: dict[str, Any] = {"curvature": curvature, "damping": damping}
        scores = {
            "EK-FAC": bi.ekfac(task, **given),
            "conjugate gradients": bi.conjugate_gradient(task, **given),
        }
        tables[damping] = bi.lds_table(scores, bank)
    yield "damping", plots.plot_sweep(tables)
    exact = bi.conjugate_gradient(task, curvature=curvature, damping=DAMPING)
    query = _most_moved(exact)[0]
    ends = np.argsort(exact["influence"].sel(query=query).values)[[0, 1, -2, -1]]
    kept = {"query": query, "train": task.train.ids[ends]}
    found = {}
    for n_beta in TEMPERATURES:
        given = {"curvature": curvature, "n_beta": n_beta, "damping": DAMPING}
        traces = _traces(task, "diabetes-mlp", size.diabetes, **given)
        found[n_beta] = bi.bif(traces).sel(kept)
    yield "temperature", plots.plot_sweep(found, "influence", along="n_beta")


def breast_cancer_figures(size: Size) -> Figures:
    """Observations of a logistic regression: what they move, and how hard they are.

    Yields
    ------
    tuple
        Name and picture.
    """
    model = breast_cancer()
    tree = model.tree(model.draws(0, 4, size.cases))
    summary = case_summary(tree)
    yield "case-influence", plots.plot_case_influence(case_influence(tree), "w[3]", summary=summary)
    yield "case-summary", plots.plot_case_summary(summary)


def save(drawn: Any, path: Path) -> int:
    """Write what a function of ``bayesinf.plots`` returned, in few colours; returns the bytes."""
    import matplotlib.pyplot as plt
    from PIL import Image

    views = hasattr(drawn, "viz")  # of arviz-plots
    figure = drawn.viz["figure"].item() if views else np.atleast_1d(drawn)[0].figure
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80)
    plt.close(figure)
    with Image.open(buffer) as image:
        image.convert("RGB").quantize(64).save(path, optimize=True)
    return path.stat().st_size


def _task(name: str) -> tuple[bi.Task, bi.Curvature, dict[str, np.ndarray]]:
    """A benchmark's task with its bank's ids, its curvature, and the labels of both sets."""
    benchmark = get_task(name)
    train, query = benchmark.data()
    task = bi.Task(benchmark.checkpoint(), benchmark.likelihood, train=train, query=query)
    bank = benchmark.bank()
    task.train.ids, task.query.ids = bank["train"].values, bank["query"].values
    labels = {"train": train[1].numpy(), "query": query[1].numpy()}
    return task, bi.fit_curvature(task, fisher=benchmark.fisher), labels


def _traces(task: bi.Task, name: str, draws: int, **options: Any) -> bi.TraceStore:
    """Four calibrated chains: fewer draws than calibration asks for, as a picture needs fewer."""
    found = bi.calibrate(task, weight_decay=get_task(name).weight_decay, **options)
    return bi.sample(
        found.posterior, found.sampler, draws=draws, warmup=100, thin=5, progress=False
    )


def _most_moved(scores: xr.Dataset) -> list[Any]:
    """Queries of the largest influences, the first most."""
    size = abs(scores["influence"]).mean("train").values
    most: list[Any] = scores["query"].values[np.argsort(-size)[:QUERIES]].tolist()
    return most


def main(argv: list[str] | None = None) -> int:
    """Draw all; the exit status is 1 if a picture is larger than 60 kB."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gallery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=FIGURES, help="folder (default: %(default)s)")
    for name, default in asdict(Size()).items():
        add(f"--{name}", type=int, default=default, help="draws a chain (default: %(default)s)")
    options = vars(parser.parse_args(argv))
    out = options.pop("out")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    began, rows, too_large = time.process_time(), [], False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bi.ConvergenceWarning)  # pictures need fewer draws
        for figures in (breast_cancer_figures, diabetes_figures, digits_figures):
            for name, drawn in figures(Size(**options)):
                size = save(drawn, out / f"gallery-{name}.png")
                too_large |= size >= LIMIT
                seconds = f"{time.process_time() - began:.0f}"
                rows.append((name, f"{size / 1000:.0f}", seconds, verdict(size < LIMIT)))
    print(format_table(("picture", "kB", "after CPU s", "< 60 kB"), rows))
    return int(too_large)


if __name__ == "__main__":
    sys.exit(main())
