r"""Curvatures that are means over checkpoints of one network, in coordinates of choice.

Curvature ``ℓ`` is ``Σ_c share[ℓ, c] · D_ℓ C(θ_c) D_ℓ``, with ``D_ℓ`` diagonal: the curvature in the
coordinates ``D_ℓ⁻¹ θ``. The Kronecker factors of its basis are means over checkpoints, and so are
the second moments in that basis: an eigenvalue is the mean of what each checkpoint has there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bayesinf._task import Task
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._bases import StandardBasis, precondition
from bayesinf.curvature._capture import Capture
from bayesinf.curvature._curvature import Block
from bayesinf.curvature._estimates import Estimate, Form
from bayesinf.curvature._estimates import Sequence as Positions
from bayesinf.curvature._layers import Layer
from bayesinf.curvature._passes import Fisher, Passes
from bayesinf.curvature._rows import Indexed, Rows
from bayesinf.curvature._spool import Spool

__all__ = ["mean_blocks"]

Scales = Sequence[Tensor]
"""``D`` of each layer, ``(P, M)``."""


def mean_blocks(
    tasks: Sequence[Task],
    shares: np.ndarray,
    layers: tuple[Layer, ...],
    forms: Mapping[str, Form],
    *,
    fisher: Fisher,
    scales: Sequence[Scales] | None = None,
    draws: int = 1,
    sequence: Positions = "expand",
    max_factor: int = 8192,
    spool_limit: float = 4.0,
    seed: int = 0,
    batch_size: int = 256,
    costs: Costs,
) -> list[tuple[Block, ...]]:
    """Blocks of ``L`` curvatures of the mean training loss, each a mean over ``C`` checkpoints.

    Parameters
    ----------
    tasks
        The task at each of the ``C`` checkpoints.
    shares
        ``(L, C)``, rows that sum to 1.
    layers, forms
        Of the task.
    scales
        ``D`` of each curvature; 1 by default.
    fisher, draws, sequence, max_factor, spool_limit, seed, batch_size, costs
        As of :func:`bayesinf.fit_curvature`.
    """
    corrected = "ekfac" in forms.values()
    spooled = corrected and tasks[0].device.type == "cpu"
    limit = int(spool_limit * 2**30 / len(tasks)) if spooled else 0
    means = []
    for i, row in enumerate(shares):
        own = [Estimate(tasks[0], la, forms[la.name], sequence, max_factor) for la in layers]
        means.append(_Mean(own, row, None if scales is None else scales[i]))
    with ExitStack() as stack:
        passes = []
        for task in tasks:
            capture = stack.enter_context(Capture(task, layers, costs))
            spool = stack.enter_context(Spool(limit))
            passes.append(Passes(capture, fisher, draws, seed, batch_size, spool))
        with costs.stage("covariance"):
            for k, every in enumerate(passes):
                for mask, pulls in every:
                    for first, pull in pulls:
                        for mean in means:
                            mean.add(k, pull, mask, every.weight, first)
        with costs.stage("eigendecomposition"):
            for mean in means:
                for estimate in mean.estimates:
                    estimate.decompose()
        if corrected:
            with costs.stage("eigenvalue correction"):
                for k, every in enumerate(passes):
                    for _, pulls in every:
                        for _, pull in pulls:
                            for mean in means:
                                mean.correct(k, pull, every.weight)
    return [tuple(estimate.block() for estimate in mean.estimates) for mean in means]


@dataclass(frozen=True)
class _Mean:
    """One curvature: an estimate for each layer, shares of checkpoints, and ``D``."""

    estimates: list[Estimate]
    shares: np.ndarray
    scales: Scales | None

    def add(
        self, checkpoint: int, pull: list[Rows], mask: Tensor | None, weight: float, first: bool
    ) -> None:
        """Add a backward pass of a checkpoint."""
        share = float(self.shares[checkpoint])
        if share:
            for i, estimate in enumerate(self.estimates):
                for rows, kept in self._scaled(i, pull[i], mask):
                    estimate.add(rows, kept, weight, first, share)

    def correct(self, checkpoint: int, pull: list[Rows], weight: float) -> None:
        """Add a backward pass of the second iteration."""
        share = float(self.shares[checkpoint])
        if share:
            for i, estimate in enumerate(self.estimates):
                if estimate.form == "ekfac":
                    for rows, _ in self._scaled(i, pull[i], None):
                        estimate.correct(rows, weight, share)

    def _scaled(
        self, i: int, rows: Rows, mask: Tensor | None
    ) -> Iterator[tuple[Rows, Tensor | None]]:
        """Rows in the coordinates of the curvature; some examples at a time where explicit."""
        if self.scales is None:
            yield rows, mask
        elif isinstance(rows, Indexed):
            yield precondition(StandardBasis(), self.scales[i], rows), mask
        else:
            for _, part in rows.chunks():
                yield precondition(StandardBasis(), self.scales[i], part), None
