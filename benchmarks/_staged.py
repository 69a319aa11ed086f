"""Calibrated BIF that is scored on its way, for curves against processor time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import xarray as xr

import bayesinf as bi

__all__ = ["Stage", "staged_bif"]

_FIRST, _FASTEST, _OVER = 8, 3.0, 1.05


@dataclass(frozen=True)
class Stage:
    """Scores at one point of a run.

    Attributes
    ----------
    seconds
        Processor seconds so far, calibration and scoring included.
    scores
        Of all draws so far.
    calibration
        What the run is of.
    """

    seconds: float
    scores: xr.Dataset
    calibration: bi.Calibration


def staged_bif(
    task: bi.Task, budgets: Sequence[float], *, weight_decay: float = 0.0
) -> Iterator[Stage]:
    """Calibrate, sample on and on, and score whenever a budget is spent.

    What the caller does with the scores is not counted. A budget that calibration and the first
    draws exceed has no stage.

    Parameters
    ----------
    task
        The task.
    budgets
        Processor seconds, ascending.
    weight_decay
        Of the training recipe.
    """
    began = time.process_time()
    found = bi.calibrate(task, weight_decay=weight_decay)
    spent = time.process_time() - began
    options = {**found.options, "draws": _FIRST}
    began = time.process_time()
    traces = bi.sample(found.posterior, found.sampler, progress=False, **options)
    sampled = time.process_time()
    bi.bif(traces)  # what scoring takes, for the budgets
    scoring = time.process_time() - sampled
    spent += time.process_time() - began
    options["draws"] = 2 * _FIRST
    for budget in budgets:
        while spent + scoring < 0.97 * budget:
            began, before = time.process_time(), traces.draws
            traces = bi.sample(
                found.posterior, found.sampler, store=traces, progress=False, **options
            )
            latest = time.process_time() - began
            spent += latest
            wanted = (budget - scoring - spent) * (traces.draws - before) / latest
            options["draws"] = math.ceil(
                min(traces.draws * _FASTEST, traces.draws + max(1.0, wanted))
            )
        if spent > _OVER * budget:
            continue
        began = time.process_time()
        scores = bi.bif(traces)
        scoring = time.process_time() - began
        spent += scoring
        yield Stage(spent, scores, found)
