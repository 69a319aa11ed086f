"""The token page: one HTML file that shows which training tokens moved which query token."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xarray as xr

from bayesinf.plots._page import framed, make_page, save_page
from bayesinf.plots._token_pack import PAGE_BYTES, embedded_json, pack
from bayesinf.plots._token_scores import Sums, read_token_scores
from bayesinf.plots._token_texts import Texts

__all__ = ["TokenPage", "token_influence"]


@dataclass(frozen=True)
class TokenPage:
    """An HTML page; the last expression of a notebook cell shows it.

    Attributes
    ----------
    html
        The whole page: one string, which needs no other file and no network.
    """

    html: str = field(repr=False)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file and return its path."""
        return save_page(self.html, path)

    def _repr_html_(self) -> str:
        """Show the page inside a frame, which keeps its style and script from the notebook's."""
        return framed(self.html, "token influence")


def token_influence(
    scores: xr.Dataset | Mapping[str, xr.Dataset],
    *,
    query: Any,
    sums: Sums | Mapping[str, Sums] | None = None,
    texts: Texts | None = None,
    n_sequences: int = 200,
) -> TokenPage:
    r"""Make a page that shows which training tokens moved a query sequence, token by token.

    The query stands on top; pointing at one of its tokens colours the training tokens and sorts the
    training sequences by the sum of their tokens' influence on it. Without a choice it is the
    whole query's, the sum over its tokens. Negative = helpful: more of that token in training
    lowers the query's loss. Colours and bars run to the largest value of the method and row that
    is shown, as methods have scales of their own; numbers are as in ``scores``.

    Parameters
    ----------
    scores
        ``influence`` of dimensions ``query_token`` (or ``query``) and ``train_token``, with their
        coordinates ``query``, ``query_position``, ``query_token_text``, ``train``,
        ``train_position`` and ``train_token_text``; and, where known, ``mcse`` with
        ``attrs["mcse_df"]``, for 95 % intervals ``influence ± t·mcse``. Several methods, of the
        same tokens, by name: ``{"BIF": …, "EK-FAC": …}``.
    query
        Id of the query sequence.
    sums
        Scores of the same draws summed over query tokens, over training tokens, and over both, such
        as ``[bi.bif(traces, tokens="query"), bi.bif(traces, tokens="train"), bi.bif(traces)]``; by
        method where there are several. Their errors are those of sums. Without them the page shows
        an upper bound: the sum of the tokens' errors.
    texts
        Whole sequences, as pieces from position 0, so that tokens without a score (the first, a
        masked prompt) are shown too: ``{"train": {id: pieces}, "query": {id: pieces}}``. Default:
        the tokens that have scores.
    n_sequences
        Most training sequences on the page: those whose influence on the query or one of its tokens
        is the largest share of the largest, by any method.

    Returns
    -------
    TokenPage
        With ``.save(path)``. The page is under 3 MB where text and sums allow: to this end it holds
        for every query token only the strongest training tokens, as many as fit, rounded to 1/127
        of the largest, and says so. The whole query's row is complete, and sums over sequences are
        exact in float32.

    Raises
    ------
    ValueError
        If dimensions or coordinates are missing, the query is unknown, a text is, a score is not
        finite, methods have different tokens, or ``sums`` are not the scores' own.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> from bayesinf import plots
    >>> scores = xr.Dataset(
    ...     {"influence": (("query_token", "train_token"), np.array([[-2.0, 0.5], [1.0, 0.0]]))},
    ...     coords={
    ...         "query": ("query_token", ["q", "q"]),
    ...         "query_position": ("query_token", [1, 2]),
    ...         "query_token_text": ("query_token", [" is", " blue"]),
    ...         "train": ("train_token", ["a", "b"]),
    ...         "train_position": ("train_token", [1, 1]),
    ...         "train_token_text": ("train_token", [" sky", " sea"]),
    ...     },
    ... )
    >>> page = plots.token_influence(scores, query="q")
    >>> page.html.startswith("<!doctype html>")
    True
    """
    data = embedded_json(
        pack(
            read_token_scores(scores, query, sums, texts, n_sequences),
            PAGE_BYTES - len(make_page("token_page", data="").encode()),
        )
    )
    return TokenPage(make_page("token_page", data=data))
