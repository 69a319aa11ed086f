"""The network of a task: a frozen copy of a module, and weights loaded into one."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Checkpoint", "frozen_copy", "load_into"]

Checkpoint = Mapping[str, Tensor] | nn.Module | str | os.PathLike[str]
"""A state dict, a module, or a file of ``torch.save`` or safetensors."""


def frozen_copy(model: nn.Module) -> nn.Module:
    """Copy a module without its gradients and backward hooks, in eval mode, all of it frozen.

    Forward hooks are part of what the network computes and stay; hooks on gradients are not, and
    do not meet ``torch.func``.
    """
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for p in model.parameters()
    }
    copied = copy.deepcopy(model, memo).eval()
    for module in copied.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return copied


def load_into(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give a module the weights and buffers of a checkpoint.

    Raises
    ------
    ValueError
        If they are not those of this network. Of tied weights one name is enough.
    """
    state = _state(checkpoint)
    try:
        missing, unknown = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(_misfit(model, str(error).strip())) from None
    given = {id(p) for name, p in _tensors(model) if name in state}
    absent = [name for name, p in _tensors(model) if name in missing and id(p) not in given]
    if absent or unknown:
        raise ValueError(
            _misfit(model, f"{absent[:4]} are missing and {list(unknown)[:4]} are not its own")
        )


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    weights: list[tuple[str, Tensor]] = list(model.named_parameters(remove_duplicate=False))
    return weights + list(model.named_buffers(remove_duplicate=False))


def _misfit(model: nn.Module, why: str) -> str:
    return (
        f"the checkpoint does not fit {type(model).__name__}: {why}. Give the state dict of the "
        f"same network, as torch.save(model.state_dict(), path) writes it."
    )


def _state(checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    if isinstance(checkpoint, nn.Module):
        return checkpoint.state_dict()
    if isinstance(checkpoint, Mapping):
        return checkpoint
    path = os.fspath(checkpoint)
    if os.path.isdir(path):
        raise ValueError(
            f"{path!r} is a folder, and a checkpoint is a file, a state dict or a module. Load it "
            f"first: task.at(AutoModelForCausalLM.from_pretrained({path!r}))."
        )
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file  # late: an extra

        loaded: Mapping[str, Tensor] = load_file(path)
    else:
        loaded = torch.load(path, weights_only=True, map_location="cpu")
    return loaded
