"""Recording a computation over all chains once, and replaying it without the transforms' cost.

``torch.func.vmap`` dispatches every operation through Python at every call. :func:`record` runs it
once, keeps the flat list of tensor operations (``make_fx``), drops those that do nothing, fuses
matrix products with the bias that follows and lets a ReLU overwrite the product before it. The
list holds for the shapes it was recorded at.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["record"]

_aten = torch.ops.aten
_NATIVE: dict[Any, Callable[..., Any]] = {  # the same operations, without the schema's dispatch
    _aten.add.Tensor: torch.add,
    _aten.baddbmm.default: torch.baddbmm,
    _aten.bmm.default: torch.bmm,
    _aten.cat.default: torch.cat,
    _aten.gather.default: torch.gather,
    _aten.mul.Tensor: torch.mul,
    _aten.relu.default: torch.relu,
    _aten.sub.Tensor: torch.sub,
    _aten.sum.dim_IntList: torch.sum,
    _aten.transpose.int: torch.transpose,
    _aten.unsqueeze.default: torch.unsqueeze,
    _aten.view.default: Tensor.view,
}
_PRODUCTS = (_aten.bmm.default, _aten.baddbmm.default, torch.bmm, torch.baddbmm)
_RESHAPES = (_aten.view.default, _aten._unsafe_view.default, _aten.expand.default)


def record(
    function: Callable[..., list[Tensor]], in_dims: tuple[int | None, ...], *inputs: Tensor
) -> Callable[..., list[Tensor]]:
    """Record ``vmap(function, in_dims)`` at the shapes of ``inputs``.

    Parameters
    ----------
    function
        Tensors in, a list of tensors out, for one chain.
    in_dims
        As of ``torch.func.vmap``.
    *inputs
        Tensors of the shapes that replays will have.

    Returns
    -------
    Callable
        Takes tensors of the same shapes.

    Raises
    ------
    RuntimeError
        If a shape depends on values (a selection by a mask, say): a replay would not follow it.
    """
    with warnings.catch_warnings():  # operations that run chain by chain, as fused attention does
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        module = make_fx(vmap(function, in_dims=in_dims))(*inputs)
    for node in module.graph.nodes:
        if _depends_on_values(node):
            raise RuntimeError(f"the shape of {node.target}'s result depends on its input's values")
    _simplify(module.graph)
    module.recompile()
    return module.forward


def _depends_on_values(node: Node) -> bool:
    """Whether the shape of a result may differ between inputs of one shape."""
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    if node.target is not _aten.index.Tensor:
        return True
    indices: Any = node.args[1]
    values = [index.meta.get("val") for index in indices if isinstance(index, Node)]
    return any(v is None or v.dtype in (torch.bool, torch.uint8) for v in values)


def _shape(node: Any) -> tuple[int, ...] | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _simplify(graph: Graph) -> None:
    """Drop operations without effect; fuse ``bias + a @ b``. Rounding may change, nothing else."""
    for node in list(graph.nodes):
        source: Any = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(source, Node):
            continue
        idle = node.target in _RESHAPES and _shape(source) == _shape(node)
        idle |= node.target is _aten.mul.Scalar and node.args[1] == 1
        if idle:
            node.replace_all_uses_with(source)
        elif node.target is _aten.transpose.int and source.target is _aten.transpose.int:
            if source.args[1:] == node.args[1:]:
                node.replace_all_uses_with(source.args[0])
        elif node.target is _aten.add.Tensor and not node.kwargs:
            _fuse_bias(graph, node)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if _overwrites(node):
            node.target = torch.relu_
        elif not node.kwargs:
            node.target = _NATIVE.get(node.target, node.target)


def _overwrites(node: Node) -> bool:
    """Whether a ReLU may overwrite its input: a product that nothing else reads."""
    source = node.args[0] if node.args else None
    return (
        node.target is _aten.relu.default
        and isinstance(source, Node)
        and source.target in _PRODUCTS
        and len(source.users) == 1
    )


def _fuse_bias(graph: Graph, node: Node) -> None:
    """Turn ``add(bias, bmm(a, b))`` into ``baddbmm(bias, a, b)`` if the bmm has no other use."""
    first, second = node.args[0], node.args[1]
    operands: tuple[tuple[Any, Any], ...] = ((first, second), (second, first))
    for product, bias in operands:
        fusable = (
            isinstance(product, Node)
            and isinstance(bias, Node)
            and product.target is _aten.bmm.default
            and _shape(product) == _shape(node)
            and len(_shape(bias) or ()) == 3
            and len([user for user in product.users if user.users or user is node]) == 1
        )
        if fusable:
            with graph.inserting_before(node):
                fused = graph.call_function(_aten.baddbmm.default, (bias, *product.args))
            fused.meta = node.meta
            node.replace_all_uses_with(fused)
            return
