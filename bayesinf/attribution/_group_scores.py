"""Sums of scores over groups of examples or tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from bayesinf._axes import Axis
from bayesinf._scores import label_scores, text_labels
from bayesinf.attribution._groups import GroupsLike, resolve_groups

__all__ = ["group_scores"]


def group_scores(
    scores: xr.Dataset, groups: GroupsLike, *, query_groups: GroupsLike | None = None
) -> xr.Dataset:
    r"""Score of every group of training examples on every query: the sum of its examples' scores.

    .. math:: \mathrm{influence}[q, S] = \sum_{i \in S} \mathrm{influence}[q, i]

    To first order removing the whole group changes φ by minus that. Of the Bayesian influence
    function :func:`bayesinf.group_influence` gives the same sums with their standard errors, which
    do not follow from those of the terms.

    Parameters
    ----------
    scores
        Of any method.
    groups
        As of :func:`bayesinf.group_influence`: ``{name: ids}``, labels along ``train`` (or
        ``train_token``), or weights, such as the masks of :func:`bayesinf.random_subsets`.
    query_groups
        The same for queries: φ is then summed over each group.

    Returns
    -------
    xr.Dataset
        ``influence``, dims ``query`` (or ``query_group``) and ``group`` (or an array's own
        dimension).

    Raises
    ------
    ValueError
        If scores are not by query and train, a group is empty, or has an example that was not
        scored or stands in it twice, or labels do not fit the tokens.
    """
    held = _Scored(scores)
    columns = resolve_groups(groups, held, "train", "group")
    _require_dim(scores, "train_token" if columns.tokens else "train")
    values = scores["influence"].transpose(..., "train_token" if columns.tokens else "train")
    (row_dim,) = (str(d) for d in values.dims[:-1])
    summed = np.asarray(values.values.astype(np.float64) @ columns.weights)
    coords: dict[str, Any] = {
        str(name): own for name, own in scores.coords.items() if own.dims == (row_dim,)
    }
    if query_groups is not None:
        rows = resolve_groups(query_groups, held, "query", "query_group")
        _require_dim(scores, "query_token" if rows.tokens else "query")
        summed, row_dim = np.asarray(rows.weights.T @ summed), rows.dim
        coords = {row_dim: text_labels(rows.names)}
    coords[columns.dim] = text_labels(columns.names)
    attrs = {k: v for k, v in scores.attrs.items() if k not in ("mcse_df", "relative_mcse")}
    arrays: dict[str, Any] = {"influence": ((row_dim, columns.dim), summed)}
    return label_scores(arrays, coords, attrs.pop("method"), attrs.pop("estimand"), attrs)


@dataclass(frozen=True)
class _Scored:
    """Axes of a score matrix."""

    scores: xr.Dataset

    def axis(self, split: str, *, tokens: bool = False) -> Axis:
        """Examples, or tokens in the order of the scores."""
        dim = f"{split}_token" if tokens else split
        _require_dim(self.scores, dim)
        ids = self.scores[split].values
        if not tokens:
            return Axis(split, ids)
        first = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
        name = f"{split}_token_id"
        return Axis(
            split,
            ids[first],
            np.append(first, len(ids)),
            self.scores[f"{split}_position"].values,
            self.scores[name].values if name in self.scores.coords else None,
        )


def _require_dim(scores: xr.Dataset, dim: str) -> None:
    if dim not in scores["influence"].dims or scores["influence"].ndim != 2:
        raise ValueError(
            f"groups along {dim!r} need scores influence(…, {dim}); got "
            f"{scores['influence'].dims}. Groups of tokens need scores of tokens, groups of "
            f"examples those of examples; pairs='self' and top_k= have no sums."
        )
