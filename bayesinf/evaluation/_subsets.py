"""Random subsets of the training set, the masks that every retraining judge starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from bayesinf._data import resolve_ids

__all__ = ["random_subsets"]


def random_subsets(
    train: int | Sequence[Any] | np.ndarray,
    *,
    fraction: float = 0.5,
    count: int,
    seed: int,
) -> xr.DataArray:
    """Draw subsets of one fixed size, uniformly and independently, without replacement inside.

    All subsets have ``round(fraction · n)`` members: with a random size, the size alone would
    carry a trivial signal that any score of constant sign predicts.

    Parameters
    ----------
    train
        Ids of the training examples, or their number ``n`` (ids are then ``0 … n−1``).
    fraction
        Share of the examples in each subset, strictly between 0 and 1.
    count
        Number of subsets.
    seed
        Seed of the draw; another seed gives other subsets.

    Returns
    -------
    xr.DataArray
        Boolean, dims ``subset`` and ``train``: True where the example is kept.

    Raises
    ------
    ValueError
        If ``count`` is not positive, or a subset would be empty or the whole set.

    Examples
    --------
    >>> random_subsets(10, fraction=0.3, count=4, seed=0).sum("train").values
    array([3, 3, 3, 3])
    """
    n = int(train) if isinstance(train, (int, np.integer)) else len(train)
    ids = resolve_ids(None if isinstance(train, (int, np.integer)) else train, n, "train")
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
    for row in mask:
        row[rng.choice(n, size, replace=False)] = True
    return xr.DataArray(
        mask,
        dims=("subset", "train"),
        coords={"subset": np.arange(count), "train": ids},
        name="subset_mask",
        attrs={"fraction": float(fraction), "seed": int(seed)},
    )
