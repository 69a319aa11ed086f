"""LDS against processor time, one rule for all tasks: ``python -m benchmarks.frontier TASK``.

Classical methods take the damping that is best on the *tuning* bank, and its search is free. BIF
takes what :func:`bayesinf.calibrate` finds at its defaults, on every task, and pays for that;
its chains go on to ``--seconds`` of processor time in all, and are scored on the way: plain, and
shrunk towards zero by their own errors (both from sampled losses alone). The hybrid is shrunk
towards conjugate gradients instead (with its damping as tuned), and pays for both. Everything is
judged on the *evaluation* bank.

Prints a table and the paired differences, and leaves ``frontier.json`` under ``results/TASK``;
``--figure`` draws all tasks that are there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xarray as xr

import bayesinf as bi
from benchmarks._staged import staged_bif
from benchmarks._table import format_table
from benchmarks.tasks import TASKS, BenchmarkTask, get_task

__all__ = ["draw", "main", "run"]

DAMPINGS = tuple(10 ** (k / 2) for k in range(-8, 1))
RELATIVE = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
STAGES = 5
"""Points on the curve, each at three times the seconds of the one before."""

Point = dict[str, Any]


def run(benchmark: BenchmarkTask, seconds: float) -> dict[str, Any]:
    """Measure one task.

    Parameters
    ----------
    benchmark
        The task.
    seconds
        Processor seconds of BIF, calibration included.

    Returns
    -------
    dict
        ``points`` (method, seconds, LDS with its interval, settings), ``differences`` (paired, at
        the last stage) and the calibration's ``report``.
    """
    train, query = benchmark.data()
    task = bi.Task(benchmark.checkpoint(), benchmark.likelihood, train=train, query=query)
    evaluation, tuning = benchmark.bank("evaluation"), benchmark.bank("tuning")
    task.train.ids, task.query.ids = evaluation["train"].values, evaluation["query"].values
    began = time.process_time()
    curvature = bi.fit_curvature(task, fisher="enumerated")
    fitted = time.process_time() - began
    points: list[Point] = []
    parents: dict[str, tuple[xr.Dataset, float]] = {}
    for name, candidates in _classical(task, curvature).items():
        scores, spent, settings = _best(candidates, tuning)
        parents[name] = scores, spent + fitted
        points.append(_point(name, spent + fitted, scores, evaluation, settings))
    parent, parent_seconds = parents["conjugate gradients"]
    budgets = [seconds / 3**k for k in range(STAGES - 1, -1, -1)]
    for stage in staged_bif(task, budgets, weight_decay=benchmark.weight_decay):
        spent, scores = stage.seconds, stage.scores
        settings = f"{scores.attrs['chains']} × {scores.attrs['draws']} draws"
        points.append(_point("BIF", spent, scores, evaluation, settings))
        pure = bi.shrink(scores)
        points.append(_point("BIF, shrunk", spent, pure, evaluation, settings))
        hybrid = bi.shrink(scores, parent)
        points.append(_point("hybrid", spent + parent_seconds, hybrid, evaluation, settings))
    pairs = {f"BIF, shrunk − {name}": (pure, own) for name, (own, _) in parents.items()}
    pairs["BIF, shrunk − BIF"] = pure, scores
    pairs["hybrid − conjugate gradients"] = hybrid, parent
    pairs["hybrid − BIF, shrunk"] = hybrid, pure
    return {
        "task": benchmark.name,
        "ceiling": float(bi.noise_ceiling(evaluation)["ceiling"]),
        "points": points,
        "differences": {name: _difference(*pair, evaluation) for name, pair in pairs.items()},
        "report": stage.calibration.report.attrs["text"],
    }


Candidates = dict[str, Callable[[], xr.Dataset]]


def _classical(task: bi.Task, curvature: bi.Curvature) -> dict[str, Candidates]:
    def ekfac(**options: Any) -> Callable[[], xr.Dataset]:
        return lambda: bi.ekfac(task, curvature=curvature, **options)

    def cg(damping: float) -> Callable[[], xr.Dataset]:
        return lambda: bi.conjugate_gradient(task, curvature=curvature, damping=damping)

    relative = {f"λ = {r:g} × mean": ekfac(relative_damping=r) for r in RELATIVE}
    return {
        "EK-FAC": relative | {f"λ = {x:.2g}": ekfac(damping=x) for x in DAMPINGS},
        "conjugate gradients": {f"λ = {x:.2g}": cg(x) for x in DAMPINGS if x >= 1e-3},
    }


def _best(candidates: Candidates, tuning: xr.Dataset) -> tuple[xr.Dataset, float, str]:
    """Scores, seconds and settings of the candidate with the best LDS on the tuning bank."""
    best, found = -math.inf, None
    for settings, score in candidates.items():
        began = time.process_time()
        scores = score()
        spent = time.process_time() - began
        lds = float(bi.lds(scores, tuning)["lds"])
        if lds > best:
            best, found = lds, (scores, spent, settings)
    if found is None:
        raise ValueError("there is no candidate.")
    return found


def _point(
    method: str, seconds: float, scores: xr.Dataset, bank: xr.Dataset, settings: str
) -> Point:
    judged = bi.lds(scores, bank)
    point = {name: float(judged[name]) for name in ("lds", "lower", "upper")}
    print(f"  {method}: {seconds:.0f} s, LDS {point['lds']:.3f} ({settings})", flush=True)
    return {"method": method, "seconds": seconds, "settings": settings, **point}


def _difference(a: xr.Dataset, b: xr.Dataset, bank: xr.Dataset) -> dict[str, float]:
    d = bi.lds_difference(a, b, bank)
    return {name: float(d[name]) for name in ("difference", "lower", "upper")}


def format_points(found: dict[str, Any]) -> str:
    """Table of the points and the paired differences."""
    rows = [
        [
            p["method"],
            p["settings"],
            f"{p['seconds']:.0f}",
            f"{p['lds']:.3f} [{p['lower']:.3f}, {p['upper']:.3f}]",
        ]
        for p in found["points"]
    ]
    lines = [format_table(("method", "settings", "CPU s", "LDS [95 %]"), rows), ""]
    lines += [
        f"{name}: {d['difference']:+.3f} [{d['lower']:+.3f}, {d['upper']:+.3f}]"
        for name, d in found["differences"].items()
    ]
    return "\n".join(lines)


def draw(root: Path) -> Path:
    """Draw one panel a task from the files under ``root``.

    Returns
    -------
    Path
        Of the figure.
    """
    import matplotlib.pyplot as plt

    files = sorted(root.glob("*/frontier.json"))
    if not files:
        raise FileNotFoundError(f"no */frontier.json under {root}: run the tasks first.")
    figure, axes = plt.subplots(
        1, len(files), figsize=(3.6 * len(files), 3.4), squeeze=False, layout="constrained"
    )
    styles = {
        "BIF": "o:C0", "BIF, shrunk": "o-C0", "hybrid": "s--C1", "EK-FAC": "D-C2",
        "conjugate gradients": "^-C3",
    }  # fmt: skip
    for ax, path in zip(axes[0], files, strict=True):
        found = json.loads(path.read_text())
        for method, style in styles.items():
            own = [p for p in found["points"] if p["method"] == method]
            spread = [[p["lds"] - p["lower"] for p in own], [p["upper"] - p["lds"] for p in own]]
            x, y = [p["seconds"] for p in own], [p["lds"] for p in own]
            ax.errorbar(x, y, yerr=spread, fmt=style, label=method, markersize=4, linewidth=1)
        ax.set(xscale="log", xlabel="processor seconds", title=found["task"])
    axes[0][0].set_ylabel("LDS")
    axes[0][0].legend(frameon=False, fontsize="small")
    target = root / "frontier.png"
    figure.savefig(target, dpi=150)
    plt.close(figure)
    return target


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frontier", description=__doc__)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=", ".join(sorted(TASKS)))
    parser.add_argument("--seconds", type=float, default=1200.0, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("results"), help="default: %(default)s")
    parser.add_argument("--figure", action="store_true", help="draw what is under OUT")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    for name in args.tasks:
        print(name, flush=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bi.ConvergenceWarning)  # early stages are short
            found = run(get_task(name), args.seconds)
        folder = args.out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "frontier.json").write_text(json.dumps(found, indent=1) + "\n")
        print(f"\n{found['report']}\n\n{format_points(found)}\n", flush=True)
    if args.figure:
        print(draw(args.out))


if __name__ == "__main__":
    main()
