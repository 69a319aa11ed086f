r"""Likelihoods: what a loss is, given a network's outputs.

A likelihood maps the outputs of a network to one number per example, the loss
``ℓ_i = −log p(y_i | f_i)`` up to a constant, **summed** over the outputs of an example (over output
dimensions for :class:`Gaussian` and :class:`Bernoulli`, over positions for a segmentation-like
:class:`Categorical`, over counted tokens for :class:`CausalLM`, which has its own module).

Shapes, used throughout this module (``B`` examples, ``C`` classes, ``D`` output dimensions):

* outputs ``(B, C)`` or ``(B, C, *positions)`` for :class:`Categorical`, ``(B, D)`` or ``(B,)`` for
  the two others;
* losses and margins ``(B,)``; losses of tokens, where a likelihood has them, in the target's shape;
* Fisher factors ``(K, *outputs.shape)`` with ``Σ_k f_k f_kᵀ = ∇²_f ℓ``, the Hessian of the loss in
  the outputs, which for these three likelihoods equals the Fisher information of the output
  distribution (they are exponential families in their natural parameter).

Only :meth:`Likelihood.loss` is needed to sample. A method that needs more calls :func:`require`,
which names the missing part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesinf._language import CausalLM

__all__ = ["Bernoulli", "Categorical", "CausalLM", "Gaussian", "Likelihood", "require"]


@runtime_checkable
class Likelihood(Protocol):
    """What :class:`~bayesinf.Task` needs of a likelihood; see the module for optional parts.

    Optional parts, each used by the methods in brackets: ``margin(outputs, target)`` [margins],
    ``sample(outputs, target, generator)`` [Fisher with sampled labels],
    ``fisher_factor(outputs, target)`` [enumerated Fisher, Gauss-Newton],
    ``bregman(outputs, reference, target)`` [proximal Bregman objectives], ``correct(outputs,
    target)`` in [0, 1] [accuracy, flipped predictions], ``token_losses(outputs,
    target)`` in the target's shape with sum ``loss`` and ``token_mask(target)`` [scores per token],
    ``check(outputs, target)`` [readable errors for a target of the wrong kind]. The target tells
    ``sample`` and ``fisher_factor`` only which outputs count (positions that the loss leaves out).
    """

    def loss(self, outputs: Any, target: Any) -> Tensor:
        """Per-example losses ``(B,)``."""
        ...


def require(likelihood: Likelihood, part: str, purpose: str) -> Callable[..., Any]:
    """Return the method ``part`` of ``likelihood``, or say what is missing and for what.

    Parameters
    ----------
    likelihood
        Any object with a ``loss`` method.
    part
        Name of the optional method.
    purpose
        What needs it, for the error message.

    Returns
    -------
    Callable
        The bound method.

    Raises
    ------
    NotImplementedError
        If the likelihood does not define the part.
    """
    method = getattr(likelihood, part, None)
    if method is None:
        name = type(likelihood).__name__
        raise NotImplementedError(
            f"{purpose} needs `{part}` of the likelihood, and {name} does not define it. "
            f"Add a method `{part}` to {name} (bayesinf._likelihoods documents its shapes), "
            f"or choose a method that does not need it."
        )
    return method


def _per_example(values: Tensor) -> Tensor:
    """Sum everything but the first axis."""
    return values if values.ndim == 1 else values.flatten(1).sum(1)


def _log_odds(loss: Tensor) -> Tensor:
    """Return log p/(1−p) for p = exp(−loss)."""
    return -loss - torch.log(-torch.expm1(-loss))


@dataclass(frozen=True)
class Categorical:
    r"""Softmax cross-entropy on logits, ``ℓ = −log softmax(f)_y`` summed over positions.

    Outputs ``(B, C)`` with integer targets ``(B,)``, or ``(B, C, *positions)`` with integer targets
    ``(B, *positions)``.
    """

    def check(self, outputs: Tensor, target: Tensor) -> None:
        """Raise ``ValueError`` if outputs and target do not fit this likelihood."""
        expected = (outputs.shape[0], *outputs.shape[2:])
        if outputs.ndim < 2 or tuple(target.shape) != expected or target.is_floating_point():
            raise ValueError(
                f"Categorical expects logits (B, C, …) and integer targets (B, …); got outputs "
                f"{tuple(outputs.shape)} and a {target.dtype} target {tuple(target.shape)}. Usual "
                f"causes: one-hot or float labels (use `y.argmax(1)` or `y.long()`), or a model "
                f"with a single logit (use Bernoulli())."
            )
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= outputs.shape[1]:
            raise ValueError(
                f"Categorical got labels from {low} to {high} for {outputs.shape[1]} classes. "
                f"Labels must lie in [0, C−1]; labels that start at 1 need `y - 1`."
            )

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Per-example cross-entropy ``(B,)``, summed over positions."""
        return _per_example(self.token_losses(outputs, target))

    def token_losses(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of each position, in the target's shape ``(B, *positions)``.

        Written as ``log Σ_c exp(f_c − f_y)``, which keeps the relative precision of small losses.
        """
        label = outputs.gather(1, target.unsqueeze(1))
        return (outputs - label).logsumexp(1)

    def token_mask(self, target: Tensor) -> Tensor:
        """Which positions count: all of them."""
        return torch.ones_like(target, dtype=torch.bool)

    def margin(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Log-odds of the label, ``log p/(1−p)``, summed over positions (TRAK, Park 2023)."""
        label = outputs.gather(1, target.unsqueeze(1)).squeeze(1)
        others = outputs.scatter(1, target.unsqueeze(1), float("-inf")).logsumexp(1)
        return _per_example(label - others)

    def correct(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Share of positions whose most probable class is the target (1 or 0 where one alone)."""
        hits = (outputs.argmax(1) == target).to(outputs.dtype)
        return hits if hits.ndim == 1 else hits.flatten(1).mean(1)

    def sample(self, outputs: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """Draw targets from the model's own predictive distribution."""
        probs = outputs.movedim(1, -1).softmax(-1)
        flat = torch.multinomial(probs.flatten(0, -2), 1, generator=generator)
        return flat.reshape(probs.shape[:-1])

    def fisher_factor(self, outputs: Tensor, target: Tensor) -> Tensor:
        r"""Rows ``f_c = √p_c (e_c − p)``; one per class, and per position where there are any.

        ``Σ_c f_c f_cᵀ = diag(p) − p pᵀ``, the Hessian of the cross-entropy in the logits.
        """
        n_classes = outputs.shape[1]
        p = outputs.softmax(1)
        eye = torch.eye(n_classes, dtype=outputs.dtype, device=outputs.device)
        eye = eye.reshape(n_classes, 1, n_classes, *[1] * (outputs.ndim - 2))
        root = p.movedim(1, 0).sqrt().unsqueeze(2)  # (C, B, 1, *positions)
        rows = root * (eye - p)  # (C, B, C, *positions)
        if outputs.ndim == 2:
            return rows
        n_positions = rows[0, 0, 0].numel()
        rows = rows.flatten(3)
        select = torch.eye(n_positions, dtype=outputs.dtype, device=outputs.device)
        spread = rows.unsqueeze(1) * select.reshape(1, n_positions, 1, 1, n_positions)
        return spread.flatten(0, 1).unflatten(-1, outputs.shape[2:])

    def bregman(self, outputs: Tensor, reference: Tensor, target: Tensor) -> Tensor:
        """Bregman divergence of the loss in the outputs: KL(p_reference ‖ p_outputs)."""
        log_p, log_r = outputs.log_softmax(1), reference.log_softmax(1)
        return _per_example((log_r.exp() * (log_r - log_p)).sum(1))


@dataclass(frozen=True)
class Gaussian:
    """Squared error ``ℓ = ½‖y − f‖²``, summed over output dimensions (unit noise variance)."""

    def check(self, outputs: Tensor, target: Tensor) -> None:
        """Raise ``ValueError`` if outputs and target do not fit this likelihood."""
        if outputs.shape != target.shape or not target.is_floating_point():
            raise ValueError(
                f"Gaussian expects float targets of the outputs' shape; got outputs "
                f"{tuple(outputs.shape)} and a {target.dtype} target {tuple(target.shape)}. Usual "
                f"cause: targets (B,) for outputs (B, 1); use `y[:, None]` (a silent broadcast "
                f"would compare every output with every target)."
            )

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Per-example half squared error ``(B,)``."""
        return _per_example(0.5 * (outputs - target) ** 2)

    def sample(self, outputs: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """Draw ``y ~ N(f, I)``."""
        noise = torch.empty_like(outputs)
        return outputs + noise.normal_(generator=generator)

    def fisher_factor(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Unit vectors, one per output dimension: the Hessian is the identity."""
        size = outputs[0].numel()
        eye = torch.eye(size, dtype=outputs.dtype, device=outputs.device)
        rows = eye.unsqueeze(1).expand(size, outputs.shape[0], size)
        return rows.reshape(size, *outputs.shape)

    def bregman(self, outputs: Tensor, reference: Tensor, target: Tensor) -> Tensor:
        """Bregman divergence of the loss in the outputs: ``½‖f − f_reference‖²``."""
        return _per_example(0.5 * (outputs - reference) ** 2)


@dataclass(frozen=True)
class Bernoulli:
    """Logistic loss on logits, ``ℓ = −log σ(±f)``, summed over output dimensions."""

    def check(self, outputs: Tensor, target: Tensor) -> None:
        """Raise ``ValueError`` if outputs and target do not fit this likelihood."""
        inside = bool(((target >= 0) & (target <= 1)).all())
        if outputs.shape != target.shape or not target.is_floating_point() or not inside:
            raise ValueError(
                f"Bernoulli expects float targets in [0, 1] of the outputs' shape; got outputs "
                f"{tuple(outputs.shape)} and a {target.dtype} target {tuple(target.shape)} in "
                f"[{target.min()}, {target.max()}]. Usual causes: integer labels (use `y.float()`),"
                f" labels −1/+1 (use `(y + 1) / 2`), outputs (B, 1) for targets (B,)."
            )

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Per-example binary cross-entropy ``(B,)``."""
        return _per_example(F.binary_cross_entropy_with_logits(outputs, target, reduction="none"))

    def margin(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Log-odds ``log p/(1−p)`` of the whole label vector, ``p = exp(−ℓ)``."""
        return _log_odds(self.loss(outputs, target))

    def correct(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Share of output dimensions on the target's side of ½ (1 or 0 where one alone)."""
        hits = ((outputs > 0) == (target > 0.5)).to(outputs.dtype)
        return hits if hits.ndim == 1 else hits.flatten(1).mean(1)

    def sample(self, outputs: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """Draw labels from the model's own predictive distribution."""
        return torch.bernoulli(outputs.sigmoid(), generator=generator)

    def fisher_factor(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Rows ``√(σ(1−σ)) e_d``, one per output dimension."""
        p = outputs.sigmoid()
        return Gaussian().fisher_factor(outputs, target) * (p * (1 - p)).sqrt()

    def bregman(self, outputs: Tensor, reference: Tensor, target: Tensor) -> Tensor:
        """Bregman divergence of the loss in the outputs: KL(p_reference ‖ p_outputs)."""
        difference = F.softplus(outputs) - F.softplus(reference)
        return _per_example(difference - reference.sigmoid() * (outputs - reference))
