"""Exact independent draws from the Gaussian of the Gauss–Newton matrix."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesinf._likelihoods import require
from bayesinf._posterior import Potential
from bayesinf._rng import ChainGenerators
from bayesinf._task import Task
from bayesinf.curvature import GaussNewtonProduct, SolverWarning, conjugate_gradient
from bayesinf.samplers._laplace import require_stationary
from bayesinf.samplers._preconditioner import Preconditioner
from bayesinf.samplers._protocol import State

__all__ = ["GaussNewtonLaplace"]


@dataclass(frozen=True)
class GaussNewtonLaplace:
    r"""A fresh draw from ``N(w0, (nβ(C + λI))⁻¹)`` at every step, by perturb and solve.

    ``C = (1/n) Σ_i J_iᵀ F_i F_iᵀ J_i`` is the exact Gauss–Newton matrix, with the likelihood's
    Fisher factors ``F_i F_iᵀ = ∇²_f ℓ_i`` at ``w0``, and ``λ`` the posterior's ``damping``:

        b = n^{−1/2} Σ_i J_iᵀ F_i ξ_i + √λ ξ  ~  N(0, C + λI)         w = w0 + (C + λI)⁻¹ b / √nβ

    ``b`` costs a backward pass per chain, the solution conjugate gradients on Gauss–Newton
    products, with the right-hand sides of all chains as one block. Draws are independent, so that
    their Monte-Carlo errors are; what scores from them lack is what is not Gaussian. On a loss that
    is quadratic in the weights they are draws from the posterior.

    Parameters
    ----------
    preconditioner
        Its ``inverse`` preconditions the solver, and only its speed depends on it; None is the
        identity.
    tolerance
        On the residual of every right-hand side, relative to it. A covariance is off by about as
        much.
    iterations
        Of the solver, at most.
    chunk_size
        Examples at a time, which bounds the memory; the random numbers depend on it.

    Raises
    ------
    ValueError
        If a setting is out of range; at the first step, if the potential is plain or improper.
    NotImplementedError
        At the first step, if the likelihood has no ``fisher_factor``.
    RuntimeError
        If a solution misses the tolerance.

    References
    ----------
    Papandreou and Yuille 2010, "Gaussian sampling by local perturbations"; Antorán et al. 2023
    (arXiv 2210.04994) for linearised networks.
    """

    preconditioner: Preconditioner | None = None
    tolerance: float = 1e-3
    iterations: int = 200
    chunk_size: int = 256

    full_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (0 < self.tolerance < 1 and self.iterations >= 1 and self.chunk_size >= 1):
            raise ValueError(
                f"need 0 < tolerance < 1, iterations ≥ 1 and chunk_size ≥ 1; got tolerance="
                f"{self.tolerance}, iterations={self.iterations}, chunk_size={self.chunk_size}."
            )

    @property
    def step_size(self) -> float:
        """NaN: there are no steps."""
        return float("nan")

    def init(self, position: Tensor, rng: ChainGenerators) -> State:
        """Start at ``position``, which the first step forgets."""
        return {"position": position}

    def step(
        self, state: State, potential: Potential, batch: Tensor | None, rng: ChainGenerators
    ) -> tuple[State, dict[str, Any]]:
        """Draw afresh, whatever the state."""
        posterior = potential.posterior
        require_stationary("GaussNewtonLaplace", posterior)
        noise = rng.normal_like(state["position"])
        if posterior.n_beta == 0:  # the prior alone
            return {"position": potential.center + noise * posterior.prior_precision**-0.5}, {}
        rhs = self._scores(posterior.task, rng, len(noise))
        rhs.add_(noise, alpha=posterior.damping**0.5)
        solved = self._solve(posterior.task, rhs, posterior.damping)
        return {"position": potential.center + solved * posterior.n_beta**-0.5}, {}

    def _scores(self, task: Task, rng: ChainGenerators, chains: int) -> Tensor:
        """``n^{−1/2} Σ_i J_iᵀ F_i ξ_i`` for every chain, ``(C, d)``."""
        factor = require(task.likelihood, "fisher_factor", "GaussNewtonLaplace")
        total = torch.zeros(chains, task.dimension, dtype=task.dtype, device=task.device)
        for _, batch in task.train.batches(self.chunk_size):
            params = {name: p.detach().requires_grad_() for name, p in task.params.items()}
            with torch.enable_grad():
                outputs = task.outputs(params, batch)
            rows = factor(outputs.detach(), batch[1])
            total += task.flatten(_pull_back(outputs, params, _scramble(rows, rng, chains)))
        return total.mul_(task.n**-0.5)

    def _solve(self, task: Task, rhs: Tensor, damping: float) -> Tensor:
        inverse = None if self.preconditioner is None else self.preconditioner.inverse
        with warnings.catch_warnings():
            warnings.simplefilter("error", SolverWarning)
            try:
                return conjugate_gradient(
                    GaussNewtonProduct(task, batch_size=self.chunk_size),
                    rhs,
                    damping=damping,
                    preconditioner=inverse,
                    tolerance=self.tolerance,
                    iterations=self.iterations,
                ).x
            except SolverWarning as warning:
                raise RuntimeError(
                    f"draws of GaussNewtonLaplace would not have their law: {warning}"
                ) from None

    def freeze(self, state: State) -> State:
        """Nothing adapts."""
        return state


def _scramble(rows: Tensor, rng: ChainGenerators, chains: int) -> Tensor:
    """``F_i ξ_i = Σ_k ξ_ki f_ki`` for every chain: rows ``(K, B, …)`` give ``(C, B, …)``."""
    k, size = rows.shape[:2]
    noise = rng.normal_like(rows.new_empty(chains, k * size)).view(chains, k, size)
    mixed = torch.einsum("ckb,kbo->cbo", noise, rows.reshape(k, size, -1))
    return mixed.view(chains, *rows.shape[1:])


def _pull_back(outputs: Tensor, params: dict[str, Tensor], cotangents: Tensor) -> dict[str, Tensor]:
    """``Jᵀv`` for each of the stacked ``v``; together where autograd's formulas can be."""
    weights = list(params.values())

    def pull(v: Tensor, together: bool) -> Sequence[Tensor | None]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return torch.autograd.grad(
                outputs, weights, v, retain_graph=True, allow_unused=True, is_grads_batched=together
            )

    try:
        found = pull(cotangents, True)
    except RuntimeError:
        each = [pull(v, False) for v in cotangents]
        found = [None if p[0] is None else torch.stack(p) for p in zip(*each, strict=True)]
    lead = len(cotangents)
    return {
        name: w.new_zeros(lead, *w.shape) if part is None else part
        for (name, w), part in zip(params.items(), found, strict=True)
    }
