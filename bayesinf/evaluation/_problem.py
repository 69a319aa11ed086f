"""What a retraining run consists of, checked: data, masks, seeds, and the identity of its store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from torch import nn

from bayesinf._data import Examples
from bayesinf._likelihoods import Likelihood
from bayesinf._scores import versions
from bayesinf.evaluation._bank import make_bank
from bayesinf.evaluation._recipes import Recipe
from bayesinf.evaluation._training import initialise

__all__ = [
    "ModelFactory",
    "Problem",
    "check_design",
    "examples",
    "identity_of",
    "label_bank",
    "make_problem",
    "supported",
]

ModelFactory = Callable[[], nn.Module]


@dataclass(frozen=True)
class Problem:
    """A checked retraining run.

    ``mask`` is ``(M, n)``; ``names`` are the measurements that the likelihood has; ``model`` is an
    untrained network to look at.
    """

    make_model: ModelFactory
    likelihood: Likelihood
    recipe: Recipe
    data: Examples
    queries: Examples
    mask: np.ndarray
    seeds: tuple[int, ...]
    names: tuple[str, ...]
    model: nn.Module

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(M, R, Q)``."""
        return len(self.mask), len(self.seeds), len(self.queries)

    def identity(self) -> dict[str, Any]:
        """Everything that the outcomes depend on, as plain values."""
        shapes = {name: list(p.shape) for name, p in self.model.named_parameters()}
        described = str(self.model) + json.dumps(shapes)
        return {
            "recipe": self.recipe.as_dict(),
            "likelihood": repr(self.likelihood),
            "model": hashlib.sha256(described.encode()).hexdigest()[:16],
            "dtype": str(next(self.model.parameters()).dtype),
            "train": self.data.fingerprint(),
            "query": self.queries.fingerprint(),
            "n": len(self.data),
            **identity_of(self.mask, self.seeds, self.names),
        }

    def label(self, values: dict[str, np.ndarray], subsets: xr.DataArray) -> xr.Dataset:
        """Make a bank of the outcomes ``(M, R, Q)``."""
        return label_bank(values, subsets, self.identity(), self.queries.ids, self.seeds)


def identity_of(mask: np.ndarray, seeds: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """What outcomes of any training depend on: masks ``(M, n)``, seeds and measurements."""
    return {
        "subsets": hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()[:16],
        "subset_count": len(mask),
        "seeds": list(seeds),
        "measurements": list(names),
    }


def label_bank(
    values: dict[str, np.ndarray],
    subsets: xr.DataArray,
    identity: dict[str, Any],
    query: np.ndarray,
    seeds: Sequence[int],
) -> xr.Dataset:
    """Make a bank of outcomes ``(M, R, Q)`` that carries the identity of its training."""
    attrs = {k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in identity.items()}
    return make_bank(values, subsets, query=query, seeds=seeds, attrs={**attrs, **versions()})


def make_problem(
    make_model: ModelFactory,
    likelihood: Likelihood,
    recipe: Recipe,
    *,
    train: Any,
    query: Any,
    subsets: xr.DataArray,
    seeds: Sequence[int],
    measurements: Sequence[str],
    query_ids: Sequence[Any] | np.ndarray | None,
) -> Problem:
    """Check the arguments of :func:`~bayesinf.evaluation.retrain`, which documents the errors."""
    check_design(subsets, seeds)
    model = initialise(make_model, 0)
    return Problem(
        make_model=make_model,
        likelihood=likelihood,
        recipe=recipe,
        data=examples(model, train, subsets["train"].values, "train"),
        queries=examples(model, query, query_ids, "query"),
        mask=subsets.values,
        seeds=tuple(int(s) for s in seeds),
        names=supported(likelihood, measurements),
        model=model,
    )


def check_design(subsets: xr.DataArray, seeds: Sequence[int]) -> None:
    """Refuse masks that nothing can be trained on, and seeds that repeat.

    Raises
    ------
    ValueError
        For either.
    """
    labelled = isinstance(subsets, xr.DataArray)
    if (
        not labelled
        or subsets.dims != ("subset", "train")
        or subsets.dtype != bool
        or "train" not in subsets.coords
    ):
        what = f"{subsets.dtype} with dims {subsets.dims}" if labelled else type(subsets).__name__
        known = [str(k) for k in subsets.coords] if labelled else []
        raise ValueError(
            f"subsets must be a boolean DataArray with dims ('subset', 'train') and train ids as "
            f"coordinate; got {what} and coordinates {known}. Make it with random_subsets(...), or "
            f"of your own lists with listed_subsets(...)."
        )
    if not subsets.values.any(axis=1).all():
        raise ValueError(
            "a subset keeps no example, so there is nothing to train on. True means kept."
        )
    if len(seeds) == 0 or len({int(s) for s in seeds}) != len(seeds):
        raise ValueError(f"seeds must be distinct integers, at least one; got {list(seeds)}.")


def examples(model: nn.Module, data: Any, ids: Any, name: str) -> Examples:
    """Hold data on the device and in the precision of a model's first parameter."""
    first = next(model.parameters())
    held = Examples(data, None, name, first.device, first.dtype)
    if ids is None:
        return held
    if len(ids) != len(held):
        raise ValueError(
            f"{name}= holds {len(held)} examples, but {len(ids)} {name} ids came with it (train "
            f"ids are the coordinate `train` of subsets=). Both must describe the same set."
        )
    return Examples(data, ids, name, first.device, first.dtype)


def supported(likelihood: Likelihood, measurements: Sequence[str]) -> tuple[str, ...]:
    """Those of the measurements that a likelihood has; only a margin may be missing."""
    for name in measurements:
        if name != "margin" and getattr(likelihood, name, None) is None:
            raise NotImplementedError(
                f"{type(likelihood).__name__} has no method {name!r} to measure queries by; "
                f"measurements=('loss',) always works."
            )
    return tuple(name for name in measurements if getattr(likelihood, name, None) is not None)
