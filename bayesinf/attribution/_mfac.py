"""Influence with the empirical Fisher matrix of stored gradients (M-FAC)."""

from __future__ import annotations

from typing import Unpack

import numpy as np
import torch
import xarray as xr

from bayesinf._task import Task
from bayesinf.attribution._needs import GRADIENTS
from bayesinf.attribution._pairwise import Attribution, require_damping, score
from bayesinf.attribution._registry import register
from bayesinf.attribution._scoring import Scoring, resolve
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._definite import cholesky, require_memory
from bayesinf.curvature._find import find_layers
from bayesinf.curvature._gauss_newton import ExampleSpaceInverse
from bayesinf.curvature._inner import gram
from bayesinf.curvature._rows import Rows, concatenate
from bayesinf.curvature._sources import GradientSource

__all__ = ["mfac"]


@register("influence", "empirical Fisher matrix of stored gradients, exactly", needs=GRADIENTS)
def mfac(
    task: Task,
    *,
    damping: float,
    examples: int | None = None,
    memory_limit: float = 8.0,
    seed: int = 0,
    **scoring: Unpack[Scoring],
) -> xr.Dataset:
    r"""Influence ``−(1/n) ∇φ_qᵀ (C + λI)⁻¹ ∇ℓ_t`` with ``C = (1/m) Σ_i g_i g_iᵀ``.

    ``C`` is the empirical Fisher matrix, over all selected parameters, of ``m`` training gradients
    that are kept. Woodbury's identity needs only their inner products:
    ``(C + λI)⁻¹ x = [x − G (mλI + GᵀG)⁻¹ Gᵀ x] / λ``. Exact, in float64 whatever the network's
    dtype; orthogonal to the gradients it divides by λ, so that with ``m`` far below the number of
    parameters λ governs the ranking. The empirical Fisher matrix is neither the Hessian nor the
    Gauss–Newton matrix, and vanishes where the data are fitted perfectly.

    Parameters
    ----------
    task
        Network, likelihood, training and query examples.
    damping
        λ = γ/(nβ) + weight decay, in units of the mean loss, > 0.
    examples
        ``m``, drawn without replacement; all by default.
    memory_limit
        GiB that the gradients may take (as factors of inputs and output derivatives where layers
        act at one position, else ``m d`` numbers), and their ``(m, m)`` inner products twice.
    seed
        Of the draw.
    **scoring
        What to pair, tokens, modules, batch sizes, top-k, a Zarr store and the like: see
        :class:`bayesinf.Scoring`.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)``; negative = helpful. Attributes: damping, fisher
        (``"empirical"``), examples, measurement, seconds by stage, forward_examples,
        backward_examples, checkpoint.

    Raises
    ------
    ValueError
        If an argument is out of range, memory would not suffice, or a gradient is not finite.
    NotImplementedError
        If the likelihood lacks the measurement.

    References
    ----------
    Frantar, Kurtic & Alistarh 2021, "M-FAC: Efficient matrix-free approximations of second-order
    information", §3.
    """
    options, costs = resolve(scoring), Costs()
    damping, count = require_damping(damping), task.n if examples is None else examples
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= task.n:
        raise ValueError(
            f"examples must be an integer from 1 to the {task.n} training examples; got {count!r}."
        )
    task.require_full_precision("a classical method")
    double = task.to(dtype=torch.float64)
    chosen = np.sort(np.random.default_rng(seed).permutation(task.n)[:count])
    with GradientSource(double, find_layers(double, costs), costs) as source:
        inverse = _fit(source, chosen, damping, options.batch_size, memory_limit, costs)
        method = Attribution(
            "mfac",
            "influence",
            inverse,
            -1 / task.n,
            attrs={"damping": damping, "fisher": "empirical", "examples": count, "seed": seed},
        )
        return score(task, source, method, options, costs)


def _fit(
    source: GradientSource,
    chosen: np.ndarray,
    damping: float,
    batch_size: int,
    memory_limit: float,
    costs: Costs,
) -> ExampleSpaceInverse:
    task, blocks = source.task, []
    with costs.stage("curvature"):
        for start in range(0, len(chosen), batch_size):
            where = chosen[start : start + batch_size]
            batch = task.train.batch(torch.from_numpy(where))
            blocks.append(source.gradients("train", where, batch))
            if start == 0:
                _require_room(task, blocks[0], len(where), len(chosen), memory_limit)
        rows = tuple(concatenate(layer) for layer in zip(*blocks, strict=True))
        del blocks
        matrix = gram(rows, rows).div_(len(chosen))
    with costs.stage("factorization"):
        factor = cholesky(matrix, damping, "empirical Fisher matrix")
    return ExampleSpaceInverse(rows, len(chosen), factor, damping, damping)


def _require_room(task: Task, block: list[Rows], size: int, m: int, limit: float) -> None:
    numbers = 0

    def count(leaf: torch.Tensor) -> torch.Tensor:
        nonlocal numbers
        numbers += leaf.numel()
        return leaf

    for layer in block:
        layer.each(count)
    gib = (2 * m**2 + 2 * m * numbers / size) * 8 / 2**30
    what = f"mfac (d={task.dimension:,} parameters, {m:,} gradients)"
    require_memory(gib, limit, what, "Keep fewer gradients with examples=…")
