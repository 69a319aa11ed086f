"""A linear regression whose local posterior is Gaussian: every law in closed form, float64.

Shapes: design ``X (n, p)``, residuals at the centre ``r (n,)``; ``A`` is the Hessian of the
potential, ``center`` the mean of the posterior.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bayesinf as bi


@dataclass(frozen=True)
class Quadratic:
    task: bi.Task
    posterior: bi.LocalPosterior
    hessian: Tensor  # of the potential
    w0: Tensor
    center: Tensor

    def covariance(self, step_size: float) -> Tensor:
        """A⁻¹(I − εA/4)⁻¹, the stationary law of SGLD."""
        eye = torch.eye(len(self.w0), dtype=torch.float64)
        return torch.linalg.inv(self.hessian) @ torch.linalg.inv(eye - step_size * self.hessian / 4)

    def gradients(self, split: str, at: Tensor) -> tuple[Tensor, Tensor]:
        """Per-example gradients of the losses, and the designs."""
        x, y = self.task.examples(split).batch()
        return x * (x @ at - y[:, 0])[:, None], x

    def influence(self, covariance: Tensor) -> Tensor:
        """−(nβ/n) Cov(ℓ_i, ℓ_q) = −(nβ/n)[g_qᵀΣg_i + ½(x_qᵀΣx_i)²] under N(center, Σ)."""
        g, x = self.gradients("train", self.center)
        gq, xq = self.gradients("query", self.center)
        cov = gq @ covariance @ g.T + 0.5 * (xq @ covariance @ x.T) ** 2
        return -self.posterior.n_beta / self.task.n * cov


def make(
    *,
    n_beta: float = 60.0,
    gamma: float = 6.0,
    weight_decay: float = 0.0,
    potential: str = "tilted",
    offset: float = 0.3,
    n: int = 30,
    p: int = 4,
) -> Quadratic:
    g = torch.Generator().manual_seed(11)
    x = torch.randn(n, p, generator=g, dtype=torch.float64) * torch.linspace(0.4, 1.6, p)
    y = x @ torch.randn(p, 1, generator=g, dtype=torch.float64)
    y = torch.round(y + 0.5 * torch.randn(n, 1, generator=g, dtype=torch.float64), decimals=12)
    xq = torch.randn(6, p, generator=g, dtype=torch.float64)
    yq = torch.randn(6, 1, generator=g, dtype=torch.float64)
    model = nn.Linear(p, 1, bias=False, dtype=torch.float64)
    shift = torch.randn(p, generator=g, dtype=torch.float64)
    w0 = torch.linalg.lstsq(x, y).solution[:, 0] + offset * shift
    w0 = torch.round(w0, decimals=12)  # LAPACK's last bits vary from call to call on some machines
    model.weight.data = w0[None].clone()
    task = bi.Task(model, bi.Gaussian(), train=(x, y), query=(xq, yq))
    posterior = bi.LocalPosterior(task, n_beta, gamma, weight_decay, potential)  # type: ignore[arg-type]
    hessian = n_beta * x.T @ x / n + posterior.prior_precision * torch.eye(p, dtype=torch.float64)
    center = w0
    if potential == "plain":
        slope = n_beta * (x.T @ (x @ w0 - y[:, 0]) / n + weight_decay * w0)
        center = w0 - torch.linalg.solve(hessian, slope)
    return Quadratic(task, posterior, hessian, w0, center)
