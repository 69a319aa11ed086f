"""A task: a network, what its loss is, the examples, and which of its parameters count."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from bayesinf._checkpoint import Checkpoint, frozen_copy, load_into
from bayesinf._data import Batch, Examples
from bayesinf._likelihoods import Likelihood, require
from bayesinf._parameters import FlatView, choose

__all__ = ["Measurement", "Task", "measurement_name"]

Measurement = str | Callable[["Task", dict[str, Tensor], Batch], Tensor]
"""A likelihood's method by name, or ``f(task, params, batch) -> (B,)``."""


def measurement_name(measurement: Measurement) -> str:
    """Return the name that scores of a measurement carry."""
    if isinstance(measurement, str):
        return measurement
    return str(getattr(measurement, "__name__", type(measurement).__name__))


class Task:
    r"""A trained checkpoint with its likelihood and its train and query examples.

    The network is copied when the task is made, and the copy is put in eval mode (dropout off,
    batch-norm statistics frozen). The user's module is never touched: weights, ``requires_grad``,
    training flags, hooks and ``.grad`` stay as they are. Tied weights count once, under the name
    that ``named_parameters()`` gives them.

    A network in bfloat16 or float16 can be sampled: its weights are kept in float32 and rounded in
    the forward pass alone, and losses are computed from its outputs in float32. Classical methods
    and curvatures need float32 or float64.

    Parameters
    ----------
    model
        Any ``nn.Module`` that maps inputs to outputs, one row per example. An output with a
        ``logits`` attribute is reduced to it.
    likelihood
        What the loss is: :class:`~bayesinf.Categorical`, :class:`~bayesinf.Gaussian`,
        :class:`~bayesinf.Bernoulli`, or any object with ``loss(outputs, target) -> (B,)``.
    train, query
        ``(x, y)`` tensors, a dict of tensors, or a map-style ``Dataset``.
    parameters
        Which parameters are sampled and attributed to: names or regular expressions that match a
        whole name; or a mapping from them to None (the whole parameter) or to a bool mask of its
        shape, where only the marked entries count and the others stay at the checkpoint. Sampling
        takes masks; curvatures of layers need whole parameters. Default: all with
        ``requires_grad``.
    train_ids, query_ids
        Unique integers or strings; positions by default.
    device
        Default: where the model's first parameter is.
    target
        Key of the target in dict data, where it is not called target(s), label(s) or y.

    Attributes
    ----------
    params : dict[str, Tensor]
        The selected weights at the checkpoint, ``w0``; whole, also where a mask selects a part.
    module : nn.Module
        The task's own frozen copy of the network.
    dtype : torch.dtype
        Of weights, gradients and losses: the network's, or float32 where that is half precision.
    module_dtype : torch.dtype
        What the network computes in.
    n : int
        Number of training examples.
    dimension : int
        Number of selected parameters (of selected entries, with masks), ``d``.

    Raises
    ------
    ValueError
        If a name matches nothing, a mask does not fit, the model changes its inputs in place, the
        losses are not one finite number per example, the target does not fit the likelihood, or
        two evaluations of the same batch differ.
    TypeError
        If data or parameters are of a kind that cannot be used.

    Examples
    --------
    >>> import torch, bayesinf as bi
    >>> x, y = torch.randn(20, 3), torch.randn(20, 1)
    >>> task = bi.Task(torch.nn.Linear(3, 1), bi.Gaussian(), train=(x, y), query=(x[:5], y[:5]))
    >>> task.dimension, task.n
    (4, 20)
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        train: Any,
        query: Any,
        parameters: str | Iterable[str] | Mapping[str, Tensor | None] | None = None,
        train_ids: Sequence[Any] | np.ndarray | None = None,
        query_ids: Sequence[Any] | np.ndarray | None = None,
        device: torch.device | str | None = None,
        target: str | None = None,
    ) -> None:
        chosen = choose(model, parameters)
        first = dict(model.named_parameters())[next(iter(chosen))]
        self.device = torch.device(device) if device is not None else first.device
        self.module_dtype = first.dtype
        self.dtype = _master(first.dtype)
        self.likelihood = likelihood
        self.module = frozen_copy(model).to(self.device)
        self._select(chosen)
        self.train = Examples(train, train_ids, "train", self.device, self.dtype, target)
        self.query = Examples(query, query_ids, "query", self.device, self.dtype, target)
        self._validate()

    def _select(self, chosen: Mapping[str, Tensor | None]) -> None:
        """Take entries of the module's own parameters."""
        own = dict(self.module.named_parameters())
        values = {name: own[name].detach().to(self.dtype) for name in chosen}
        entries = {name: where for name, where in chosen.items() if where is not None}
        self._view = FlatView(values, entries).moved(values)

    @property
    def params(self) -> dict[str, Tensor]:
        """The selected weights at the checkpoint."""
        return self._view.values

    @property
    def dimension(self) -> int:
        """Number of selected parameters, or entries of them."""
        return sum(self._view.sizes)

    @property
    def n(self) -> int:
        """Number of training examples."""
        return len(self.train)

    def examples(self, split: str) -> Examples:
        """Return the ``"train"`` or the ``"query"`` examples."""
        return self.train if split == "train" else self.query

    # ------------------------------------------------------------------ functional view

    def outputs(self, params: dict[str, Tensor], batch: Batch, *, head: bool = False) -> Any:
        """Network outputs at ``params`` (a subset of the module's parameters) for a batch.

        With ``head``, a network that has a chunked head gives what its logits are made of, for
        likelihoods that do without them.
        """
        inputs = batch[0]
        if self.module_dtype != self.dtype:
            inputs = tree_map(self._lower, inputs)
            params = {name: self._lower(weight) for name, weight in params.items()}
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if isinstance(inputs, dict):
            kwargs = inputs
        else:
            args = inputs if isinstance(inputs, tuple) else (inputs,)
        if head and getattr(self.module, "chunked_head", False):
            kwargs = {**kwargs, "return_head": True}
        out = functional_call(self.module, params, args, kwargs)
        out = out if isinstance(out, Tensor) else getattr(out, "logits", out)
        half = self.module_dtype != self.dtype and isinstance(out, Tensor)
        return out.to(self.dtype) if half else out

    def _lower(self, value: Tensor) -> Tensor:
        """Round to what the network computes in."""
        return value.to(self.module_dtype) if value.is_floating_point() else value

    def losses(self, params: dict[str, Tensor], batch: Batch) -> Tensor:
        """Per-example losses ``ℓ_i(params)``, shape ``(B,)``."""
        return self.likelihood.loss(self.outputs(params, batch, head=True), batch[1])

    def measure(self, measurement: Measurement, params: dict[str, Tensor], batch: Batch) -> Tensor:
        """Per-example values ``(B,)`` of a measurement: ``"loss"``, ``"margin"``, or a function."""
        if callable(measurement):
            return measurement(self, params, batch)
        method = require(self.likelihood, measurement, f"the measurement {measurement!r}")
        return method(self.outputs(params, batch, head=True), batch[1])

    # ------------------------------------------------------------------ flat view

    def flatten(self, params: dict[str, Tensor]) -> Tensor:
        """Concatenate the selected entries to ``(..., d)``; leading dimensions are kept."""
        return self._view.flatten(params)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Weights ``(..., d)`` as named parameters with the same leading dimensions.

        Views of whole parameters; of one that a mask selects in part, the other entries are as at
        the checkpoint.
        """
        return self._view.unflatten(flat)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Task:
        """Return the same task on another device or in another precision; this one stays."""
        device = self.device if device is None else torch.device(device)
        dtype = self.module_dtype if dtype is None else dtype
        if (device, dtype) == (self.device, self.module_dtype):
            return self
        moved = copy.copy(self)
        moved.device, moved.module_dtype, moved.dtype = device, dtype, _master(dtype)
        moved.module = copy.deepcopy(self.module).to(device, dtype)
        moved._select(self._chosen())
        moved.train = self.train.to(device, moved.dtype)
        moved.query = self.query.to(device, moved.dtype)
        return moved

    def restrict(
        self, parameters: str | Iterable[str] | Mapping[str, Tensor | None] | None
    ) -> Task:
        """Return the same task with other parameters selected.

        Network and data are shared, so that a task for each component of a network costs nothing.

        Parameters
        ----------
        parameters
            As of :class:`Task`; None takes all parameters of the network.

        Raises
        ------
        ValueError
            If a name matches nothing or a mask does not fit.
        TypeError
            If the parameters are of another dtype than those selected before.
        """
        chosen = choose(self.module, ".*" if parameters is None else parameters)
        kind = dict(self.module.named_parameters())[next(iter(chosen))].dtype
        if kind != self.module_dtype:
            raise TypeError(
                f"the selected parameters are of {kind}, and the task computes in "
                f"{self.module_dtype}. Convert the model first: model.float()."
            )
        other = copy.copy(self)
        other._select(chosen)
        return other

    def of(self, module: nn.Module, *, train: Examples, query: Examples) -> Task:
        """Return the same task with another network that has the selected parameters."""
        other = copy.copy(self)
        other.module = module
        other.train, other.query = train, query
        other._select(self._chosen())
        return other

    def at(self, checkpoint: Checkpoint) -> Task:
        """Return the same task at another checkpoint of the same network.

        Data are shared, and selected are the same entries of the same parameters.

        Parameters
        ----------
        checkpoint
            A state dict, a module of the same structure, or a file: ``*.safetensors``, or what
            ``torch.save`` wrote of a state dict (read with ``weights_only=True``).

        Raises
        ------
        ValueError
            If the weights are not those of this network, or the losses there are not finite.
        """
        other = copy.copy(self)
        other.module = copy.deepcopy(self.module)
        load_into(other.module, checkpoint)
        other._select(self._chosen())
        other._validate()
        return other

    def _chosen(self) -> dict[str, Tensor | None]:
        return {name: self._view.entries.get(name) for name in self.params}

    def require_whole_parameters(self, what: str) -> None:
        """Raise ``ValueError`` where a mask selects a part of a parameter."""
        parts = list(self._view.entries)
        if parts:
            raise ValueError(
                f"{what} needs whole parameters, and masks select parts of {parts[:4]}"
                f"{' …' if len(parts) > 4 else ''}. Sampling takes masks with any kernel that has "
                f"no preconditioner; for this, select whole parameters: "
                f"task.restrict({parts[:4]!r})."
            )

    def require_full_precision(self, what: str) -> None:
        """Raise ``TypeError`` where the network computes in half precision."""
        if self.module_dtype != self.dtype:
            raise TypeError(
                f"{what} needs a network in float32 or float64; this one computes in "
                f"{str(self.module_dtype).removeprefix('torch.')}, which only sampling can use. "
                f"Convert the task: task.to(dtype=torch.float32)."
            )

    # ------------------------------------------------------------------ identity

    def fingerprint(self) -> dict[str, Any]:
        """Hashes of the checkpoint and data, for stores and scores."""
        digest = hashlib.sha256(_without_addresses(self.module).encode())
        tensors = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(
                tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            )
        return {
            "checkpoint": digest.hexdigest()[:16],
            "parameters": self._view.digest(),
            "likelihood": _without_addresses(self.likelihood),
            "train": self.train.fingerprint(),
            "query": self.query.fingerprint(),
            "n": self.n,
            "dtype": str(self.module_dtype),
        }

    # ------------------------------------------------------------------ checks

    def _validate(self) -> None:
        for data in (self.train, self.query):
            index = torch.arange(min(2, len(data)))
            batch = data.batch(index)
            inputs = tree_leaves(batch[0])
            versions = [leaf._version for leaf in inputs]
            with torch.no_grad():
                outputs = self.outputs(self.params, batch)
                check = getattr(self.likelihood, "check", None)
                if check is not None:
                    check(outputs, batch[1])
                    if data.held:
                        check(outputs[:1].expand(len(data), *outputs.shape[1:]), data.batch()[1])
                losses = self.losses(self.params, batch)
                again = self.losses(self.params, data.batch(index))
            if [leaf._version for leaf in inputs] != versions:
                raise ValueError(
                    f"{type(self.module).__name__} changes its inputs in place, and all chains see "
                    f"the same ones. Write x = x - mean for x -= mean, and give a first activation "
                    f"inplace=False."
                )
            if tuple(losses.shape) != (len(index),):
                raise ValueError(
                    f"the likelihood must return one loss per example, shape ({len(index)},) "
                    f"here; got {tuple(losses.shape)}. Usual cause: reduction='mean' in the loss "
                    f"(use 'none' and sum over an example's outputs)."
                )
            if not bool(torch.isfinite(losses).all()):
                raise ValueError(
                    f"the loss of a {data.name} example is not finite at the checkpoint: "
                    f"{losses.tolist()}. Check the weights and the inputs for NaN or inf."
                )
            if not torch.equal(losses, again):
                raise ValueError(
                    f"two evaluations of the same {data.name} examples differ "
                    f"({losses.tolist()} and {again.tolist()}): the model or the dataset is "
                    f"random even in eval mode. Use deterministic layers and drop augmentation."
                )


def _without_addresses(thing: Any) -> str:
    """``repr``, the same in every process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(thing))


_HALF = {torch.bfloat16, torch.float16}


def _master(dtype: torch.dtype) -> torch.dtype:
    """What weights of a network in ``dtype`` are sampled in."""
    return torch.float32 if dtype in _HALF else dtype
