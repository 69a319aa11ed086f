r"""How precise scores are, how many draws a wanted precision takes, and sampling until it is there.

The precision of scores is one number: the root mean square of ``mcse`` over a query's train
examples, divided by the standard deviation of its scores over them, and of all queries the median.
Being relative, it has no unit. At precision ``r`` about ``r²`` of the variance between a query's
scores is Monte-Carlo noise; with no signal at all it is near 1. As the noise falls with the draws
``T`` and the signal stays, ``r²/(1 − r²) ∝ 1/T``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bayesinf._chains import FailedChainsWarning
from bayesinf._diagnostics import diagnose
from bayesinf._store import Store, covariance_of
from bayesinf._streaming import StreamingCovariance
from bayesinf._traces import TraceStore

__all__ = [
    "MonteCarloWarning",
    "Until",
    "Watch",
    "draws_needed",
    "median_relative",
    "relative_mcse",
]

_GROWTH = 1.25
_FEWEST = 8
_DIAGNOSED = 100


class MonteCarloWarning(UserWarning):
    """Scores are less precise than was asked for."""


def relative_mcse(value: np.ndarray, mcse: np.ndarray) -> float:
    """``√(Σ mcse² / Σ (value − mean)²)`` over the ``N`` of each row ``(Q, N)``; the median row's.

    Rows that do not vary are left out; infinite where none does.
    """
    return median_relative(value.var(axis=1), np.square(mcse).mean(axis=1))


def median_relative(signal: np.ndarray, noise: np.ndarray) -> float:
    """The same from the variance of each row's values and the mean of its squared errors."""
    varies = signal > 0
    if not varies.any():
        return math.inf
    return float(np.median(np.sqrt(noise[varies] / signal[varies])))


def draws_needed(draws: int, precision: float, wanted: float) -> int | None:
    """Draws at which scores that have ``precision`` after ``draws`` should reach the wanted one.

    None where noise covers the signal (precision of 1 or more), so that nothing can be foretold.
    """
    if precision <= wanted:
        return draws
    if precision >= 1:
        return None
    odds, target = precision**2 / (1 - precision**2), wanted**2 / (1 - wanted**2)
    return math.ceil(draws * odds / target)


def check_wanted(name: str, wanted: float) -> None:
    """Raise ``ValueError`` where a wanted precision is not between 0 and 1."""
    if not 0 < wanted < 1:
        raise ValueError(
            f"{name} must lie between 0 and 1, as it is relative to the spread of a query's "
            f"scores; got {wanted}. At 0.3 about a tenth of their variance is noise."
        )


@dataclass(frozen=True)
class Until:
    """When :func:`bayesinf.sample` may stop before its ``draws``; whichever comes first.

    Parameters
    ----------
    mcse
        Wanted precision of the influence: the root mean square over train examples of the
        Monte-Carlo standard error, relative to the standard deviation of the query's scores over
        them; the median over queries. At ``r`` about
        ``r²`` of the variance between scores is noise. Believed only once
        :func:`bayesinf.diagnose` finds no fault with the chains (and a single chain is a fault).
    seconds
        Time budget of the sampling, over all calls on this store. Warm-up counts and is never cut
        short, and at least one draw is made.
    measurement
        Of the queries, for ``mcse``.

    Raises
    ------
    ValueError
        If neither is given, or one is out of range.

    Notes
    -----
    A run that stops once the standard errors are small stops a little too readily where they happen
    to be underestimated; the bias vanishes as the wanted precision does (Glynn and Whitt 1992), and
    none but the number of draws depends on it.
    """

    mcse: float | None = None
    seconds: float | None = None
    measurement: str = "loss"

    def __post_init__(self) -> None:
        if self.mcse is None and self.seconds is None:
            raise ValueError("Until() needs mcse=, seconds=, or both; got neither.")
        if self.mcse is not None:
            check_wanted("mcse", self.mcse)
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds must be > 0; got {self.seconds}.")

    def __call__(self, store: Store) -> bool:
        """Whether the draws in the store are enough."""
        if self.seconds is not None and store.commit_facts.get("seconds", 0.0) >= self.seconds:
            return True
        if self.mcse is None or store.draws < _FEWEST:
            return False
        result = covariance_of(store, self.measurement)
        precise = relative_mcse(result.value, result.mcse) <= self.mcse
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FailedChainsWarning)  # the driver names them
            assert isinstance(store, (TraceStore, StreamingCovariance))  # or it had been refused
            return precise and bool(diagnose(store, max_examples=_DIAGNOSED).attrs["ok"])


class Watch:
    """When to ask whether the draws are enough: every time they grew by a quarter."""

    def __init__(self, until: Callable[[Store], bool] | None) -> None:
        self.until = until
        self.next = _FEWEST
        self.seconds = until.seconds if isinstance(until, Until) else None

    def due(self, draws: int, seconds: float) -> bool:
        """Whether to ask after so many draws and seconds of sampling."""
        late = self.seconds is not None and seconds >= self.seconds
        return self.until is not None and (late or draws >= self.next)

    def enough(self, store: Store) -> bool:
        """Ask."""
        if self.until is None or not store.draws or not store.healthy:
            return False
        self.next = math.ceil(store.draws * _GROWTH)
        return bool(self.until(store))
