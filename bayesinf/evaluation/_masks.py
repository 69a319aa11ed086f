"""Masks that judges retrain on, each once, and what the retrained networks measure.

All masks of a judge are rows of one bank, those of one size beside each other: small networks
train many at once, and a killed run goes on in its store.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from bayesinf._likelihoods import Likelihood, require
from bayesinf.evaluation._problem import ModelFactory
from bayesinf.evaluation._recipes import Recipe
from bayesinf.evaluation._retraining import retrain

__all__ = ["CORRECT", "FEWEST_REPEATS", "Masks", "check_repeats", "measured"]

CORRECT = "correct"
"""The measurement of a likelihood that is 1 where the prediction is right."""

FEWEST_REPEATS = 2


class Masks:
    """Distinct masks of kept examples, the first of all of them."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._places: dict[bytes, int] = {}
        self._rows: list[np.ndarray] = []
        self.everything = self.add(np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, removed: np.ndarray) -> int:
        """Row of the mask without the examples at these positions; one that is there is found."""
        mask = np.ones(self.n, dtype=bool)
        mask[removed] = False
        key = np.packbits(mask).tobytes()
        if key not in self._places:
            self._places[key] = len(self._rows)
            self._rows.append(mask)
        return self._places[key]

    def subsets(self, ids: np.ndarray) -> tuple[xr.DataArray, np.ndarray]:
        """Masks by size, largest first, and the place of each row among them."""
        rows = np.stack(self._rows)
        order = np.argsort(-rows.sum(axis=1), kind="stable")
        coords = {"subset": np.arange(len(rows)), "train": ids}
        return xr.DataArray(rows[order], coords, ("subset", "train")), np.argsort(order)


def measured(
    masks: Masks,
    make_model: ModelFactory,
    likelihood: Likelihood,
    recipe: Recipe,
    *,
    measurement: str,
    train_ids: np.ndarray,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Outcomes ``(masks, R, Q)`` in float64: the measurement and, where there is one, ``correct``.

    Further options are those of :func:`bayesinf.retrain`.

    Raises
    ------
    NotImplementedError
        If the likelihood lacks the measurement.
    """
    require(likelihood, measurement, f"the measurement {measurement!r}")
    names = [measurement, *[CORRECT] * hasattr(likelihood, CORRECT)]
    subsets, places = masks.subsets(train_ids)
    bank = retrain(
        make_model,
        likelihood,
        recipe,
        subsets=subsets,
        measurements=list(dict.fromkeys(names)),
        **options,
    )
    wide = {name: bank[name].transpose("subset", "seed", "query").values for name in names}
    return {name: array[places].astype(np.float64) for name, array in wide.items()}


def check_repeats(seeds: Any, random: int, confidence: float) -> None:
    """Refuse what leaves no spread to make intervals from.

    Raises
    ------
    ValueError
        If there are fewer than two seeds or random masks, or the confidence is out of range.
    """
    if len(seeds) < FEWEST_REPEATS or random < FEWEST_REPEATS:
        raise ValueError(
            f"intervals need the spread over at least two seeds and two random masks; got "
            f"{len(seeds)} seeds and random={random}."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, such as 0.95; got {confidence}.")
