"""Training by a recipe: one network, or many at once with stacked parameters.

Shapes: ``G`` models of a group, ``B`` examples of a batch, ``m`` members of a subset. Stacked
parameters are ``(G, *shape)``; a group's batches are gathered at positions ``(G, B)``.

A *row* is one training run. Everything random in it (initial weights, batch order, dropout) comes
from its own two seeds, a hash of its subset and its seed, so a row does not depend on which
other rows are trained, in which order, or beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from bayesinf._data import Examples
from bayesinf._likelihoods import Likelihood
from bayesinf.evaluation._recipes import Recipe
from bayesinf.evaluation._recording import Record, Recording

__all__ = ["RowSeeds", "choose_group_size", "row_seeds", "train_looped"]

RowSeeds = tuple[int, int]
"""Seeds of a row: initial weights, and batch order."""

VECTORISABLE = (
    nn.Linear, nn.Flatten, nn.Identity, nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU,
    nn.Tanh, nn.Sigmoid, nn.Softplus, nn.LayerNorm, nn.Embedding,
)  # fmt: skip
ELEMENTWISE = (
    nn.Identity, nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Softplus,
)  # fmt: skip
SMALL_MODEL = 2**16
GROUP_SIZE = 30


def row_seeds(mask: np.ndarray, seed: int) -> RowSeeds:
    """Return the two seeds of the row that trains on ``mask`` (``(n,)`` booleans)."""
    packed = np.packbits(np.asarray(mask, dtype=bool)).tobytes()
    digest = hashlib.sha256(packed + f"|{len(mask)}|{int(seed)}".encode()).digest()
    first, second = (int.from_bytes(digest[k : k + 8], "big") >> 1 for k in (0, 8))
    return first, second


def initialise(make_model: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Make a network with the global generator seeded, and leave that generator as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make_model()


def call(model: nn.Module, inputs: Any, params: dict[str, Tensor] | None = None) -> Tensor:
    """Outputs of a module for the ``inputs`` part of a batch, at other weights if given."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, dict):
        kwargs = inputs
    else:
        args = inputs if isinstance(inputs, tuple) else (inputs,)
    out = model(*args, **kwargs) if params is None else functional_call(model, params, args, kwargs)
    return out if isinstance(out, Tensor) else getattr(out, "logits", out)


