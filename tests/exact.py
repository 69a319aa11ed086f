"""Dense curvature and influence by ``torch.func`` alone, for comparison."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.func import jacrev

import bayesinf as bi


def gradients(task: bi.Task, split: str = "train", measurement: str = "loss") -> Tensor:
    """Per-example gradients ``(n, d)``."""
    batch = task.examples(split).batch()
    jacobian = jacrev(lambda params: task.measure(measurement, params, batch))(task.params)
    return task.flatten(jacobian)


def output_jacobian(task: bi.Task) -> Tensor:
    """``(n, outputs, d)``."""
    batch = task.train.batch()
    jacobian = jacrev(lambda params: task.outputs(params, batch).flatten(1))(task.params)
    return task.flatten(jacobian)


def output_hessians(task: bi.Task) -> Tensor:
    """Hessian of each loss in the outputs, ``(n, outputs, outputs)``."""
    x, y = task.train.batch()
    found = []
    for i in range(task.n):
        f = task.outputs(task.params, (x[i : i + 1], y[i : i + 1])).detach()
        loss = lambda f, i=i: task.likelihood.loss(f, y[i : i + 1]).sum()  # noqa: E731
        found.append(jacrev(jacrev(loss))(f).reshape(f.numel(), f.numel()))
    return torch.stack(found)


def gauss_newton(task: bi.Task) -> Tensor:
    """``(1/n) Σ Jᵀ H J``, ``(d, d)``."""
    j = output_jacobian(task)
    return torch.einsum("nkd,nkl,nle->de", j, output_hessians(task), j) / task.n


def empirical_fisher(task: bi.Task) -> Tensor:
    g = gradients(task)
    return g.T @ g / task.n


FISHER = {"empirical": empirical_fisher, "enumerated": gauss_newton}


def loss_hessian(task: bi.Task) -> Tensor:
    """Hessian of the mean loss by double backward, row by row."""
    batch = task.train.batch()

    def mean_loss(flat: Tensor) -> Tensor:
        return task.losses(task.unflatten(flat), batch).mean()

    return torch.autograd.functional.hessian(mean_loss, task.flatten(task.params))


def influence(task: bi.Task, curvature: Tensor, damping: float, measurement: str = "loss"):
    """``−(1/n) ∇φᵀ (C + λI)⁻¹ ∇ℓ``."""
    damped = curvature + damping * torch.eye(len(curvature), dtype=curvature.dtype)
    left, right = gradients(task, "query", measurement), gradients(task)
    return (-(left @ torch.linalg.solve(damped, right.T)) / task.n).numpy()


def index(task: bi.Task, weight: str | None, bias: str | None) -> Tensor:
    """Positions in the flat parameters of a layer's ``(P, M [+ bias])`` matrix, row by row."""
    place, start = {}, 0
    for name, p in task.params.items():
        place[name] = torch.arange(start, start + p.numel())
        start += p.numel()
    if weight is None:
        return place[bias]
    rows = place[weight].reshape(len(task.params[weight]), -1)
    if bias is not None:
        rows = torch.cat([rows, place[bias][:, None]], dim=1)
    return rows.flatten()


def close(got, expected, rtol: float = 1e-9) -> None:
    """Frobenius distance relative to the expected norm."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    norm = np.linalg.norm(expected)
    assert norm > 0
    assert np.linalg.norm(got - expected) <= rtol * norm
