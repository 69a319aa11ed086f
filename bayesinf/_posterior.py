r"""The local posterior around a checkpoint.

With mean loss ``L(w) = (1/n) Σ_i ℓ_i(w)`` and checkpoint ``w0``,

    U(w) = nβ L(w) + (nβ·wd/2)‖w‖² + (γ/2)‖w − w0‖²            p(w) ∝ exp(−U(w))

and, tilted, ``U(w) − ⟨∇U(w0), w⟩``: a constant linear term that makes ``w0`` stationary whatever
the training state. Its gradient is ``nβ[∇L(w) − t] + …`` with ``t = ∇L(w0)``, or 0 untilted.

The potential is exact; what a batch ``B`` estimates is ``∇L``, without bias:

    ∇ℓ_B(w)                              anchor None
    ∇ℓ_B(w) − ∇ℓ_B(a) + ∇L(a)            anchor a: the noise vanishes at a

where ``∇ℓ_B`` is the mean over the batch of ``weight_i ∇ℓ_i``. With ``a = w0`` and the tilted
potential ``∇L(w0)`` cancels and is never computed.

Positions are flat: ``(C, d)``, one row per chain. A batch is None (all training examples) or
positions of examples ``(C, B)``, one row per chain.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.func import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from bayesinf._footprint import examples_at_once
from bayesinf._gradients import ChainFunctions
from bayesinf._task import Task

__all__ = ["Anchor", "LocalPosterior", "Potential", "PotentialKind"]

PotentialKind = Literal["tilted", "plain"]


@dataclass(frozen=True)
class LocalPosterior:
    r"""Tempered posterior localised at the task's checkpoint.

    Parameters
    ----------
    task
        The task.
    n_beta
        Inverse temperature times the number of examples, ``nβ ≥ 0``: the weight of the **mean**
        loss. ``n_beta=0`` samples the localising prior alone (a negative control).
    gamma
        Precision of the localising prior ``(γ/2)‖w − w0‖²``, ``γ ≥ 0``.
    weight_decay
        Coefficient of ``½‖w‖²`` in the objective, in units of the mean loss, as in SGD's
        ``weight_decay`` (AdamW's decoupled decay is not part of a potential).
    potential
        ``"tilted"`` (default): ``w0`` is stationary, the leading term of the covariances is exactly
        the damped influence function at ``w0``. ``"plain"``: the untilted potential.

    Attributes
    ----------
    damping : float
        ``λ = γ/(nβ) + weight_decay``, the damping of the classical influence function that this
        posterior tends to at low temperature (infinite at ``n_beta=0``).
    prior_precision : float
        ``γ + nβ·weight_decay``.

    Raises
    ------
    ValueError
        If a number is negative or not finite, or the potential is neither of the two.

    Notes
    -----
    Kreer et al. 2025 (arXiv 2509.26544) define the plain local posterior; the tilt makes it the
    quadratic model of the proximal Bregman objective of Bae et al. 2022 (arXiv 2209.05364).
    """

    task: Task
    n_beta: float
    gamma: float
    weight_decay: float = 0.0
    potential: PotentialKind = "tilted"

    def __post_init__(self) -> None:
        for name in ("n_beta", "gamma", "weight_decay"):
            value = float(getattr(self, name))
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and ≥ 0; got {value}.")
        if self.potential not in get_args(PotentialKind):
            raise ValueError(f"potential must be 'tilted' or 'plain'; got {self.potential!r}.")

    @property
    def prior_precision(self) -> float:
        """``γ + nβ·wd``, the precision that the prior terms give every direction."""
        return self.gamma + self.n_beta * self.weight_decay

    @property
    def damping(self) -> float:
        """``γ/(nβ) + wd``, in units of the mean loss."""
        return self.prior_precision / self.n_beta if self.n_beta else float("inf")

    def config(self) -> dict[str, Any]:
        """What identifies the posterior, apart from the task."""
        return {
            "n_beta": float(self.n_beta),
            "gamma": float(self.gamma),
            "weight_decay": float(self.weight_decay),
            "potential": self.potential,
        }

    def bind(self, *, vectorize: bool | None = None, chunk_size: int = 1000) -> Potential:
        """Make the potential computable.

        Parameters
        ----------
        vectorize
            Whether chains are computed together; None chooses by the size of
            the network and of what an example leaves behind.
        chunk_size
            Examples per forward pass of a full-batch evaluation (bounds the memory).

        Returns
        -------
        Potential
            ``value``, ``grad``, ``value_and_grad`` and ``hvp`` at stacked positions.
        """
        return Potential(self, ChainFunctions(self.task, vectorize), chunk_size)


@dataclass(frozen=True)
class Anchor:
    """Where the gradient over all examples is known.

    Attributes
    ----------
    position
        ``(d,)``, or ``(C, d)`` with an anchor for every chain.
    gradient
        ``∇L`` there, of the same shape; None at the checkpoint, where the potential knows it.
    """

    position: Tensor
    gradient: Tensor | None = None


@dataclass(frozen=True)
class _Evaluation:
    """Gradient ``(C, d)`` and losses ``(C, n)`` of all training examples at a position."""

    position: Tensor
    version: int
    gradient: Tensor
    losses: Tensor

    def holds_for(self, position: Tensor) -> bool:
        """Whether this is the very tensor, and not written to since."""
        return position is self.position and position._version == self.version


class Potential:
    """The potential of a :class:`LocalPosterior` and its (stochastic) gradient; see the module.

    Attributes
    ----------
    weights
        Of the training examples in batches, ``(n,)``; None where they all are 1.
    anchor
        What a batch's gradient is compared with.
    first_evaluated
        Where the full-batch gradient was computed first since this was last set to None.
    """

    weights: Tensor | None
    anchor: Anchor | None
    first_evaluated: Tensor | None

    def __init__(self, posterior: LocalPosterior, functions: ChainFunctions, chunk: int) -> None:
        self.posterior, self.functions, self.chunk = posterior, functions, chunk
        self.center = posterior.task.flatten(posterior.task.params)
        self.weights, self.first_evaluated = None, None
        self.anchor = Anchor(self.center) if self._tilted else None
        self._last: _Evaluation | None = None

    def estimated(self, weights: Tensor | None, anchor: Anchor | None) -> Potential:
        """Return the same potential with another estimator of its gradient from batches."""
        other = copy.copy(self)
        other.weights, other.anchor = weights, anchor
        return other

    @cached_property
    def _center_grad(self) -> Tensor:
        """∇L(w0) over all examples, ``(d,)``."""
        return self._all(self.center[None])[0][0]

    @property
    def _tilted(self) -> bool:
        return self.posterior.potential == "tilted"

    # ------------------------------------------------------------------ losses and their gradients

    def _all(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient ``(C, d)`` of the mean loss and losses ``(C, n)`` of all training examples."""
        train = self.posterior.task.train
        grad, losses = torch.zeros_like(position), []
        for where, chunk in train.batches(self.chunk):
            g, part = self.functions.loss_grad(position, chunk, shared=True)
            grad.add_(g, alpha=(where.stop - where.start) / len(train))
            losses.append(part)
        return grad, torch.cat(losses, dim=1)

    def evaluate(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient ``(C, d)`` of ``L`` and losses ``(C, n)`` of all training examples.

        The last evaluation is kept: at the same tensor it is not computed again.
        """
        if self.first_evaluated is None:
            self.first_evaluated = position
        if self._last is None or not self._last.holds_for(position):
            self._last = _Evaluation(position, position._version, *self._all(position))
        return self._last.gradient, self._last.losses

    def evaluated(self, position: Tensor) -> bool:
        """Whether :meth:`evaluate` would cost nothing."""
        return self._last is not None and self._last.holds_for(position)

    def _on_batch(self, position: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted gradient ``(C, d)`` and value ``(C,)`` of the batch's mean loss."""
        examples = self.posterior.task.train.batch(batch)
        weights = None if self.weights is None else self.weights[batch]
        grad, losses = self.functions.loss_grad(position, examples, shared=False, weights=weights)
        return grad, (losses if weights is None else losses * weights).mean(1)

    def _mean_loss(self, position: Tensor, batch: Tensor | None) -> tuple[Tensor, Tensor]:
        """Plain gradient ``(C, d)`` and value ``(C,)`` of the mean loss over the batch."""
        if batch is not None:
            return self._on_batch(position, batch)
        grad, losses = self.evaluate(position)
        return grad, losses.mean(1)

    def _shift(self, batch: Tensor | None, chains: int) -> Tensor | None:
        """What makes a batch's gradient an estimate of ``∇L − t``: ``(d,)``, ``(C, d)`` or None."""
        tilt = self._center_grad if self._tilted and not self._cancels(batch) else None
        if batch is None or self.anchor is None:
            return None if tilt is None else -tilt
        shift = -self._on_batch(self.anchor.position.expand(chains, -1), batch)[0]
        if not self._cancels(batch):
            known = self.anchor.gradient
            shift += self._center_grad if known is None else known
        return shift if tilt is None else shift.sub_(tilt)

    def _cancels(self, batch: Tensor | None) -> bool:
        """Whether the tilt is the gradient at the anchor."""
        anchored = batch is not None and self.anchor is not None
        return anchored and self._tilted and self.anchor.gradient is None  # type: ignore[union-attr]

    def loss_grad(self, position: Tensor, batch: Tensor | None) -> Tensor:
        """Plain gradient of the batch's mean loss, ``(C, d)`` (what preconditioners adapt to)."""
        return self._mean_loss(position, batch)[0]

    def assemble(self, position: Tensor, loss_grad: Tensor, batch: Tensor | None) -> Tensor:
        """Gradient of the potential from :meth:`loss_grad` at the same position and batch."""
        p, shift = self.posterior, self._shift(batch, len(position))
        out = p.n_beta * loss_grad if shift is None else (loss_grad + shift).mul_(p.n_beta)
        if self._tilted:
            return out.add_(position - self.center, alpha=p.prior_precision)
        out.add_(position, alpha=p.prior_precision)
        return out.sub_(self.center, alpha=p.gamma)

    def grad(self, position: Tensor, batch: Tensor | None = None) -> Tensor:
        """Gradient ``(C, d)`` of the potential, stochastic where a batch is given."""
        return self.assemble(position, self.loss_grad(position, batch), batch)

    def value_and_grad(
        self, position: Tensor, batch: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Value ``(C,)`` and gradient ``(C, d)``; their batch is the same."""
        loss_grad, loss = self._mean_loss(position, batch)
        return self._value(position, loss, batch), self.assemble(position, loss_grad, batch)

    def value(self, position: Tensor, batch: Tensor | None = None) -> Tensor:
        """Value ``(C,)``, up to a constant that depends on neither position nor chain."""
        return self._value(position, self._mean_loss(position, batch)[1], batch)

    def value_of_loss(self, position: Tensor, loss: Tensor) -> Tensor:
        """Value ``(C,)`` from the mean loss over **all** training examples, where it is known."""
        return self._value(position, loss, None)

    def _value(self, position: Tensor, loss: Tensor, batch: Tensor | None) -> Tensor:
        p, delta = self.posterior, position - self.center
        shift = self._shift(batch, len(position))
        if shift is not None:
            loss = loss + (shift * delta).sum(-1)
        if self._tilted:
            return p.n_beta * loss + 0.5 * p.prior_precision * delta.square().sum(-1)
        decay = 0.5 * p.n_beta * p.weight_decay * position.square().sum(-1)
        return p.n_beta * loss + decay + 0.5 * p.gamma * delta.square().sum(-1)

    def hvp(self, position: Tensor, vector: Tensor, batch: Tensor | None = None) -> Tensor:
        """Hessian of the potential times a vector, ``(C, d)``; the tilt does not change it."""
        p, task = self.posterior, self.posterior.task
        out = p.prior_precision * vector
        size = examples_at_once(task, self.chunk)
        for c in range(len(position)):
            for share, examples, weights in self._shares(None if batch is None else batch[c], size):

                def mean_loss(
                    w: Tensor, examples: Any = examples, weights: Any = weights
                ) -> Tensor:
                    return (weights * task.losses(task.unflatten(w), examples)).mean()

                def slope(w: Tensor, c: int = c) -> Tensor:
                    return grad(mean_loss)(w) @ vector[c]

                with sdpa_kernel(SDPBackend.MATH):  # fused attention has first derivatives only
                    out[c] += p.n_beta * share * grad(slope)(position[c])
        return out

    def _shares(self, batch: Tensor | None, size: int) -> Iterator[tuple[float, Any, Any]]:
        train = self.posterior.task.train
        if batch is None:
            for where, examples in train.batches(size):
                yield (where.stop - where.start) / len(train), examples, 1
            return
        for part in batch.split(size):
            weights = 1 if self.weights is None else self.weights[part]
            yield len(part) / len(batch), train.batch(part), weights
