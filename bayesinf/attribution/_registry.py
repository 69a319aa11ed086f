"""The registry of attribution methods that are functions of a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import xarray as xr

__all__ = ["METHODS", "Method", "register"]


@dataclass(frozen=True)
class Method:
    """A row of the registry: a function ``(task, …) -> xr.Dataset`` and what it needs."""

    name: str
    function: Callable[..., xr.Dataset]
    estimand: str
    summary: str


METHODS: dict[str, Method] = {}


def register(
    estimand: str, summary: str
) -> Callable[[Callable[..., xr.Dataset]], Callable[..., xr.Dataset]]:
    """Add a method to the registry under its function's name."""

    def add(function: Callable[..., xr.Dataset]) -> Callable[..., xr.Dataset]:
        METHODS[function.__name__] = Method(function.__name__, function, estimand, summary)
        return function

    return add
