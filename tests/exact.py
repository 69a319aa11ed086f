"""Dense gradients, curvature and influence by ``torch.func`` alone, for comparison."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

import bayesinf as bi
from tests.layered_cases import LAYERED_BY_NAME


def jacrev(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """``torch.func.jacrev`` without its warnings about operations that it runs one by one."""

    def run(*args: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            return torch.func.jacrev(function)(*args)

    return run


# ---------------------------------------------------------------- gradients


def gradients(task: bi.Task, split: str = "train", measurement: Any = "loss") -> Tensor:
    """Per-example gradients ``(n, d)``."""
    batch = task.examples(split).batch()
    jacobian = jacrev(lambda params: task.measure(measurement, params, batch))(task.params)
    return task.flatten(jacobian)


def loss_tokens(task: bi.Task, split: str = "train") -> Tensor:
    """Gradients of the losses of counted tokens, example by example, ``(tokens, d)``."""
    x, y = task.examples(split).batch()
    mask = task.likelihood.token_mask(y).flatten()

    def losses(params: dict[str, Tensor]) -> Tensor:
        return task.likelihood.token_losses(task.outputs(params, (x, y)), y).flatten()[mask]

    return task.flatten(jacrev(losses)(task.params))


def position_tokens(task: bi.Task, split: str = "train") -> Tensor:
    """Parts of gradients from what layers saw at each position, ``(n, T, d)``.

    Every module gets weights of its own at every position, added to its output as a perturbation,
    and the loss is differentiated in them.
    """
    x, y = task.examples(split).batch()
    ids = x["input_ids"] if isinstance(x, dict) else x
    n, length = ids.shape[:2]
    canonical = {id(p): name for name, p in task.module.named_parameters()}
    own = {
        name: torch.zeros(length, *p.shape, dtype=p.dtype, requires_grad=True)
        for name, p in task.params.items()
    }
    handles = []
    for module in task.module.modules():
        held = {
            role: canonical[id(p)]
            for role, p in module.named_parameters(recurse=False, remove_duplicate=False)
            if canonical[id(p)] in own
        }
        if held:
            handles.append(module.register_forward_hook(_perturb(held, own, n, length)))
    with torch.enable_grad():
        losses = task.losses(task.params, (x, y))
    for handle in handles:
        handle.remove()
    rows = [torch.autograd.grad(loss, list(own.values()), retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten(1) for g in row], dim=1) for row in rows])


def _perturb(held: dict[str, str], own: dict[str, Tensor], n: int, length: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        a = args[0]
        shift = torch.zeros((), dtype=output.dtype)
        weight = own.get(held.get("weight", ""))
        if weight is not None and isinstance(module, nn.Embedding):
            a = a.expand(n, length)
            shift = shift + torch.stack([weight[t][a[:, t]] for t in range(length)], dim=1)
        elif weight is not None and weight.ndim == 2:  # one normalised channel a column
            shift = shift + normalised(module, a, output) * weight
        elif weight is not None:
            equation = "btm,tmp->btp" if type(module).__name__ == "Conv1D" else "btm,tpm->btp"
            shift = shift + torch.einsum(equation, a, weight)
        if held.get("bias") in own:
            shift = shift + own[held["bias"]]
        return output + shift

    return hook


def normalised(module: Any, x: Tensor, output: Tensor) -> Tensor:
    """``x̂`` of a normalisation layer with ``output = w ⊙ x̂ + b``."""
    weight, bias = module.weight, getattr(module, "bias", None)
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
        shape = (1, -1, *[1] * (x.ndim - 2))
        weight, bias = weight.view(shape), bias.view(shape)
    scale = weight + 1 if getattr(module, "plus_one", False) else weight
    return (output if bias is None else output - bias) / scale


# ---------------------------------------------------------------- dense curvature


def output_jacobian(task: bi.Task) -> Tensor:
    """``(n, outputs, d)``."""
    batch = task.train.batch()
    jacobian = jacrev(lambda params: task.outputs(params, batch).flatten(1))(task.params)
    return task.flatten(jacobian)


def output_hessians(task: bi.Task) -> Tensor:
    """Hessian of each loss in the outputs, ``(n, outputs, outputs)``."""
    found = []
    for i in range(task.n):
        x, y = task.train.batch(slice(i, i + 1))
        f = task.outputs(task.params, (x, y)).detach()
        loss = lambda f, y=y: task.likelihood.loss(f, y).sum()  # noqa: E731
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


def fisher(case: Any, kind: str) -> Tensor:
    """Dense Fisher of a case of the grid, computed once."""
    return _fisher(case.name, kind).clone()


@cache
def _fisher(name: str, kind: str) -> Tensor:
    return FISHER[kind](LAYERED_BY_NAME[name].task())


def loss_hessian(task: bi.Task) -> Tensor:
    """Hessian of the mean loss by double backward, row by row."""
    batch = task.train.batch()

    def mean_loss(flat: Tensor) -> Tensor:
        return task.losses(task.unflatten(flat), batch).mean()

    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(mean_loss, task.flatten(task.params))


def influence(
    task: bi.Task,
    curvature: Tensor,
    damping: float,
    measurement: Any = "loss",
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> np.ndarray:
    """``−(1/n) ∇φᵀ (C + λI)⁻¹ ∇ℓ``; rows of queries and of training examples may be given."""
    damped = curvature + damping * torch.eye(len(curvature), dtype=curvature.dtype)
    left = gradients(task, "query", measurement) if left is None else left
    right = gradients(task) if right is None else right
    return (-(left @ torch.linalg.solve(damped, right.T)) / task.n).numpy()


# ---------------------------------------------------------------- layers


def index(task: bi.Task, layer: Any, bias: str | None = None) -> Tensor:
    """Positions in the flat parameters of a layer's ``(P, M)`` matrix, row by row.

    Of a layer, or of a weight (and a bias) by name.
    """
    if isinstance(layer, str):
        rows = len(task.params[layer])
        layer = SimpleNamespace(weight=layer, bias=bias, shape=(rows, None))
    place, start = {}, 0
    for name, p in task.params.items():
        place[name] = torch.arange(start, start + p.numel()).reshape(p.shape)
        start += p.numel()
    columns = []
    if layer.weight is not None:
        weight = place[layer.weight]
        if type(task.module.get_submodule(".".join(layer.weight.split(".")[:-1]))).__name__ == (
            "Conv1D"
        ):
            weight = weight.T
        columns.append(weight.reshape(layer.shape[0], -1))
    if layer.bias is not None:
        columns.append(place[layer.bias].reshape(-1, 1))
    return torch.cat(columns, dim=1).flatten()


def block(matrix: Tensor, task: bi.Task, layer: Any) -> Tensor:
    """A layer's block of a ``(d, d)`` matrix."""
    where = index(task, layer)
    return matrix[where][:, where]


