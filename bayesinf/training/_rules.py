r"""Update rules of optimisers as data, and as functions of flat vectors.

``g`` is the gradient of the batch loss, ``η`` the learning rate, ``w`` the weight decay.

* SGD: ``g ← g + wθ``, ``v ← μv + (1 − d)g`` (the first time ``v ← g``), ``θ ← θ − ηv`` (with
  Nesterov's look-ahead ``θ ← θ − η(g + μv)``);
* Adam: ``g ← g + wθ``, ``m ← β₁m + (1 − β₁)g``, ``s ← β₂s + (1 − β₂)g²``,
  ``θ ← θ − η m̂/(√ŝ + eps)`` with ``m̂ = m/(1 − β₁ᵗ)`` and ``ŝ = s/(1 − β₂ᵗ)``;
* AdamW: the same with ``θ ← (1 − ηw)θ`` first instead of ``g ← g + wθ``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["MOMENTS", "Kind", "Rule", "rule_of", "updated"]

Kind = Literal["sgd", "adam", "adamw"]

MOMENTS: dict[Kind, tuple[str, ...]] = {
    "sgd": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
}
"""What an optimiser keeps of a parameter, by PyTorch's names."""


@dataclass(frozen=True)
class Rule:
    """How an optimiser moves parameters; learning rates change from step to step and are no part.

    Attributes
    ----------
    kind
        ``"sgd"``, ``"adam"`` or ``"adamw"``.
    groups
        Names of the parameters of each group.
    weight_decay
        Of each group.
    momentum, dampening, nesterov
        Of SGD.
    betas, eps
        Of Adam and AdamW.
    """

    kind: Kind
    groups: tuple[tuple[str, ...], ...]
    weight_decay: tuple[float, ...]
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    @property
    def names(self) -> tuple[str, ...]:
        """All parameters that are trained."""
        return tuple(name for group in self.groups for name in group)

    @property
    def decays(self) -> dict[str, float]:
        """Weight decay by parameter."""
        pairs = zip(self.groups, self.weight_decay, strict=True)
        return {name: decay for group, decay in pairs for name in group}

    @property
    def gain(self) -> float:
        """What a gradient moves in all, over the step that it came in: ``(1 − d)/(1 − μ)``."""
        if self.kind != "sgd" or not self.momentum:
            return 1.0
        return (1 - self.dampening) / (1 - self.momentum)

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(held: Mapping[str, Any]) -> Rule:
        """Inverse of :meth:`as_dict`."""
        fields = dict(held)
        fields["groups"] = tuple(tuple(group) for group in fields["groups"])
        for name in ("weight_decay", "betas"):
            fields[name] = tuple(fields[name])
        return Rule(**fields)


def rule_of(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> Rule:
    """Read the rule of an optimiser of PyTorch.

    Parameters
    ----------
    optimizer
        ``torch.optim.SGD``, ``Adam`` or ``AdamW``.
    names
        Names of the model's parameters by ``id``.

    Raises
    ------
    TypeError
        If it is another optimiser.
    ValueError
        If groups differ in more than learning rate and weight decay, it maximises, uses amsgrad,
        or has a parameter that the model has not.
    """
    kind = _kind(optimizer)
    groups = optimizer.param_groups
    fields = ("momentum", "dampening", "nesterov") if kind == "sgd" else ("betas", "eps")
    for group in groups:
        for name in (*fields, "maximize", "amsgrad"):
            wanted = groups[0].get(name) if name in fields else False
            if group.get(name, False if name not in fields else None) != wanted:
                raise ValueError(
                    f"a recorded optimiser must have {name}={wanted!r} in all parameter groups; "
                    f"got {group[name]!r}. Groups may differ in lr and weight_decay only."
                )
    strange = sum(id(p) not in names for group in groups for p in group["params"])
    if strange:
        raise ValueError(
            f"{strange} parameters of the optimiser are none of the model's. Record the model that "
            f"the optimiser was made for: CheckpointRecorder(folder, model, optimizer, …)."
        )
    return Rule(
        kind,
        tuple(tuple(names[id(p)] for p in group["params"]) for group in groups),
        tuple(float(group["weight_decay"]) for group in groups),
        **{name: groups[0][name] for name in fields},
    )


def _kind(optimizer: torch.optim.Optimizer) -> Kind:
    if isinstance(optimizer, torch.optim.SGD):
        return "sgd"
    if isinstance(optimizer, torch.optim.AdamW):
        return "adamw"
    if isinstance(optimizer, torch.optim.Adam):
        decoupled = optimizer.param_groups[0].get("decoupled_weight_decay", False)
        return "adamw" if decoupled else "adam"
    raise TypeError(
        f"runs of torch.optim.SGD, Adam and AdamW can be recorded; got "
        f"{type(optimizer).__name__}, whose steps these methods have no formula for."
    )


def updated(
    rule: Rule,
    state: tuple[Tensor, ...],
    gradient: Tensor,
    rate: Tensor,
    decay: Tensor,
    step: int,
) -> tuple[Tensor, ...]:
    """One step, entry by entry, differentiable also where second moments are 0.

    Parameters
    ----------
    rule
        The rule.
    state
        Parameters ``(d,)``, then the moments in the order of :data:`MOMENTS`.
    gradient
        Of the batch loss.
    rate, decay
        ``η`` and ``w`` of every entry.
    step
        Steps that the optimiser has taken before.

    Returns
    -------
    tuple[Tensor, ...]
        The new state.
    """
    if rule.kind == "sgd":
        return _sgd(rule, state, gradient + decay * state[0], rate, step)
    position, first, second = state
    if rule.kind == "adam":
        gradient = gradient + decay * position
    else:
        position = position - rate * decay * position
    (beta, gamma), time = rule.betas, step + 1
    first = beta * first + (1 - beta) * gradient
    second = gamma * second + (1 - gamma) * gradient.square()
    moved = second > 0
    root = torch.where(moved, second, 1.0).sqrt() / (1 - gamma**time) ** 0.5
    size = torch.where(moved, root, 0.0) + rule.eps
    return position - rate * first / (1 - beta**time) / size, first, second


def _sgd(
    rule: Rule, state: tuple[Tensor, ...], gradient: Tensor, rate: Tensor, step: int
) -> tuple[Tensor, ...]:
    position, velocity = state
    if not rule.momentum:
        return position - rate * gradient, velocity
    velocity = rule.momentum * velocity + (1 - rule.dampening if step else 1.0) * gradient
    move = gradient + rule.momentum * velocity if rule.nesterov else velocity
    return position - rate * move, velocity
