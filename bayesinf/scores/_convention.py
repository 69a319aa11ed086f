"""From a source's convention to the estimand, ``influence[query, train] = d E[φ_query]/d b_train``.

A source has a sign, an orientation and a scale::

    influence = factor · score,     factor = ± scale

``+`` where a positive score says that up-weighting the training example raises φ, ``−`` where it
says that it lowers φ. For a loss, what lowers it is helpful; for a margin, what raises it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from bayesinf._data import resolve_ids
from bayesinf._scores import label_scores, make_scores, text_labels
from bayesinf.scores._self_sign import HELP, Sign, check_self, shared_diagonal

__all__ = ["Convention", "Ids", "convert"]

Ids = Sequence[Any] | np.ndarray | None
"""Ids of examples; None for their positions."""

Dims = tuple[str, str]

_SIGN_TEXT = {
    "helpful": "positive is helpful",
    "harmful": "positive is harmful",
    "lowers": "positive lowers the measurement",
    "raises": "positive raises the measurement",
}


@dataclass(frozen=True)
class Convention:
    """How a source writes scores.

    Attributes
    ----------
    source
        Name of the library or format.
    sign
        What a positive score means.
    dims
        Orientation of its matrices.
    scale
        Positive multiplier to the unit of the estimand; None: scores only rank.
    notes
        Further attributes, such as what was summed.
    """

    source: str
    sign: Sign
    dims: Dims = ("query", "train")
    scale: float | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


def convert(
    values: np.ndarray | Tensor | Sequence[Any],
    query: Ids,
    train: Ids,
    convention: Convention,
    *,
    measurement: str,
    method: str,
    n: int | None = None,
    self_influence: np.ndarray | Tensor | None = None,
) -> xr.Dataset:
    """Map scores ``(query, train)``, or self-influences ``(train,)``, onto the estimand and label.

    Every public function calls it directly: its warnings point to the caller of that.

    Parameters
    ----------
    values
        In the source's convention; converted to float64, so that no scale moves a rank.
    query, train
        Ids.
    convention
        The source's.
    measurement
        Name of φ.
    method
        Name of the method.
    n
        Examples of the training set, where the source leaves ``1/n`` out; takes the place of
        ``convention.scale``.
    self_influence
        ``(train,)``, in the source's convention: checked for its sign.

    Raises
    ------
    ValueError
        As in :func:`~bayesinf.scores.from_array`.

    Warns
    -----
    SignWarning
        If self-influence contradicts the sign.
    """
    factor = _factor(convention, measurement, n)
    numbers = _numbers(values, "scores")
    attrs = {
        "source": convention.source,
        "source_sign": _SIGN_TEXT[convention.sign],
        "factor": factor,
        "n": n,
        "measurement": measurement,
        **convention.notes,
    }
    estimand = "similarity" if n is None and convention.scale is None else "influence"
    if numbers.ndim == 1:
        if query is not None or self_influence is not None:
            raise ValueError(_ONE_DIMENSION.format(n=len(numbers)))
        scores = _self_scores(factor * numbers, train, method, estimand, attrs)
        check_self(scores["influence"].values, measurement, convention.sign, "given")
        return scores
    _check_shape(numbers, {"query": query, "train": train}, convention.dims)
    attrs["source_orientation"] = " × ".join(convention.dims)
    influence = factor * (numbers if convention.dims == ("query", "train") else numbers.T)
    queries = resolve_ids(query, len(influence), "query")
    trains = resolve_ids(train, influence.shape[1], "train")
    _check_n(n, len(trains))
    scores = make_scores(
        influence, query=queries, train=trains, method=method, estimand=estimand, attrs=attrs
    )
    if self_influence is not None:
        own = factor * _own(self_influence, len(trains))
        check_self(own, measurement, convention.sign, "of self_influence=")
    elif query is not None and train is not None:
        own = shared_diagonal(influence, queries, trains)
        check_self(own, measurement, convention.sign, "of the ids that query and train share")
    return scores


def _factor(convention: Convention, measurement: str, n: int | None) -> float:
    sign, scale = convention.sign, convention.scale
    if sign not in _SIGN_TEXT:
        raise ValueError(
            f"sign must be one of {tuple(_SIGN_TEXT)}; got {sign!r}. It says what a positive score "
            f"means: sign='helpful' where up-weighting the example lowers the query's loss."
        )
    if sign in ("helpful", "harmful") and measurement not in HELP:
        raise ValueError(
            f"sign={sign!r} says nothing about the measurement {measurement!r}, of which it is not "
            f"known which direction is good. Say sign='raises' or sign='lowers': what up-weighting "
            f"an example of positive score does to it."
        )
    if n is not None:
        if n < 1:
            raise ValueError(f"n must be the size of the training set; got {n}.")
        scale = 1.0 / n
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ValueError(
            f"factor must be a positive number; got {scale}. What a positive score means is said "
            f"by sign=; factor is the unit alone, such as 1 / n for scores without the 1/n."
        )
    direction = {"raises": 1, "lowers": -1}.get(sign)
    if direction is None:
        direction = HELP[measurement] * (1 if sign == "helpful" else -1)
    return direction * (1.0 if scale is None else scale)


def _numbers(values: np.ndarray | Tensor | Sequence[Any], what: str) -> np.ndarray:
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values
    array = np.asarray(array)
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"{what} must be real numbers; got {array.dtype}. Usual cause: an array of objects, "
            f"such as a list of arrays of unequal lengths."
        )
    if array.ndim not in (1, 2) or not array.size:
        raise ValueError(
            f"{what} must be a matrix (query, train), or (train,) of each example with itself; got "
            f"shape {array.shape}. Scores of tokens add up to those of their sequence: "
            f"scores.sum(-1)."
        )
    return array.astype(np.float64)


def _check_shape(array: np.ndarray, ids: dict[str, Ids], dims: Dims) -> None:
    if sorted(dims) != ["query", "train"]:
        raise ValueError(
            f"dims must be ('query', 'train') or ('train', 'query'): what rows and columns are; "
            f"got {dims!r}."
        )
    given = {name: None if own is None else len(own) for name, own in ids.items()}
    rows, columns = (given[name] for name in dims)
    if rows in (None, len(array)) and columns in (None, array.shape[1]):
        return
    known = " and ".join(f"{size} {name} ids" for name, size in given.items() if size is not None)
    shape = f"the matrix has {array.shape[0]} rows and {array.shape[1]} columns"
    if rows in (None, array.shape[1]) and columns in (None, len(array)):
        raise ValueError(
            f"{shape}, read as ({dims[0]}, {dims[1]}), and there are {known}: it is transposed. "
            f"Read it with from_array(matrix, ..., dims={dims[::-1]!r})."
        )
    raise ValueError(
        f"{shape}, read as ({dims[0]}, {dims[1]}), and there are {known}. Usual cause: ids of "
        f"another split, or scores of a part of it; give an id to every row and every column."
    )


def _check_n(n: int | None, scored: int) -> None:
    if n is not None and n < scored:
        raise ValueError(
            f"n={n} examples are fewer than the {scored} that have scores. n is the size of the "
            f"whole training set: n={scored} where all of it is scored."
        )


_ONE_DIMENSION = (
    "scores of one dimension ({n},) pair each training example with itself and have no queries. "
    "Leave query= and self_influence= out; for one query give a matrix: scores[None, :]."
)


def _self_scores(
    influence: np.ndarray, train: Ids, method: str, estimand: str, attrs: dict[str, Any]
) -> xr.Dataset:
    if train is not None and len(train) != len(influence):
        raise ValueError(
            f"there are {len(influence)} self-influences and {len(train)} train ids. Give an id to "
            f"each."
        )
    ids = resolve_ids(train, len(influence), "train")
    _check_n(attrs["n"], len(ids))
    return label_scores(
        {"influence": (("train",), influence)},
        {"train": text_labels(ids)},
        method,
        estimand,
        {**attrs, "pairs": "self"},
    )


def _own(values: np.ndarray | Tensor, n: int) -> np.ndarray:
    own = _numbers(values, "self_influence")
    if own.shape != (n,):
        raise ValueError(
            f"self_influence must hold one number for each of the {n} training examples; got shape "
            f"{own.shape}."
        )
    return own
