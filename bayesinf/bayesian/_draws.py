"""Draws of ArviZ data as arrays: pointwise log-likelihoods and posterior quantities."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from bayesinf._scores import text_labels

__all__ = ["Draws", "Quantities", "read_log_likelihood", "read_quantities", "read_tree"]

Quantities = Mapping[str, Callable[[xr.Dataset], xr.DataArray] | xr.DataArray]
SAMPLE_DIMS = ("chain", "draw")


@dataclass(frozen=True)
class Draws:
    """``values (C, T, n)`` in float64 and their ``labels (n,)``, as ids of scores have them.

    ``variables (n,)``: of several observed variables the one that each column is of.
    """

    values: np.ndarray
    labels: np.ndarray
    variables: np.ndarray | None = None

    def coords(self, dim: str) -> dict[str, Any]:
        """Coordinates of ``dim``: labels and, of several variables, ``likelihood (dim)``."""
        found: dict[str, Any] = {dim: self.labels}
        return found if self.variables is None else found | {"likelihood": (dim, self.variables)}


def read_tree(data: Any) -> xr.DataTree:
    """Whatever ArviZ reads, as a ``DataTree``.

    Raises
    ------
    TypeError
        If ArviZ does not read it.
    """
    from arviz_base import convert_to_datatree

    try:
        tree: xr.DataTree = convert_to_datatree(data)
    except ValueError as error:
        raise TypeError(
            f"ArviZ does not read a {type(data).__name__}. Convert it first: "
            f"arviz_base.from_numpyro(mcmc), pymc's own result, from_cmdstanpy(fit), or "
            f"from_dict({{'posterior': …, 'log_likelihood': …}})."
        ) from error
    return tree


def read_log_likelihood(
    data: Any,
    log_likelihood_var_name: str | Sequence[str] | None = None,
    sample_dims: str | Sequence[str] | None = None,
) -> Draws:
    """Pointwise log-likelihoods, one column per observation.

    Parameters
    ----------
    data
        What ArviZ reads.
    log_likelihood_var_name
        Variables of the group ``log_likelihood``, one or several; all by default.
    sample_dims
        Chain and draw, or the one dimension of draws; default ``("chain", "draw")``.

    Returns
    -------
    Draws
        Labels are the coordinate of the observations; with several dimensions, their coordinates
        joined by commas. Of several variables the observations stand one after the other, labelled
        as ``y[3]``.

    Raises
    ------
    KeyError
        If there is no such group or variable.
    ValueError
        If dimensions of draws are missing, a log-likelihood is not pointwise, or a value is not
        finite.
    """
    dataset = _group(read_tree(data), "log_likelihood")
    names = [str(name) for name in dataset.data_vars]
    wanted = log_likelihood_var_name
    chosen = [wanted] if isinstance(wanted, str) else names if wanted is None else list(wanted)
    unknown = [name for name in chosen if name not in names]
    if unknown or not chosen or len(set(chosen)) < len(chosen):
        raise KeyError(
            f"the group log_likelihood has no variable {unknown[0]!r}; it has {names}."
            if unknown
            else f"log_likelihood_var_name= must name variables of {names}, each once; got "
            f"{chosen}."
        )
    found = [_pointwise(dataset[name], name, sample_dims) for name in chosen]
    if len(found) == 1:
        return found[0]
    ids = [f"{n}[{x}]" for n, d in zip(chosen, found, strict=True) for x in d.labels.tolist()]
    of = np.repeat(chosen, [len(draws.labels) for draws in found])
    return Draws(
        np.concatenate([draws.values for draws in found], axis=2),
        text_labels(np.array(ids, dtype=object)),
        text_labels(of),
    )


def _pointwise(array: xr.DataArray, name: str, sample_dims: str | Sequence[str] | None) -> Draws:
    """Draws of one variable of the group ``log_likelihood``."""
    values, labels = _flat(array, f"log_likelihood {name}", sample_dims)
    if labels is None:
        raise ValueError(
            f"log_likelihood {name} has dims {array.dims}: one number per draw, as of a joint "
            f"log-likelihood. Influence of cases needs one per observation: keep the log density "
            f"of each observation apart instead of their sum, or leave this variable out by "
            f"log_likelihood_var_name=."
        )
    ids = labels if labels.dtype.kind in "iu" else np.array([str(x) for x in labels], dtype=object)
    return Draws(values, text_labels(ids))


def read_quantities(
    data: Any,
    var_names: str | Sequence[str] | None = None,
    group: str = "posterior",
    quantities: Quantities | None = None,
    sample_dims: str | Sequence[str] | None = None,
) -> Draws:
    """Posterior quantities φ, one column per element, labelled as ``theta[Choate, 0]``.

    Parameters
    ----------
    data
        What ArviZ reads.
    var_names
        Variables of ``group``; all, if neither these nor ``quantities`` are given.
    group
        Of the variables, such as ``posterior``, ``log_likelihood``, ``posterior_predictive``.
    quantities
        By name, functions of the group as a ``Dataset``, or arrays, with the dimensions of draws.
    sample_dims
        As of :func:`read_log_likelihood`.

    Returns
    -------
    Draws
        Of all elements.

    Raises
    ------
    KeyError
        If there is no such group or variable.
    ValueError
        If dimensions of draws are missing, or a value is not finite.
    """
    arrays: dict[str, xr.DataArray] = {}
    if var_names is not None or quantities is None:
        dataset = _group(read_tree(data), group)
        wanted = [var_names] if isinstance(var_names, str) else var_names
        for name in dataset.data_vars if wanted is None else wanted:
            if name not in dataset.data_vars:
                raise KeyError(
                    f"the group {group} has no variable {name!r}; it has "
                    f"{[str(v) for v in dataset.data_vars]}."
                )
            arrays[str(name)] = dataset[name]
    for name, what in (quantities or {}).items():
        made = what(_group(read_tree(data), group)) if callable(what) else what
        if not isinstance(made, xr.DataArray):
            raise ValueError(
                f"quantity {name!r} must be an xarray.DataArray with the dimensions of draws; got "
                f"a {type(made).__name__}. Compute it from the Dataset's own variables: "
                f"lambda p: p['a'] / p['b']."
            )
        arrays[name] = made
    columns, labels = [], []
    for name, array in arrays.items():
        values, inner = _flat(array, f"{group} {name}", sample_dims)
        columns.append(values)
        labels += [name] if inner is None else [f"{name}[{label}]" for label in inner]
    shapes = {column.shape[:2] for column in columns}
    if len(shapes) > 1:
        raise ValueError(f"quantities have different numbers of chains and draws: {shapes}.")
    return Draws(np.concatenate(columns, axis=2), text_labels(np.array(labels, dtype=object)))


def _group(tree: xr.DataTree, name: str) -> xr.Dataset:
    if name in tree.children:
        return tree[name].to_dataset()
    advice = (
        "Pointwise log-likelihoods are what influence of cases is made of. Ask for them: "
        "arviz_base.from_numpyro(mcmc, log_likelihood=True); pymc.compute_log_likelihood(data); in "
        "Stan a generated quantity log_lik[n], renamed to the group; or add the group by hand: "
        "data['log_likelihood'] = xr.Dataset({'y': log_p}) with dims chain, draw and observation"
        if name == "log_likelihood"
        else "Name one of these with group="
    )
    raise KeyError(f"there is no group {name!r}, only {sorted(tree.children)}. {advice}.")


def _flat(
    array: xr.DataArray, what: str, sample_dims: str | Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Values ``(C, T, n)`` and labels, which are None for a scalar."""
    dims = [sample_dims] if isinstance(sample_dims, str) else list(sample_dims or SAMPLE_DIMS)
    if len(dims) not in (1, 2) or any(dim not in array.dims for dim in dims):
        raise ValueError(
            f"{what} has dims {array.dims}, and draws were looked for along {tuple(dims)}. Say "
            f"which dimensions are chain and draw: sample_dims=('chain', 'draw'), or "
            f"sample_dims='sample' for draws of one chain."
        )
    inner = [dim for dim in array.dims if dim not in dims]
    values = array.transpose(*dims, *inner).values.astype(np.float64)
    values = values.reshape(*(values.shape[:2] if len(dims) == 2 else (1, len(values))), -1)
    labels = None
    if inner:
        parts = [array[dim].values for dim in inner]
        labels = parts[0]
        if len(parts) > 1:
            joined = [", ".join(map(str, label)) for label in itertools.product(*parts)]
            labels = np.array(joined, dtype=object)
    bad = ~np.isfinite(values)
    if bad.any():
        chain, draw, column = np.argwhere(bad)[0]
        where = "" if labels is None else f", element {labels[column]}"
        raise ValueError(
            f"{what} is not finite in {int(bad.sum())} of {bad.size} values, first in chain "
            f"{chain}, draw {draw}{where}. Usual causes: a missing observation, or a parameter at "
            f"the border of its support. Leave these observations or draws out with .sel()/.isel()."
        )
    return values, labels
