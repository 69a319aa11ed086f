"""Susceptibilities: how the loss reacts to each example where one component alone may move."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from bayesinf._chains import FailedChainsWarning
from bayesinf._covariance import CrossCovariance, batches_of_a_chain, cross_covariance
from bayesinf._diagnostics import ConvergenceWarning, diagnose
from bayesinf._scores import text_labels, versions
from bayesinf._traces import TraceStore

__all__ = ["differing", "susceptibility"]

_DIAGNOSED = 100
_BLOCK = 4096


def susceptibility(
    traces: Mapping[Hashable, TraceStore],
    *,
    tokens: bool = False,
    batches_per_chain: int | None = None,
) -> xr.Dataset:
    r"""Susceptibility of every component of a network to every train example.

    .. math:: \chi_{C,i} = -\mathrm{Cov}_C\big(n_\beta\,(L - L(w_0)),\ \ell_i - L\big)
              = \frac{d}{dh} E_C[L]\Big|_{h=0}
              \quad\text{with loss } L + h\,(\ell_i - L) \text{ in the posterior}

    ``E_C`` is over the posterior of component ``C`` alone, all other weights at the checkpoint, and
    ``L`` the mean train loss. Negative: weighting the example up lets the component lower the loss
    of all (on average over examples it is zero). The matrix of components and examples is the
    structural map: components with like rows do like things.

    Parameters
    ----------
    traces
        By component: what :func:`bayesinf.sample` returned for ``task.restrict(part)``, at one
        setting and with all train examples observed; :func:`bayesinf.sample_each` makes them. Sums
        of a :class:`bayesinf.StreamingCovariance` do not hold the loss of a draw.
    tokens
        By token of the train examples, where their losses were recorded by token: ``ℓ_t − L/T``
        for a token of a sequence of ``T``, so that tokens sum to their sequence.
    batches_per_chain
        For the standard errors, at least; default: as few as make 12 batches over all chains.

    Returns
    -------
    xr.Dataset
        ``susceptibility``, ``mcse`` and ``susceptibility_within`` (centred per chain, a check),
        dims ``component`` and ``train`` (or ``train_token``). An interval is
        ``susceptibility ± t·mcse`` with ``mcse_df (component)`` degrees of freedom. Components
        whose chains are in doubt are centred per chain, and ``center (component)`` says which.

    Raises
    ------
    TypeError
        If a value is no store of traces.
    ValueError
        If there is no component, their settings or examples differ, not all train examples were
        observed, or there are too few draws.
    KeyError
        If tokens were not recorded.

    Warns
    -----
    ConvergenceWarning
        By component, if :func:`bayesinf.diagnose` finds fault with its chains.
    FailedChainsWarning
        If chains diverged; they are left out.

    Notes
    -----
    Baker et al. 2025 (arXiv 2504.18274). Values of components of different size are not on one
    scale: compare rows after dividing each by its spread.
    """
    first = _checked(traces)
    rows = []
    for name, store in traces.items():
        how = _center(store, name)
        rows.append((how, _row(store, tokens, how, batches_per_chain)))
    n_beta = first.config["posterior"]["n_beta"]
    dim, coords = _labels(first, tokens)
    dims = ("component", dim)
    arrays: dict[str, Any] = {
        "susceptibility": (dims, -n_beta * np.stack([r.value[0] for _, r in rows])),
        "mcse": (dims, n_beta * np.stack([r.mcse[0] for _, r in rows])),
        "susceptibility_within": (dims, -n_beta * np.stack([r.within[0] for _, r in rows])),
        "mcse_df": ("component", np.array([r.freedom for _, r in rows])),
        "center": ("component", text_labels(np.array([how for how, _ in rows]))),
    }
    coords["component"] = text_labels(np.array(list(traces)))
    attrs = {
        **versions(),
        **first.config["posterior"],
        "n": first.config["task"]["n"],
        "checkpoint": first.config["task"]["checkpoint"],
    }
    return xr.Dataset(arrays, coords=coords, attrs=attrs)


def _row(
    store: TraceStore, tokens: bool, how: str, batches_per_chain: int | None
) -> CrossCovariance:
    """Covariances of the mean loss with each example's, or token's, less its share of the mean."""
    if batches_per_chain is None and len(store.healthy) > 1:
        batches_per_chain = batches_of_a_chain(store.chains)
    with warnings.catch_warnings():  # failed chains were named when the chains were looked at
        warnings.simplefilter("ignore", FailedChainsWarning)
        losses = store.values("train").values
        columns = store.values("train", tokens=True).values if tokens else losses
    mean = losses.mean(axis=2, keepdims=True, dtype=np.float64)
    share = np.ones(columns.shape[2])
    if tokens:
        starts = store.axis("train", tokens=True).starts
        assert starts is not None
        share = np.repeat(1 / np.diff(starts), np.diff(starts))
    parts = [
        cross_covariance(
            mean,
            columns[:, :, where] - mean * share[where],
            center=how,
            batches_per_chain=batches_per_chain,
        )
        for where in (slice(i, i + _BLOCK) for i in range(0, columns.shape[2], _BLOCK))
    ]
    names = ("value", "mcse", "within", "deleted", "halves")
    joined = {k: np.concatenate([getattr(p, k) for p in parts], axis=-1) for k in names}
    return CrossCovariance(
        **joined, batches=parts[0].batches, freedom=parts[0].freedom, share=parts[0].share
    )


def _labels(store: TraceStore, tokens: bool) -> tuple[str, dict[str, Any]]:
    if not tokens:
        return "train", {"train": text_labels(store.ids("train"))}
    axis = store.axis("train", tokens=True)
    return axis.dim, dict(axis.coords())


def _center(store: TraceStore, name: Hashable) -> str:
    """``"grand"``; ``"chain"``, with a warning, where the chains are in doubt."""
    store.values("query")  # names failed chains
    if store.draws < 4:
        return "grand"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = diagnose(store, max_examples=_DIAGNOSED)
    if report.attrs["ok"]:
        return "grand"
    warnings.warn(
        f"component {name!r} has chains in doubt: {report.attrs['verdict']}.",
        ConvergenceWarning,
        stacklevel=3,
    )
    return "chain"


def _checked(traces: Mapping[Hashable, TraceStore]) -> TraceStore:
    """The first of the stores, of one setting but for the parameters."""
    if not traces:
        raise ValueError("there is no component; give {name: traces}.")
    for name, store in traces.items():
        if not isinstance(store, TraceStore):
            raise TypeError(
                f"component {name!r} is a {type(store).__name__}, and traces are needed: "
                f"sample_each({{name: task.restrict(part)}}, …) returns them."
            )
        n, seen = store.config["task"]["n"], len(store.ids("train"))
        if seen != n:
            raise ValueError(
                f"component {name!r}: {seen} of the {n} train examples were observed, and the mean "
                f"train loss is over all of them. Leave 'train' out of sample(..., observe=…)."
            )
    first = next(iter(traces.values()))
    for name, store in traces.items():
        odd = differing(first.config, store.config, {"task.parameters"})
        if odd:
            raise ValueError(
                f"component {name!r} was sampled at another setting than {next(iter(traces))!r}: "
                f"{odd[0]}. Susceptibilities compare at one setting: sample_each(…) keeps it."
            )
    return first


def differing(one: Any, other: Any, allowed: set[str], path: str = "") -> list[str]:
    """Settings of two runs that differ, with both values, apart from those allowed."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(k for k in other if k not in one)]
        parts = [
            differing(one.get(k), other.get(k), allowed, f"{path}.{k}" if path else k) for k in keys
        ]
        return [line for part in parts for line in part]
    return [] if one == other or path in allowed else [f"{path} is {one!r} and {other!r}"]
