"""Influence from Kronecker-projected gradients (LoGra)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import torch
import xarray as xr
from torch import Tensor

from bayesinf._task import Task
from bayesinf.attribution._kronecker_scores import require_one_damping, resolve_damping
from bayesinf.attribution._needs import GRADIENTS
from bayesinf.attribution._pairwise import Attribution, score
from bayesinf.attribution._projected import (
    ProjectedGradients,
    columns,
    keep_gradients,
    second_moments,
    task_identity,
)
from bayesinf.attribution._registry import register
from bayesinf.attribution._scoring import Options, Scoring, resolve
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._bases import KroneckerBasis
from bayesinf.curvature._curvature import Block, Curvature, Damping
from bayesinf.curvature._definite import require_memory
from bayesinf.curvature._find import find_layers
from bayesinf.curvature._fit import Fisher, fit_curvature
from bayesinf.curvature._layers import Layer
from bayesinf.curvature._projections import KroneckerProjection, random_sides
from bayesinf.curvature._rows import Rows
from bayesinf.curvature._saving import load_curvature, save_curvature
from bayesinf.curvature._sources import GradientSource

__all__ = ["logra"]

ProjectionBasis = Literal["random", "pca"]


@register(
    "influence",
    "full Fisher of Kronecker-projected gradients, layer by layer",
    needs=GRADIENTS,
    one_of=(("damping", "relative_damping"),),
)
def logra(
    task: Task,
    *,
    fisher: Fisher,
    rank: int | tuple[int, int] = 64,
    basis: ProjectionBasis = "random",
    damping: Damping | None = None,
    relative_damping: float | None = None,
    gradients: str | os.PathLike[str] | None = None,
    memory_limit: float = 8.0,
    seed: int = 0,
    **scoring: Unpack[Scoring],
) -> xr.Dataset:
    r"""Influence with the full curvature of projected gradients, layer by layer.

    ``influence = −(1/n) Σ_ℓ (P_ℓ ∇φ_q)ᵀ (P_ℓ C_ℓ P_ℓᵀ + λI)⁻¹ (P_ℓ ∇ℓ_t)`` with
    ``P_ℓ G = P_o G P_iᵀ`` ``(k_o, k_i)`` for the gradient matrix ``G`` ``(P, M)`` of a layer:
    inputs and output derivatives are projected by themselves, and the gradient is never formed.
    ``P_ℓ C_ℓ P_ℓᵀ`` is the whole matrix ``(k_o k_i, k_o k_i)``, where EK-FAC has the diagonal in a
    basis. With square projections it is the exact Fisher block of the layer.

    The inverse is that of the projected curvature, not the projection of the inverse: directions
    that are projected away count as if they were infinitely stiff.

    Parameters
    ----------
    task
        Network, likelihood, training and query examples.
    fisher
        Labels of the curvature: ``"enumerated"``, ``"sampled"`` or ``"empirical"``, as for
        :func:`~bayesinf.ekfac`. The empirical one is made of the projected training gradients and
        needs no pass of its own.
    rank
        ``(k_o, k_i)``, or one number for both (64 in the paper). A shorter side is kept whole.
    basis
        ``"random"``: orthonormal rows of uniform direction, scaled so that
        ``E⟨P g, P g'⟩ = ⟨g, g'⟩``. ``"pca"``: the leading eigenvectors of the second moments of a
        layer's inputs and of its output derivatives (from one fit more), not scaled. Layers that
        have no such pair (norms, groups) are projected at random.
    damping
        λ = γ/(nβ) + weight decay, in units of the mean loss, the same in every layer or a dict by
        layer.
    relative_damping
        Instead: λ of a layer as a multiple of the mean eigenvalue of its projected curvature; the
        paper's library uses 0.1.
    gradients
        Folder in which the projected training gradients stay, with the projection and the
        curvature. A later call with other queries, another damping or other options reads them and
        makes no pass over the training set; other settings of the projection are refused.
    memory_limit
        GiB that the gradients, where they are not on disk, and the curvature may take:
        ``n Σ_ℓ k_o k_i`` numbers of the network's precision, and ``3 (k_o k_i)²`` in float64 by
        layer.
    seed
        Of projections and of sampled labels.
    **scoring
        What to pair, tokens, modules, batch sizes, top-k, a Zarr store and the like: see
        :class:`bayesinf.Scoring`.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)``; negative = helpful. Attributes: damping, fisher, rank, basis,
        numbers (kept of a training example), measurement, seconds by stage, forward_examples,
        backward_examples, checkpoint.

    Raises
    ------
    ValueError
        If not exactly one damping is given, an argument is out of range, memory would not suffice,
        ``gradients`` holds others, or a gradient is not finite.
    NotPositiveDefiniteError
        If a projected curvature plus damping is singular (a ``ValueError``).
    NotImplementedError
        If the likelihood lacks what ``fisher`` or ``measurement`` needs.

    References
    ----------
    Choe et al. 2024, "What is your data worth to GPT? LLM-scale data valuation with influence
    functions", §3.1 and Eqs. 3-6.
    """
    options, costs = resolve(scoring), Costs()
    require_one_damping(damping, relative_damping)
    ranks = _ranks(rank, basis, fisher)
    folder = None if gradients is None else Path(os.fspath(gradients))
    layers = find_layers(task, costs)
    sides = _sides(task, layers, ranks, basis, fisher, seed, folder, options, costs)
    projection = KroneckerProjection(layers, sides)
    _require_room(projection.layers, memory_limit)
    identity = {"projection": "kronecker", "rank": list(ranks), "basis": basis, "seed": seed}
    if basis == "pca":
        identity["fisher"] = fisher
    with GradientSource(task, layers, costs) as source:
        projected = ProjectedGradients(source, projection)
        if folder is not None or fisher == "empirical" or options.train_tokens is None:
            keep_gradients(
                projected,
                measurement="loss",
                path=None if folder is None else folder / "gradients",
                identity=identity,
                batch_size=options.batch_size,
                memory_limit=memory_limit,
                costs=costs,
            )
        curvature = _curvature(source, projected, fisher, seed, folder, options, costs)
        lam = resolve_damping(curvature, damping, relative_damping)
        method = Attribution(
            "logra",
            "influence",
            curvature.inverse(lam).precondition,
            -1 / task.n,
            attrs={
                "damping": lam,
                "relative_damping": relative_damping,
                "fisher": fisher,
                "rank": list(ranks),
                "basis": basis,
                "seed": seed,
                "numbers": sum(layer.size for layer in projection.layers),
            },
        )
        return score(task, projected, method, options, costs)


def _ranks(rank: Any, basis: str, fisher: str) -> tuple[int, int]:
    pair = rank if isinstance(rank, tuple) else (rank, rank)
    if len(pair) != 2 or any(not isinstance(k, int) or isinstance(k, bool) or k < 1 for k in pair):
        raise ValueError(
            f"rank must be a positive integer or a pair (k_o, k_i) of them; got {rank!r}."
        )
    for name, value, choices in (
        ("basis", basis, get_args(ProjectionBasis)),
        ("fisher", fisher, get_args(Fisher)),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}; got {value!r}.")
    return pair[0], pair[1]


def _require_room(layers: tuple[Layer, ...], limit: float) -> None:
    gib = sum(3 * layer.size**2 for layer in layers) * 8 / 2**30
    largest = max(layers, key=lambda layer: layer.size)
    what = f"logra (k_o·k_i = {largest.size:,} in layer {largest.name!r})"
    require_memory(gib, limit, what, "Use a smaller rank")


# ---------------------------------------------------------------------------- projections


def _sides(
    task: Task,
    layers: tuple[Layer, ...],
    ranks: tuple[int, int],
    basis: str,
    fisher: Fisher,
    seed: int,
    folder: Path | None,
    options: Options,
    costs: Costs,
) -> tuple[tuple[Tensor, Tensor], ...]:
    like = next(iter(task.params.values()))
    sides = random_sides(layers, ranks, seed, like)
    if basis == "random":
        return sides

    def fit() -> Curvature:
        return fit_curvature(
            task, fisher=fisher, form="kfac", seed=seed, batch_size=options.batch_size, costs=costs
        )

    known = {"fisher": fisher, "seed": seed}
    factors = _cached(folder, "basis", task, known, fit)
    return tuple(
        _leading(block, ranks) or drawn for block, drawn in zip(factors.blocks, sides, strict=True)
    )


def _leading(block: Block, ranks: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """Leading eigenvectors of both factors, where a layer has one pair of them."""
    basis, values = block.basis, block.eigenvalues
    if not isinstance(basis, KroneckerBasis):
        return None
    found = []
    for q, spectrum, k in (
        (basis.q_s, values.sum(1), ranks[0]),
        (basis.q_a, values.sum(0), ranks[1]),
    ):
        if q is not None and q.ndim != 2:
            return None
        chosen = spectrum.argsort(descending=True, stable=True)[:k]
        if q is None:
            found.append(torch.nn.functional.one_hot(chosen, len(spectrum)).T.to(values))
        else:
            found.append(q[:, chosen])
    return found[0], found[1]


# ---------------------------------------------------------------------------- curvature


def _curvature(
    source: GradientSource,
    projected: ProjectedGradients,
    fisher: Fisher,
    seed: int,
    folder: Path | None,
    options: Options,
    costs: Costs,
) -> Curvature:
    task = source.task

    def rows() -> Iterator[list[Rows]]:
        if fisher == "empirical":
            assert projected.kept is not None
            for start in range(0, task.n, options.batch_size):
                where = slice(start, min(start + options.batch_size, task.n))
                yield columns(projected.kept.read(where).to(task.device), projected.layers)
        else:
            for block in source.fisher_rows(fisher, seed=seed, batch_size=options.batch_size):
                yield projected.project(block)

    def fit() -> Curvature:
        held = task.fingerprint()
        info = {"fisher": fisher, "seed": seed, "n": task.n}
        info |= {key: held[key] for key in ("checkpoint", "train", "likelihood")}
        with costs.stage("curvature"):
            return second_moments(projected.layers, rows(), task.n, task.dtype, info)

    return _cached(folder, f"curvature-{fisher}", task, {"seed": seed}, fit)


def _cached(
    folder: Path | None, name: str, task: Task, known: dict[str, Any], fit: Any
) -> Curvature:
    """What the folder holds of this task and these settings, or a new fit, kept there."""
    if folder is None:
        return fit()
    place, wanted = folder / name, {**task_identity(task), **known}
    if (place / "curvature.json").exists():
        held = load_curvature(place, device=task.device)
        if all(held.info.get(k) == wanted.get(k, held.info.get(k)) for k in held.info):
            return held
    found: Curvature = fit()
    save_curvature(found, place)
    return load_curvature(place, device=task.device)  # as a later run will see it, to the bit
