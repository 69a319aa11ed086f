"""Banks on disk: small Zarr v3 directories that can be shipped with a repository."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import BloscCodec

__all__ = ["open_bank", "save_bank"]


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
