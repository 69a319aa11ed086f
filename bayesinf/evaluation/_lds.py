"""The linear datamodelling score: how well summed influences rank real retrainings.

For each query, predictions ``+Σ_{i kept} influence`` are rank-correlated over subsets with the
measurement of the models retrained on those subsets; the LDS is the mean over queries (Ilyas
et al. 2022; Park et al. 2023). ``influence`` is ``dE[φ]/db``, so a helpful example has a negative
one, keeping it lowers both sides, and a good method has a positive LDS.
"""

from __future__ import annotations

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
)
from bayesinf.evaluation._ceiling import noise_ceiling
from bayesinf.evaluation._monte_carlo import monte_carlo
from bayesinf.evaluation._statistics import (
    Correlation,
    MeanEstimate,
    Queries,
    correlations,
    delete_one,
    mean_estimate,
    random_parts,
    require_options,
)
from bayesinf.evaluation._tables import Named, named, with_costs

__all__ = ["Constant", "lds", "lds_difference", "lds_table"]

Constant = Literal["raise", "zero"]
_ROUNDING = 1e-20  # variances below this are rounding


def lds(
    scores: xr.Dataset,
    bank: xr.Dataset,
    *,
    measurement: str = "loss",
    correlation: Correlation = "spearman",
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
    correlation
        ``"spearman"``, of ranks, as in the literature; or ``"pearson"``.
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
        ``lower``, ``upper``; ``lds_query (query)`` and its ``lds_query_error``;
        ``effective_queries``, how many queries with subset noise of their own would give the
        mean this subset error: the mean variance of the queries' correlations over that of
        their mean, NaN where neither varies; with replicates also ``mcse``, ``reliability`` and
        ``attenuation``.

    Raises
    ------
    ValueError
        If ids or measurement of scores and bank differ, or a prediction or truth is constant.
    """
    require_options(correlation, queries, confidence)
    aligned = align(scores, bank, measurement, constant)
    values, deleted = _correlations(aligned, correlation)
    estimate = _estimate(values, deleted, queries, confidence)
    attrs = {
        "method": method_name(scores),
        "checkpoints": checkpoints(scores),
        **_attrs(bank, measurement, correlation, queries, confidence),
    }
    noise = monte_carlo(scores, bank, measurement, constant, correlation, estimate.mean)
    if noise:
        attrs["monte_carlo"] = (
            "mcse is apart from standard_error, lower and upper, which take the scores as they are"
        )
    table = _dataset("lds", estimate, values, deleted, aligned.query, attrs)
    return table.assign({**noise, "effective_queries": _effective(table)})


def lds_difference(
    a: xr.Dataset,
    b: xr.Dataset,
    bank: xr.Dataset,
    *,
    measurement: str = "loss",
    correlation: Correlation = "spearman",
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
    bank, measurement, correlation, queries, confidence, constant
        As in :func:`lds`.

    Returns
    -------
    xr.Dataset
        Scalars ``difference``, ``standard_error``, ``subset_error``, ``query_error``, ``lower``,
        ``upper``; ``difference_query (query)``, ``difference_query_error``. Positive: ``a`` is
        better.

    Raises
    ------
    ValueError
        As in :func:`lds`, and if one is of a single checkpoint and the other of an ensemble.
    """
    require_options(correlation, queries, confidence)
    check_same_kind([a, b], [method_name(a), method_name(b)])
    first = align(a, bank, measurement, constant)
    second = align(b.sel(query=first.query), bank, measurement, constant)
    pairs = zip(_correlations(first, correlation), _correlations(second, correlation), strict=True)
    values, deleted = (x - y for x, y in pairs)
    estimate = _estimate(values, deleted, queries, confidence)
    attrs = {
        "method_a": method_name(a),
        "method_b": method_name(b),
        "checkpoints": checkpoints(a),
        **_attrs(bank, measurement, correlation, queries, confidence),
    }
    return _dataset("difference", estimate, values, deleted, first.query, attrs)


def lds_table(
    scores: Named,
    bank: xr.Dataset,
    *,
    measurement: str = "loss",
    correlation: Correlation = "spearman",
    queries: Queries = "random",
    confidence: float = 0.95,
    constant: Constant = "raise",
) -> xr.Dataset:
    """LDS of several methods on the same queries, with the noise ceiling.

    Parameters
    ----------
    scores
        Scores by name, or a list of them, named by ``attrs["method"]``.
    bank, measurement, correlation, queries, confidence, constant
        As in :func:`lds`.

    Returns
    -------
    xr.Dataset
        By ``scorer``, the name of the scores: ``lds``, ``standard_error``, ``subset_error``,
        ``query_error``, ``lower``, ``upper``, ``effective_queries``, ``relative`` (LDS / ceiling;
        absent with a single seed), ``mcse``, ``reliability`` and ``attenuation`` (where any scores
        have replicates, NaN for those without), ``lds_query (scorer, query)``,
        ``lds_query_error`` and what the scores cost: ``seconds`` (summed over stages),
        ``forward_examples``, ``backward_examples``, ``peak_memory``, NaN where unknown; scalar
        ``ceiling``.

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
            correlation=correlation,
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
        found = noise_ceiling(bank, measurement, query=query, correlation=correlation)
        table["ceiling"] = found["ceiling"]
        table["relative"] = table["lds"] / table["ceiling"]
    return table


# ---------------------------------------------------------------------------- helpers


def _correlations(aligned: Aligned, kind: Correlation) -> tuple[np.ndarray, np.ndarray]:
    pair = aligned.prediction, aligned.truth
    return correlations(*pair, kind), delete_one(*pair, kind)


def _estimate(
    values: np.ndarray, deleted: np.ndarray, queries: Queries, confidence: float
) -> MeanEstimate:
    return mean_estimate(values, deleted, random_queries=queries == "random", confidence=confidence)


def _dataset(
    name: str,
    estimate: MeanEstimate,
    values: np.ndarray,
    deleted: np.ndarray,
    query: np.ndarray,
    attrs: dict[str, Any],
) -> xr.Dataset:
    scalars = asdict(estimate)
    error = np.sqrt((len(deleted) - 1) * deleted.var(axis=0))
    return xr.Dataset(
        {
            name: scalars.pop("mean"),
            **scalars,
            f"{name}_query": ("query", values),
            f"{name}_query_error": ("query", error),
        },
        coords={"query": query},
        attrs=attrs,
    )


def _effective(table: xr.Dataset) -> float:
    """Mean variance of the queries' correlations over the variance of their mean; see `lds`."""
    own = float((table["lds_query_error"] ** 2).mean())
    return own / float(table["subset_error"]) ** 2 if own > _ROUNDING else np.nan


def _attrs(
    bank: xr.Dataset, measurement: str, correlation: str, queries: str, confidence: float
) -> dict[str, Any]:
    found = {key: bank.attrs[key] for key in ("task", "bank", "fraction") if key in bank.attrs}
    return {
        "measurement": measurement,
        "correlation": correlation,
        "confidence": confidence,
        **random_parts(queries, "subsets", "seeds"),
        "subsets": bank.sizes["subset"],
        "seeds": bank.sizes["seed"],
        **found,
    }
