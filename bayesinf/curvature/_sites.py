r"""What one call of a module contributes to the gradient of its layer, example by example.

``B`` examples, ``T`` positions: the leading dimensions of a linear map's input beyond the batch,
the output pixels of a convolution (its input unfolded into patches), the tokens of an embedding,
what a normalisation does not treat as channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.func import functional_call

from bayesinf.curvature._layers import Layer
from bayesinf.curvature._rows import Factored, Grouped, Indexed

__all__ = ["Call", "contribution", "expand_shared_index"]

_CHANNELS_FIRST = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


@dataclass(frozen=True)
class Call:
    """One call of a module: its input, and where to differentiate.

    Attributes
    ----------
    memo
        What multiplies derivatives, by layer: the same in every backward pass.
    """

    module: nn.Module
    input: Tensor
    edge: GradientEdge
    output: torch.Size
    dtype: torch.dtype
    memo: dict[str, Tensor] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Return what was made for a layer in the first backward pass."""
        if name not in self.memo:
            self.memo[name] = make()
        return self.memo[name]


def contribution(
    layer: Layer, call: Call, ds: Tensor | None, size: int
) -> Factored | Grouped | Indexed:
    """Rows ``(B, 1)`` of a layer from the derivative ``ds`` in a call's output.

    Parameters
    ----------
    layer
        The layer.
    call
        What the hook saw.
    ds
        Derivative of a sum over examples in the output; ``None`` for zero.
    size
        ``B``.

    Raises
    ------
    ValueError
        If inputs cannot be told apart by example.
    """
    if ds is None:
        ds = call.input.new_zeros(call.output, dtype=call.dtype)
    module = call.module
    if isinstance(module, nn.Embedding) and layer.kind in ("embedding", "tied"):
        index = call.once(layer.name, lambda: call.input.reshape(size, -1))
        return _embedding(layer, module, index, ds, size)
    if layer.kind == "affine":
        return _affine(layer, call, ds, size)
    if layer.kind == "conv":
        return _convolution(layer, call, ds, size)
    values = _by_example(layer, ds, size)
    if layer.weight is None:
        return Factored(values.unsqueeze(1), values.new_ones(*values.shape[:2], 1))
    a = call.once(layer.name, lambda: _with_bias(layer, _by_example(layer, call.input, size)))
    return Factored(values.unsqueeze(1), a)


def expand_shared_index(index: Tensor, size: int) -> Tensor:
    """Repeat an index ``(T,)`` or ``(1, T)`` that a whole batch shares for every example."""
    index = index.unsqueeze(0) if index.ndim == 1 else index
    return index.expand(size, *index.shape[1:])


def _by_example(layer: Layer, x: Tensor, size: int) -> Tensor:
    """Split ``(first, *, width)`` into ``(B, T, width)``, the examples first."""
    first = 1 if x.ndim == 1 else x.shape[0]
    if first % size:
        raise ValueError(
            f"layer {layer.name!r}: its input has {first} rows for {size} examples, so rows "
            f"cannot be told apart by example. Usual cause: the layer acts on something shared by "
            f"the whole batch, or on a choice of positions that depends on the data. Leave it out "
            f"with Task(..., parameters=…)."
        )
    return x.reshape(size, -1, x.shape[-1])


def _with_bias(layer: Layer, a: Tensor) -> Tensor:
    """Append the constant input 1 where the layer has a bias."""
    return F.pad(a, (0, 1), value=1.0) if layer.bias is not None else a


def _embedding(layer: Layer, module: nn.Embedding, index: Tensor, ds: Tensor, size: int) -> Indexed:
    values = _by_example(layer, ds, size)
    if module.padding_idx is not None:
        values = values * (index != module.padding_idx).unsqueeze(-1)
    return Indexed(values.unsqueeze(1), index, layer.shape[0])


def _affine(layer: Layer, call: Call, ds: Tensor, size: int) -> Grouped:
    channels_first = isinstance(call.module, _CHANNELS_FIRST)

    def by_example(x: Tensor) -> Tensor:
        return _by_example(layer, _channels_last(x, layer, channels_first), size)

    values = by_example(ds)
    a = call.once(layer.name, lambda: _normalised(layer, call, by_example, values))
    return Grouped(values[:, None, :, :, None], a)


def _normalised(
    layer: Layer, call: Call, by_example: Callable[[Tensor], Tensor], like: Tensor
) -> Tensor:
    """``(B, T, channels, 1 or 2)``: the normalised input, what the weight 1 adds; the bias's 1."""
    columns = []
    if layer.weight is not None:
        gain = _affine_output(call, 1.0) - _affine_output(call, 0.0)
        columns.append(by_example(gain.reshape(call.output)))
    if layer.bias is not None:
        columns.append(torch.ones_like(like))
    return torch.stack(columns, dim=-1)


def _affine_output(call: Call, weight: float) -> Tensor:
    own = {
        name: torch.full_like(p, weight if name == "weight" else 0.0)
        for name, p in call.module.named_parameters(recurse=False)
    }
    with torch.no_grad():
        return functional_call(call.module, own, (call.input,))


def _channels_last(x: Tensor, layer: Layer, channels_first: bool) -> Tensor:
    if channels_first:
        return x.movedim(1, -1) if x.ndim > 2 else x
    trailing = len(layer.weight_shape or layer.bias_shape)
    return x.flatten(x.ndim - trailing)


def _convolution(layer: Layer, call: Call, ds: Tensor, size: int) -> Factored | Grouped:
    module, x = call.module, call.input
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    values = _by_example(layer, ds.flatten(2).transpose(1, 2), size)  # (B, T, P)
    if layer.weight is None:
        return Factored(values.unsqueeze(1), values.new_ones(*values.shape[:2], 1))

    def inputs() -> Tensor:
        a = _by_example(layer, _patches(module, x), size)
        return _with_bias(layer, a.unflatten(2, (layer.groups, -1)) if layer.groups > 1 else a)

    a = call.once(layer.name, inputs)
    if layer.groups == 1:
        return Factored(values.unsqueeze(1), a)
    return Grouped(values.unflatten(2, (layer.groups, -1)).unsqueeze(1), a)


def _patches(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Patches ``(B, T, C·kernel)`` that a convolution multiplies with its weight."""
    pads: list[int] = []
    dims = len(conv.kernel_size)
    for i in reversed(range(dims)):  # F.pad takes the last dimension first
        if conv.padding == "same":
            total = conv.dilation[i] * (conv.kernel_size[i] - 1)
            pads += [total // 2, total - total // 2]
        elif conv.padding == "valid":
            pads += [0, 0]
        else:
            pads += [int(conv.padding[i])] * 2
    if any(pads):
        x = F.pad(x, pads, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    if dims == 2:
        unfolded = F.unfold(x, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)
        return unfolded.transpose(1, 2)
    for i in range(dims):
        dilation = conv.dilation[i]
        reach = dilation * (conv.kernel_size[i] - 1) + 1
        x = x.unfold(2 + i, reach, conv.stride[i])[..., ::dilation]
    spatial, kernel = range(2, 2 + dims), range(2 + dims, 2 + 2 * dims)
    return x.permute(0, *spatial, 1, *kernel).flatten(dims + 1).flatten(1, dims)
