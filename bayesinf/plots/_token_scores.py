"""Token scores of one query sequence as plain arrays: what the page and the figure draw.

Shapes: ``R`` rows, the whole query first and then its ``R − 1`` scored tokens; ``N`` scored
training tokens, those of a sequence side by side in the order of their positions; ``S`` training
sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr

from bayesinf.plots._token_sums import (
    HalfWidths,
    bounded_error,
    exact_error,
    half_width,
    over_sequences,
    sort_tokens,
    with_whole,
)
from bayesinf.plots._token_texts import Axis, Passage, Texts, make_passage, read_axis

__all__ = ["MethodScores", "Sums", "TokenScores", "read_token_scores"]

Sums = xr.Dataset | Sequence[xr.Dataset]
"""Scores of the same method and sequences, summed over tokens of the query, the train, or both."""


@dataclass(frozen=True)
class MethodScores:
    """Scores of one method.

    Attributes
    ----------
    name
        As it is shown.
    estimand
        ``"influence"`` or ``"similarity"``.
    tokens
        ``(R, N)``.
    sums
        ``(R, S)``: ``tokens`` summed over each sequence.
    error
        Half the widths of their intervals, where the method has any.
    """

    name: str
    estimand: str
    tokens: np.ndarray
    sums: np.ndarray
    error: HalfWidths | None


@dataclass(frozen=True)
class TokenScores:
    """All that is shown of one query.

    Attributes
    ----------
    query
        Its text; row ``r`` is token ``r − 1`` of ``query.scored``.
    train
        The sequences.
    starts
        ``(S + 1,)``: where each sequence's tokens begin.
    methods
        Their scores.
    available
        How many training sequences there are scores of.
    """

    query: Passage
    train: tuple[Passage, ...]
    starts: np.ndarray
    methods: tuple[MethodScores, ...]
    available: int

    def select(self, count: int) -> TokenScores:
        """Keep the sequences that matter most to the query or one of its tokens, by any method."""
        if count >= len(self.train):
            return self
        best = np.max([_share_of_largest(m.sums).max(0) for m in self.methods], axis=0)
        kept = np.sort(np.argsort(-best, kind="stable")[:count])
        spans = [np.arange(self.starts[k], self.starts[k + 1]) for k in kept]
        return replace(
            self,
            train=tuple(self.train[k] for k in kept),
            starts=np.cumsum([0, *map(len, spans)]),
            methods=tuple(_columns(m, np.concatenate(spans), kept) for m in self.methods),
        )


def read_token_scores(
    scores: xr.Dataset | Mapping[str, xr.Dataset],
    query: Any,
    sums: Sums | Mapping[str, Sums] | None,
    texts: Texts | None,
    n_sequences: int,
) -> TokenScores:
    """Check and sort scores; arguments and errors as for :func:`token_influence`."""
    if n_sequences < 1:
        raise ValueError(f"n_sequences must be at least 1; got {n_sequences}.")
    named = _by_name(scores)
    coarse = _sums_by_name(sums, named)
    found = {name: _check(name, dataset, query) for name, dataset in named.items()}
    first = next(iter(found.values()))
    train, own = read_axis(first, "train"), _query_axis(first)
    methods = []
    for name, dataset in found.items():
        axis = read_axis(dataset, "train", like=train)
        rows = _query_axis(dataset)
        _require_same(next(iter(found)), name, (train, own), (axis, rows))
        method = _method(name, dataset, axis, rows)
        methods.append(_with_sums(method, coarse.get(name, ()), query, (axis, rows)))
    passage = (
        make_passage(own, 0, "query", texts)
        if own is not None
        else _bare_query(query, (texts or {}).get("query", {}).get(query, ()))
    )
    passages = tuple(make_passage(train, k, "train", texts) for k in range(len(train.ids)))
    whole = TokenScores(passage, passages, train.starts, tuple(methods), len(passages))
    return whole.select(n_sequences)


def _by_name(scores: xr.Dataset | Mapping[str, xr.Dataset]) -> dict[str, xr.Dataset]:
    if isinstance(scores, xr.Dataset):
        return {str(scores.attrs.get("method", "scores")): scores}
    if not scores:
        raise ValueError("there are no scores; give a dataset, or {'BIF': scores, …}.")
    return {str(name): scores[name] for name in scores}


def _sums_by_name(
    sums: Sums | Mapping[str, Sums] | None, named: Mapping[str, xr.Dataset]
) -> dict[str, tuple[xr.Dataset, ...]]:
    if sums is None:
        return {}
    if isinstance(sums, xr.Dataset) or not isinstance(sums, Mapping):
        if len(named) > 1:
            raise ValueError(
                f"there are scores of {list(named)}, and sums= does not say whose it is; give "
                f"sums={{{next(iter(named))!r}: …}}."
            )
        sums = {next(iter(named)): sums}
    unknown = [name for name in sums if name not in named]
    if unknown:
        raise ValueError(f"sums= has {unknown}, which scores have not; those are {list(named)}.")
    return {
        str(name): (part,) if isinstance(part, xr.Dataset) else tuple(part)
        for name, part in sums.items()
    }


def _check(name: str, scores: xr.Dataset, query: Any) -> xr.Dataset:
    """Refuse what cannot be drawn, and keep the rows of the query."""
    if "influence" not in scores:
        raise ValueError(
            f"{name}: scores have the variable 'influence'; this dataset has "
            f"{[str(v) for v in scores.data_vars]}."
        )
    dims = {str(d) for d in scores["influence"].dims}
    if dims not in ({"query_token", "train_token"}, {"query", "train_token"}):
        raise ValueError(
            f"{name}: a token map needs influence with the dimensions 'query_token' (or 'query') "
            f"and 'train_token'; this one has {sorted(dims)}. Usual causes: scores of whole "
            f"sequences, or top_k=, which keeps no whole row. Score tokens by "
            f"bi.bif(traces, tokens='both') or "
            f"bi.ekfac(task, train_tokens='loss', query_tokens='loss', …)."
        )
    row = "query_token" if "query_token" in dims else "query"
    ids = scores["query"].values.tolist() if "query" in scores.coords else []
    entries = [k for k, key in enumerate(ids) if key == query]
    if not entries:
        known = list(dict.fromkeys(ids))
        more = ", …" if len(known) > 8 else ""
        raise ValueError(
            f"{name}: there is no query {query!r} ({type(query).__name__}); the scores have "
            f"{', '.join(map(repr, known[:8])) or 'no coordinate query'}{more}. Choose one: "
            f"query={(known or ['id'])[0]!r}."
        )
    if "mcse" in scores and "mcse_df" not in scores.attrs:
        raise ValueError(
            f"{name}: the scores have mcse but no attrs['mcse_df'], the degrees of freedom of its "
            f"t interval. bi.bif writes it; usual cause: a dataset that lost its attrs on the way. "
            f"Put it back: scores.attrs['mcse_df'] = original.attrs['mcse_df']."
        )
    kept = scores[[v for v in ("influence", "mcse") if v in scores]].isel({row: entries})
    kept = kept.transpose(row, "train_token").load()
    for variable in kept:
        _require_finite(name, str(variable), kept[variable])
    return kept


def _require_finite(name: str, variable: str, array: xr.DataArray) -> None:
    bad = ~np.isfinite(array.values)
    if bad.any():
        at = array[tuple(np.argwhere(bad)[0])]
        place = [f"{c} {at[c].item()!r}" for c in ("query_position", "train", "train_position")
                 if c in at.coords]  # fmt: skip
        raise ValueError(
            f"{name}: {variable} is not finite for {int(bad.sum())} of {bad.size} pairs of tokens, "
            f"first {', '.join(place)}. Usual causes: a diverged chain, or datasets aligned by "
            f"outer joins. Leave those tokens out: scores.isel(train_token=…)."
        )


def _query_axis(scores: xr.Dataset) -> Axis | None:
    return read_axis(scores, "query") if "query_token" in scores.dims else None


def _require_same(
    first: str,
    name: str,
    expected: tuple[Axis, Axis | None],
    got: tuple[Axis, Axis | None],
) -> None:
    for split, a, b in zip(("train", "query"), expected, got, strict=True):
        if (a is None) != (b is None) or (a is not None and b is not None and not a.same_tokens(b)):
            sizes = [0 if x is None else len(x.order) for x in (a, b)]
            raise ValueError(
                f"{first} and {name} have scores of different {split} tokens ({sizes[0]} and "
                f"{sizes[1]}). Usual causes: other sequences, or tokens='position' for one and "
                f"'loss' for the other. BIF scores the tokens of losses: make the others with "
                f"bi.ekfac(task, train_tokens='loss', query_tokens='loss', …)."
            )


def _bare_query(query: Any, pieces: Sequence[str]) -> Passage:
    """Passage of a query that has one score, not one a token."""
    return Passage(
        str(query), tuple(map(str, pieces)), np.arange(len(pieces)), np.zeros(0, np.int64)
    )


def _method(name: str, scores: xr.Dataset, axis: Axis, rows: Axis | None) -> MethodScores:
    tokens = with_whole(sort_tokens(scores["influence"], axis, rows), rows)
    error = None
    if "mcse" in scores:
        half = half_width(scores) * sort_tokens(scores["mcse"], axis, rows)
        error = bounded_error(half, axis, rows)
    estimand = str(scores.attrs.get("estimand", "influence"))
    return MethodScores(name, estimand, tokens, over_sequences(tokens, axis), error)


def _with_sums(
    method: MethodScores,
    parts: Sequence[xr.Dataset],
    query: Any,
    axes: tuple[Axis, Axis | None],
) -> MethodScores:
    for part in parts:
        if method.error is None:
            raise ValueError(
                f"{method.name}: sums= gives the errors of sums, and these scores have no mcse; "
                f"classical methods have none. Leave {method.name!r} out of sums=."
            )
        values = method.tokens, method.sums
        error = exact_error(method.name, values, method.error, part, query, axes)
        method = replace(method, error=error)
    return method


def _share_of_largest(rows: np.ndarray) -> np.ndarray:
    largest = np.abs(rows).max(1, keepdims=True)
    return np.abs(rows) / np.where(largest > 0, largest, 1)


def _columns(method: MethodScores, tokens: np.ndarray, sequences: np.ndarray) -> MethodScores:
    error = method.error
    return replace(
        method,
        tokens=method.tokens[:, tokens],
        sums=method.sums[:, sequences],
        error=error
        and replace(error, tokens=error.tokens[:, tokens], sums=error.sums[:, sequences]),
    )
