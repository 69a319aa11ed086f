"""Banks of outcomes: made from arrays, and kept as small Zarr v3 directories.

Shapes: ``M`` subsets, ``R`` seeds, ``Q`` queries, ``n`` training examples.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import BloscCodec

from bayesinf._data import resolve_ids

__all__ = ["make_bank", "open_bank", "save_bank"]


def make_bank(
    outcomes: Mapping[str, np.ndarray],
    subsets: np.ndarray | xr.DataArray,
    *,
    query: Sequence[Any] | np.ndarray | None = None,
    seeds: Sequence[int] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """Label outcomes of retrainings that were run elsewhere as a bank that the judges take.

    Parameters
    ----------
    outcomes
        By measurement (``"loss"``, ``"margin"`` or a name of your own): ``(M, R, Q)``, or
        ``(M, Q)`` for one run of each subset, or an average over runs. Stored in float32.
    subsets
        Which examples each subset kept: ``(M, n)`` booleans, zeros and ones, or a design such as
        :func:`listed_subsets` returns, with ids. Of an array, the ids are ``0 … n−1``.
    query, seeds
        Ids of the queries and seeds of the runs; counted from 0 by default.
    attrs
        Whatever should be kept with the bank.

    Returns
    -------
    xr.Dataset
        As :func:`retrain` returns it; attrs ``fraction`` (mean share kept) and ``n``.

    Raises
    ------
    ValueError
        If shapes do not fit, masks hold more than two values or outcomes are not finite.
    """
    masks = np.asarray(subsets)
    if masks.ndim != 2 or not np.isin(masks, (0, 1)).all():
        raise ValueError(
            f"subsets must be (subsets, train) masks of 0 and 1, 1 where an example was kept; got "
            f"shape {masks.shape} with values such as {np.unique(masks)[:5].tolist()}. Lists of "
            f"ids become masks by listed_subsets(...)."
        )
    kept = masks.astype(bool)
    values = {name: _three_axes(name, np.asarray(v), len(kept)) for name, v in outcomes.items()}
    shapes = {value.shape for value in values.values()}
    if len(shapes) != 1:
        raise ValueError(
            f"outcomes must hold at least one measurement, all of one shape; got "
            f"{ {name: np.shape(value) for name, value in outcomes.items()} }."
        )
    _, runs, queries = shapes.pop()
    design = subsets if isinstance(subsets, xr.DataArray) else xr.DataArray(kept)
    coords = design.coords
    numbers = np.arange(runs) if seeds is None else np.asarray(seeds, dtype=np.int64)
    if numbers.shape != (runs,):
        raise ValueError(f"seeds must be one for each of {runs} runs; got {list(numbers)}.")
    return xr.Dataset(
        {
            **{name: (("subset", "seed", "query"), value) for name, value in values.items()},
            "subset_mask": (("subset", "train"), kept),
        },
        coords={
            "subset": coords["subset"].values if "subset" in coords else np.arange(len(kept)),
            "seed": numbers,
            "query": resolve_ids(query, queries, "query"),
            "train": coords["train"].values if "train" in coords else np.arange(kept.shape[1]),
        },
        attrs={
            "fraction": float(kept.mean()),
            "n": kept.shape[1],
            **_of_design(design),
            **(attrs or {}),
        },
    )


def _three_axes(name: str, values: np.ndarray, subsets: int) -> np.ndarray:
    """``(M, R, Q)`` in float32."""
    full = values[:, None] if values.ndim == 2 else values
    if full.ndim != 3 or len(full) != subsets:
        raise ValueError(
            f"{name} must be (subsets, query) or (subsets, seeds, query) for {subsets} subsets; "
            f"got {values.shape}. Usual cause: masks and outcomes in each other's place, or an "
            f"average over the wrong axis."
        )
    bad = int((~np.isfinite(full)).sum())
    if bad:
        raise ValueError(
            f"{name} is not finite for {bad} of {full.size} outcomes, so no judge can rank them. "
            f"Leave out subsets that were not trained, or queries that were not measured."
        )
    return full.astype(np.float32)


def _of_design(subsets: xr.DataArray) -> dict[str, Any]:
    """What a bank says of how its subsets were drawn."""
    named = {"subset_design": "design", "subset_seed": "seed"}
    known = {name: subsets.attrs[key] for name, key in named.items() if key in subsets.attrs}
    return {"n": subsets.shape[1], **known}


def save_bank(bank: xr.Dataset, path: str | os.PathLike[str]) -> None:
    """Write a bank as a Zarr v3 directory: one compressed chunk per variable, float32.

    Parameters
    ----------
    bank
        What :func:`retrain` returned.
    path
        Directory that must not exist yet.

    Raises
    ------
    FileExistsError
        If the path exists.
    """
    root = Path(path)
    if root.exists():
        raise FileExistsError(
            f"{path} exists. A bank is never overwritten: remove it first, or save elsewhere."
        )
    text = {
        name: np.asarray(bank[name].values).astype(np.dtypes.StringDType())
        for name in bank.coords
        if bank[name].dtype.kind in "UT"
    }
    compress = BloscCodec(cname="zstd", clevel=9, shuffle="bitshuffle")
    encoding = {
        str(name): {"compressors": [compress], "chunks": variable.shape}
        for name, variable in bank.data_vars.items()
    }
    draft = root.with_name(f"{root.name}.{os.getpid()}.new")
    bank.assign_coords(text).to_zarr(
        draft, mode="w", zarr_format=3, consolidated=False, encoding=encoding
    )
    os.replace(draft, root)


def open_bank(path: str | os.PathLike[str]) -> xr.Dataset:
    """Read a bank into memory.

    Parameters
    ----------
    path
        Directory written by :func:`save_bank`.

    Returns
    -------
    xr.Dataset
        As :func:`retrain` returned it.

    Raises
    ------
    FileNotFoundError
        If there is no such directory.
    ValueError
        If the directory holds something else, such as a retraining run that is not finished.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(f"there is no bank at {path}: retrain(...) and save_bank(...) it.")
    try:
        is_bank = "subset_mask" in zarr.open_group(path, mode="r", use_consolidated=False)
    except FileNotFoundError:
        is_bank = False
    if not is_bank:
        raise ValueError(
            f"{path} is not a bank: it has no `subset_mask`. A store= of retrain() becomes one by "
            f"calling retrain() again with the same arguments and save_bank() on what it returns."
        )
    bank = xr.open_zarr(path, consolidated=False).load()
    text = {
        name: np.array(bank[name].values.tolist(), dtype=str)
        for name in bank.coords
        if bank[name].dtype.kind in "OT"
    }
    bank = bank.assign_coords(text)
    for variable in bank.variables.values():
        variable.encoding = {}
    return bank
