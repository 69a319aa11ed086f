"""Plain text tables."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["format_table", "verdict"]


def verdict(holds: bool | None) -> str:
    """Say whether a bar is met; None where there is nothing to judge."""
    return "" if holds is None else "met" if holds else "MISSED"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the others to the right, a rule below the header.

    Parameters
    ----------
    header
        Column titles.
    rows
        Cells as text, as many to a row as there are titles.

    Returns
    -------
    str
        Lines without trailing blanks.
    """
    lines = [header, *rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(header))]

    def render(line: Sequence[str]) -> str:
        first, *others = (cell for cell in line)
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join([render(header), "  ".join("─" * w for w in widths), *map(render, rows)])
