"""Every attribution method by name: one call, one table of what runs, the same errors for all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from bayesinf import _calibrated_bif  # noqa: F401, a row of the registry
from bayesinf._checkpoint import Checkpoint
from bayesinf._measuring import Cost, measured
from bayesinf._scores import ESTIMANDS, text_labels
from bayesinf._task import Task
from bayesinf.attribution._ensemble import ensemble as average
from bayesinf.attribution._entry_points import all_methods, find_method
from bayesinf.attribution._registry import Method

__all__ = ["attribute", "available_methods", "checked_method"]


def attribute(
    task: Task,
    method: str = "ekfac",
    *,
    ensemble: Sequence[Checkpoint] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> xr.Dataset:
    r"""Score a task with a method by name.

    Parameters
    ----------
    task
        Network, likelihood, training and query examples.
    method
        Name: one of :func:`available_methods`.
    ensemble
        Checkpoints of the same network over which scores are averaged; default: the task's own
        alone. See :func:`bayesinf.ensemble`.
    device, dtype
        Where and in which precision the task is computed; default: as it is.
    **options
        Of the method: its own, and those that most share, ``damping`` (λ in units of the mean
        loss), ``batch_size``, ``store`` (path of a Zarr store that scores stream to), ``progress``.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)``, negative = helpful. Attributes: method, estimand, settings, and
        what it cost: ``seconds`` by stage, ``processor_seconds``, ``forward_examples``,
        ``backward_examples``, ``peak_memory`` (bytes beyond what was resident before; on a GPU also
        ``peak_device_memory``) and ``disk`` (bytes of its stores).

    Raises
    ------
    ValueError
        If there is no such method, it does not run on this task, the device is not there, exactly
        one of several options was wanted, or a score is not finite.
    TypeError
        If an option is unknown or missing, or the task or what the method returns is of another
        kind.
    ImportError
        If the method is of another package and does not load.

    Notes
    -----
    Other packages add methods: see :class:`bayesinf.Method`.

    Examples
    --------
    >>> import torch, bayesinf as bi
    >>> x, y = torch.randn(20, 3), torch.randn(20, 1)
    >>> task = bi.Task(torch.nn.Linear(3, 1), bi.Gaussian(), train=(x, y), query=(x[:5], y[:5]))
    >>> bi.attribute(task, "gauss_newton", damping=0.1).influence.shape
    (5, 20)
    """
    row = checked_method(method, options)
    tasks = _tasks(task, ensemble, device, dtype)
    if ensemble is not None and any(options.get(name) is not None for name in row.paths):
        raise ValueError(
            f"an ensemble has scores of every member, which one {' or '.join(row.paths)} cannot "
            f"hold. Call attribute(task.at(checkpoint), …) for each, and bi.ensemble of them."
        )
    scores = [_run(row, one, options) for one in tasks]
    return scores[0] if ensemble is None else average(scores)


def available_methods(task: Task) -> xr.Dataset:
    """Which attribution methods run on a task, what they take, and why the others do not.

    Parameters
    ----------
    task
        The task.

    Returns
    -------
    xr.Dataset
        By ``name``: ``runs``, ``reason`` (why it does not; empty where it does), ``estimand``,
        ``summary``, ``needs``, ``required`` (options that must be given), ``options`` (all that it
        takes) and ``source`` (the package it comes from). ``.to_dataframe()`` prints well.

    Raises
    ------
    ValueError
        If two methods have one name.
    TypeError
        If this is no task.

    Warns
    -----
    MethodWarning
        By method of another package that does not load.
    """
    _require_task(task)
    methods = all_methods()
    columns: dict[str, list[Any]] = {
        key: []
        for key in (
            "runs", "reason", "estimand", "summary", "needs", "required", "options", "source",
        )
    }  # fmt: skip
    for row, source in methods.values():
        reasons = row.missing(task)
        either = [" or ".join(names) for names in row.one_of]
        found = {
            "runs": not reasons,
            "reason": "; ".join(reasons),
            "estimand": row.estimand,
            "summary": row.summary,
            "needs": ", ".join(need.what for need in row.needs),
            "required": ", ".join([*row.required, *either]),
            "options": ", ".join(sorted(row.takes)),
            "source": source,
        }
        for key, value in found.items():
            columns[key].append(value)
    return xr.Dataset(
        {key: ("name", text_labels(np.array(values))) for key, values in columns.items()},
        coords={"name": text_labels(np.array(list(methods)))},
    )


def checked_method(method: str, options: Mapping[str, Any]) -> Method:
    """Return the method of a name, if it takes these options.

    Raises
    ------
    ValueError, TypeError, ImportError
        As :func:`attribute`.
    """
    row = find_method(method)
    unknown = sorted(set(options) - row.takes)
    if unknown:
        takes = ", ".join(sorted(row.takes)) or "no options"
        raise TypeError(f"{method} takes no {', '.join(unknown)}. It takes {takes}.")
    missing = [name for name in row.required if name not in options]
    if missing:
        raise TypeError(
            f"{method} needs {', '.join(missing)}, which sets the answer and has no default: "
            f"attribute(task, {method!r}, {missing[0]}=…)."
        )
    for names in row.one_of:
        given = [name for name in names if options.get(name) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "neither"
            raise ValueError(f"{method} needs exactly one of {' and '.join(names)}; got {got}.")
    return row


# ---------------------------------------------------------------- one run


def _run(row: Method, task: Task, options: dict[str, Any]) -> xr.Dataset:
    reasons = row.missing(task, options)
    if reasons:
        raise ValueError(
            f"{row.name} does not run on this task: {'; '.join(reasons)}. "
            f"available_methods(task) says which do."
        )
    cuda = task.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(task.device)
        before = torch.cuda.memory_allocated(task.device)
    with measured() as cost:
        scores = row.function(task, **options)
    _require_scores(row, scores)
    attrs = _costs(row, scores, cost, options)
    if cuda:
        attrs["peak_device_memory"] = torch.cuda.max_memory_allocated(task.device) - before
    return scores.assign_attrs(attrs)


def _costs(row: Method, scores: xr.Dataset, cost: Cost, options: dict[str, Any]) -> dict[str, Any]:
    stages = {} if "seconds" in scores.attrs else {"seconds": json.dumps({"scores": cost.wall})}
    paths = [options[name] for name in row.paths if options.get(name) is not None]
    return {
        **stages,
        "processor_seconds": round(cost.cpu, 6),
        "peak_memory": int(2**20 * cost.memory),
        "disk": sum(_size(path) for path in paths),
    }


def _size(path: str | os.PathLike[str]) -> int:
    """Bytes of a file, or of all files in a folder."""
    root = Path(path)
    files = [root] if root.is_file() else root.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def _require_scores(row: Method, scores: Any) -> None:
    """What any method must return."""
    if not isinstance(scores, xr.Dataset) or "influence" not in scores:
        raise TypeError(
            f"{row.name} must return a Dataset with the variable influence(query, train), as from "
            f"bi.make_scores; got a {type(scores).__name__}."
        )
    estimand = scores.attrs.get("estimand")
    if estimand not in ESTIMANDS:
        raise ValueError(
            f"scores of {row.name} must say attrs['estimand'], one of {ESTIMANDS}; got "
            f"{estimand!r}. bi.make_scores(..., estimand=…) does."
        )


def _tasks(
    task: Task,
    checkpoints: Sequence[Checkpoint] | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> list[Task]:
    _require_task(task)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating dtype such as torch.float32; got {dtype!r}.")
    moved = task.to(_device(device), dtype)
    if checkpoints is None:
        return [moved]
    if len(checkpoints) < 2:
        raise ValueError(
            f"an ensemble has at least two checkpoints; got {len(checkpoints)}. Of one: "
            f"attribute(task.at(checkpoint), …)."
        )
    return [moved.at(checkpoint) for checkpoint in checkpoints]


def _device(device: torch.device | str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"device {str(device)!r} is not there: {str(error).splitlines()[0]}. Leave device= "
            f"out to stay where the task is."
        ) from error
    return torch.device(device)


def _require_task(task: Any) -> None:
    if not isinstance(task, Task):
        raise TypeError(
            f"the first argument must be a bayesinf.Task; got a {type(task).__name__}. Make one of "
            f"a network and its data: bi.Task(model, bi.Categorical(), train=…, query=…)."
        )
