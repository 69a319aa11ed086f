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
from contextlib import ExitStack
from typing import Literal, get_args

import torch
from torch import Tensor

from bayesinf._task import Task
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._bases import DenseBasis, StandardBasis, rotate_rows
from bayesinf.curvature._capture import Capture
from bayesinf.curvature._curvature import Block, Curvature
from bayesinf.curvature._find import find_layers
from bayesinf.curvature._inner import squared_norms
from bayesinf.curvature._kronecker import outer_moment, second_moment
from bayesinf.curvature._kronecker_sums import KroneckerSums
from bayesinf.curvature._layers import Layer
from bayesinf.curvature._passes import Fisher, Passes
from bayesinf.curvature._rows import Rows
from bayesinf.curvature._spool import Spool

__all__ = ["Fisher", "Form", "Sequence", "choose_forms", "fit_curvature"]

Form = Literal["ekfac", "kfac", "diagonal", "dense", "identity"]
Sequence = Literal["expand", "reduce"]

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
    with ExitStack() as stack:
        capture = stack.enter_context(Capture(task, layers, costs))
        two = "ekfac" in forms.values() and task.device.type == "cpu"
        spool = stack.enter_context(Spool(int(spool_limit * 2**30) if two else 0))
        passes = Passes(capture, fisher, draws, seed, batch_size, spool)
        with costs.stage("covariance"):
            estimates = [
                _Estimate(task, layer, forms[layer.name], sequence, max_factor) for layer in layers
            ]
            for mask, pulls in passes:
                for first, pull in pulls:
                    for estimate, rows in zip(estimates, pull, strict=True):
                        estimate.add(rows, mask, passes.weight, first)
        with costs.stage("eigendecomposition"):
            blocks = [estimate.block() for estimate in estimates]
        corrected = [i for i, block in enumerate(blocks) if block.form == "ekfac"]
        if corrected:
            with costs.stage("eigenvalue correction"):
                _correct(task, blocks, corrected, passes)
    fingerprint = task.fingerprint()
    info = {
        "fisher": fisher,
        "sequence": sequence,
        "n": task.n,
        **{key: fingerprint[key] for key in ("checkpoint", "train", "likelihood")},
        **({"draws": draws, "seed": seed} if fisher == "sampled" else {}),
    }
    return Curvature(tuple(blocks), {k: tuple(p.shape) for k, p in task.params.items()}, info)


def _correct(task: Task, blocks: list[Block], which: list[int], passes: Passes) -> None:
    """Replace the eigenvalues of K-FAC by second moments in its basis."""
    totals = {i: _zeros(task, *blocks[i].layer.shape) for i in which}
    for _, pulls in passes:
        for _, pull in pulls:
            for i in which:
                totals[i] += passes.weight * second_moment(rotate_rows(blocks[i].basis, pull[i]))
    for i, total in totals.items():
        block = blocks[i]
        _require_finite_sum(total, block.layer, task)
        values = (total / task.n).to(task.dtype)
        blocks[i] = Block(block.layer, block.form, block.basis, values)


class _Estimate:
    """Running sums of one layer's block."""

    def __init__(
        self, task: Task, layer: Layer, form: Form, sequence: Sequence, max_factor: int
    ) -> None:
        self.task, self.layer, self.form = task, layer, form
        self.factors: KroneckerSums | None = None
        if form in ("ekfac", "kfac"):
            self.factors = KroneckerSums(layer, sequence, max_factor, task)
        elif form == "dense":
            self.total = _zeros(task, layer.size, layer.size)
        else:
            self.total = _zeros(task, *layer.shape) if form == "diagonal" else _zeros(task, 1)

    def add(self, rows: Rows, mask: Tensor | None, weight: float, first: bool) -> None:
        if self.factors is not None:
            self.factors.add(rows, mask, weight, first)
        elif self.form == "dense":
            self.total += weight * outer_moment(rows)
        elif self.form == "diagonal":
            self.total += weight * second_moment(rows)
        else:
            self.total += weight * squared_norms([rows]).double().sum()

    def block(self) -> Block:
        layer, n, dtype = self.layer, self.task.n, self.task.dtype
        if self.factors is not None:
            basis, values = self.factors.decompose(n)
            _require_finite_sum(values, layer, self.task)
            return Block(layer, self.form, basis, values.to(dtype))
        total = self.total / n
        _require_finite_sum(total, layer, self.task)
        if self.form == "dense":
            values, vectors = torch.linalg.eigh((total + total.T) / 2)
            kept = values.clamp_min(0).view(layer.shape)
            dense = DenseBasis(vectors.to(dtype).contiguous())
            return Block(layer, self.form, dense, kept.to(dtype))
        if self.form == "identity":
            total = (total / layer.size).expand(layer.shape).contiguous()
        return Block(layer, self.form, StandardBasis(), total.to(dtype))


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


def _require_finite_sum(total: Tensor, layer: Layer, task: Task) -> None:
    if not bool(torch.isfinite(total).all()):
        raise ValueError(
            f"layer {layer.name!r}: gradients are finite, but their products overflow "
            f"{task.dtype}. Use a float64 model: model.double()."
        )


def _zeros(task: Task, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=task.device)
