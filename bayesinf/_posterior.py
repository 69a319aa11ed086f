r"""The local posterior around a checkpoint.

With mean loss ``L(w) = (1/n) Σ_i ℓ_i(w)`` and checkpoint ``w0``,

    U(w) = nβ L(w) + (nβ·wd/2)‖w‖² + (γ/2)‖w − w0‖²            p(w) ∝ exp(−U(w))

and, tilted, ``U(w) − ⟨∇U(w0), w⟩``: a constant linear term that makes ``w0`` stationary whatever
the training state. Minibatch gradients of the tilted potential are
``nβ[∇ℓ_B(w) − ∇ℓ_B(w0)] + (nβ·wd + γ)(w − w0)``, whose noise vanishes at ``w0``.

Positions are flat: ``(C, d)``, one row per chain. A batch is None (all training examples) or
positions of examples ``(C, B)``, one row per chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.func import grad

from bayesinf._gradients import ChainFunctions
from bayesinf._task import Task

__all__ = ["LocalPosterior", "Potential", "PotentialKind"]

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
            Whether chains are computed together; None chooses by the number of parameters.
        chunk_size
            Examples per forward pass of a full-batch evaluation (bounds the memory).

        Returns
        -------
        Potential
            ``value``, ``grad``, ``value_and_grad`` and ``hvp`` at stacked positions.
        """
        return Potential(self, ChainFunctions(self.task, vectorize), chunk_size)


class Potential:
    """The potential of a :class:`LocalPosterior` and its (stochastic) gradient; see the module."""

    def __init__(self, posterior: LocalPosterior, functions: ChainFunctions, chunk: int) -> None:
        self.posterior, self.functions, self.chunk = posterior, functions, chunk
        self.center = posterior.task.flatten(posterior.task.params)

    @cached_property
    def _center_grad(self) -> Tensor:
        """∇L(w0) over all examples, ``(d,)``."""
        return self._mean_loss(self.center[None], None)[0][0]

    @property
    def _tilted(self) -> bool:
        return self.posterior.potential == "tilted"

    def _mean_loss(self, position: Tensor, batch: Tensor | None) -> tuple[Tensor, Tensor]:
        """Plain gradient ``(C, d)`` and value ``(C,)`` of the mean loss over the batch."""
        train = self.posterior.task.train
        if batch is not None:
            return self.functions.loss_grad(position, train.batch(batch), shared=False)
        grad, loss = torch.zeros_like(position), position.new_zeros(len(position))
        for where, chunk in train.batches(self.chunk):
            g, v = self.functions.loss_grad(position, chunk, shared=True)
            share = (where.stop - where.start) / len(train)
            grad += share * g
            loss += share * v
        return grad, loss

    def _tilt(self, batch: Tensor | None, chains: int) -> Tensor:
        """Mean-loss gradient at ``w0`` over the same batch, ``(d,)`` or ``(C, d)``."""
        if batch is None:
            return self._center_grad
        return self._mean_loss(self.center.expand(chains, -1), batch)[0]

    def loss_grad(self, position: Tensor, batch: Tensor | None) -> Tensor:
        """Plain gradient of the batch's mean loss, ``(C, d)`` (what preconditioners adapt to)."""
        return self._mean_loss(position, batch)[0]

    def assemble(self, position: Tensor, loss_grad: Tensor, batch: Tensor | None) -> Tensor:
        """Gradient of the potential from :meth:`loss_grad` at the same position and batch."""
        p = self.posterior
        if self._tilted:
            out = p.n_beta * (loss_grad - self._tilt(batch, len(position)))
            return out.add_(position - self.center, alpha=p.prior_precision)
        out = p.n_beta * loss_grad
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
        if self._tilted:
            linear = (self._tilt(batch, len(position)) * delta).sum(-1)
            return p.n_beta * (loss - linear) + 0.5 * p.prior_precision * delta.square().sum(-1)
        decay = 0.5 * p.n_beta * p.weight_decay * position.square().sum(-1)
        return p.n_beta * loss + decay + 0.5 * p.gamma * delta.square().sum(-1)

    def hvp(self, position: Tensor, vector: Tensor, batch: Tensor | None = None) -> Tensor:
        """Hessian of the potential times a vector, ``(C, d)``; the tilt does not change it."""
        p, task = self.posterior, self.posterior.task
        out = p.prior_precision * vector
        for c in range(len(position)):
            for share, examples in self._shares(None if batch is None else batch[c]):

                def mean_loss(w: Tensor, examples: Any = examples) -> Tensor:
                    return task.losses(task.unflatten(w), examples).mean()

                def slope(w: Tensor, c: int = c) -> Tensor:
                    return grad(mean_loss)(w) @ vector[c]

                out[c] += p.n_beta * share * grad(slope)(position[c])
        return out

    def _shares(self, batch: Tensor | None) -> list[tuple[float, Any]]:
        train = self.posterior.task.train
        if batch is not None:
            return [(1.0, train.batch(batch))]
        return [
            ((where.stop - where.start) / len(train), examples)
            for where, examples in train.batches(self.chunk)
        ]
