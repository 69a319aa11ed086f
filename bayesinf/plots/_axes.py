"""Axes of figures that were given none."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["new_axes"]


def new_axes(size: tuple[float, float]) -> Axes:
    """Axes of a new figure of ``size`` in inches.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib, which is not installed: pip install 'bayesinf[plots]'"
        ) from error
    _, ax = plt.subplots(figsize=size, layout="constrained")
    return ax
