"""Scores of kronfluence, from the safetensors file that its ``Analyzer`` writes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bayesinf.scores._convention import Convention, Ids, convert
from bayesinf.scores._self_sign import Sign

__all__ = ["read_kronfluence"]

_ALL = "all_modules"
_FILE = "pairwise_scores.safetensors"


def read_kronfluence(
    path: str | os.PathLike[str],
    *,
    query: Ids = None,
    train: Ids = None,
    n: int | None = None,
    modules: Sequence[str] | None = None,
    sign: Sign = "helpful",
    measurement: str = "loss",
    method: str = "kronfluence",
) -> xr.Dataset:
    r"""Read pairwise or self scores of kronfluence.

    Its pairwise score is :math:`+\nabla f_q^\top (C + \lambda I)^{-1} \nabla\ell_t`, where ``f`` is
    what the task's ``compute_measurement`` returns, so that ``influence = −score/n``. Scores by
    module and by token add up, and are added.

    Parameters
    ----------
    path
        ``pairwise_scores.safetensors``, the folder ``scores_NAME`` that holds it, or
        ``self_scores.safetensors``.
    query, train, measurement, method
        As of :func:`~bayesinf.scores.from_array`; ids are positions by default.
    n
        Examples of the training set, also where fewer are scored: the scores become influences.
        None: they only rank (strategy ``"identity"``, for example, has no curvature).
    modules
        Which to add, where the file has scores by module; all by default.
    sign
        ``"helpful"`` where ``compute_measurement`` returns a loss or **minus** a margin, as in its
        examples; ``"harmful"`` where it returns the margin itself. For a φ of your own that it
        returns as it is, ``"lowers"``.

    Returns
    -------
    xr.Dataset
        ``influence (query, train)``; of self scores ``influence (train)``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        As in :func:`~bayesinf.scores.from_array`; if a module is not in the file, or gradients of
        training examples were summed.

    Warns
    -----
    SignWarning
        As in :func:`~bayesinf.scores.from_array`.
    """
    path = Path(path)
    file = path / _FILE if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(
            f"there is no {file.name} at {file.parent}. kronfluence writes it into scores_NAME/ "
            f"once all partitions of data and modules are scored; a folder with partitions alone "
            f"is put together by analyzer.aggregate_pairwise_scores(scores_name=NAME)."
        )
    tensors, settings = _load(file)
    if settings.get("aggregate_train_gradients") == "True":
        raise ValueError(
            f"{file.name} was made with aggregate_train_gradients=True: one number a query for all "
            f"training examples together. Compute the scores again without it."
        )
    chosen = _chosen(tensors, modules, file.name)
    total = sum((tensors[name].double() for name in chosen[1:]), tensors[chosen[0]].double())
    notes: dict[str, Any] = {"source_file": file.name, "source_settings": settings or None}
    if chosen != [_ALL]:
        notes["modules"] = chosen
    if total.ndim == 3:
        notes["summed_tokens"] = total.shape[2]
        total = total.sum(-1)
    return convert(
        total,
        query,
        train,
        Convention("kronfluence", sign, notes=notes),
        measurement=measurement,
        method=method,
        n=n,
    )


def _load(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as held:
            tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
            return tensors, held.metadata() or {}
    except SafetensorError as reason:
        raise ValueError(
            f"{file.name} is no whole safetensors file ({reason}). Copy it again, or compute the "
            f"scores again with overwrite_output_dir=True."
        ) from reason


def _chosen(tensors: dict[str, Tensor], modules: Sequence[str] | None, file: str) -> list[str]:
    chosen = sorted(tensors) if modules is None else list(modules)
    unknown = [name for name in chosen if name not in tensors]
    if unknown or not chosen:
        raise ValueError(
            f"{file} has no scores of the modules {unknown or chosen}; it has {sorted(tensors)}. "
            f"Scores by module are made with ScoreArguments(compute_per_module_scores=True)."
        )
    shapes = {tuple(tensors[name].shape[:2]) for name in chosen}
    if len(shapes) > 1 or any(not torch.is_floating_point(tensors[name]) for name in chosen):
        raise ValueError(f"the scores in {file} are not of one shape: {sorted(shapes)}.")
    return [str(name) for name in chosen]
