r"""Products with the Gauss–Newton matrix and the Hessian of the mean loss, without the matrices.

    C v = (1/n) Σ_i J_iᵀ (∇²_f ℓ_i) J_i v            H v = (1/n) Σ_i ∇²ℓ_i v

``J_i`` ``(K, d)`` is the Jacobian of an example's outputs in the selected parameters. Vectors are
rows ``(..., d)`` in the order of :meth:`Task.flatten`, as many at once as there are: what does not
depend on them, the forward pass and the graph of the first derivative, is computed once a batch,
and each vector costs about a forward and a backward pass more. ``J v`` is the derivative of the
linear map ``u ↦ Jᵀu``, so that only reverse-mode derivatives are needed and the network itself is
never transformed.

Source: Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent".
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from bayesinf._data import Batch
from bayesinf.curvature._mean_product import Linear, MeanProduct

__all__ = ["GaussNewtonProduct", "HessianProduct"]


class GaussNewtonProduct(MeanProduct):
    r"""Products with the generalised Gauss–Newton matrix of the mean training loss.

    ``C = (1/n) Σ_i J_iᵀ (∇²_f ℓ_i) J_i``. The output-space Hessian comes from differentiating
    ``likelihood.loss`` twice in the outputs, so that any likelihood with a ``loss`` will do.
    Outputs are one tensor with the examples first.

    Parameters
    ----------
    task
        Network, likelihood and training examples; its dtype is that of the computation.
    batch_size
        Examples at a time.
    vectorize
        True: all vectors at once where autograd's formulas can be vectorised, and where they cannot
        one after another, with the same result. False: always one after another.
    memory_limit
        GiB of passes over the first batches that are kept from one product to the next.
    costs
        Account to which passes are added: two backward passes an example and vector.

    Raises
    ------
    ValueError
        If ``batch_size`` is not positive, or ``memory_limit`` negative.

    Examples
    --------
    >>> import torch, bayesinf as bi
    >>> x, y = torch.randn(20, 3), torch.randn(20, 1)
    >>> task = bi.Task(torch.nn.Linear(3, 1), bi.Gaussian(), train=(x, y), query=(x[:5], y[:5]))
    >>> operator = GaussNewtonProduct(task)
    >>> operator.apply(torch.randn(7, 4)).shape, operator.products
    (torch.Size([7, 4]), 7.0)
    """

    _passes = 2

    def _linear(self, params: dict[str, Tensor], batch: Batch) -> Linear:
        weights = list(params.values())
        outputs = self.task.outputs(params, batch)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"Gauss–Newton products need outputs that are one tensor, examples first; "
                f"{type(self.task.module).__name__} returns a {type(outputs).__name__}. Wrap the "
                f"module so that it returns the tensor the loss is computed from, or use "
                f"HessianProduct, which differentiates the loss alone."
            )
        u = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(outputs, weights, u, create_graph=True, allow_unused=True)
        self._require_graph(pulled)
        f = outputs.detach().requires_grad_()
        loss = self.task.likelihood.loss(f, batch[1]).sum()
        slope = torch.autograd.grad(loss, [f], create_graph=True)

        def product(vectors: Sequence[Tensor], stacked: bool) -> list[Tensor]:
            tangent = _pull(pulled, [u], vectors, stacked)
            curved = _pull(slope, [f], tangent, stacked)
            return _pull([outputs], weights, curved, stacked)

        return product


class HessianProduct(MeanProduct):
    r"""Products with the Hessian ``H = (1/n) Σ_i ∇²ℓ_i`` of the mean training loss.

    Symmetric, and in general indefinite.

    Parameters
    ----------
    task
        Network, likelihood and training examples; its dtype is that of the computation.
    batch_size
        Examples at a time.
    vectorize, memory_limit
        As in :class:`GaussNewtonProduct`.
    costs
        Account to which passes are added: one backward pass an example and vector, as in
        :func:`dense_hessian`.

    Raises
    ------
    ValueError
        If ``batch_size`` is not positive, or ``memory_limit`` negative.
    """

    _passes = 1

    def _linear(self, params: dict[str, Tensor], batch: Batch) -> Linear:
        weights = list(params.values())
        loss = self.task.losses(params, batch).sum()
        slope = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        self._require_graph(slope)
        return lambda vectors, stacked: _pull(slope, weights, vectors, stacked)


def _pull(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    stacked: bool,
) -> list[Tensor]:
    """``Σ_o (∂o/∂input)ᵀ cotangent_o`` for each input, zero where nothing depends on it."""
    pairs = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output is not None and output.requires_grad
    ]
    lead = cotangents[0].shape[:1] if stacked else ()
    if not pairs:
        return [x.new_zeros(*lead, *x.shape) for x in inputs]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        found = torch.autograd.grad(
            [output for output, _ in pairs],
            list(inputs),
            [cotangent for _, cotangent in pairs],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=stacked,
        )
    return [
        x.new_zeros(*lead, *x.shape) if part is None else part
        for x, part in zip(inputs, found, strict=True)
    ]
