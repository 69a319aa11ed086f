"""EK-FAC and K-FAC scores: a fitted curvature, its damping, and the engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xarray as xr

from bayesinf._task import Task
from bayesinf.attribution._pairwise import Attribution, require_damping, score
from bayesinf.attribution._scoring import Options, Scoring, resolve
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._curvature import Curvature, Damping
from bayesinf.curvature._fit import Fisher, Form, choose_forms, fit_curvature
from bayesinf.curvature._saving import load_curvature, save_curvature
from bayesinf.curvature._sources import GradientSource

__all__ = [
    "curvature_attrs",
    "fitted",
    "kronecker_scores",
    "require_one_damping",
    "resolve_damping",
]


def kronecker_scores(
    task: Task,
    form: Form,
    *,
    fisher: Fisher | None,
    damping: Damping | None,
    relative_damping: float | None,
    curvature: Curvature | None,
    seed: int,
    scoring: Scoring,
) -> xr.Dataset:
    """Score all pairs; :func:`ekfac` and :func:`kfac` document the arguments."""
    options, costs = resolve(scoring), Costs()
    require_one_damping(damping, relative_damping)
    curvature = fitted(task, form, fisher, curvature, seed, options, costs)
    lam = resolve_damping(curvature, damping, relative_damping)
    inverse = curvature.inverse(lam)
    method = Attribution(
        form,
        "influence",
        inverse.precondition,
        -1 / task.n,
        attrs={
            "damping": lam,
            "relative_damping": relative_damping,
            **curvature_attrs(curvature),
        },
    )
    with GradientSource(task, curvature.layers, costs) as source:
        return score(task, source, method, options, costs)


def fitted(
    task: Task,
    form: Form,
    fisher: Fisher | None,
    curvature: Curvature | None,
    seed: int,
    options: Options,
    costs: Costs,
) -> Curvature:
    """Return the given curvature, the one of the store that is resumed, or a new one.

    Raises
    ------
    ValueError
        If both or neither of ``fisher`` and ``curvature`` are given, or it is of another task.
    """
    if (fisher is None) == (curvature is None):
        got = "neither" if fisher is None else "both"
        raise ValueError(
            f"give exactly one of fisher= (to fit a curvature here) and curvature= (from "
            f"bi.fit_curvature); got {got}."
        )
    if curvature is not None:
        curvature.require_task(task)
        return curvature
    assert fisher is not None
    cache = Path(os.fspath(options.store)) / "curvature" if options.store is not None else None
    if cache is not None and (cache / "curvature.json").exists():
        held = load_curvature(cache, device=task.device)
        held.require_task(task)
        wanted = task.fingerprint()
        same = all(held.info.get(key) == wanted[key] for key in ("train", "likelihood"))
        same &= held.info["fisher"] == fisher and held.info.get("seed", seed) == seed
        if same and choose_forms(held.layers, form) == {b.layer.name: b.form for b in held.blocks}:
            return held
    found = fit_curvature(
        task, fisher=fisher, form=form, seed=seed, batch_size=options.batch_size, costs=costs
    )
    if cache is None:
        return found
    save_curvature(found, cache)
    return load_curvature(cache, device=task.device)  # as a resumed run will see it, to the bit


def require_one_damping(damping: Any, relative_damping: Any) -> None:
    """Raise ``ValueError`` unless exactly one damping is given, in range."""
    if (damping is None) == (relative_damping is None):
        got = "neither" if damping is None else "both"
        raise ValueError(
            f"give exactly one of damping= and relative_damping=; got {got}. damping is λ itself, "
            f"the same for all layers (λ = γ/(nβ) + weight decay, what BIF tends to); "
            f"relative_damping multiplies each layer's mean eigenvalue (0.1 in Grosse et al. 2023)."
        )
    if damping is not None and not isinstance(damping, Mapping):
        require_damping(damping)


def resolve_damping(
    curvature: Curvature, damping: Damping | None, relative_damping: float | None
) -> Damping:
    """λ, or λ by layer."""
    if damping is not None:
        return damping
    assert relative_damping is not None
    return curvature.relative_damping(relative_damping)


def curvature_attrs(curvature: Curvature) -> dict[str, Any]:
    """What scores record of a curvature."""
    forms = {block.layer.name: block.form for block in curvature.blocks}
    info = {k: v for k, v in curvature.info.items() if k in ("fisher", "seed", "draws", "sequence")}
    return {**info, "forms": forms}
