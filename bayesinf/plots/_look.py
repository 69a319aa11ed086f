"""What all figures share: colours that colour-blind eyes tell apart, points with intervals."""

from __future__ import annotations

from typing import Any

__all__ = ["ACCENT", "COLORS", "GREY", "INK", "MARKERS", "RULE", "points", "style_of"]

INK, ACCENT, GREY = "#1f4e79", "#b5651d", "0.45"
"""Of what is shown, of what it is held against or must be looked at, of controls."""

RULE: dict[str, Any] = {"color": "0.7", "linewidth": 0.8, "zorder": 0}
"""Of lines at 0 and between blocks."""

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of methods, chains and classes: Okabe and Ito's, without the yellow, which white drowns."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")


def style_of(k: int) -> dict[str, Any]:
    """Colour and marker of the ``k``-th of several things; 56 of them differ."""
    return {"color": COLORS[k % len(COLORS)], "marker": MARKERS[k % len(MARKERS)]}


def points(color: str = INK) -> dict[str, Any]:
    """Of ``Axes.errorbar``: points with capped intervals and no line between them."""
    return {
        "color": color,
        "marker": "o",
        "linestyle": "none",
        "markersize": 5,
        "capsize": 3,
        "elinewidth": 1.2,
    }
