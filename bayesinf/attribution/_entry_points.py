"""Methods of other packages, found by entry point and loaded when one is asked for.

A package adds a method without touching this library: an object :class:`bayesinf.Method`, and in
its ``pyproject.toml`` ::

    [project.entry-points."bayesinf.methods"]
    nearest = "my_package.nearest:METHOD"

where the name on the left is the method's own.
"""

from __future__ import annotations

import difflib
import warnings
from importlib.metadata import EntryPoint, entry_points

from bayesinf.attribution._registry import METHODS, Method

__all__ = ["GROUP", "MethodWarning", "all_methods", "find_method"]

GROUP = "bayesinf.methods"
OWN = "bayesinf"


class MethodWarning(UserWarning):
    """A method of another package does not load, or one of several was left out."""


def find_method(name: str) -> Method:
    """Return the method of a name.

    Parameters
    ----------
    name
        Of this library, or of an entry point.

    Raises
    ------
    ValueError
        If there is none, with the nearest names, or a name is taken twice.
    ImportError
        If its entry point does not load.
    """
    points = _points()
    if name in METHODS:
        return METHODS[name]
    if name in points:
        try:
            return _load(points[name])
        except Exception as error:
            raise ImportError(_broken(points[name], error)) from error
    known = sorted({*METHODS, *points})
    near = difflib.get_close_matches(str(name), known)
    hint = f"Nearest: {', '.join(near)}." if near else f"There are {', '.join(known)}."
    raise ValueError(f"there is no method {name!r}. {hint} available_methods(task) lists them.")


def all_methods() -> dict[str, tuple[Method, str]]:
    """Return every method that loads, and the package it comes from, by name.

    Raises
    ------
    ValueError
        If a name is taken twice.

    Warns
    -----
    MethodWarning
        By entry point that does not load; it is left out.
    """
    found = {name: (method, OWN) for name, method in METHODS.items()}
    for name, point in _points().items():
        try:
            found[name] = (_load(point), _package(point))
        except Exception as error:
            warnings.warn(f"{_broken(point, error)} It is left out.", MethodWarning, stacklevel=3)
    return dict(sorted(found.items()))


def _points() -> dict[str, EntryPoint]:
    """Entry points by name, none of which is loaded."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name in METHODS or point.name in found:
            other = OWN if point.name in METHODS else _package(found[point.name])
            raise ValueError(
                f"two methods are called {point.name!r}: one of {other} and one of "
                f"{_package(point)} (entry point {point.value!r}). Rename the entry point and its "
                f"Method, or uninstall one of the packages."
            )
        found[point.name] = point
    return found


def _load(point: EntryPoint) -> Method:
    loaded = point.load()
    if not isinstance(loaded, Method):
        raise TypeError(
            f"it is a {type(loaded).__name__}, and must be a bayesinf.Method(name, function, "
            f"estimand, summary)"
        )
    if loaded.name != point.name:
        raise ValueError(f"its Method is called {loaded.name!r}")
    _ = loaded.options  # that they can be told
    return loaded


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module


def _broken(point: EntryPoint, error: Exception) -> str:
    return (
        f"the method {point.name!r} of {_package(point)} does not load from its entry point "
        f"{point.value!r}: {type(error).__name__}: {error}."
    )
