r"""The curvature of a task's mean loss, layer by layer, fitted over its training examples.

``C ≈ (1/n) Σ_i E_ŷ[D_i D_iᵀ]``, with ``D_i`` the gradient of ``−log p(ŷ | x_i)``. Which labels ŷ:

* ``"enumerated"``: the expectation over the model's own distribution, exactly, as a sum over the
  rows of the output-space factor ``Σ_k f_k f_kᵀ`` (equal to the Gauss–Newton matrix);
* ``"sampled"``: ``draws`` labels an example, drawn from the model's distribution;
* ``"empirical"``: the data's labels.

Sources: Martens & Grosse 2015 (K-FAC); Grosse & Martens 2016 (convolutions); George et al. 2018
(EK-FAC); Eschenhagen et al. 2023 (expand and reduce); Grosse et al. 2023 §2.4 and §3.1.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import get_args

import numpy as np

from bayesinf._task import Task
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._curvature import Curvature
from bayesinf.curvature._estimates import Form, Sequence
from bayesinf.curvature._find import find_layers
from bayesinf.curvature._layers import Layer
from bayesinf.curvature._mean_fit import mean_blocks
from bayesinf.curvature._passes import Fisher

__all__ = ["Fisher", "Form", "Sequence", "choose_forms", "fit_curvature"]

_DENSE = 512
"""Norm layers and vectors up to this size get a dense block by default."""


def fit_curvature(
    task: Task,
    *,
    fisher: Fisher,
    form: Form | Mapping[str, Form] = "ekfac",
    draws: int = 1,
    sequence: Sequence = "expand",
    max_factor: int = 8192,
    spool_limit: float = 4.0,
    seed: int = 0,
    batch_size: int = 256,
    costs: Costs | None = None,
) -> Curvature:
    r"""Fit the curvature of the mean training loss, block by layer.

    Every selected parameter is in a block. By form of the block, with ``G_i`` the gradient of an
    example as a matrix ``(P, M)`` and expectations over labels and examples:

    * ``"ekfac"``: ``(Q_S ⊗ Q_A) diag(Λ) (Q_S ⊗ Q_A)ᵀ`` with ``Λ = E[(Q_Sᵀ G Q_A)²]``, the diagonal
      of the layer's Fisher block in that basis: trace and diagonal are exact, and no other diagonal
      is closer in Frobenius norm;
    * ``"kfac"``: the same basis, ``Λ = λ_S λ_Aᵀ``;
    * ``"diagonal"``: ``E[G²]``; ``"dense"``: the whole block ``E[vec G vec Gᵀ]``;
      ``"identity"``: the multiple of the identity that has the block's trace.

    ``Q_A`` and ``Q_S`` are eigenvectors of ``A = (1/n) Σ a aᵀ`` over inputs and
    ``S = (1/N) Σ ds dsᵀ`` over output derivatives, ``N`` positions in all. An embedding's tokens
    are its inputs, so its basis is the identity on that side, exactly. Parameters whose gradients
    do not factor (tied embeddings, free matrices) take ``A = E[GᵀG]``, ``S = E[GGᵀ]``. Groups of a
    convolution have factors of their own. Vectors and norm layers are ``"dense"`` up to 512
    parameters and ``"diagonal"`` above, unless chosen otherwise.

    Parameters
    ----------
    task
        Network, likelihood and training examples. Positions where an ``attention_mask`` among the
        inputs is 0 count nothing.
    fisher
        ``"enumerated"``, ``"sampled"`` or ``"empirical"``; see the module.
    form
        One for all layers that have matrices, or by layer name or pattern (``"*.mlp.*"``, the first
        that matches; layers that none matches are as by default).
    draws
        Labels an example for ``"sampled"``.
    sequence
        Of Kronecker factors with several positions: ``"expand"`` (positions count as examples) or
        ``"reduce"`` (inputs are averaged and derivatives summed over positions first).
    max_factor
        Sides of a layer beyond this size keep the identity basis.
    spool_limit
        GiB of captured gradients that are kept in a temporary file for the second pass of EK-FAC,
        instead of computing them again (on the CPU; 0 turns it off).
    seed
        Of sampled labels, one generator an example: they do not depend on ``batch_size``.
    batch_size
        Examples at a time; the curvature does not depend on it.
    costs
        Account to which seconds and passes are added.

    Returns
    -------
    Curvature
        In the model's dtype; sums and eigendecompositions are in float64.

    Raises
    ------
    ValueError
        If an argument is unknown, a pattern matches no layer, an example's loss depends on others,
        or a gradient is not finite.
    NotImplementedError
        If the likelihood lacks the part that ``fisher`` needs.
    """
    _require_choice("fisher", fisher, Fisher)
    _require_choice("sequence", sequence, Sequence)
    for name, number in (("draws", draws), ("batch_size", batch_size), ("max_factor", max_factor)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{name} must be a positive integer; got {number!r}.")
    costs = costs if costs is not None else Costs()
    layers = find_layers(task, costs)
    forms = choose_forms(layers, form)
    (blocks,) = mean_blocks(
        [task],
        np.ones((1, 1)),
        layers,
        forms,
        fisher=fisher,
        draws=draws,
        sequence=sequence,
        max_factor=max_factor,
        spool_limit=spool_limit,
        seed=seed,
        batch_size=batch_size,
        costs=costs,
    )
    fingerprint = task.fingerprint()
    info = {
        "fisher": fisher,
        "sequence": sequence,
        "n": task.n,
        **{key: fingerprint[key] for key in ("checkpoint", "train", "likelihood")},
        **({"draws": draws, "seed": seed} if fisher == "sampled" else {}),
    }
    return Curvature(blocks, {k: tuple(p.shape) for k, p in task.params.items()}, info)


def choose_forms(layers: tuple[Layer, ...], form: Form | Mapping[str, Form]) -> dict[str, Form]:
    """The form of every layer's block."""
    chosen = dict(form) if isinstance(form, Mapping) else {}
    for value in chosen.values() if isinstance(form, Mapping) else [form]:
        _require_choice("form", value, Form)
    names = [layer.name for layer in layers]
    unused = [p for p in chosen if not any(fnmatch.fnmatchcase(name, p) for name in names)]
    if unused:
        raise ValueError(
            f"form= names no layer with {unused}; layers are {names[:12]}"
            f"{' …' if len(names) > 12 else ''}."
        )
    found: dict[str, Form] = {}
    for layer in layers:
        hits = [value for p, value in chosen.items() if fnmatch.fnmatchcase(layer.name, p)]
        general: Form = "ekfac" if isinstance(form, Mapping) else form
        found[layer.name] = hits[0] if hits else _default_form(layer, general)
    return found


def _default_form(layer: Layer, general: Form) -> Form:
    vector = layer.kind == "affine" or (layer.kind == "free" and 1 in layer.shape)
    if general in ("ekfac", "kfac") and vector:
        return "dense" if layer.size <= _DENSE else "diagonal"
    return general


def _require_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {get_args(choices)}; got {value!r}.")
