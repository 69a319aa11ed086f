"""What a store is to the driver, and covariances from whatever store there is."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from bayesinf._chains import FailedChainsWarning
from bayesinf._covariance import CrossCovariance, batches_of_a_chain, cross_covariance
from bayesinf._disk import StoreError
from bayesinf._streaming import StreamingCovariance
from bayesinf._traces import TraceStore

__all__ = ["Store", "check_recorded", "covariance_of"]


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
    center: str = "grand",
    correlation: bool = False,
    batches_per_chain: int | None = None,
    block: int = 4096,
    replicates: bool = False,
    mix: np.ndarray | None = None,
) -> CrossCovariance:
    """Covariances ``(Q, N)`` of a query measurement with the train losses of the healthy chains.

    Parameters
    ----------
    store
        Traces or sums.
    measurement, center, correlation, batches_per_chain, block, replicates
        As of :func:`~bayesinf._covariance.cross_covariance`; batches are by default those of all
        chains, failed ones included, so that sums and traces have the same.
    mix
        ``(N, G)``: covariances with ``losses @ mix`` instead.

    Returns
    -------
    CrossCovariance
        The same to rounding, whichever store it is.

    Raises
    ------
    KeyError
        If the measurement was not recorded.
    StoreError
        If there is no draw or no healthy chain.
    ValueError
        If the draws do not suffice for standard errors.
    TypeError
        If this is no store.

    Warns
    -----
    FailedChainsWarning
        Where chains failed.
    """
    check_recorded(store, measurement)
    if batches_per_chain is None and len(store.healthy) > 1:
        batches_per_chain = batches_of_a_chain(store.chains)
    options: dict[str, Any] = {
        "center": center, "correlation": correlation, "batches_per_chain": batches_per_chain,
        "block": block, "replicates": replicates,
    }  # fmt: skip
    if isinstance(store, StreamingCovariance):
        return store.covariance(measurement, mix=mix, **options)
    assert isinstance(store, TraceStore)
    y = store.values("train").values
    with warnings.catch_warnings():  # the failed chains were named just now
        warnings.simplefilter("ignore", FailedChainsWarning)
        x = store.values("query", measurement).values
    if mix is not None:
        y = np.stack([chain.astype(np.float64) @ mix for chain in y])
    return cross_covariance(x, y, **options)
