"""How a trace store is laid out on Zarr, and what identifies its draws."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr

from bayesinf._axes import Axis

__all__ = ["differences", "flatten_config", "identity", "lay_out"]

_CHUNK_VALUES = 1 << 18
_TOKEN_DRAWS = 16
_STATS = {
    "lp": "float64",
    "step_size": "float64",
    "diverging": "bool",
    "distance": "float64",
    "acceptance_rate": "float64",
}


def identity(config: Mapping[str, Any]) -> str:
    """Hash of a configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten_config(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def differences(mine: Mapping[str, Any], asked: Mapping[str, Any], where: str) -> str:
    """Say in which settings a store ``where`` and what is asked for differ, with both values."""
    own, other = flatten_config(mine), flatten_config(json.loads(json.dumps(asked)))
    rows = [
        f"  {key}: store has {own.get(key)!r}, asked for {other.get(key)!r}"
        for key in sorted(own.keys() | other.keys())
        if own.get(key) != other.get(key)
    ]
    return (
        f"the store {where} was made with other settings, and draws of two settings do not mix:\n"
        + "\n".join(rows)
        + "\nUse these settings, or another store."
    )


def lay_out(
    store: Any,
    config: Mapping[str, Any],
    ids: Mapping[str, np.ndarray],
    measurements: Mapping[str, list[str]],
    draws: int,
    tokens: Mapping[str, Axis],
) -> Any:
    """Make the groups, arrays and attributes of an empty store, and return its root group.

    Losses of the groups in ``tokens`` have a group of their own, ``train_token`` or
    ``query_token``, as one group cannot have a dimension of examples and their ids along another.
    """
    root = zarr.open_group(store, mode="w", zarr_format=3)
    chains = int(config["chains"])
    widest = max(len(v) for v in ids.values())
    chunk = max(1, min(100, _CHUNK_VALUES // max(widest, 1)))
    if tokens:
        chunk = min(chunk, _TOKEN_DRAWS)
    for group, labels in ids.items():
        g = root.create_group(group)
        _coordinate(g, group, labels)
        _chain_draw(g, chains, draws)
        for name in measurements[group]:
            if name != "loss" or group not in tokens:
                width = max(1, min(len(labels), 4 * _CHUNK_VALUES))
                _values(g, name, (chains, draws, len(labels)), (1, chunk, width), group)
    for axis in tokens.values():
        _token_group(root, axis, chains, draws, chunk)
    stats = root.create_group("sample_stats")
    _chain_draw(stats, chains, draws)
    for name, kind in _STATS.items():
        fill: Any = False if kind == "bool" else float("nan")
        stats.create_array(
            name,
            shape=(chains, draws),
            chunks=(1, chunk),
            dtype=kind,
            fill_value=fill,
            dimension_names=["chain", "draw"],
        )
    root.attrs.update({"config": dict(config), "identity": identity(config), **_versions()})
    return root


def _values(
    group: zarr.Group, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dim: str
) -> Any:
    return group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        dtype="float32",
        fill_value=float("nan"),
        dimension_names=["chain", "draw", dim],
    )


def _token_group(root: zarr.Group, axis: Axis, chains: int, draws: int, chunk: int) -> None:
    """Losses of tokens, in blocks of columns so that a few of them are read at little cost."""
    group = root.create_group(axis.dim)
    coords = axis.coords()
    for name, (dim, labels) in coords.items():
        _coordinate(group, name, labels, dim)
    _chain_draw(group, chains, draws)
    chunks = (1, chunk, max(1, min(axis.size, _CHUNK_VALUES // chunk)))
    losses = _values(group, "loss", (chains, draws, axis.size), chunks, axis.dim)
    losses.attrs["coordinates"] = " ".join(coords)


def _chain_draw(group: zarr.Group, chains: int, draws: int) -> None:
    _coordinate(group, "chain", np.arange(chains))
    _coordinate(group, "draw", np.arange(draws))


def _coordinate(group: zarr.Group, name: str, labels: np.ndarray, dim: str | None = None) -> None:
    text = labels.dtype.kind in "UTO"
    kind: Any = str if text else labels.dtype
    array = group.create_array(name, shape=labels.shape, dtype=kind, dimension_names=[dim or name])
    array[:] = labels.astype(np.dtypes.StringDType()) if text else labels


def _versions() -> dict[str, str]:
    import bayesinf

    return {"bayesinf_version": bayesinf.__version__, "zarr_version": zarr.__version__}
