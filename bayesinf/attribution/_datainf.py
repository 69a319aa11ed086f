"""Influence by swapping mean and inverse (DataInf)."""

from __future__ import annotations

from typing import Unpack

import torch
import xarray as xr
from torch import Tensor

from bayesinf._task import Task
from bayesinf.attribution._kronecker_scores import require_one_damping
from bayesinf.attribution._needs import GRADIENTS
from bayesinf.attribution._pairwise import Attribution, score
from bayesinf.attribution._registry import register
from bayesinf.attribution._scoring import Scoring, resolve
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._bases import StandardBasis
from bayesinf.curvature._curvature import Block, Curvature, Damping
from bayesinf.curvature._find import find_layers
from bayesinf.curvature._gauss_newton import combine
from bayesinf.curvature._inner import gram, squared_norms
from bayesinf.curvature._rows import Explicit, Rows
from bayesinf.curvature._sources import GradientSource

__all__ = ["datainf"]


@register(
    "influence",
    "mean and inverse of the empirical Fisher swapped, layer by layer",
    needs=GRADIENTS,
    one_of=(("damping", "relative_damping"),),
)
def datainf(
    task: Task,
    *,
    damping: Damping | None = None,
    relative_damping: float | None = None,
    **scoring: Unpack[Scoring],
) -> xr.Dataset:
    r"""Influence with ``(1/n) Σ_i (g_i g_iᵀ + λI)⁻¹`` for the inverse of a layer's curvature.

    ``influence = −(1/n) Σ_ℓ (1/λ_ℓ) [⟨∇φ_q, ∇ℓ_t⟩ − (1/n) Σ_i ⟨∇φ_q, g_i⟩ ⟨g_i, ∇ℓ_t⟩ /
    (λ_ℓ + ‖g_i‖²)]``, inner products within layer ``ℓ``: each summand is inverted by itself, in
    closed form, and the mean taken afterwards. The mean of inverses is not the inverse of the mean;
    it is larger, and the authors bound the difference by the square of the layer's size. Exact for
    one training example.

    Parameters
    ----------
    task
        Network, likelihood, training and query examples.
    damping
        λ = γ/(nβ) + weight decay, in units of the mean loss, the same in every layer or a dict by
        layer, > 0.
    relative_damping
        Instead: λ of a layer as a multiple of the mean eigenvalue of its empirical Fisher matrix,
        ``(1/(n d_ℓ)) Σ_i ‖g_i‖²``; 0.1 in the paper.
    **scoring
        What to pair, tokens, modules, batch sizes, top-k, a Zarr store and the like: see
        :class:`bayesinf.Scoring`. Each block of queries is a pass over the training set more; a
        block holds ``query_batch_size · d`` numbers twice.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)``; negative = helpful. Attributes: damping, fisher
        (``"empirical"``), measurement, seconds by stage, forward_examples, backward_examples,
        checkpoint.

    Raises
    ------
    ValueError
        If not exactly one damping is given, one is not positive, or a gradient is not finite.
    NotImplementedError
        If the likelihood lacks the measurement.

    References
    ----------
    Kwon, Wu, Wu & Zou 2024, "DataInf: Efficiently estimating data influence in LoRA-tuned LLMs and
    diffusion models", Eq. 5.
    """
    options, costs = resolve(scoring), Costs()
    require_one_damping(damping, relative_damping)
    with GradientSource(task, find_layers(task, costs), costs) as source:
        squares = _squares(source, options.batch_size, costs)  # (n, layers)
        if damping is None:
            assert relative_damping is not None
            damping = _scale(source, squares).relative_damping(relative_damping)
        lam = _scale(source, squares).dampings(damping)
        zero = [name for name, value in lam.items() if value == 0]
        if zero:
            raise ValueError(f"damping must be positive in every layer; it is 0 in {zero[:4]}.")
        dampings = [lam[layer.name] for layer in source.layers]

        def precondition(rows: list[Rows]) -> list[Rows]:
            return _swapped(source, rows, squares, dampings, options.batch_size, costs)

        method = Attribution(
            "datainf",
            "influence",
            precondition,
            -1 / task.n,
            attrs={
                "damping": damping,
                "relative_damping": relative_damping,
                "fisher": "empirical",
            },
        )
        return score(task, source, method, options, costs)


def _squares(source: GradientSource, batch_size: int, costs: Costs) -> Tensor:
    """``‖g_i‖²`` of every training example and layer, ``(n, layers)``."""
    found = []
    with costs.stage("norms"):
        for where, batch in source.task.train.batches(batch_size):
            rows = source.gradients("train", where, batch)
            found.append(torch.stack([squared_norms([layer]) for layer in rows], dim=1))
    return torch.cat(found)


def _scale(source: GradientSource, squares: Tensor) -> Curvature:
    """The multiple of the identity with the trace of each layer's empirical Fisher matrix."""
    means = squares.double().mean(0)
    blocks = tuple(
        Block(layer, "identity", StandardBasis(), (mean / layer.size).expand(layer.shape))
        for layer, mean in zip(source.layers, means, strict=True)
    )
    return Curvature(blocks, {})


def _swapped(
    source: GradientSource,
    rows: list[Rows],
    squares: Tensor,
    dampings: list[float],
    batch_size: int,
    costs: Costs,
) -> list[Rows]:
    """``(1/λ) [x − (1/n) Σ_i g_i ⟨g_i, x⟩ / (λ + ‖g_i‖²)]`` for every row ``x``, layer by layer."""
    with costs.stage("curvature"):
        left = [layer.matrices().flatten(0, 1).unsqueeze(1).clone() for layer in rows]
        n = source.task.n
        for where, batch in source.task.train.batches(batch_size):
            for i, g in enumerate(source.gradients("train", where, batch)):
                weights = gram([g], [rows[i]])  # (B, rows)
                weights /= n * (dampings[i] + squares[where, i])[:, None]
                left[i] -= combine(g, weights)
        return [Explicit(part / lam) for part, lam in zip(left, dampings, strict=True)]
