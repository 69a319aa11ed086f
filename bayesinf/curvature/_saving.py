"""A curvature on disk: tensors in safetensors, everything else in JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bayesinf.curvature._bases import Basis, DenseBasis, KroneckerBasis, StandardBasis
from bayesinf.curvature._curvature import Block, Curvature, make_basis
from bayesinf.curvature._layers import Layer

__all__ = ["load_curvature", "save_curvature"]

_FORMAT = 1
_BASES: dict[str, Basis] = {
    "standard": StandardBasis(),
    "kronecker": KroneckerBasis(None, None),
    "dense": DenseBasis(torch.empty(0)),
}


def save_curvature(curvature: Curvature, path: str | os.PathLike[str]) -> None:
    """Write ``factors.safetensors`` and ``curvature.json`` into the folder ``path``.

    The JSON is written last and atomically (one that is there goes first), so that a folder with
    one is complete.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in curvature.tensors().items()}
    blocks = []
    for block in curvature.blocks:
        kind = next(k for k, like in _BASES.items() if type(like) is type(block.basis))
        blocks.append({"layer": asdict(block.layer), "form": block.form, "basis": kind})
    described = {
        "format": _FORMAT,
        "blocks": blocks,
        "shapes": {name: list(shape) for name, shape in curvature.shapes.items()},
        "info": curvature.info,
    }
    (folder / "curvature.json").unlink(missing_ok=True)  # it would describe other tensors
    _replace(folder / "factors.safetensors", lambda file: save_file(tensors, file))
    _replace(folder / "curvature.json", lambda file: file.write_text(json.dumps(described)))


def load_curvature(
    path: str | os.PathLike[str], *, device: torch.device | str = "cpu"
) -> Curvature:
    """Read what :func:`save_curvature` wrote.

    Parameters
    ----------
    path
        The folder.
    device
        Where to put the tensors.

    Raises
    ------
    FileNotFoundError
        If the folder holds no curvature.
    ValueError
        If its files are damaged, or of a newer version.
    """
    folder = Path(path)
    if not (folder / "curvature.json").exists():
        raise FileNotFoundError(
            f"{os.fspath(path)!r} holds no curvature (no curvature.json). One is written by "
            f"bi.save_curvature(curvature, path)."
        )
    try:
        described = json.loads((folder / "curvature.json").read_text())
        tensors = load_file(folder / "factors.safetensors", device=str(device))
        if described["format"] != _FORMAT:
            raise ValueError(
                f"the curvature in {os.fspath(path)!r} has format {described['format']}, and this "
                f"version reads format {_FORMAT}. Fit and save it again."
            )
        return _assemble(described, tensors)
    except (KeyError, TypeError, json.JSONDecodeError, SafetensorError, OSError) as reason:
        raise ValueError(
            f"the curvature in {os.fspath(path)!r} is damaged ({reason}). Fit and save it again."
        ) from reason


def _assemble(described: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Curvature:
    blocks = []
    for i, held in enumerate(described["blocks"]):
        own = {
            name.split(".", 1)[1]: tensor
            for name, tensor in tensors.items()
            if name.split(".", 1)[0] == str(i)
        }
        eigenvalues = own.pop("eigenvalues")
        basis = make_basis(_BASES[held["basis"]], own)
        blocks.append(Block(_layer(held["layer"]), held["form"], basis, eigenvalues))
    shapes = {name: tuple(shape) for name, shape in described["shapes"].items()}
    return Curvature(tuple(blocks), shapes, described["info"])


def _layer(held: dict[str, Any]) -> Layer:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in held.items()
    }
    return Layer(**fields)


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)