def descend(
    params: Sequence[Tensor],
    mean_loss: Callable[[Tensor], Tensor],
    members: Sequence[Tensor],
    seeds: Sequence[int],
    recipe: Recipe,
    record: Recording | None = None,
) -> None:
    """Train ``params`` in place.

    ``mean_loss`` maps positions ``(G, B)`` to the **sum over models** of their mean batch losses:
    each model's part of the gradient is then that of its own mean loss.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    optimizer = recipe.optimizer(params)
    size = len(members[0])
    total, step = recipe.steps(size), 0
    if record is not None:
        record.begin()
    for _ in range(recipe.epochs):
        orders = [m[torch.randperm(size, generator=g)] for m, g in zip(members, generators)]  # noqa: B905
        order = torch.stack(orders)
        for start in range(0, size, recipe.batch_size):
            batch = order[:, start : start + recipe.batch_size]
            grads = torch.autograd.grad(mean_loss(batch), params)
            rate = recipe.rate(step, total)
            optimizer(grads, rate)
            step += 1
            if record is not None:
                record.step(batch[0], rate, optimizer)


def train_looped(
    make_model: Callable[[], nn.Module],
    likelihood: Likelihood,
    recipe: Recipe,
    data: Examples,
    members: Tensor,
    seeds: RowSeeds,
    record: Record | None = None,
) -> nn.Module:
    """Train one network on the examples at positions ``members``; returned in eval mode."""
    model = initialise(make_model, seeds[0]).train()
    params = [p for p in model.parameters() if p.requires_grad]
    recording = None if record is None else Recording(record, model, recipe, len(members))

    def mean_loss(positions: Tensor) -> Tensor:
        inputs, target = data.batch(positions[0])
        return likelihood.loss(call(model, inputs), target).mean()

    with torch.random.fork_rng():
        torch.manual_seed(seeds[1])
        descend(params, mean_loss, [members], [seeds[1]], recipe, recording)
    return model.eval()


def train_stacked(
    make_model: Callable[[], nn.Module],
    likelihood: Likelihood,
    recipe: Recipe,
    data: Examples,
    members: Sequence[Tensor],
    seeds: Sequence[RowSeeds],
) -> Callable[[Any], Tensor]:
    """Train ``G`` networks side by side; returns the map of inputs to outputs ``(G, B, …)``.

    All subsets must be of one size. The forward pass is vectorised over models and the backward
    pass taken outside, of the sum of their losses.
    """
    models = [initialise(make_model, first) for first, _ in seeds]
    skeleton = models[0].train()
    named = [dict(model.named_parameters()) for model in models]
    layout = _transposed if _is_chain(skeleton) else torch.stack
    stacked = {
        name: layout([own[name].detach() for own in named]).requires_grad_(p.requires_grad)
        for name, p in named[0].items()
    }
    params = [p for p in stacked.values() if p.requires_grad]

    def mean_loss(positions: Tensor) -> Tensor:
        inputs, target = data.batch(positions)
        outputs = _outputs(skeleton, stacked, inputs, 0)
        losses = likelihood.loss(outputs.flatten(0, 1), target.flatten(0, 1))
        return losses.unflatten(0, positions.shape).mean(1).sum()

    descend(params, mean_loss, members, [second for _, second in seeds], recipe)
    skeleton.eval()
    return lambda inputs: _outputs(skeleton, stacked, inputs, None)


def _outputs(
    skeleton: nn.Module, stacked: dict[str, Tensor], inputs: Any, models: int | None
) -> Tensor:
    """Outputs ``(G, B, …)``; ``models`` is the dimension of the inputs that counts models.

    A chain of linear maps and elementwise functions takes batched products, bias and all, which
    costs a fifth less than vmap; the rest goes through vmap.
    """
    if _is_chain(skeleton) and isinstance(inputs, Tensor) and inputs.ndim == 2 + (models == 0):
        count = len(next(iter(stacked.values())))
        hidden = inputs if models == 0 else inputs.expand(count, *inputs.shape)
        for name, module in skeleton.named_children():
            if isinstance(module, nn.Linear):
                weight, bias = stacked[f"{name}.weight"].mT, stacked.get(f"{name}.bias")
                hidden = (
                    torch.bmm(hidden, weight)
                    if bias is None
                    else torch.baddbmm(bias.unsqueeze(1), hidden, weight)
                )
            else:
                hidden = module(hidden)
        return hidden

    def forward(weights: dict[str, Tensor], own: Any) -> Tensor:
        return call(skeleton, own, weights)

    return vmap(forward, in_dims=(0, models))(stacked, inputs)


def _transposed(own: Sequence[Tensor]) -> Tensor:
    """Stack the parameters of models, matrices ``(out, in)`` with their memory as ``(in, out)``.

    Batched products give gradients in that layout, and sums of two layouts are slow.
    """
    joined = torch.stack(list(own))
    return joined.mT.contiguous().mT if joined.ndim == 3 else joined


def _is_chain(model: nn.Module) -> bool:
    """Whether a model is a plain sequence of linear maps and elementwise functions."""
    kinds = (nn.Linear, *ELEMENTWISE)
    return type(model) is nn.Sequential and all(type(m) in kinds for m in model)


def choose_group_size(model: nn.Module) -> int:
    """How many networks to train at once: 30 small plain MLPs, else 1.

    Measured on one CPU thread: a model and step at 17,000 parameters costs 0.28 of a loop's with
    30 at once (60: 0.30, 12: 0.30), and a seventh at 5,000; nothing is gained at 235,000, nor for
    convolutions, which turn into grouped ones. Modules with buffers or dropout can only be trained
    one after another.
    """
    leaves = [m for m in model.modules() if not list(m.children())]
    small = sum(p.numel() for p in model.parameters()) <= SMALL_MODEL
    plain = all(isinstance(m, VECTORISABLE) for m in leaves) and not list(model.buffers())
    return GROUP_SIZE if small and plain else 1
