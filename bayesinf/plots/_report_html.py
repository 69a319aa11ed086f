"""HTML of a report's parts; every text that came from outside is escaped here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import numpy as np

from bayesinf.plots._report_tables import Column, Grid, Sheet

__all__ = ["figure_html", "settings_html", "sheet_html"]

_WIDTH, _HEIGHT = 96.0, 12.0


def sheet_html(name: str, sheet: Sheet) -> str:
    """Return a section: title, what the intervals cover, single numbers and grids."""
    parts = [f"<h2>{escape(name)}</h2>", _note(sheet)]
    if sheet.facts:
        facts = "".join(
            f"<div><dt>{escape(c.title)}</dt><dd>{_texts(c)[0]}</dd></div>" for c in sheet.facts
        )
        parts.append(f'<dl class="facts">{facts}</dl>')
    parts += [_grid(grid, name) for grid in sheet.grids]
    if sheet.hidden:
        parts.append(
            f'<p class="note">In the dataset and not shown here: '
            f"{escape(', '.join(sheet.hidden))}.</p>"
        )
    if sheet.attrs:
        parts.append(
            f"<details><summary>How it was made</summary>{_plain(sheet.attrs, name)}</details>"
        )
    return _section(parts)


def settings_html(title: str, settings: Mapping[str, Any]) -> str:
    """Return a section with a table of names and values."""
    return _section([f"<h2>{escape(title)}</h2>", _plain(settings, title)])


def figure_html(caption: str, address: str) -> str:
    """Return an image with its caption; the address holds the image itself."""
    return (
        f'<figure><img src="{escape(address)}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


# ---------------------------------------------------------------------------- pieces


def _section(parts: Iterable[str]) -> str:
    return "<section>\n" + "\n".join(part for part in parts if part) + "\n</section>"


def _note(sheet: Sheet) -> str:
    """What the brackets are."""
    columns = [*sheet.facts, *(column for grid in sheet.grids for column in grid.columns)]
    if all(column.lower is None for column in columns):
        return ""
    share = sheet.attrs.get("confidence")
    kind = "" if share is None else f"{100 * float(share):g} % "
    random = sheet.attrs.get("random")
    covers = f"; random in them: {random}" if random else ""
    text = f"In brackets: {kind}intervals{covers}."
    return f'<p class="note">{escape(text)}</p>'


def _grid(grid: Grid, name: str) -> str:
    heads = "".join(
        f'<th scope="col"{_kind(column)} data-first='
        f'"{"descending" if column.best_first else "ascending"}">'
        f'<button type="button">{escape(column.title)}</button></th>'
        for column in grid.columns
    )
    cells = [
        [
            f'<{tag}{_kind(column)} data-value="{_sort_key(value)}">{text}{picture}</{tag[:2]}>'
            for value, text, picture in zip(
                column.values, _texts(column), _pictures(column), strict=True
            )
        ]
        for tag, column in (
            ('th scope="row"' if k == 0 else "td", column) for k, column in enumerate(grid.columns)
        )
    ]
    rows = "\n".join(f"<tr>{''.join(row)}</tr>" for row in zip(*cells, strict=True))
    head, body = f"<thead><tr>{heads}</tr></thead>", f"<tbody>\n{rows}\n</tbody>"
    return _scrolled(f'<table class="sortable">{head}\n{body}</table>', name)


def _plain(settings: Mapping[str, Any], name: str) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(_shown(value))}</td></tr>'
        for key, value in settings.items()
    )
    return _scrolled(f'<table class="plain"><tbody>\n{rows}\n</tbody></table>', f"{name}, settings")


def _scrolled(table: str, label: str) -> str:
    """A table in a box that scrolls by itself, also by keys."""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{table}</div>'
    )


def _shown(value: Any) -> str:
    """Text as it is, a mapping line by line, anything else as JSON."""
    plain = value.item() if isinstance(value, np.generic) else value
    if isinstance(plain, Mapping) and plain:
        return "\n".join(f"{key}: {_shown(own)}" for key, own in plain.items())
    return plain if isinstance(plain, str) else json.dumps(plain, default=str, ensure_ascii=False)


# ---------------------------------------------------------------------------- cells


def _kind(column: Column) -> str:
    return ' class="text"' if column.is_text else ""


def _sort_key(value: Any) -> str:
    if isinstance(value, str):
        return escape(value)
    return "" if np.isnan(value) else repr(float(value)).replace("inf", "Infinity")


def _texts(column: Column) -> list[str]:
    """Cells; digits so that the typical interval of the column has two."""
    if column.is_text:
        return [escape(value) for value in column.values]
    if column.lower is None or column.upper is None:
        return [_number(value) for value in column.values]
    half = (column.upper - column.lower) / 2
    sizes = half[np.isfinite(half) & (half > 0)]
    digits = int(np.clip(1 - np.floor(np.log10(np.median(sizes))), 0, 6)) if len(sizes) else 3
    return [
        _fixed(value, digits)
        + (
            f" <small>[{_fixed(low, digits)}, {_fixed(high, digits)}]</small>"
            if not np.isnan(low + high)
            else ""
        )
        for value, low, high in zip(column.values, column.lower, column.upper, strict=True)
    ]


def _fixed(value: float, digits: int) -> str:
    if not np.isfinite(value) or abs(value) >= 1e9:
        return _number(value)
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")


def _number(value: float) -> str:
    if np.isnan(value):
        return "–"
    if np.isinf(value):
        return "∞" if value > 0 else "−∞"
    whole = value == round(value) and abs(value) < 1e12
    text = f"{int(value):,}" if whole or 1e3 <= abs(value) < 1e12 else f"{value:#.3g}".rstrip(".")
    return text.replace("-", "−")


def _pictures(column: Column) -> list[str]:
    """A point with its interval for each row, on the scale of the column; nothing for one row."""
    if column.lower is None or column.upper is None or len(column.values) < 2:
        return [""] * len(column.values)
    every = np.concatenate([column.values, column.lower, column.upper])
    every = every[np.isfinite(every)]
    low, high = (every.min(), every.max()) if len(every) else (0.0, 0.0)
    if not high > low:
        return [""] * len(column.values)

    def place(value: float) -> str:
        return f"{_WIDTH * (value - low) / (high - low):.1f}"

    zero = _line("zero", place(0.0), place(0.0), "0", f"{_HEIGHT:g}") if low < 0 < high else ""
    middle, found = f"{_HEIGHT / 2:g}", []
    for value, a, b in zip(column.values, column.lower, column.upper, strict=True):
        if not np.isfinite([value, a, b]).all():
            found.append("")
            continue
        found.append(
            f'<svg class="interval" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" aria-hidden="true">{zero}'
            f"{_line('', place(a), place(b), middle, middle)}"
            f'<circle cx="{place(value)}" cy="{middle}" r="3"/></svg>'
        )
    return found


def _line(kind: str, x1: str, x2: str, y1: str, y2: str) -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<line{name} x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}"/>'
