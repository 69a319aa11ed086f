"""Sampling the local posterior of a JAX loss."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from bayesinf._accuracy import Until
from bayesinf._plan import Plan
from bayesinf._posterior import LocalPosterior, PotentialKind
from bayesinf._run import Chains
from bayesinf._sampling import drive
from bayesinf._store import Store
from bayesinf._streaming import StreamingCovariance
from bayesinf._traces import TraceStore
from bayesinf.interop.jax._chains import JaxChains
from bayesinf.interop.jax._kernels import KERNELS
from bayesinf.interop.jax._task import JaxTask, LossFunction
from bayesinf.samplers import Sampler

__all__ = ["sample_jax"]


def sample_jax(
    loss_fn: LossFunction,
    params: Any,
    train: Any,
    query: Any,
    sampler: Sampler,
    *,
    n_beta: float,
    gamma: float,
    draws: int,
    warmup: int,
    weight_decay: float = 0.0,
    potential: PotentialKind = "tilted",
    chains: int = 4,
    thin: int = 1,
    batch_size: int | None = None,
    seed: int = 0,
    train_ids: Sequence[Any] | np.ndarray | None = None,
    query_ids: Sequence[Any] | np.ndarray | None = None,
    observe: Mapping[str, Sequence[Any] | None] | None = None,
    measurements: Mapping[str, LossFunction] | None = None,
    store: str | os.PathLike[str] | TraceStore | StreamingCovariance | None = None,
    until: Until | Callable[[Store], bool] | None = None,
    superchains: int | None = None,
    jitter: float = 1.0,
    divergence_bound: float | None = None,
    on_divergence: Literal["raise", "drop"] = "raise",
    chunk_size: int = 1000,
    max_excess: float = 0.05,
    progress: bool = True,
) -> TraceStore | StreamingCovariance:
    r"""Sample the local posterior of a JAX loss and record per-example losses at every kept draw.

    What is sampled is :class:`bayesinf.LocalPosterior` of the weights in ``params``,

        U(w) = nβ L(w) + (nβ·wd/2)‖w‖² + (γ/2)‖w − w0‖²         (tilted: − ⟨∇U(w0), w⟩)

    with the kernels of :mod:`bayesinf.samplers` and minibatches as of :func:`bayesinf.sample`;
    what is not said here is as there. The store is the same, too: :func:`bayesinf.bif`,
    :func:`bayesinf.diagnose`, :func:`bayesinf.llc` and ``to_arviz()`` read it.

    Parameters
    ----------
    loss_fn
        ``loss_fn(params, batch) -> (B,)``, pure: **one loss per example**, not their mean.
    params
        The checkpoint, a pytree in whatever structure ``loss_fn`` takes: variables of Flax, an
        Equinox module, nested dicts. Its floating-point arrays are sampled, in their precision
        (arrays in bfloat16 or float16 are sampled in float32, and rounded where the loss is
        computed); everything else in it stays as it is.
    train, query
        Pytrees of arrays with one row per example; batches are the same pytrees with fewer rows.
        Floating-point arrays are cast to the precision of the weights.
    sampler
        ``SGLD``, ``RMSpropSGLD``, ``Underdamped``, ``SGHMC``, ``SGNHT`` or ``MALA`` (which needs
        BlackJAX and full batches) of bayesinf, without a preconditioner.
    n_beta, gamma, weight_decay, potential
        As of :class:`bayesinf.LocalPosterior`.
    draws, warmup, chains, thin, seed
        As of :func:`bayesinf.sample`. Starting points and minibatches of a seed are those that it
        has there, the noise is not.
    batch_size
        Examples per gradient, without replacement within an epoch; None for the full batch.
    train_ids, query_ids
        Unique integers or strings that label the examples.
    observe
        Which examples are recorded, by id.
    measurements
        What is recorded of the queries besides the loss: ``{name: f(params, batch) -> (B,)}``.
    store, until, superchains, jitter, divergence_bound, on_divergence, max_excess, progress
        As of :func:`bayesinf.sample`.
    chunk_size
        Losses that are computed at once (bounds the memory): as many examples of a full batch or an
        observation, and as many chains together as there is room for, else one after another. The
        default suits a processor; give an accelerator more, 100,000 say.

    Returns
    -------
    TraceStore or StreamingCovariance
        With ``draws`` draws per chain, or fewer that are enough.

    Raises
    ------
    DivergenceError
        If a chain diverges and ``on_divergence="raise"``, or all do.
    StoreError
        If the store has other settings or cannot be written.
    TypeError
        If ``params`` holds no weights, data are no arrays of numbers, or the kernel is not one of
        those above.
    ValueError
        If a loss or measurement does not give one number per example, the rows of data differ,
        weights are in float64 while JAX's 64-bit mode is off, or a setting is out of range.

    Warns
    -----
    GradientNoiseWarning
        Where minibatches heat the chains by more than ``max_excess``.
    PrecisionWarning
        Where half precision rounds most perturbations of the weights away.
    FailedChainsWarning
        Where chains were dropped.

    Notes
    -----
    Compiled programs are kept for as long as ``loss_fn`` is the same object and shapes stay: other
    step sizes, temperatures, checkpoints and more draws compile nothing. A run that is killed goes
    on with the same call, bit for bit on the same device and versions.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, bayesinf as bi
    >>> from bayesinf.interop.jax import sample_jax
    >>> def loss_fn(params, batch):
    ...     x, y = batch
    ...     return 0.5 * (x @ params["w"] + params["b"] - y) ** 2
    >>> x = jax.random.normal(jax.random.key(0), (20, 3))
    >>> params = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    >>> traces = sample_jax(
    ...     loss_fn, params, (x, x[:, 0]), (x[:5], x[:5, 0]), bi.SGLD(0.02), n_beta=20, gamma=5,
    ...     draws=500, warmup=100, progress=False,
    ... )
    >>> scores = bi.bif(traces)
    """
    _check_kernel(sampler)
    if batch_size is not None and not isinstance(batch_size, int | np.integer):
        raise TypeError(
            f"batch_size must be a number of examples or None for all; got "
            f"{type(batch_size).__name__}. Weighted and stratified batches and moving anchors are "
            f"for bayesinf.sample alone."
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; got {chunk_size}.")
    task: Any = JaxTask(loss_fn, params, train, query, train_ids, query_ids)
    measured = dict(measurements or {})
    for name, function in measured.items():
        if name == "loss" or not callable(function):
            raise ValueError(
                f"measurements maps names, other than 'loss' which is always recorded, to "
                f"functions f(params, batch) -> (B,); got {name!r}: {function!r}."
            )
        task.check_values(function, "query", f"measurement {name!r}")
    posterior = LocalPosterior(task, n_beta, gamma, weight_decay, potential)
    plan = Plan.make(
        posterior, sampler, draws, warmup, chains, thin, batch_size, seed, superchains, jitter,
        observe, measured,  # type: ignore[arg-type]  # functions of (params, batch)
    )  # fmt: skip

    def make() -> Chains:
        return JaxChains(plan, chunk_size)

    return drive(
        plan, make, draws=draws, store=store, until=until, divergence_bound=divergence_bound,
        on_divergence=on_divergence, max_excess=max_excess, progress=progress,
    )  # fmt: skip


def _check_kernel(sampler: Sampler) -> None:
    if type(sampler) not in KERNELS:
        names = ", ".join(sorted(kernel.__name__ for kernel in KERNELS))
        raise TypeError(
            f"sample_jax has the kernels {names}; got {type(sampler).__name__}. Give one of these "
            f"with its settings, for example bayesinf.Underdamped(1e-5, friction=10.0)."
        )
    if getattr(sampler, "preconditioner", None) is not None:
        raise TypeError(
            f"preconditioners are made of a torch network's curvature, and sample_jax has none; "
            f"got {type(sampler).__name__} with one. Leave it out, or take RMSpropSGLD, which "
            f"adapts its own."
        )
