"""The token figure: the strongest training sequences for a query, on paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from bayesinf.plots._token_scores import MethodScores, Sums, TokenScores, read_token_scores
from bayesinf.plots._token_texts import Passage, Texts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["excerpt", "token_figure", "wrap"]

HELPFUL, HARMFUL, INK, SOFT = "#5ca4dc", "#f49e4c", "#1c1e21", "#6b7079"
COLUMNS, LINES = 84, 3
FONT_SIZE, LINE_INCHES, BAR_INCHES, PAD_INCHES = 8.0, 0.17, 1.7, 0.3
CHARACTER_INCHES = 0.60205 * FONT_SIZE / 72  # an advance of DejaVu Sans Mono
FONT: dict[str, Any] = {
    "family": "DejaVu Sans Mono",
    "size": FONT_SIZE,
    "color": INK,
    "parse_math": False,
}


def token_figure(
    scores: xr.Dataset | Mapping[str, xr.Dataset],
    *,
    query: Any,
    query_token: int | None = None,
    sums: Sums | Mapping[str, Sums] | None = None,
    texts: Texts | None = None,
    n_sequences: int = 10,
) -> Figure:
    """Draw the training sequences that moved a query, or one of its tokens, most.

    The query stands on top, the token framed. Below, strongest first, is an excerpt of each
    sequence around its strongest tokens, coloured by their influence (blue helpful, orange harmful,
    to the largest absolute value drawn); beside it a bar for the sum over the whole sequence with
    its 95 % interval, dashed where that is only an upper bound. With several methods, texts, colour
    and order are of the first, and each has bars on a scale of its own.

    Parameters
    ----------
    scores, query, sums, texts
        As of :func:`token_influence`.
    query_token
        Position of the query token; default: the whole query, the sum over its tokens.
    n_sequences
        How many sequences, those of the largest ``|sum|`` by the first method.

    Returns
    -------
    Figure
        One axes with the texts, then one with bars for each method.

    Raises
    ------
    ValueError
        As of :func:`token_influence`, and if the query token has no score.
    ImportError
        If matplotlib is not installed.
    """
    if n_sequences < 1:
        raise ValueError(f"n_sequences must be at least 1; got {n_sequences}.")
    found = read_token_scores(scores, query, sums, texts, n_sequences=2**62)
    row = _row(found.query, query_token)
    strengths = np.abs(found.methods[0].sums[row])
    order = np.argsort(-strengths, kind="stable")[:n_sequences].tolist()
    values = [_values(found, row, s) for s in order]
    largest = max(np.abs(v).max() for v in values) or 1.0
    head = wrap(found.query.pieces or (f"query {found.query.id}",))
    blocks = [wrap(found.train[s].pieces, *excerpt(found.train[s].pieces, v))
              for s, v in zip(order, values, strict=True)]  # fmt: skip
    tops = np.cumsum([_height(head) + 0.6] + [_height(block) + 1.5 for block in blocks])
    figure, text, bars = _new_figure(float(tops[-1]), len(found.methods))
    framed = int(found.query.scored[row - 1]) if row else None
    _draw_lines(text, head, 0.0)
    _frame(text, [segment for segment in head if segment.piece == framed])
    for s, value, block, top in zip(order, values, blocks, tops[:-1].tolist(), strict=True):
        text.text(0, top + 0.5, found.train[s].id, va="center", **{**FONT, "color": SOFT})
        _draw_lines(text, block, top + 1, value / largest)
    middles = tops[:-1] + 1 + np.array([_height(block) / 2 for block in blocks])
    for axes, method in zip(bars, found.methods, strict=True):
        _draw_bars(axes, method, row, order, middles)
        axes.set_ylim(text.get_ylim())
    return figure


@dataclass(frozen=True)
class Segment:
    """A piece of text in its place: line and column, both from 0."""

    line: int
    column: int
    text: str
    piece: int


def wrap(pieces: Sequence[str], start: int = 0, stop: int | None = None) -> list[Segment]:
    """Break pieces ``start`` to ``stop`` into lines; an ellipsis marks what is left out."""
    stop = len(pieces) if stop is None else stop
    shown = [(k, _printable(pieces[k])) for k in range(start, stop)]
    shown = [(-1, "… ")] * (start > 0) + shown + [(-1, " …")] * (stop < len(pieces))
    found, line, column = [], 0, 0
    for k, text in shown:
        if column + len(text) > COLUMNS and column:
            line, column = line + 1, 0
        for cut in range(0, max(len(text), 1), COLUMNS):
            part = text[cut : cut + COLUMNS]
            line, column = (line + 1, 0) if cut else (line, column)
            found.append(Segment(line, column, part, k))
            column += len(part)
    return found


def excerpt(pieces: Sequence[str], values: np.ndarray) -> tuple[int, int]:
    """First and last (exclusive) of the neighbouring pieces that hold most of ``Σ|value|``.

    Parameters
    ----------
    pieces
        All of a sequence.
    values
        One a piece.

    Returns
    -------
    start, stop
        As much text as about ``LINES`` lines have room for.
    """
    ends = np.cumsum([0] + [len(_printable(piece)) for piece in pieces])
    weight = np.cumsum([0.0, *np.abs(values)])
    stops = np.searchsorted(ends, ends[:-1] + 0.9 * COLUMNS * LINES, side="right") - 1
    stops = np.maximum(stops, np.arange(1, len(pieces) + 1))
    start = int(np.argmax(weight[stops] - weight[:-1]))
    while start > 0 and stops[start - 1] == len(pieces):
        start -= 1  # at the end of a sequence there is room before
    return start, int(stops[start])


def _printable(piece: str) -> str:
    """The piece with signs for what cannot be seen, and a box for what the font lacks."""
    known = _characters()
    signs = {"\n": "↵", "\t": "→"}
    return "".join(signs.get(c, c if c.isprintable() and ord(c) in known else "□") for c in piece)


@cache
def _characters() -> frozenset[int]:
    from matplotlib import font_manager

    path = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans Mono"))
    return frozenset(font_manager.get_font(path).get_charmap())


def _row(query: Passage, position: int | None) -> int:
    if position is None:
        return 0
    scored = query.positions[query.scored].tolist()
    if position not in scored:
        known = f"{scored[0]} to {scored[-1]}" if scored else "none: its tokens have no scores"
        raise ValueError(
            f"query {query.id!r} has no score at position {position}; positions with one: {known}. "
            f"Leave query_token out for the whole query."
        )
    return int(scored.index(position)) + 1


def _values(scores: TokenScores, row: int, s: int) -> np.ndarray:
    """Influence of each piece of a sequence by the first method; 0 without a score."""
    values = np.zeros(len(scores.train[s].pieces))
    part = slice(scores.starts[s], scores.starts[s + 1])
    values[scores.train[s].scored] = scores.methods[0].tokens[row, part]
    return values


def _height(segments: list[Segment]) -> int:
    return segments[-1].line + 1


def _new_figure(lines: float, methods: int) -> tuple[Figure, Axes, list[Axes]]:
    """Figure whose text axes has one unit a character and one a line."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib, which is not installed: pip install 'bayesinf[plots]'"
        ) from error
    text_width, text_height = COLUMNS * CHARACTER_INCHES, lines * LINE_INCHES
    width = 2 * PAD_INCHES + text_width + methods * (BAR_INCHES + PAD_INCHES)
    height = text_height + 3 * PAD_INCHES
    figure = plt.figure(figsize=(width, height))

    def place(left: float, wide: float) -> Axes:
        box = left / width, 2 * PAD_INCHES / height, wide / width, text_height / height
        axes: Axes = figure.add_axes(box)
        return axes

    text = place(PAD_INCHES, text_width)
    text.set(xlim=(0, COLUMNS), ylim=(lines, 0))
    text.axis("off")
    first = 2 * PAD_INCHES + text_width
    bars = [place(first + k * (BAR_INCHES + PAD_INCHES), BAR_INCHES) for k in range(methods)]
    return figure, text, bars


