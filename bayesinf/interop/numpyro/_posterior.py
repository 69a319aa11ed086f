r"""The local posterior of a task as a function of JAX, in float64.

The potential is that of :mod:`bayesinf._posterior`, term by term:

    plain    nβ L(w) + (nβ·wd/2)‖w‖² + (γ/2)‖w − w0‖²
    tilted   nβ [L(w) − ⟨∇L(w0), w − w0⟩] + ((γ + nβ·wd)/2)‖w − w0‖²

Positions are flat, ``(d,)``, in the order of :meth:`bayesinf.Task.flatten`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from torch import Tensor

from bayesinf._likelihoods import Bernoulli, Categorical, Gaussian
from bayesinf._posterior import LocalPosterior
from bayesinf._task import Task
from bayesinf.interop.numpyro._network import network

__all__ = ["JaxTask", "potential_fn"]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""How far losses of PyTorch and JAX may be apart, relative to their size."""


def potential_fn(posterior: LocalPosterior) -> Callable[[Array], Array]:
    r"""Potential of a local posterior in JAX, for any kernel of NumPyro or BlackJAX.

    Parameters
    ----------
    posterior
        Of a task whose network is a sequence of layers; see
        :func:`~bayesinf.interop.numpyro.reference_posterior`.

    Returns
    -------
    Callable
        ``U(w)``, flat weights ``(d,)`` in, a scalar out; the same as PyTorch's
        ``posterior.bind().value`` to rounding in float64. To be called, traced or compiled under
        ``jax.enable_x64(True)``.

    Raises
    ------
    NotImplementedError
        If a module or the likelihood has no counterpart in JAX.
    ValueError
        If the losses of the two differ at the checkpoint.
    TypeError
        If the network computes in half precision or takes other inputs than one tensor.

    Examples
    --------
    >>> import jax, torch, bayesinf as bi
    >>> from bayesinf.interop.numpyro import potential_fn
    >>> x, y = torch.randn(20, 3), torch.randn(20, 1)
    >>> task = bi.Task(torch.nn.Linear(3, 1), bi.Gaussian(), train=(x, y), query=(x[:5], y[:5]))
    >>> potential = potential_fn(bi.LocalPosterior(task, n_beta=20, gamma=1))
    >>> with jax.enable_x64(True):
    ...     slope = jax.grad(potential)(task.flatten(task.params).double().numpy())
    >>> slope.shape
    (4,)
    """
    return potential_of(posterior, JaxTask.of(posterior.task))


def potential_of(posterior: LocalPosterior, task: JaxTask) -> Callable[[Array], Array]:
    """As :func:`potential_fn`, of a task that is translated."""
    center, p = task.center, posterior

    def mean_loss(w: Array) -> Array:
        return task.losses(w, "train").mean()

    tilt = None
    if p.potential == "tilted":
        with jax.enable_x64(True):
            tilt = np.asarray(jax.jit(jax.grad(mean_loss))(center))

    def potential(w: Array) -> Array:
        require_float64()
        delta = w - center
        if tilt is not None:
            loss = mean_loss(w) - tilt @ delta
            return p.n_beta * loss + 0.5 * p.prior_precision * (delta @ delta)
        objective = mean_loss(w) + 0.5 * p.weight_decay * (w @ w)
        return p.n_beta * objective + 0.5 * p.gamma * (delta @ delta)

    return potential


def require_float64() -> None:
    """Raise ``RuntimeError`` where JAX would round to float32."""
    if jnp.result_type(float) != jnp.float64:
        raise RuntimeError(
            "this potential is for float64, and JAX computes in float32 here: energies of some "
            "hundreds would lose the differences that decide on proposals. Put the call into "
            "`with jax.enable_x64(True): …`."
        )


