"""Leaving out one example: how well influences rank what the loss of each does."""

from __future__ import annotations

import warnings

import numpy as np
import xarray as xr

from bayesinf._diagnostics import ConvergenceWarning
from bayesinf.evaluation._alignment import align, check_same_kind, outcomes
from bayesinf.evaluation._lds import Constant
from bayesinf.evaluation._reliability import SplitHalf, spearman_brown, split_half
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

__all__ = ["loo_correlation"]


def loo_correlation(
    scores: Named,
    bank: xr.Dataset,
    *,
    measurement: str = "loss",
    correlation: Correlation = "spearman",
    queries: Queries = "random",
    confidence: float = 0.95,
    constant: Constant = "raise",
) -> xr.Dataset:
    r"""Correlate influences with the effect of leaving out one example, and allow for seed noise.

    The effect of one example is of the size 1/n and mostly far below what another seed changes, so
    that the plain ``correlation`` with means of ``R`` retrainings says as much of ``R`` as of the
    scores. How much of those means is signal is measured on halves of the seeds
    (``reliability``), and ``disattenuated`` is the correlation over the ceiling that it leaves to
    the true effects:

    .. math:: r \,/\, c(ρ_h)

    with ``c`` of :mod:`bayesinf.evaluation._reliability`. It estimates the correlation that
    infinitely many seeds would show; chance may take it above 1.

    Parameters
    ----------
    scores
        Scores by name, a list of them, or those of one method.
    bank
        Ground truth of at least two seeds whose subsets leave out one example each
        (:func:`leave_one_out`). Subsets that keep everything are not needed: what all effects are
        measured from cancels in a correlation.
    measurement, correlation, queries, constant
        As in :func:`lds`.
    confidence
        Of the intervals. Random in them are the examples that were left out, the seeds of their
        retrainings and, as ``queries`` says, the queries.

    Returns
    -------
    xr.Dataset
        By ``scorer``: ``correlation``, the mean over queries of ``correlation_query (scorer,
        query)``, with ``standard_error``, ``lower``, ``upper``; ``disattenuated`` with
        ``disattenuated_standard_error``, ``disattenuated_lower``, ``disattenuated_upper``; what
        the scores cost. Scalars ``reliability``, the signal's share of the variance of the means,
        its ``reliability_lower`` and ``reliability_upper``, and ``ceiling``.

    Raises
    ------
    ValueError
        As in :func:`lds`; if a subset leaves out several examples, two the same one, or there is
        a single seed.

    Warns
    -----
    ConvergenceWarning
        If the interval of the reliability reaches 0, so that there is nothing to correlate with:
        ``disattenuated`` is NaN then.
    """
    require_options(correlation, queries, confidence)
    methods, alone = named(scores), _single(bank)
    check_same_kind(list(methods.values()), list(methods))
    query = next(iter(methods.values()))["query"].values
    outcome = outcomes(alone, measurement, query)
    runs, random = outcome.shape[1], queries == "random"
    if runs < 2:
        raise ValueError(
            "seed noise is told from signal by comparing seeds, and the bank has one. Retrain with "
            "more, hundreds for networks: retrain(..., seeds=range(200))."
        )
    half = split_half(outcome, correlation)
    rho = half.estimate(random_queries=random, confidence=confidence)
    heard = rho.lower > 0
    if not heard:
        _warn(rho, half, runs)
    rows = []
    for own in methods.values():
        pair = align(own.sel(query=query), alone, measurement, constant)
        values = correlations(pair.prediction, pair.truth, correlation)
        deleted = delete_one(pair.prediction, pair.truth, correlation)
        plain = mean_estimate(values, deleted, random_queries=random, confidence=confidence)
        clean = (
            half.relative(values, deleted, runs, random_queries=random, confidence=confidence)
            if heard
            else None
        )
        rows.append(_row(plain, clean, values, query))
    table = xr.concat(rows, dim="scorer").assign_coords(scorer=list(methods))
    shares = np.clip([rho.mean, rho.lower, rho.upper], 0, 1)
    reliability, lower, upper = spearman_brown(shares, runs / half.size)
    table = table.assign(
        reliability=reliability,
        reliability_lower=lower,
        reliability_upper=upper,
        ceiling=half.mean_ceiling(rho.mean, runs),
    )
    table.attrs = {
        "measurement": measurement,
        "correlation": correlation,
        "confidence": confidence,
        **random_parts(queries, "examples left out", "seeds"),
        "examples": len(outcome),
        "seeds": runs,
    }
    return with_costs(table, methods)


# ---------------------------------------------------------------------------- helpers


def _row(
    plain: MeanEstimate, clean: MeanEstimate | None, values: np.ndarray, query: np.ndarray
) -> xr.Dataset:
    def of(estimate: MeanEstimate | None, name: str) -> float:
        return np.nan if estimate is None else float(getattr(estimate, name))

    names = ("standard_error", "lower", "upper")
    return xr.Dataset(
        {
            "correlation": plain.mean,
            **{name: of(plain, name) for name in names},
            "disattenuated": of(clean, "mean"),
            **{f"disattenuated_{name}": of(clean, name) for name in names},
            "correlation_query": ("query", values),
        },
        coords={"query": query},
    )


def _single(bank: xr.Dataset) -> xr.Dataset:
    """Subsets of a bank that leave out one example, without those that keep everything."""
    mask = bank["subset_mask"].transpose("subset", "train").values
    missing = (~mask.astype(bool)).sum(axis=1)
    if (missing > 1).any():
        raise ValueError(
            f"{int((missing > 1).sum())} of {len(missing)} subsets leave out more than one example "
            f"(up to {missing.max()}). For groups the judge is lds(scores, bank); single examples "
            f"are left out by retrain(..., subsets=leave_one_out(n))."
        )
    alone = np.flatnonzero(missing == 1)
    left = bank["train"].values[np.argmin(mask[alone], axis=1)]
    if len(set(left.tolist())) < len(left):
        raise ValueError(
            "two subsets leave out the same example: give it one subset and more seeds instead."
        )
    return bank.isel(subset=alone)


def _warn(rho: MeanEstimate, half: SplitHalf, runs: int) -> None:
    single = spearman_brown(np.array(max(rho.upper, 0.0)), 1 / half.size)
    need = f"{(1 - single) / single:.0f}" if single > 0 else "many more"
    warnings.warn(
        f"the means over {runs} seeds hold no signal that can be told from seed noise: two halves "
        f"of the seeds correlate by {rho.mean:.3f} [{rho.lower:.3f}, {rho.upper:.3f}]. "
        f"`disattenuated` is NaN. At the upper end at least {need} seeds would make noise and "
        f"signal equal.",
        ConvergenceWarning,
        stacklevel=3,
    )
