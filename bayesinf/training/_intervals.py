"""Which steps of a run belong to which segment and which checkpoint."""

from __future__ import annotations

import numpy as np

__all__ = ["equal_segments", "interval_sums", "nearest_nodes"]


def equal_segments(total: int, segments: int) -> np.ndarray:
    """Edges ``(L + 1,)`` of segments of ``total`` steps that differ by at most one step.

    Raises
    ------
    ValueError
        If there are fewer steps than segments.
    """
    if not 1 <= segments <= total:
        raise ValueError(f"segments must be between 1 and the {total} steps; got {segments!r}.")
    return np.array([total * k // segments for k in range(segments + 1)], dtype=np.int64)


def interval_sums(weights: np.ndarray, nodes: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Sums ``(L, C)`` of weights over the steps of a segment that are nearest to a node.

    Parameters
    ----------
    weights
        ``(T,)``: of steps, from ``θ_s`` to ``θ_{s+1}``, hence at ``s + ½``.
    nodes
        ``(C,)`` steps, ascending; of equally near ones the first counts.
    edges
        ``(L + 1,)``: segment ``ℓ`` has the steps from ``edges[ℓ]`` on, before ``edges[ℓ + 1]``.
    """
    middle = np.arange(len(weights)) + 0.5
    nearest = nearest_nodes(middle, nodes)
    segment = np.searchsorted(edges, middle, side="right") - 1
    sums = np.zeros((len(edges) - 1, len(nodes)))
    np.add.at(sums, (segment, nearest), weights)
    return sums


def nearest_nodes(places: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Position of the node next to each place; of equally near ones the first."""
    borders = (nodes[1:] + nodes[:-1]) / 2
    return np.searchsorted(borders, places, side="left")
