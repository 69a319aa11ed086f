"""Several tasks sampled alike: checkpoints of a training run, or parts of one network."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from bayesinf._posterior import LocalPosterior, PotentialKind
from bayesinf._sampling import sample
from bayesinf._task import Task
from bayesinf._traces import TraceStore
from bayesinf.samplers import Sampler

__all__ = ["sample_each"]

_Label = TypeVar("_Label", bound=Hashable)


def sample_each(
    tasks: Mapping[_Label, Task | Callable[[], Task]],
    sampler: Sampler,
    *,
    n_beta: float,
    gamma: float,
    draws: int,
    warmup: int,
    weight_decay: float = 0.0,
    potential: PotentialKind = "tilted",
    folder: str | os.PathLike[str] | None = None,
    **options: Any,
) -> dict[_Label, TraceStore]:
    """Sample the local posterior of every task at one setting, with common random numbers.

    One posterior, one kernel and one seed serve all: tasks with as many parameters have the same
    starting offsets, noise and batches, so that differences between their traces are differences
    between the tasks.

    Parameters
    ----------
    tasks
        By label: ``{step: task.at(path)}`` for checkpoints, ``{name: task.restrict(part)}`` for
        parts of a network. A function that makes the task is called when its turn comes, so that
        one checkpoint is in memory at a time.
    sampler
        The kernel. One with a preconditioner fits one checkpoint and is refused at others.
    n_beta, gamma, weight_decay, potential
        As of :class:`bayesinf.LocalPosterior`.
    draws, warmup, **options
        As of :func:`bayesinf.sample`, apart from its ``store``.
    folder
        Keeps every store as ``folder/<label>.zarr``, from which the same call goes on; None for
        memory.

    Returns
    -------
    dict[label, TraceStore]
        In the order of the tasks: for :func:`bayesinf.influence_over_checkpoints`,
        :func:`bayesinf.susceptibility`, or each for itself.

    Raises
    ------
    ValueError
        If there is no task, a label makes no file name, or an argument is out of range.
    DivergenceError
        As :func:`bayesinf.sample`, with a note of the label.

    Examples
    --------
    >>> import torch, bayesinf as bi
    >>> x, y = torch.randn(20, 3), torch.randn(20, 1)
    >>> net = torch.nn.Linear(3, 1)
    >>> task = bi.Task(net, bi.Gaussian(), train=(x, y), query=(x[:5], y[:5]))
    >>> parts = {name: task.restrict(name) for name in ("weight", "bias")}
    >>> options = {"draws": 20, "warmup": 5, "progress": False}
    >>> traces = sample_each(parts, bi.SGLD(0.01), n_beta=20.0, gamma=5.0, **options)
    """
    if not tasks:
        raise ValueError("there is no task; give {label: task}.")
    if "store" in options:
        raise ValueError("every task has a store of its own; give folder=, not store=.")
    paths = {label: _path(folder, label) for label in tasks}
    if folder is not None and len(set(paths.values())) < len(paths):
        raise ValueError(f"labels must differ as text, which names their files; got {list(tasks)}.")
    found: dict[_Label, TraceStore] = {}
    for label, made in tasks.items():
        task = made if isinstance(made, Task) else made()
        posterior = LocalPosterior(task, n_beta, gamma, weight_decay, potential)
        try:
            found[label] = sample(
                posterior, sampler, draws=draws, warmup=warmup, store=paths[label], **options
            )
        except Exception as error:
            error.add_note(f"while sampling {label!r}")
            raise
    return found


def _path(folder: str | os.PathLike[str] | None, label: Hashable) -> Path | None:
    if folder is None:
        return None
    name = str(label)
    if not name or name.startswith(".") or set(name) & {"/", "\\", "\0"}:
        raise ValueError(f"label {label!r} makes no file name: leave out '/', and a dot in front.")
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder) / f"{name}.zarr"
