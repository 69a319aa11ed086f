r"""Training recipes: optimiser, learning rates, epochs and batches.

A recipe is data. Training asks it for the number of steps ``T`` on a subset, the learning rate
``η_t`` of each, and an optimiser of its parameters, which may be stacked ``(G, *shape)`` for ``G``
networks: both optimisers act on every entry by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["AdamWRecipe", "Recipe", "SGDRecipe", "StatedStep", "Step"]

SCHEDULES = ("cosine", "constant")

Step = Callable[[Sequence[Tensor], float], None]
"""``step(grads, rate)`` moves the parameters, in place."""


@dataclass(frozen=True)
class StatedStep:
    """A step that shows what its optimiser keeps.

    Attributes
    ----------
    move
        The step.
    moments
        What is kept of each parameter by now, by PyTorch's names.
    """

    move: Step
    moments: Callable[[], dict[str, list[Tensor]]]

    def __call__(self, grads: Sequence[Tensor], rate: float) -> None:
        self.move(grads, rate)


class Recipe(Protocol):
    """What training needs of a recipe; ``lr`` is the learning rate ``η`` before any schedule."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...

    def steps(self, size: int) -> int:
        """Number of steps ``T`` on a subset of ``size`` examples."""
        ...

    def rate(self, step: int, total: int) -> float:
        """Learning rate ``η_t`` of step ``t`` of ``total``."""
        ...

    def optimizer(self, params: Sequence[Tensor]) -> Step:
        """Start an optimiser of ``params``."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for attrs and stores."""
        ...


@dataclass(frozen=True)
class SGDRecipe:
    """How a network is trained: SGD with momentum on the mean loss of its subset.

    A step at learning rate ``η_t`` is ``v ← momentum·v + ∇L_B(w) + weight_decay·w``,
    ``w ← w − η_t v``, as in ``torch.optim.SGD``. Batches come from a new permutation every epoch;
    the last one is smaller where ``batch_size`` does not divide the subset.

    Parameters
    ----------
    epochs, batch_size
        Passes over the subset, and examples of a step.
    lr
        Learning rate ``η`` of the first step.
    momentum, weight_decay
        As in ``torch.optim.SGD`` (coupled: weight decay is part of the gradient).
    schedule
        ``"cosine"``: ``η_t = η (1 + cos(πt/T))/2`` over all ``T`` steps, to 0; or ``"constant"``.

    Raises
    ------
    ValueError
        If a number is out of range or the schedule unknown.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        _require(self, self.schedule)
        if not 0 <= self.momentum < 1 or self.weight_decay < 0:
            raise ValueError(f"momentum must lie in [0, 1) and weight_decay be ≥ 0; got {self}.")

    def steps(self, size: int) -> int:
        """Number of steps ``T`` on a subset of ``size`` examples."""
        return self.epochs * math.ceil(size / self.batch_size)

    def rate(self, step: int, total: int) -> float:
        """Learning rate ``η_t`` of step ``t`` of ``total``."""
        return self.lr * _scheduled(self.schedule, step, total)

    def learning_rates(self, size: int) -> list[float]:
        """Learning rates of all steps on a subset of ``size`` examples."""
        total = self.steps(size)
        return [self.rate(step, total) for step in range(total)]

    def optimizer(self, params: Sequence[Tensor]) -> StatedStep:
        """Start the optimiser, with velocities 0."""
        velocity = [torch.zeros_like(p) for p in params]

        @torch.no_grad()
        def step(grads: Sequence[Tensor], rate: float) -> None:
            for w, g, v in zip(params, grads, velocity, strict=True):
                torch.add(g, v, alpha=self.momentum, out=v)
                if self.weight_decay:
                    v.add_(w, alpha=self.weight_decay)
                w.add_(v, alpha=-rate)

        return StatedStep(step, lambda: {"momentum_buffer": velocity})

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for attrs and stores."""
        return {"optimizer": "sgd", **asdict(self)}


@dataclass(frozen=True)
class AdamWRecipe:
    r"""How a network is trained: AdamW on the mean loss of its subset, as language models are.

    The steps are those of ``torch.optim.AdamW``: with ``g`` the gradient of the mean batch loss,
    ``m`` and ``v`` its running moments and ``m̂``, ``v̂`` these without their bias,
    ``w ← (1 − η_t·weight_decay) w − η_t m̂/(√v̂ + eps)``. Weight decay is decoupled: it is no part
    of the loss, so that a posterior at the checkpoint has none. A sequence's loss is the sum over
    its tokens; a mean over tokens would move the weights in the same way but for ``eps``.

    Parameters
    ----------
    epochs, batch_size
        Passes over the subset, and examples of a step.
    lr
        Largest learning rate ``η``.
    betas, eps, weight_decay
        As in ``torch.optim.AdamW``.
    schedule
        ``"cosine"``: ``η_t = η (1 + cos(πt/T))/2`` over all ``T`` steps, to 0; or ``"constant"``.
    warmup
        Share of all steps, ``W = round(warmup·T)`` of them, that the rate rises over: a factor
        ``min(1, (t + 1)/W)``.

    Raises
    ------
    ValueError
        If a number is out of range or the schedule unknown.

    References
    ----------
    Loshchilov and Hutter 2019, "Decoupled weight decay regularization".
    """

    epochs: int
    batch_size: int
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        _require(self, self.schedule)
        if not all(0 <= beta < 1 for beta in self.betas) or not 0 <= self.warmup <= 1:
            raise ValueError(f"betas must lie in [0, 1) and warmup in [0, 1]; got {self}.")
        if self.eps <= 0 or self.weight_decay < 0:
            raise ValueError(f"eps must be positive and weight_decay ≥ 0; got {self}.")

    def steps(self, size: int) -> int:
        """Number of steps ``T`` on a subset of ``size`` examples."""
        return self.epochs * math.ceil(size / self.batch_size)

    def rate(self, step: int, total: int) -> float:
        """Learning rate ``η_t`` of step ``t`` of ``total``."""
        rising = min(1.0, (step + 1) / max(1, round(self.warmup * total)))
        return self.lr * rising * _scheduled(self.schedule, step, total)

    def learning_rates(self, size: int) -> list[float]:
        """Learning rates of all steps on a subset of ``size`` examples."""
        total = self.steps(size)
        return [self.rate(step, total) for step in range(total)]

    def optimizer(self, params: Sequence[Tensor]) -> StatedStep:
        """Start the optimiser, with moments 0."""
        adam = torch.optim.AdamW(
            params, self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )

        def step(grads: Sequence[Tensor], rate: float) -> None:
            adam.param_groups[0]["lr"] = rate
            for parameter, gradient in zip(params, grads, strict=True):
                parameter.grad = gradient
            adam.step()
            adam.zero_grad()

        def moments() -> dict[str, list[Tensor]]:
            kept = adam.state[params[0]]
            return {key: [adam.state[p][key] for p in params] for key in kept}

        return StatedStep(step, moments)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for attrs and stores."""
        return {"optimizer": "adamw", **asdict(self), "betas": list(self.betas)}


def _require(recipe: Recipe, schedule: str) -> None:
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}; got {schedule!r}.")
    if recipe.epochs < 1 or recipe.batch_size < 1 or recipe.lr <= 0:
        raise ValueError(f"epochs, batch_size and lr must be positive; got {recipe}.")


def _scheduled(schedule: str, step: int, total: int) -> float:
    """Factor of the learning rate."""
    return 1.0 if schedule == "constant" else 0.5 * (1 + math.cos(math.pi * step / total))
