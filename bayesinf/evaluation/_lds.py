"""The linear datamodelling score: how well summed influences rank real retrainings.

For each query, predictions ``+Σ_{i kept} influence`` are rank-correlated over subsets with the
measurement of the models retrained on those subsets; the LDS is the mean over queries (Ilyas
et al. 2022; Park et al. 2023). ``influence`` is ``dE[φ]/db``, so a helpful example has a negative
one, keeping it lowers both sides, and a good method has a positive LDS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import xarray as xr

from bayesinf.evaluation._alignment import (
    Aligned,
    align,
    check_same_kind,
    checkpoints,
    method_name,
    outcomes,
)
from bayesinf.evaluation._monte_carlo import monte_carlo
from bayesinf.evaluation._statistics import (
    MeanEstimate,
    delete_one_spearman,
    mean_estimate,
    spearman,
    split_half_ceiling,
)
from bayesinf.evaluation._tables import Named, named, with_costs

__all__ = ["lds", "lds_difference", "lds_table", "noise_ceiling"]

Queries = Literal["random", "fixed"]
Constant = Literal["raise", "zero"]


def lds(
    scores: xr.Dataset,
    bank: xr.Dataset,
    *,
    measurement: str = "loss",
    queries: Queries = "random",
    confidence: float = 0.95,
    constant: Constant = "raise",
) -> xr.Dataset:
    """Judge scores by the linear datamodelling score against retrained models.

    The interval is for the expected LDS of these scores at as many subsets and seeds. Its subset
    part is a jackknife that leaves out a subset for all queries at once, so it holds
    when queries share their effects; ``queries="random"`` adds the spread of the queries. It takes
    the scores as they are. What another run of the sampler would change is told apart, where scores
    carry replicates (``bif(traces, replicates=True)``): ``mcse``, the Monte-Carlo standard error of
    the LDS by a jackknife over batches of draws, and ``reliability``, the share of the variance of
    the predictions that is no Monte-Carlo noise, from two halves of the chains. Noise also lowers
    the LDS, by about the factor ``attenuation = √reliability``.

    Parameters
    ----------
    scores
        Dataset with ``influence (query, train)``; ids are matched with the bank's, in any order.
    bank
        Ground truth from :func:`~bayesinf.evaluation.retrain`.
    measurement
        ``"loss"``, ``"margin"``, …: what the scores were made for.
    queries
        ``"random"``: the interval is for the population of queries these were drawn from;
        ``"fixed"``: for these queries, where only subsets and seeds are random.
    confidence
        Of the interval.
    constant
        For a query whose prediction is the same for all subsets: ``"raise"``, or ``"zero"`` to
        count its correlation as 0.

    Returns
    -------
    xr.Dataset
        Scalars ``lds``, ``standard_error`` (and its parts ``subset_error``, ``query_error``),
        ``lower``, ``upper``; ``lds_query (query)``; with replicates also ``mcse``, ``reliability``
        and ``attenuation``.

    Raises
    ------
    ValueError
        If ids or measurement of scores and bank differ, or a prediction or truth is constant.
    """
    aligned = align(scores, bank, measurement, constant)
    values, deleted = _correlations(aligned)
    estimate = _estimate(values, deleted, queries, confidence)
    attrs = {
        "method": method_name(scores),
        "checkpoints": checkpoints(scores),
        **_attrs(bank, measurement, queries, confidence),
    }
    noise = monte_carlo(scores, bank, measurement, constant, estimate.mean)
    if noise:
        attrs["monte_carlo"] = (
            "mcse is apart from standard_error, lower and upper, which take the scores as they are"
        )
    return _dataset("lds", estimate, values, aligned.query, attrs).assign(noise)


def lds_difference(
    a: xr.Dataset,
    b: xr.Dataset,
    bank: xr.Dataset,
    *,
    measurement: str = "loss",
    queries: Queries = "random",
    confidence: float = 0.95,
    constant: Constant = "raise",
) -> xr.Dataset:
    """Paired difference of two methods' LDS, ``a − b``, on the same subsets and queries.

    What the methods share (hard queries, lucky subsets) cancels, so that the interval is
    narrower than the two single ones suggest.

    Parameters
    ----------
    a, b
        Scores of the same queries, in any order, of the same number of checkpoints.
    bank, measurement, queries, confidence, constant
        As in :func:`lds`.

    Returns
    -------
    xr.Dataset
        Scalars ``difference``, ``standard_error``, ``subset_error``, ``query_error``, ``lower``,
        ``upper``; ``difference_query (query)``. Positive: ``a`` is better.

    Raises
    ------
    ValueError
        As in :func:`lds`, and if one is of a single checkpoint and the other of an ensemble.
    """
    check_same_kind([a, b], [method_name(a), method_name(b)])
    first = align(a, bank, measurement, constant)
    second = align(b.sel(query=first.query), bank, measurement, constant)
    pairs = zip(_correlations(first), _correlations(second), strict=True)
    values, deleted = (x - y for x, y in pairs)
    estimate = _estimate(values, deleted, queries, confidence)
    attrs = {
        "method_a": method_name(a),
        "method_b": method_name(b),
        "checkpoints": checkpoints(a),
        **_attrs(bank, measurement, queries, confidence),
    }
    return _dataset("difference", estimate, values, first.query, attrs)


def noise_ceiling(
    bank: xr.Dataset, measurement: str = "loss", *, query: Sequence[Any] | np.ndarray | None = None
) -> xr.Dataset:
    """LDS that the true effect of every subset would reach, given the noise of the seeds.

    From split seeds: see :func:`bayesinf.evaluation._statistics.split_half_ceiling`. It is the
    ceiling of *any* prediction; an additive one may not reach it, as effects need not add up.

    Parameters
    ----------
    bank
        Ground truth with at least two seeds.
    measurement
        ``"loss"``, ``"margin"``, ….
    query
        Ids to restrict it to; all by default.

    Returns
    -------
    xr.Dataset
        Scalar ``ceiling``, the mean over queries of ``ceiling_query (query)``.

    Raises
    ------
    ValueError
        If the bank has a single seed or lacks the measurement.
    """
    ids = bank["query"].values if query is None else np.asarray(query)
    values = outcomes(bank, measurement, ids)
    if values.shape[1] < 2:
        raise ValueError(
            "the noise ceiling compares seeds, and the bank has one. Retrain with two seeds or "
            "more: retrain(..., seeds=range(6))."
        )
    ceiling = split_half_ceiling(values)
    return xr.Dataset(
        {"ceiling": ceiling.mean(), "ceiling_query": ("query", ceiling)},
        coords={"query": ids},
        attrs={"measurement": measurement, "seeds": values.shape[1], "subsets": len(values)},
    )


def lds_table(
    scores: Named,
    bank: xr.Dataset,
    *,
    measurement: str = "loss",
    queries: Queries = "random",
    confidence: float = 0.95,
    constant: Constant = "raise",
) -> xr.Dataset:
    """LDS of several methods on the same queries, with the noise ceiling.

    Parameters
    ----------
    scores
        Scores by name, or a list of them, named by ``attrs["method"]``.
    bank, measurement, queries, confidence, constant
        As in :func:`lds`.

    Returns
    -------
    xr.Dataset
        By ``scorer``, the name of the scores: ``lds``, ``standard_error``, ``subset_error``,
        ``query_error``, ``lower``, ``upper``, ``relative`` (LDS / ceiling; absent with a single
        seed), ``mcse``, ``reliability`` and ``attenuation`` (where any scores have replicates, NaN
        for those without), ``lds_query (scorer, query)`` and what the scores cost: ``seconds``
        (summed over stages), ``forward_examples``, ``backward_examples``, ``peak_memory``, NaN
        where unknown; scalar ``ceiling``.

    Raises
    ------
    ValueError
        As in :func:`lds`; if names repeat, queries differ, or scores of single checkpoints and
        ensembles are mixed.
    """
    methods = named(scores)
    names = list(methods)
    check_same_kind(list(methods.values()), names)
    query = methods[names[0]]["query"].values
    rows = [
        lds(
            own.sel(query=query),
            bank,
            measurement=measurement,
            queries=queries,
            confidence=confidence,
            constant=constant,
        )
        for own in methods.values()
    ]
    noise = {str(name) for row in rows for name in row.data_vars} - set(rows[0].data_vars)
    noise |= {name for name in ("mcse", "reliability", "attenuation") if name in rows[0]}
    rows = [row.assign({name: np.nan for name in noise if name not in row}) for row in rows]
    table = xr.concat(rows, dim="scorer", combine_attrs="drop").assign_coords(scorer=names)
    table = with_costs(table, methods)
    table.attrs = {
        key: value for key, value in rows[0].attrs.items() if key not in ("method", "monte_carlo")
    }
    if bank.sizes["seed"] > 1:
        table["ceiling"] = noise_ceiling(bank, measurement, query=query)["ceiling"]
        table["relative"] = table["lds"] / table["ceiling"]
    return table


# ---------------------------------------------------------------------------- helpers


def _correlations(aligned: Aligned) -> tuple[np.ndarray, np.ndarray]:
    pair = aligned.prediction, aligned.truth
    return spearman(*pair), delete_one_spearman(*pair)


def _estimate(
    values: np.ndarray, deleted: np.ndarray, queries: str, confidence: float
) -> MeanEstimate:
    if queries not in ("random", "fixed"):
        raise ValueError(f"queries must be 'random' or 'fixed'; got {queries!r}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, such as 0.95; got {confidence}.")
    return mean_estimate(values, deleted, random_queries=queries == "random", confidence=confidence)


def _dataset(
    name: str,
    estimate: MeanEstimate,
    values: np.ndarray,
    query: np.ndarray,
    attrs: dict[str, Any],
) -> xr.Dataset:
    scalars = asdict(estimate)
    return xr.Dataset(
        {name: scalars.pop("mean"), **scalars, f"{name}_query": ("query", values)},
        coords={"query": query},
        attrs=attrs,
    )


def _attrs(bank: xr.Dataset, measurement: str, queries: str, confidence: float) -> dict[str, Any]:
    found = {key: bank.attrs[key] for key in ("task", "bank", "fraction") if key in bank.attrs}
    return {
        "measurement": measurement,
        "queries": queries,
        "confidence": confidence,
        "subsets": bank.sizes["subset"],
        "seeds": bank.sizes["seed"],
        **found,
    }