def signals(task: bi.Task, layer: Any, kind: str) -> tuple[Tensor, Tensor]:
    """Inputs ``(n, T, g, M)`` of a layer and its derivatives ``(n, K, T, g, P/g)``.

    The derivatives are of the loss, or of the outputs times a root of the Hessian in them, in
    perturbations added to the module's output at each call; calls are one after another along T.
    """
    x, y = task.train.batch()
    inputs: list[Tensor] = []
    noise: list[Tensor] = []
    call = [0]

    def add(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        if layer.name == "places" and (output.ndim == 2 or len(output) == 1):  # for a whole batch
            output = output.expand(task.n, *output.shape[-2:])
        if not filled:
            a = [*args, *kwargs.values()][0]
            inputs.append(_inputs(module, layer, a, output, task.n).detach())
            noise.append(torch.zeros(output.shape, dtype=output.dtype))
        call[0] += 1
        return output + noise[call[0] - 1]

    handles = [
        task.module.get_submodule(site).register_forward_hook(add, with_kwargs=True)
        for site in layer.sites
    ]

    def run(parts: list[Tensor]) -> Tensor:
        call[0], noise[:] = 0, parts
        if kind == "empirical":
            return task.losses(task.params, (x, y)).unsqueeze(1)
        return task.outputs(task.params, (x, y)).flatten(1)

    filled = False
    task.outputs(task.params, (x, y))
    filled = True
    jacobians = jacrev(run)(list(noise))
    for handle in handles:
        handle.remove()
    module = task.module.get_submodule(layer.sites[0])
    parts = []
    for jacobian in jacobians:  # (n, K, n or n·T, *outputs)
        own = jacobian.unflatten(2, (task.n, -1)) if jacobian.shape[2] != task.n else jacobian
        rows = [_positions(module, layer, own[i, :, i]) for i in range(task.n)]
        parts.append(torch.stack(rows))
    ds = torch.cat(parts, dim=2)  # (n, K, T, P)
    if kind == "enumerated":
        values, vectors = torch.linalg.eigh(output_hessians(task))
        root = vectors * values.clamp_min(0).sqrt().unsqueeze(1)
        ds = torch.einsum("nkl,nktp->nltp", root, ds)
    return torch.cat(inputs, dim=1), ds.unflatten(3, (layer.groups, -1))


def _positions(module: nn.Module, layer: Any, values: Tensor) -> Tensor:
    """``(B, *outputs)`` as ``(B, T, P)``."""
    channels = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.modules.batchnorm._NormBase, nn.GroupNorm
    if isinstance(module, channels) and values.ndim > 2:
        return values.flatten(2).transpose(1, 2)
    width = layer.shape[1] if isinstance(module, nn.Embedding) else layer.shape[0]
    return values.reshape(len(values), -1, width)


def _inputs(module: Any, layer: Any, x: Tensor, output: Tensor, n: int) -> Tensor:
    """What multiplies the weight, ``(n, T, g, M)``, the 1 of the bias last."""
    if layer.weight is None:
        a = output.new_ones(n, _positions(module, layer, output).shape[1], 1, 0)
    elif isinstance(module, nn.Embedding):
        a = nn.functional.one_hot(x, module.num_embeddings).to(output.dtype)
        if module.padding_idx is not None:
            a[..., module.padding_idx] = 0
        a = a.expand(*output.shape[:-1], -1).reshape(n, -1, 1, module.num_embeddings)
    elif layer.kind == "conv":
        a = _patches(module, x)
    elif layer.kind == "affine":
        a = _positions(module, layer, normalised(module, x, output)).unsqueeze(3)
    else:
        a = x.reshape(n, -1, 1, x.shape[-1])
    if layer.bias is not None:
        a = torch.cat([a, torch.ones(*a.shape[:3], 1, dtype=a.dtype)], dim=3)
    return a


def _patches(module: Any, x: Tensor) -> Tensor:
    """Patches of each group by convolving with one-hot kernels."""
    size = module.weight[0].numel()
    kernels = torch.eye(size, dtype=x.dtype).view(size, *module.weight.shape[1:])
    groups, module.groups = module.groups, 1
    found = [module._conv_forward(part, kernels, None) for part in x.chunk(groups, dim=1)]
    module.groups = groups
    return torch.stack([part.flatten(2).transpose(1, 2) for part in found], dim=2)


# ---------------------------------------------------------------- comparison


def close(got: Any, expected: Any, rtol: float = 1e-9) -> None:
    """Frobenius distance relative to the expected norm."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    norm = np.linalg.norm(expected)
    assert norm > 0
    assert np.linalg.norm(got - expected) <= rtol * norm


def close_or_zero(got: Any, expected: Any, rtol: float = 1e-9) -> None:
    """The same; what is zero must be so to the bit."""
    if np.any(np.asarray(expected)):
        close(got, expected, rtol)
    else:
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


def same(one: Any, other: Any) -> None:
    """Bitwise equality of arrays that are not all one number."""
    one, other = np.asarray(one), np.asarray(other)
    np.testing.assert_array_equal(one, other)
    assert one.size == 1 or np.ptp(one) > 0


def take(batch: Any, where: Any) -> Any:
    """Some examples of a batch."""
    return tree_map(lambda leaf: leaf[where], batch)
