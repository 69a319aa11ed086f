"""Which entries of which parameters count, and the vectors made of them."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["FlatView", "choose"]


@dataclass(frozen=True)
class FlatView:
    """Parameters at the checkpoint, and which of their entries make up a vector ``(d,)``.

    Parameters
    ----------
    values
        Whole tensors, in the network's order.
    entries
        Positions ``(k,)`` in the flattened tensor, ascending, of parameters that count in part.
    """

    values: dict[str, Tensor]
    entries: dict[str, Tensor]

    @property
    def sizes(self) -> list[int]:
        """Entries of each parameter that count."""
        return [
            len(self.entries[name]) if name in self.entries else value.numel()
            for name, value in self.values.items()
        ]

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """Entries that count, ``(..., d)``; leading dimensions are kept.

        Linear, so that it also takes gradients and directions.
        """
        parts = []
        for name, reference in self.values.items():
            value = params[name]
            lead = value.shape[: value.ndim - reference.ndim]
            flat = value.reshape(*lead, reference.numel())
            where = self.entries.get(name)
            parts.append(flat if where is None else flat.index_select(-1, where))
        return torch.cat(parts, dim=-1)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Parameters with these entries ``(..., d)``; the others are as at the checkpoint.

        Views where a parameter counts as a whole. Linear only where all do.
        """
        return {
            name: self._restore(name, reference, part)
            for (name, reference), part in zip(
                self.values.items(), flat.split(self.sizes, dim=-1), strict=True
            )
        }

    def _restore(self, name: str, reference: Tensor, part: Tensor) -> Tensor:
        if name in self.entries:
            rest = reference.reshape(-1).expand(*part.shape[:-1], -1)
            part = rest.index_copy(part.ndim - 1, self.entries[name], part)
        return part.unflatten(-1, reference.shape) if reference.ndim else part.squeeze(-1)

    def digest(self) -> str:
        """Identify names and entries."""
        digest = hashlib.sha256("\n".join(self.values).encode())
        for name, where in self.entries.items():
            digest.update(f"\n{name} ".encode())
            digest.update(where.cpu().numpy().data)
        return digest.hexdigest()[:16]

    def moved(self, values: dict[str, Tensor]) -> FlatView:
        """Return the same entries of other values, on their device."""
        entries = {name: where.to(values[name].device) for name, where in self.entries.items()}
        return FlatView(values, entries)


def choose(
    model: nn.Module, parameters: str | Iterable[str] | Mapping[str, Tensor | None] | None
) -> dict[str, Tensor | None]:
    """Canonical names in the network's order, with the positions that count or None for all.

    Parameters
    ----------
    model
        Whose parameters.
    parameters
        As of :class:`bayesinf.Task`.

    Raises
    ------
    ValueError
        If a pattern matches nothing, or a mask has another shape, another dtype or no entry.
    TypeError
        If the parameters are not all of one floating dtype.
    """
    canonical = {id(p): name for name, p in model.named_parameters()}
    if not canonical:
        raise ValueError(f"{type(model).__name__} has no parameters.")
    every = dict(model.named_parameters(remove_duplicate=False))
    masks: dict[str, Tensor | None] = {}
    for pattern, mask in _patterns(model, parameters).items():
        hits = [name for name in every if name == pattern or re.fullmatch(pattern, name)]
        if not hits:
            raise ValueError(
                f"parameters={pattern!r} matches no parameter. Names are "
                f"{sorted(every)[:12]}{' …' if len(every) > 12 else ''}; a regular "
                f"expression must match the whole name."
            )
        for hit in hits:
            _check_mask(pattern, mask, hit, every[hit])
            name = canonical[id(every[hit])]
            own = masks.get(name, mask)
            masks[name] = None if own is None or mask is None else own.cpu() | mask.cpu()
    chosen = {name: _positions(masks[name]) for name in canonical.values() if name in masks}
    _require_one_dtype({every[name].dtype for name in chosen})
    return chosen


def _patterns(
    model: nn.Module, parameters: str | Iterable[str] | Mapping[str, Tensor | None] | None
) -> dict[str, Tensor | None]:
    if parameters is None:
        chosen = [re.escape(name) for name, p in model.named_parameters() if p.requires_grad]
        if not chosen:
            raise ValueError(
                "no parameter has requires_grad=True. Name the ones that count: "
                "Task(..., parameters='.*') takes them all."
            )
        return dict.fromkeys(chosen)
    if isinstance(parameters, Mapping):
        given = dict(parameters)
    else:
        given = dict.fromkeys([parameters] if isinstance(parameters, str) else parameters)
    if not given:
        raise ValueError("parameters is empty; None takes all parameters with requires_grad.")
    return given


def _check_mask(pattern: str, mask: Tensor | None, name: str, parameter: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"parameters[{pattern!r}] must be None (the whole parameter) or a bool tensor of its "
            f"shape; got {got}. Numbers become a mask by a comparison: weights != 0."
        )
    if mask.shape != parameter.shape:
        raise ValueError(
            f"parameters[{pattern!r}] is a mask of shape {tuple(mask.shape)}, and {name!r} has "
            f"shape {tuple(parameter.shape)}. Usual cause: a row or column alone, or a pattern "
            f"that matches parameters of several shapes; give each its own mask."
        )
    if not bool(mask.any()):
        raise ValueError(
            f"parameters[{pattern!r}] is a mask without a single True. Leave the name out, or "
            f"mark the entries that count."
        )


def _positions(mask: Tensor | None) -> Tensor | None:
    """Positions in the flattened mask; None where all count."""
    if mask is None or bool(mask.all()):
        return None
    return mask.reshape(math.prod(mask.shape)).nonzero()[:, 0].cpu()


def _require_one_dtype(kinds: set[torch.dtype]) -> None:
    known = {torch.float32, torch.float64, torch.bfloat16, torch.float16}
    if len(kinds) != 1 or not kinds <= known:
        raise TypeError(
            f"the selected parameters must all be of one floating dtype (float32, float64, "
            f"bfloat16 or float16); got {sorted(map(str, kinds))}. Convert the model first: "
            f"model.float()."
        )
