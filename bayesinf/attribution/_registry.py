"""The registry of attribution methods that are functions of a task.

A row says what a method is, which options it takes, and what it needs of a task. The library's own
functions join by ``@register(…)``; other packages join by an entry point
(:mod:`bayesinf.attribution._entry_points`).
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args, is_typeddict

import xarray as xr

from bayesinf._scores import ESTIMANDS
from bayesinf._task import Task
from bayesinf.attribution._needs import Need

__all__ = ["METHODS", "Method", "register"]


@dataclass(frozen=True)
class Method:
    """A row of the registry: a function ``(task, *, …) -> xr.Dataset`` and what it needs.

    Attributes
    ----------
    name
        By which :func:`bayesinf.attribute` finds it.
    function
        Takes a :class:`bayesinf.Task` and keywords that are named in its signature, or in a
        ``TypedDict`` as ``**options: Unpack[Options]``; returns scores, as from
        :func:`bayesinf.make_scores`.
    estimand
        ``"influence"`` (values mean something) or ``"similarity"`` (only ranks do).
    summary
        What it is, in a few words.
    needs
        What it needs of a task.
    one_of
        Groups of options of which exactly one must be given.

    Raises
    ------
    ValueError
        If the name is no identifier, or the estimand is unknown.

    Examples
    --------
    >>> import numpy as np, bayesinf as bi
    >>> def constant(task, *, value=-1.0):
    ...     scores = np.full((len(task.query), task.n), value)
    ...     return bi.make_scores(scores, query=task.query.ids, train=task.train.ids,
    ...                           method="constant", estimand="similarity")
    >>> bi.Method("constant", constant, "similarity", "one number for all").takes
    frozenset({'value'})
    """

    name: str
    function: Callable[..., xr.Dataset]
    estimand: str
    summary: str
    needs: tuple[Need, ...] = ()
    one_of: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"a method's name must be an identifier; got {self.name!r}.")
        if self.estimand not in ESTIMANDS:
            raise ValueError(
                f"{self.name}: the estimand must be one of {ESTIMANDS}; got {self.estimand!r}."
            )

    @cached_property
    def options(self) -> Mapping[str, Any]:
        """Annotation, as text or object, of every option; ``TypeError`` where they have no name."""
        found: dict[str, Any] = {}
        for parameter in self._parameters:
            if parameter.kind is not parameter.VAR_KEYWORD:
                found[parameter.name] = parameter.annotation
                continue
            hint = typing.get_type_hints(self.function).get(parameter.name)
            (typed,) = get_args(hint) or (None,)
            if not is_typeddict(typed):
                raise TypeError(
                    f"{self.name} takes **{parameter.name} without saying which. Name its options "
                    f"in the signature, or in a TypedDict: **{parameter.name}: Unpack[Options]."
                )
            found |= typed.__annotations__
        return found

    @property
    def takes(self) -> frozenset[str]:
        """Names of its options."""
        return frozenset(self.options)

    @property
    def required(self) -> tuple[str, ...]:
        """Options that have no default."""
        empty = inspect.Parameter.empty
        named = [p for p in self._parameters if p.kind is not p.VAR_KEYWORD]
        return tuple(p.name for p in named if p.default is empty)

    @property
    def paths(self) -> tuple[str, ...]:
        """Options that say where files go."""
        return tuple(name for name, kind in self.options.items() if "PathLike" in str(kind))

    def missing(self, task: Task, options: Mapping[str, Any] | None = None) -> tuple[str, ...]:
        """Return why it does not run on a task, with these options; nothing where it does."""
        found = (need.missing(task, options or {}) for need in self.needs)
        return tuple(reason for reason in found if reason is not None)

    @property
    def _parameters(self) -> list[inspect.Parameter]:
        """All but the task."""
        found = list(inspect.signature(self.function).parameters.values())[1:]
        return [p for p in found if p.kind is not p.VAR_POSITIONAL]


METHODS: dict[str, Method] = {}


def register(
    estimand: str,
    summary: str,
    *,
    needs: tuple[Need, ...] = (),
    one_of: tuple[tuple[str, ...], ...] = (),
) -> Callable[[Callable[..., xr.Dataset]], Callable[..., xr.Dataset]]:
    """Add a method to the registry under its function's name.

    Parameters
    ----------
    estimand, summary, needs, one_of
        As of :class:`Method`.

    Raises
    ------
    ValueError
        If another function has the name.
    """

    def add(function: Callable[..., xr.Dataset]) -> Callable[..., xr.Dataset]:
        name = function.__name__
        held = METHODS.get(name)
        if held is not None and held.function.__module__ != function.__module__:
            raise ValueError(
                f"two functions are registered as {name!r}: one of {held.function.__module__} and "
                f"one of {function.__module__}. Rename one of them."
            )
        METHODS[name] = Method(name, function, estimand, summary, needs, one_of)
        return function

    return add
