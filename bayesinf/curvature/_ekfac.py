r"""K-FAC and EK-FAC factors of a task's curvature, fitted over the training set.

The curvature is that of the **mean** loss, ``C ≈ (1/n) Σ_i E_ŷ[D_i D_iᵀ]`` block by layer, with
``D_i`` the gradient of ``−log p(ŷ | x_i)``. Which labels ŷ:

* ``"enumerated"``: the expectation over the model's own distribution, exactly, as a sum over the
  rows of the output-space factor ``Σ_k f_k f_kᵀ`` (equal to the Gauss–Newton matrix);
* ``"sampled"``: one label an example, drawn from the model's distribution;
* ``"empirical"``: the data's labels.

Sources: Martens & Grosse 2015; George et al. 2018; Grosse et al. 2023 §2.4 and §3.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from bayesinf._data import Batch
from bayesinf._likelihoods import require
from bayesinf._task import Task
from bayesinf.curvature import _kronecker as kron
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._capture import Capture, Record, require_finite
from bayesinf.curvature._layers import Layer, require_layers

__all__ = ["FISHERS", "LayerFactors", "fit_factors"]

FISHERS = ("enumerated", "sampled", "empirical")


@dataclass(frozen=True)
class LayerFactors:
    """The curvature of one layer, ``(Q_S ⊗ Q_A) diag(Λ) (Q_S ⊗ Q_A)ᵀ``.

    Attributes
    ----------
    layer
        The parameters.
    q_a, q_s
        Eigenvectors in columns, ``(M, M)`` and ``(P, P)``.
    values_a, values_s
        Eigenvalues of ``A`` and ``S``.
    eigenvalues
        ``Λ`` ``(P, M)``, in units of the mean loss.
    """

    layer: Layer
    q_a: Tensor
    q_s: Tensor
    values_a: Tensor
    values_s: Tensor
    eigenvalues: Tensor

    def trace(self) -> float:
        """Trace of the layer's curvature."""
        return float(self.eigenvalues.double().sum())

    def mean_eigenvalue(self) -> float:
        """Mean of ``Λ``, the unit of a relative damping."""
        return self.trace() / self.layer.size

    def dense(self) -> Tensor:
        """The curvature as a ``(P·M, P·M)`` matrix; for small layers."""
        return kron.dense(self.q_a, self.q_s, self.eigenvalues)

    def apply_inverse(self, matrix: Tensor, damping: float) -> Tensor:
        """``(C + λI)⁻¹`` times gradients ``(..., P, M)`` of this layer."""
        return kron.damped_inverse(matrix, self.q_a, self.q_s, self.eigenvalues, damping)


@dataclass
class _Sums:
    inputs: Tensor
    outputs: Tensor
    positions: int = 0


def fit_factors(
    task: Task,
    *,
    fisher: str,
    layers: tuple[Layer, ...] | None = None,
    corrected: bool = True,
    seed: int = 0,
    batch_size: int = 256,
    costs: Costs | None = None,
) -> tuple[LayerFactors, ...]:
    r"""Fit Kronecker factors layer by layer.

    ``A = (1/n) Σ a aᵀ`` and ``S = (1/N) Σ ds dsᵀ`` (``N`` positions in all) and their
    eigenvectors in a first pass; in a second, ``Λ = (1/n) Σ_i E[(Q_Sᵀ G_i Q_A)²]``, the diagonal of
    the layer's Fisher block in that basis, which leaves trace and diagonal unbiased.

    Parameters
    ----------
    task
        Network, likelihood and training examples.
    fisher
        ``"enumerated"``, ``"sampled"`` or ``"empirical"``; see the module.
    layers
        The layers to fit; by default all that can be, with a warning about the others.
    corrected
        True: EK-FAC. False: K-FAC, ``Λ = λ_S λ_Aᵀ``, without the second pass.
    seed
        For sampled labels, one generator an example: they do not depend on ``batch_size``.
    batch_size
        Examples at a time; the factors do not depend on it.
    costs
        Account to which seconds and passes are added.

    Returns
    -------
    tuple[LayerFactors, ...]
        In the order of the layers, in the model's dtype.

    Raises
    ------
    ValueError
        If ``fisher`` is unknown, no layer can be treated, captured gradients disagree with
        autograd's, or a gradient is not finite.
    NotImplementedError
        If the likelihood lacks the part that ``fisher`` needs.
    """
    if fisher not in FISHERS:
        raise ValueError(f"fisher must be one of {FISHERS}; got {fisher!r}.")
    costs = costs if costs is not None else Costs()
    layers = require_layers(task)[0] if layers is None else layers
    seeds = torch.randint(2**62, (task.n,), generator=torch.Generator().manual_seed(seed))
    with Capture(task, layers, costs) as capture:
        labels = _Labels(capture, fisher, seeds)
        with costs.stage("covariance"):
            sums = _covariances(task, layers, labels, batch_size)
        with costs.stage("eigendecomposition"):
            factors = [_decompose(layer, s, task) for layer, s in zip(layers, sums, strict=True)]
        if corrected:
            with costs.stage("eigenvalue correction"):
                factors = _correct(task, factors, labels, batch_size)
    return tuple(factors)