def _draw_lines(
    axes: Axes, segments: list[Segment], top: float, shares: np.ndarray | None = None
) -> None:
    """One text a line; ``shares`` of full colour behind the pieces."""
    from matplotlib.patches import Rectangle

    for line in range(_height(segments)):
        text = "".join(segment.text for segment in segments if segment.line == line)
        axes.text(0, top + line + 0.5, text, va="center_baseline", **FONT)
    if shares is None:
        return
    for segment in segments:
        share = float(shares[segment.piece]) if segment.piece >= 0 else 0.0
        if share:
            place = segment.column, top + segment.line + 0.05
            color = HELPFUL if share < 0 else HARMFUL
            box = Rectangle(place, len(segment.text), 0.9, color=color, alpha=abs(share), lw=0)
            axes.add_patch(box).set_gid(f"piece {segment.piece}")


def _frame(axes: Axes, segments: list[Segment]) -> None:
    from matplotlib.patches import Rectangle

    for segment in segments:
        place = segment.column, segment.line + 0.02
        axes.add_patch(Rectangle(place, len(segment.text), 0.96, fill=False, ec=INK, lw=1.0))


def _draw_bars(
    axes: Axes, method: MethodScores, row: int, order: list[int], middles: np.ndarray
) -> None:
    sums = method.sums[row, order]
    axes.barh(middles, sums, height=0.9, color=np.where(sums < 0, HELPFUL, HARMFUL))
    if method.error is not None:
        style = "--" if method.error.sum_bound[row] else "-"
        half = method.error.sums[row, order]
        drawn = axes.errorbar(sums, middles, xerr=half, fmt="none", ecolor=INK, elinewidth=1.2)
        drawn.lines[2][0].set_linestyle(style)
    axes.axvline(0.0, color=SOFT, linewidth=0.8)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.set_yticks([])
    axes.tick_params(labelsize=FONT_SIZE)
    axes.locator_params(axis="x", nbins=3)
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
    axes.set_xlabel(f"{method.name}: {method.estimand}", fontsize=FONT_SIZE)
