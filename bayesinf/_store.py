"""What a store is to the driver, and covariances from whatever store there is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from scipy.sparse import csr_array

from bayesinf._axes import Axis, Selection
from bayesinf._batch_sums import degrees_of_freedom
from bayesinf._covariance import (
    CrossCovariance,
    batch_edges,
    batches_of_a_chain,
    cross_covariance,
)
from bayesinf._disk import StoreError
from bayesinf._running_sums import multiplied
from bayesinf._streaming import StreamingCovariance
from bayesinf._traces import TraceStore

__all__ = ["Store", "batch_shares", "check_recorded", "covariance_of", "freedom_of"]

_READ_VALUES = 1 << 22


class Store(Protocol):
    """Where draws go: :class:`~bayesinf.TraceStore` or :class:`~bayesinf.StreamingCovariance`."""

    config: dict[str, Any]
    draws: int

    def check_identity(self, config: Mapping[str, Any]) -> None:
        """Raise ``StoreError`` where the store is of other settings."""
        ...

    def grow(self, draws: int) -> None:
        """Make room for ``draws`` draws in all."""
        ...

    def append(
        self, values: Mapping[str, np.ndarray], payload: bytes, extra: Mapping[str, Any]
    ) -> None:
        """Take draws ``(chain, new draws, …)`` by name, and the state after the last of them."""
        ...

    def flush(self) -> None:
        """Put on disk what was appended."""
        ...

    @property
    def chunk_draws(self) -> int:
        """Draws that a writer should collect before it appends."""
        ...

    @property
    def payload(self) -> bytes | None:
        """The state given with the last draws, or None before the first."""
        ...

    @property
    def commit_facts(self) -> dict[str, Any]:
        """The facts given with the last draws."""
        ...

    @property
    def chains(self) -> int:
        """Number of chains, failed ones included."""
        ...

    @property
    def failed(self) -> dict[int, str]:
        """Failed chains and why."""
        ...

    @property
    def healthy(self) -> list[int]:
        """Chains that did not fail."""
        ...

    @property
    def superchains(self) -> np.ndarray:
        """Superchain of each healthy chain."""
        ...

    def ids(self, group: str) -> np.ndarray:
        """Ids of the observed examples of ``"train"`` or ``"query"``."""
        ...

    def axis(self, group: str, *, tokens: bool = False) -> Axis:
        """Labels of the observed examples of a group, or of their tokens."""
        ...

    def warn_of_failures(self, stacklevel: int) -> None:
        """Warn where chains failed, by number."""
        ...


def check_recorded(store: Store, measurement: str) -> None:
    """Raise where a query measurement is not in a store, or nothing is.

    Raises
    ------
    KeyError
        If the measurement was not recorded.
    StoreError
        If there is no draw or no healthy chain.
    TypeError
        If this is no store.
    """
    if not isinstance(store, (TraceStore, StreamingCovariance)):
        raise TypeError(
            f"expected what sample() returns, a TraceStore or a StreamingCovariance; got "
            f"{type(store).__name__}. Open stored traces with open_traces(path)."
        )
    if not store.draws:
        raise StoreError(f"{store!r} holds no draw yet: give it to sample(..., store=…) first.")
    if not store.healthy:
        raise StoreError(f"every chain failed: {store.failed}.")
    have = store.config["measurements"]["query"]
    if measurement not in have:
        raise KeyError(
            f"{measurement!r} of 'query' was not recorded; this store has {sorted(have)}. Record "
            f"it with sample(..., measurements=[…])."
        )


def covariance_of(
    store: Store,
    measurement: str = "loss",
    *,
    query: Selection | None = None,
    train: Selection | None = None,
    center: str = "grand",
    correlation: bool = False,
    batches_per_chain: int | None = None,
    block: int = 4096,
    replicates: bool = False,
    errors: bool = True,
    mix: csr_array | None = None,
    query_mix: csr_array | None = None,
) -> CrossCovariance:
    """Covariances ``(Q, N)`` of a query measurement with the train losses of the healthy chains.

    Parameters
    ----------
    store
        Traces or sums.
    query, train
        Examples or tokens, all or some; by default all examples.
    measurement, center, correlation, batches_per_chain, block, replicates
        As of :func:`~bayesinf._covariance.cross_covariance`; batches are by default those of all
        chains, failed ones included, so that sums and traces have the same.
    errors
        As there; sums have their errors anyway.
    mix, query_mix
        ``(N, G)`` and ``(Q, H)``: covariances with ``losses @ mix`` instead, of ``φ @ query_mix``.

    Returns
    -------
    CrossCovariance
        The same to rounding, whichever store it is.

    Raises
    ------
    KeyError
        If the measurement, or its tokens, were not recorded.
    StoreError
        If there is no draw or no healthy chain.
    ValueError
        If the draws do not suffice for standard errors.
    TypeError
        If this is no store.
    """
    check_recorded(store, measurement)
    query, train = query or Selection(), train or Selection()
    options: dict[str, Any] = {
        "center": center, "correlation": correlation,
        "batches_per_chain": _per_chain(store, batches_per_chain),
        "block": block, "replicates": replicates,
    }  # fmt: skip
    if isinstance(store, StreamingCovariance):
        return store.covariance(measurement, query, train, mix=mix, query_mix=query_mix, **options)
    assert isinstance(store, TraceStore)
    x = _mixed(store, "query", measurement, query, query_mix)
    y = _mixed(store, "train", "loss", train, mix)
    return cross_covariance(x, y, errors=errors, **options)


def batch_shares(store: Store, batches_per_chain: int | None) -> np.ndarray:
    """Share of the draws that each batch of :func:`covariance_of` holds."""
    length = _lengths(store, batches_per_chain)
    shares: np.ndarray = length / length.sum()
    return shares


def freedom_of(store: Store, batches_per_chain: int | None) -> float:
    """Degrees of freedom of the standard errors of :func:`covariance_of`."""
    return degrees_of_freedom(_lengths(store, batches_per_chain))


def _lengths(store: Store, batches_per_chain: int | None) -> np.ndarray:
    chains = len(store.healthy)
    edges = batch_edges(chains, store.draws, _per_chain(store, batches_per_chain))
    return np.tile(np.diff(edges).astype(np.float64), chains)


def _per_chain(store: Store, asked: int | None) -> int | None:
    several = asked is None and len(store.healthy) > 1
    return batches_of_a_chain(store.chains) if several else asked


def _mixed(
    store: TraceStore, group: str, measurement: str, what: Selection, mix: csr_array | None
) -> np.ndarray:
    """Draws of a selection, or of weighted sums over it, a block of columns at a time."""
    if mix is None:
        return store.read(group, measurement, what)
    pick = np.arange(mix.shape[0]) if what.pick is None else what.pick
    out = np.zeros((len(store.healthy), store.draws, mix.shape[1]))
    step = max(1, _READ_VALUES // (store.draws * len(store.healthy)))
    for start in range(0, len(pick), step):
        own = slice(start, start + step)
        values = store.read(group, measurement, Selection(what.tokens, pick[own]))
        out += multiplied(values, mix[own])
    return out