@dataclass(frozen=True)
class _Labels:
    """Output derivatives of every layer for the labels of one kind of Fisher."""

    capture: Capture
    fisher: str
    seeds: Tensor

    def pulls(self, where: slice, batch: Batch) -> tuple[Record, Iterator[list[Tensor]]]:
        """One forward pass, and the backward passes that sum to the Fisher."""
        record = self.capture.record(batch)
        if self.fisher == "enumerated":
            return record, self._enumerated(record, batch)
        likelihood = self.capture.task.likelihood
        target = self._sample(record, batch, where) if self.fisher == "sampled" else batch[1]
        with torch.enable_grad():
            total = likelihood.loss(record.outputs, target).sum()
        return record, iter([record.pull(total)])

    def _enumerated(self, record: Record, batch: Batch) -> Iterator[list[Tensor]]:
        likelihood = self.capture.task.likelihood
        factor = require(likelihood, "fisher_factor", "fisher='enumerated'")
        rows = factor(record.outputs.detach(), batch[1])
        for k, row in enumerate(rows):
            yield record.pull(record.outputs, row, keep=k < len(rows) - 1)

    def _sample(self, record: Record, batch: Batch, where: slice) -> Tensor:
        sample = require(self.capture.task.likelihood, "sample", "fisher='sampled'")
        generator = torch.Generator(self.capture.task.device)
        drawn = []
        for i, seed in enumerate(self.seeds[where].tolist()):
            one = tree_map(lambda leaf, i=i: leaf[i : i + 1].detach(), record.outputs)
            target = tree_map(lambda leaf, i=i: leaf[i : i + 1], batch[1])
            drawn.append(sample(one, target, generator.manual_seed(seed)))
        return torch.cat(drawn)


def _covariances(
    task: Task, layers: tuple[Layer, ...], labels: _Labels, batch_size: int
) -> list[_Sums]:
    sums = [
        _Sums(_zeros(task, columns, columns), _zeros(task, rows, rows))
        for rows, columns in (layer.shape for layer in layers)
    ]
    for where, batch in task.train.batches(batch_size):
        record, pulls = labels.pulls(where, batch)
        for total, a in zip(sums, record.inputs, strict=True):
            total.inputs += kron.covariance(a)
            total.positions += a.shape[0] * a.shape[1]
        for pull in pulls:
            for layer, total, a, ds in zip(layers, sums, record.inputs, pull, strict=True):
                part = kron.covariance(ds)
                require_finite(part, layer.name, a, ds, task.train.ids[where], "train")
                total.outputs += part
    return sums


def _decompose(layer: Layer, sums: _Sums, task: Task) -> LayerFactors:
    values_a, q_a = kron.eigenbasis(sums.inputs / task.n)
    values_s, q_s = kron.eigenbasis(sums.outputs / max(1, sums.positions))
    parts = (q_a, q_s, values_a, values_s, torch.outer(values_s, values_a))
    return LayerFactors(layer, *(part.to(task.dtype) for part in parts))


def _correct(
    task: Task, factors: list[LayerFactors], labels: _Labels, batch_size: int
) -> list[LayerFactors]:
    totals = [_zeros(task, *f.layer.shape) for f in factors]
    for where, batch in task.train.batches(batch_size):
        record, pulls = labels.pulls(where, batch)
        inputs = [a @ f.q_a for f, a in zip(factors, record.inputs, strict=True)]
        for pull in pulls:
            for f, total, a, ds in zip(factors, totals, inputs, pull, strict=True):
                part = kron.second_moment(a, ds @ f.q_s)
                require_finite(part, f.layer.name, a, ds, task.train.ids[where], "train")
                total += part
    return [
        LayerFactors(f.layer, f.q_a, f.q_s, f.values_a, f.values_s, (total / task.n).to(task.dtype))
        for f, total in zip(factors, totals, strict=True)
    ]


def _zeros(task: Task, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=task.device)
