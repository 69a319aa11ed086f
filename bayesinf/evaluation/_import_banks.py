"""Banks that other libraries made, read from their files, each with its own conventions.

What differs is what a subset lists (what was kept, or what was left out) and the sign of an
outcome. All of them store averages over runs, or one run: such a bank has one seed, and no noise
ceiling.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from bayesinf._likelihoods import Categorical
from bayesinf.evaluation._bank import make_bank
from bayesinf.evaluation._read_files import read_array, read_lists, read_numbers
from bayesinf.evaluation._subsets import Ids, listed_subsets

__all__ = ["bank_from_bergson", "bank_from_dattri", "bank_from_kronfluence", "bank_from_quanda"]

File = str | os.PathLike[str]
Queries = Sequence[Any] | np.ndarray | None


def bank_from_kronfluence(
    masks: File, losses: File, *, measurement: str = "loss", query: Queries = None
) -> xr.Dataset:
    """Read the masks and outcomes that kronfluence's examples come with.

    Parameters
    ----------
    masks
        ``masks.pt``, ``(M, n)``: 1 where an example was kept.
    losses
        ``losses.pt`` or ``margins.pt``, ``(M, Q)``, averages over runs; or ``(M, R, Q)``.
    measurement
        What the outcomes are: ``"loss"`` or ``"margin"``.
    query
        Ids of the queries; ``0 … Q−1`` by default.

    Returns
    -------
    xr.Dataset
        A bank, as :func:`make_bank` returns it; the training ids are positions.

    Raises
    ------
    ValueError
        If the files hold something else, or do not fit each other.
    """
    return make_bank(
        {measurement: read_array(losses)}, read_array(masks), query=query, attrs=_of("kronfluence")
    )


def bank_from_dattri(
    indices: File,
    target_values: File,
    *,
    train: Ids,
    measurement: str = "loss",
    negated: bool | None = None,
    query: Queries = None,
) -> xr.Dataset:
    """Read dattri's ground truth of LDS or of leave-one-out.

    Parameters
    ----------
    indices
        ``indices_lds.pt``, ``(M, k)``: positions of what was kept; ``indices_loo.pt``, ``(M,)``:
        the one left out; or the folder that ``retrain_lds`` wrote, with ``0/indices.txt``, ….
    target_values
        ``target_values_lds.pt`` or ``target_values_loo.pt``, ``(M, Q)``.
    train
        Ids of the training examples, or their number.
    measurement
        What the target function returned.
    negated
        Whether the file holds minus the target. Default: for LDS, whose ground truth dattri
        negates, and not for leave-one-out, where it does not.
    query
        Ids of the queries; ``0 … Q−1`` by default.

    Returns
    -------
    xr.Dataset
        A bank, as :func:`make_bank` returns it.

    Raises
    ------
    ValueError
        If the files hold something else or do not fit each other, or all losses are negative.
    """
    where, kept = Path(indices), True
    lists: list[Any]
    if where.is_dir():
        lists = _indices(where)
    else:
        array = read_array(where).astype(np.int64)
        kept = array.ndim == 2
        lists = list(array if kept else array[:, None])
    flipped = kept if negated is None else negated
    values = read_array(target_values) * (-1 if flipped else 1)
    if measurement == "loss" and (values < 0).all():
        raise ValueError(
            f"all losses are negative when the values are read with negated={flipped}: a loss is "
            f"not. Pass negated={not flipped}, or name what they are: measurement='margin'."
        )
    subsets = listed_subsets(train, lists, kept=kept)
    return make_bank({measurement: values}, subsets, query=query, attrs=_of("dattri"))


def bank_from_quanda(
    subset_ids: File,
    subset_logits: File,
    targets: Sequence[int] | np.ndarray,
    *,
    train: Ids,
    query: Queries = None,
) -> xr.Dataset:
    """Read the subsets and cached logits of quanda's LDS benchmark.

    Parameters
    ----------
    subset_ids
        Its YAML file of lists: positions of what was kept.
    subset_logits
        The folder that ``cache_subset_logits`` wrote: ``0.pt``, ``1.pt``, … for batches of
        queries, each a dict of logits ``(B, C)`` by subset.
    targets
        Classes of the queries, ``(Q,)``, in the order of the batches.
    train
        Ids of the training examples, or their number.
    query
        Ids of the queries; ``0 … Q−1`` by default.

    Returns
    -------
    xr.Dataset
        A bank, as :func:`make_bank` returns it, of the loss (cross-entropy) and the margin
        ``log(p/(1 − p))``, which is quanda's outcome.

    Raises
    ------
    FileNotFoundError
        If the folder holds no batches.
    ValueError
        If a batch or a subset is missing, or the files do not fit each other.
    """
    subsets = listed_subsets(train, read_lists(subset_ids), kept=True)
    folder, logits = Path(subset_logits), []
    files = sorted(folder.glob("*.pt"), key=lambda file: int(file.stem))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.pt; cache_subset_logits(...) writes them.")
    for place, file in enumerate(files):
        batch = read_numbers(file)
        missing = set(range(len(subsets))) - set(batch)
        if int(file.stem) != place or missing:
            raise ValueError(
                f"{folder} lacks {f'{place}.pt' if int(file.stem) != place else sorted(missing)} "
                f"of {len(subsets)} subsets in {len(files)} batches. Usual cause: a cache that was "
                f"not finished."
            )
        logits.append(torch.stack([batch[number].double() for number in range(len(subsets))]))
    outputs, classes = torch.cat(logits, dim=1), torch.as_tensor(np.asarray(targets))
    if outputs.ndim != 3 or classes.shape != (outputs.shape[1],):
        raise ValueError(
            f"targets must be the classes of {outputs.shape[1]} queries, and logits (subsets, "
            f"queries, classes); got {tuple(classes.shape)} and {tuple(outputs.shape)}."
        )
    flat, repeated = outputs.flatten(0, 1), classes.repeat(len(subsets))
    likelihood = Categorical()
    values = {
        name: getattr(likelihood, name)(flat, repeated).unflatten(0, outputs.shape[:2]).numpy()
        for name in ("loss", "margin")
    }
    return make_bank(values, subsets, query=query, attrs=_of("quanda"))


def bank_from_bergson(
    folders: File | Sequence[File], *, train: Ids, query: Queries = None
) -> xr.Dataset:
    """Read banks of bergson: what was left out, and the losses it keeps beside them.

    Parameters
    ----------
    folders
        The folder of a run, or of several runs on the same subsets, which become the seeds: with
        ``subsets.json`` (positions of what was **left out**) and one file
        ``query_loss_cache/losses_*.pt``.
    train
        Ids of the training sequences, or their number.
    query
        Ids of the queries; ``0 … Q−1`` by default. A run that kept only the mean loss of all
        queries has one.

    Returns
    -------
    xr.Dataset
        A bank, as :func:`make_bank` returns it.

    Raises
    ------
    FileNotFoundError
        If a folder has no subsets, or not one file of losses.
    ValueError
        If the runs are on different subsets, or files hold something else.
    """
    paths = [Path(p) for p in ([folders] if isinstance(folders, (str, os.PathLike)) else folders)]
    lists = [read_lists(path / "subsets.json") for path in paths]
    if any(own != lists[0] for own in lists):
        raise ValueError(
            f"the runs {[path.name for path in paths]} left out different examples. Runs of one "
            f"bank share their subsets.json (method.manifest); read others one by one."
        )
    losses = []
    for path in paths:
        files = sorted(path.glob("query_loss_cache/losses_*.pt"))
        if len(files) != 1:
            raise FileNotFoundError(
                f"{path} must hold one query_loss_cache/losses_*.pt; it has {len(files)}. Each is "
                f"of one set of queries: keep the one that is meant; evaluating the bank with "
                f"bergson writes it."
            )
        values = read_numbers(files[0])["per_subset"].numpy()
        losses.append(values[:, None] if values.ndim == 1 else values)
    subsets = listed_subsets(train, lists[0], kept=False)
    return make_bank({"loss": np.stack(losses, 1)}, subsets, query=query, attrs=_of("bergson"))


def _of(library: str) -> dict[str, str]:
    return {"source": library}


def _indices(folder: Path) -> list[list[int]]:
    """What ``retrain_lds`` of dattri wrote: the kept positions of subsets 0, 1, …."""
    found: list[list[int]] = []
    while (file := folder / str(len(found)) / "indices.txt").exists():
        found.append([int(line) for line in file.read_text().split()])
    return found
