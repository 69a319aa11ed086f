"""Calibrated BIF that is scored on its way, for curves against processor time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import xarray as xr

import bayesinf as bi

__all__ = ["Stage", "staged_bif"]

_FIRST, _LEAST, _FASTEST = 2, 4, 4.0


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
    draws exceed has no stage; one stage serves budgets that are closer together than the draws.

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
    draws, traces = _FIRST, None
    for budget in budgets:
        scored = 0 if traces is None else traces.draws
        while spent < 0.97 * budget:
            began = time.process_time()
            options = {**found.options, "draws": draws}
            traces = bi.sample(
                found.posterior, found.sampler, store=traces, progress=False, **options
            )
            latest = time.process_time() - began
            spent += latest
            per_draw = latest / max(traces.draws - scored, 1)
            draws = math.ceil(min(draws * _FASTEST, draws + max(1, (budget - spent) / per_draw)))
            scored = traces.draws
        if traces is None or traces.draws < _LEAST:
            continue
        began = time.process_time()
        scores = bi.bif(traces)
        spent += time.process_time() - began
        yield Stage(spent, scores, found)