@dataclass(frozen=True)
class JaxTask:
    """What JAX needs of a task.

    Attributes
    ----------
    center
        ``w0 (d,)`` in float64.
    data
        Inputs and targets by ``"train"`` and ``"query"``.
    outputs
        ``(w (d,), inputs) -> (B, …)``.
    loss
        ``(outputs, targets) -> (B,)``.
    """

    center: np.ndarray
    data: dict[str, tuple[np.ndarray, np.ndarray]]
    outputs: Callable[[Array, Array], Array]
    loss: Callable[[Array, Array], Array]

    @classmethod
    def of(cls, task: Task) -> JaxTask:
        """Translate a task; errors are those of :func:`potential_fn`."""
        task.require_full_precision("a posterior in JAX")
        loss = _loss(task.likelihood)
        apply = network(task.module)
        restore = _restored(task)

        def outputs(w: Array, x: Array) -> Array:
            return apply(restore(w), x)

        data = {group: _arrays(task, group) for group in ("train", "query")}
        center = _double(task.flatten(task.params))
        found = cls(center, data, outputs, loss)
        _check_same(task, found)
        return found

    def losses(self, w: Array, group: str) -> Array:
        """Losses ``(n,)`` of all examples of a group."""
        x, y = self.data[group]
        return self.loss(self.outputs(w, jnp.asarray(x)), jnp.asarray(y))


# ------------------------------------------------------------------------------ weights and data


def _double(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().cpu().numpy()
    return array.astype(np.float64) if tensor.is_floating_point() else array


def _arrays(task: Task, group: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = task.examples(group).batch()
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise TypeError(
            f"a posterior in JAX is for networks with one tensor of inputs and one of targets; "
            f"{group} examples have inputs of type {type(x).__name__}. Give the task tensors: "
            f"{group}=(x, y)."
        )
    return _double(x), _double(y)


def _restored(task: Task) -> Callable[[Array], dict[str, Array]]:
    """Weights of the whole network from a flat vector; entries that do not count stay at w0."""
    fixed = {name: _double(p) for name, p in task.module.named_parameters()}
    marked = task.unflatten(torch.full((task.dimension,), torch.nan, dtype=task.dtype))
    chosen = {name: np.flatnonzero(np.isnan(_double(m).ravel())) for name, m in marked.items()}

    def restore(w: Array) -> dict[str, Array]:
        params = {name: jnp.asarray(value) for name, value in fixed.items()}
        start = 0
        for name, where in chosen.items():
            part = w[start : start + len(where)]
            start += len(where)
            if len(where) < fixed[name].size:
                part = params[name].ravel().at[where].set(part)
            params[name] = part.reshape(fixed[name].shape)
        return params

    return restore


def _check_same(task: Task, found: JaxTask) -> None:
    """Hooks, and whatever else a module does behind its type, show in the losses."""
    for group in ("train", "query"):
        with torch.no_grad():
            theirs = _double(task.losses(task.params, task.examples(group).batch()))
        with jax.enable_x64(True):
            ours = np.asarray(jax.jit(found.losses, static_argnums=1)(found.center, group))
        off = np.abs(ours - theirs) / (1 + np.abs(theirs))
        worst = int(np.argmax(off))
        if not off[worst] <= _TOLERANCE[task.dtype]:
            raise ValueError(
                f"at the checkpoint the loss of {group} example "
                f"{task.examples(group).ids[worst : worst + 1].tolist()[0]!r} is "
                f"{theirs[worst]:.9g} in PyTorch and {ours[worst]:.9g} in JAX: the network does "
                f"more than its layers say. Usual cause: hooks that change values. Remove them."
            )


# ------------------------------------------------------------------------------ likelihoods


def _loss(likelihood: object) -> Callable[[Array, Array], Array]:
    for kind, function in _LOSSES.items():
        if type(likelihood) is kind:
            return function
    raise NotImplementedError(
        f"the likelihood {type(likelihood).__name__} has no counterpart in JAX here; there are "
        f"{', '.join(kind.__name__ for kind in _LOSSES)}. Judge it by bi.HMC, whose law is exact, "
        f"too."
    )


def _per_example(values: Array) -> Array:
    return values.reshape(len(values), -1).sum(1)


def _categorical(outputs: Array, target: Array) -> Array:
    label = jnp.take_along_axis(outputs, target[:, None], axis=1)
    return _per_example(jax.nn.logsumexp(outputs - label, axis=1))


def _gaussian(outputs: Array, target: Array) -> Array:
    return _per_example(0.5 * (outputs - target) ** 2)


def _bernoulli(outputs: Array, target: Array) -> Array:
    return _per_example(jax.nn.softplus(outputs) - outputs * target)


_LOSSES: dict[type, Callable[[Array, Array], Array]] = {
    Categorical: _categorical,
    Gaussian: _gaussian,
    Bernoulli: _bernoulli,
}
