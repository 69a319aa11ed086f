"""How a score's LDS depends on the size of the subsets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from bayesinf.evaluation._lds import Constant, lds_table
from bayesinf.evaluation._statistics import Correlation, Queries
from bayesinf.evaluation._tables import COSTS, Named, named, with_costs

__all__ = ["alpha_curve"]


def alpha_curve(
    scores: Named,
    banks: Sequence[xr.Dataset],
    *,
    measurement: str = "loss",
    correlation: Correlation = "spearman",
    queries: Queries = "random",
    confidence: float = 0.95,
    constant: Constant = "raise",
) -> xr.Dataset:
    """LDS of the same scores on banks of different subset sizes.

    Subsets of half the data ask how large groups act, subsets that leave out one percent what few
    examples do; the LDS of one says little about that of the other, and the noise ceiling falls
    as the subsets come to resemble one another.

    Parameters
    ----------
    scores
        Scores by name, a list of them, or those of one method.
    banks
        Ground truths, one for each fraction of the data that is kept.
    measurement, correlation, queries, confidence, constant
        As in :func:`lds`.

    Returns
    -------
    xr.Dataset
        The variables of :func:`lds_table` by ``fraction`` (ascending) and ``scorer``; ``ceiling``
        and ``subsets`` and ``seeds`` of the banks by ``fraction``; what the scores cost by
        ``scorer``. ``ceiling`` and ``relative`` are NaN where a bank has a single seed, and absent
        where all have.

    Raises
    ------
    ValueError
        As in :func:`lds`; if there is no bank, two have one fraction, or the subsets of one
        differ in size.
    """
    if isinstance(banks, xr.Dataset) or not len(banks):
        raise ValueError(
            "banks must be a list of banks of different fractions, such as [retrain(..., "
            "subsets=random_subsets(n, fraction=f, ...)) for f in (0.1, 0.5, 0.9)]; got "
            f"{'one bank' if isinstance(banks, xr.Dataset) else 'none'}."
        )
    methods = named(scores)
    fractions = [_fraction(bank, k) for k, bank in enumerate(banks)]
    if repeated := sorted({f for f in fractions if fractions.count(f) > 1}):
        raise ValueError(
            f"several banks keep the fraction {repeated} of the data. Concatenate them over "
            f"'subset' if they are of one recipe, or draw curves of their own."
        )
    order = np.argsort(fractions)
    tables = [
        lds_table(
            methods,
            banks[k],
            measurement=measurement,
            correlation=correlation,
            queries=queries,
            confidence=confidence,
            constant=constant,
        ).drop_vars(COSTS)
        for k in order
    ]
    if any("ceiling" in table for table in tables):
        missing = {"ceiling": np.nan, "relative": xr.full_like(tables[0]["lds"], np.nan)}
        tables = [one if "ceiling" in one else one.assign(missing) for one in tables]
    curve = xr.concat(tables, dim="fraction", combine_attrs="drop_conflicts")
    curve = curve.assign_coords(fraction=[fractions[k] for k in order])
    curve["subsets"] = "fraction", [banks[k].sizes["subset"] for k in order]
    curve["seeds"] = "fraction", [banks[k].sizes["seed"] for k in order]
    return with_costs(curve, methods)


def _fraction(bank: xr.Dataset, place: int) -> float:
    """Share of the data that every subset of a bank keeps."""
    mask = bank["subset_mask"].transpose("subset", "train").values
    sizes = np.unique(mask.sum(axis=1))
    if len(sizes) > 1:
        raise ValueError(
            f"the subsets of bank {place} keep {sizes.min()} to {sizes.max()} of {mask.shape[1]} "
            f"examples: a curve over fractions needs subsets of one size in each bank. "
            f"random_subsets(...) makes them."
        )
    return float(sizes[0] / mask.shape[1])
