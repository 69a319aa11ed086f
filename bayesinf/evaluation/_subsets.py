"""Designs of subsets: the masks that every retraining judge starts from.

A design is a boolean ``(subset, train)`` array, True where the example is kept, with attributes
that say how it was drawn. :func:`random_subsets` draws subsets of any share α independently,
:func:`disjoint_subsets` cuts the examples into parts, :func:`leave_one_out` leaves out one each,
and :func:`listed_subsets` takes lists made elsewhere. Leaving out k % at random is
``random_subsets(fraction=1 - k / 100)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from bayesinf._data import resolve_ids

__all__ = ["disjoint_subsets", "leave_one_out", "listed_subsets", "random_subsets"]

Ids = int | Sequence[Any] | np.ndarray
"""Ids of the training examples, or their number."""

KEPT = ("rest", "part")


def random_subsets(
    train: Ids,
    *,
    fraction: float = 0.5,
    count: int,
    seed: int,
    labels: Sequence[Any] | np.ndarray | None = None,
) -> xr.DataArray:
    """Draw subsets of one fixed size, independently, without replacement inside.

    All subsets have ``round(fraction · n)`` members: with a random size, the size alone would
    carry a trivial signal that any score of constant sign predicts. Every example is kept with
    the same probability, with and without ``labels``.

    Parameters
    ----------
    train
        Ids of the training examples, or their number ``n`` (ids are then ``0 … n−1``).
    fraction
        Share α of the examples in each subset, strictly between 0 and 1: 0.5 for halves, 0.99 to
        leave out 1 %.
    count
        Number of subsets.
    seed
        Seed of the draw; another seed gives other subsets.
    labels
        Class of each example, ``(n,)``: subsets are stratified. Each keeps the share of every
        class as well as whole numbers allow (its number is rounded up or down at random), so that
        the balance of classes is no signal either. Default: uniform over all subsets of the size.

    Returns
    -------
    xr.DataArray
        Boolean, dims ``subset`` and ``train``: True where the example is kept.

    Raises
    ------
    ValueError
        If ``count`` is not positive, a subset would be empty or the whole set, or ``labels`` are
        not one for each example.

    Examples
    --------
    >>> random_subsets(10, fraction=0.3, count=4, seed=0).sum("train").values
    array([3, 3, 3, 3])
    """
    ids = _ids(train)
    n = len(ids)
    size = round(fraction * n)
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}.")
    if not 0 < size < n:
        raise ValueError(
            f"fraction={fraction} of {n} examples leaves {size} in a subset, which must hold at "
            f"least 1 and at most {n - 1}. fraction is a share between 0 and 1, such as 0.5."
        )
    rng = np.random.default_rng(seed)
    mask = np.zeros((count, n), dtype=bool)
    if labels is None:
        for row in mask:
            row[rng.choice(n, size, replace=False)] = True
    else:
        classes = [np.flatnonzero(own) for own in _classes(labels, n)]
        for row in mask:
            for members, kept in zip(classes, _quotas(classes, size, n, rng), strict=True):
                row[rng.choice(members, kept, replace=False)] = True
    return _design(
        mask, ids, "random", fraction=float(fraction), seed=int(seed), stratified=labels is not None
    )


def disjoint_subsets(
    train: Ids,
    *,
    parts: int,
    seed: int,
    kept: str = "rest",
    labels: Sequence[Any] | np.ndarray | None = None,
) -> xr.DataArray:
    """Cut the examples at random into disjoint parts, one subset for each.

    With ``kept="rest"`` a subset is everything but its part: each example is left out exactly
    once, as 100 parts leave out 1 % each. With ``kept="part"`` a subset is its part: each is kept
    exactly once. Where ``parts`` does not divide ``n``, sizes differ by one.

    Parameters
    ----------
    train
        Ids of the training examples, or their number ``n``.
    parts
        Number of parts and of subsets, between 2 and ``n``.
    seed
        Seed of the draw. For several cuts, concatenate designs of several seeds along ``subset``.
    kept
        ``"rest"`` or ``"part"``.
    labels
        Class of each example, ``(n,)``: the parts of every class differ in size by at most one.

    Returns
    -------
    xr.DataArray
        As of :func:`random_subsets`.

    Raises
    ------
    ValueError
        If ``parts`` is out of range, ``kept`` unknown or ``labels`` are not one for each example.
    """
    ids = _ids(train)
    n = len(ids)
    if not 2 <= parts <= n:
        raise ValueError(
            f"parts must lie between 2 and the number of examples {n}; got {parts}. To leave out "
            f"1 % at a time, parts=100."
        )
    if kept not in KEPT:
        raise ValueError(f"kept must be one of {KEPT}; got {kept!r}.")
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    if labels is not None:  # classes one after another: dealing them out in turn spreads each
        first = np.argmax(_classes(labels, n), axis=0)
        order = order[np.argsort(first[order], kind="stable")]
    mask = np.zeros((parts, n), dtype=bool)
    mask[np.arange(n) % parts, order] = True
    return _design(
        ~mask if kept == "rest" else mask, ids, "disjoint",
        parts=int(parts), kept=kept, seed=int(seed), stratified=labels is not None,
    )  # fmt: skip


def leave_one_out(train: Ids, examples: Sequence[Any] | np.ndarray | None = None) -> xr.DataArray:
    """Keep everything in the first subset, and everything but one example in each other.

    The effect of leaving out an example is its subset's outcome minus that of subset 0. It is of
    the size 1/n, and the noise of training is not: both need many seeds, and as many for subset 0,
    whose noise is in every effect.

    Parameters
    ----------
    train
        Ids of the training examples, or their number ``n``.
    examples
        Ids of those to leave out, in this order; all by default.

    Returns
    -------
    xr.DataArray
        As of :func:`random_subsets`, ``1 + len(examples)`` subsets.

    Raises
    ------
    ValueError
        If an id is unknown or repeats.
    """
    ids = _ids(train)
    positions = _positions(ids, ids if examples is None else examples, "examples")
    mask = np.ones((1 + len(positions), len(ids)), dtype=bool)
    mask[1 + np.arange(len(positions)), positions] = False
    return _design(mask, ids, "leave-one-out")


def listed_subsets(
    train: Ids, lists: Sequence[Sequence[Any] | np.ndarray], *, kept: bool
) -> xr.DataArray:
    """Make masks of subsets that are given as lists of ids.

    Parameters
    ----------
    train
        Ids of the training examples, or their number ``n``.
    lists
        The ids of each subset.
    kept
        Whether the lists say what is kept (True) or what is left out (False).

    Returns
    -------
    xr.DataArray
        As of :func:`random_subsets`.

    Raises
    ------
    ValueError
        If there is no list, or an id of a list is unknown or repeats.
    """
    ids = _ids(train)
    if not len(lists):
        raise ValueError("lists= holds no subset.")
    mask = np.full((len(lists), len(ids)), not kept)
    for number, (row, own) in enumerate(zip(mask, lists, strict=True)):
        row[_positions(ids, own, f"subset {number}")] = kept
    return _design(mask, ids, "listed")


def _design(mask: np.ndarray, ids: np.ndarray, design: str, **how: Any) -> xr.DataArray:
    """Label masks ``(M, n)``."""
    return xr.DataArray(
        mask,
        dims=("subset", "train"),
        coords={"subset": np.arange(len(mask)), "train": ids},
        name="subset_mask",
        attrs={"design": design, **how},
    )


def _ids(train: Ids) -> np.ndarray:
    if isinstance(train, (int, np.integer)):
        return resolve_ids(None, int(train), "train")
    return resolve_ids(train, len(train), "train")


def _positions(ids: np.ndarray, wanted: Sequence[Any] | np.ndarray, name: str) -> np.ndarray:
    """Positions of distinct ids."""
    place = {key: i for i, key in enumerate(ids.tolist())}
    keys = np.asarray(wanted).tolist()
    unknown = [key for key in keys if key not in place]
    if unknown or len(set(keys)) < len(keys):
        what = f"unknown ids {unknown[:5]}" if unknown else "an id more than once"
        raise ValueError(
            f"{name} has {what}; the {len(ids)} training ids run from {ids[0]!r} to {ids[-1]!r}. "
            f"Usual cause: positions where ids were meant, or another training set."
        )
    return np.array([place[key] for key in keys], dtype=np.int64)


def _classes(labels: Sequence[Any] | np.ndarray, n: int) -> np.ndarray:
    """Which examples are of each class, ``(classes, n)``."""
    array = np.asarray(labels)
    if array.shape != (n,):
        raise ValueError(
            f"labels must be one for each of the {n} training examples; got shape {array.shape}."
        )
    return np.unique(array)[:, None] == array


def _quotas(classes: list[np.ndarray], size: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """How many of each class are kept: ``size`` in all, each expected ``size · n_c / n``.

    Systematic rounding: one uniform offset for the cumulated shares.
    """
    upto = np.cumsum([len(members) for members in classes]) * size / n
    upto[-1] = size
    return np.diff(np.floor(upto + rng.random()).astype(np.int64), prepend=0)
