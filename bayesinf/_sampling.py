"""The driver: chains × draws, warm-up, thinning, what to observe, progress, resume."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, TypeVar

import torch

from bayesinf._accuracy import Until, Watch
from bayesinf._batching import Batches
from bayesinf._chains import FailedChainsWarning
from bayesinf._plan import Plan
from bayesinf._posterior import LocalPosterior
from bayesinf._run import Chains, DivergenceError, Run, divergence_message
from bayesinf._store import Store
from bayesinf._streaming import StreamingCovariance
from bayesinf._task import Measurement
from bayesinf._torch_chains import TorchChains
from bayesinf._traces import TraceStore
from bayesinf.samplers import Sampler

__all__ = ["drive", "sample"]

_Store = TypeVar("_Store", bound=Store)


def sample(
    posterior: LocalPosterior,
    sampler: Sampler,
    *,
    draws: int,
    warmup: int,
    chains: int = 4,
    thin: int = 1,
    batch_size: int | Batches | None = None,
    seed: int = 0,
    observe: Mapping[str, Sequence[Any] | None] | None = None,
    measurements: Sequence[str] | Mapping[str, Measurement] = ("loss",),
    tokens: Literal["train", "query", "both"] | None = None,
    store: str | os.PathLike[str] | _Store | None = None,
    until: Until | Callable[[Store], bool] | None = None,
    superchains: int | None = None,
    jitter: float = 1.0,
    divergence_bound: float | None = None,
    on_divergence: Literal["raise", "drop"] = "raise",
    vectorize: bool | None = None,
    chunk_size: int = 1000,
    device: torch.device | str | None = None,
    max_excess: float = 0.05,
    progress: bool = True,
) -> TraceStore | _Store:
    r"""Sample a local posterior and record per-example losses at every kept draw.

    Parameters
    ----------
    posterior
        What is sampled.
    sampler
        The kernel, with its step size.
    draws
        Kept draws per chain **in all**: with a store that already holds some, the rest is added.
        With ``until``, at most.
    warmup
        Steps before the first kept draw, thrown away; adaptive kernels adapt here and only here.
    chains
        Number of chains.
    thin
        Steps per kept draw.
    batch_size
        Examples per gradient, without replacement within an epoch, reshuffled every epoch, of each
        chain's own; None for the full batch. :class:`bayesinf.Batches` says more: importance
        sampling, strata, anchors that move.
    seed
        Of everything random: every chain owns a generator derived from it.
    observe
        Which examples are recorded: ``{"train": ids or None, "query": ids or None}``; None (and a
        missing key) means all.
    measurements
        What is recorded of the queries, apart from the loss: names of likelihood methods
        (``"loss"``, ``"margin"``), or ``{name: f(task, params, batch) -> (B,)}``. Of train examples
        the loss is recorded.
    tokens
        Of which groups the losses are recorded token by token, with the likelihood's
        ``token_losses``: then ``traces.values(group, tokens=True)`` and ``bif(traces, tokens=…)``
        have them, padded and masked tokens absent, and an example's loss is the sum over its
        tokens for whoever asks for it. Other measurements stay one number an example.
    store
        Where traces go: a path (``*.zarr``), an earlier :class:`TraceStore` to extend, or None for
        memory. A :class:`StreamingCovariance` keeps sums instead, which do not grow. A store with
        other settings is refused.
    until
        Stop earlier: at a precision or after a time (:class:`Until`), or when a function of the
        store returns True. Asked whenever the draws grew by a quarter; like ``draws`` it may
        change from call to call on one store.
    superchains
        Groups of chains that start at the same point; default 4 where ``chains`` is a multiple of
        4, else one per chain. Nested R-hat compares them.
    jitter
        Spread of the starting points around the checkpoint: as a multiple of the Gaussian that the
        kernel's preconditioner stands for (a Laplace draw) or, without one, of the prior's
        ``1/√(γ + nβ·wd)``, which is over-dispersed in every direction of positive curvature.
    divergence_bound
        A chain whose mean observed loss exceeds this is stopped and marked ``diverging``. Default:
        ``L(w0) + 10·(1 + d/(2nβ))``, ten times what ``d`` unconstrained directions would add.
    on_divergence
        ``"raise"``, or ``"drop"`` to go on with the healthy chains: failed ones are then absent
        from every statistic and named in a warning.
    vectorize
        Compute chains together or one after another; None chooses. The draws do not depend on it
        beyond rounding.
    chunk_size
        Examples per forward pass, for full-batch gradients and observations (bounds the memory).
    device
        Where to run; default: where the task is.
    max_excess
        Bound on the excess temperature that minibatches may cause
        (:func:`bayesinf.gradient_noise`), measured between warm-up and the first draw.
    progress
        Whether to show a progress bar with the loss and its R-hat so far.

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
    ValueError
        If an argument is out of range, or examples have no tokens where they are asked for.
    NotImplementedError
        If the likelihood has no measurement of a name, or no token losses where they are asked for.

    Warns
    -----
    PaddingWarning
        Where the padding of sequences changes their losses.
    GradientNoiseWarning
        Where minibatches heat the chains by more than ``max_excess``.
    PrecisionWarning
        Where a network in half precision rounds most perturbations of its weights away.
    FailedChainsWarning
        Where chains were dropped.

    Notes
    -----
    A run that is killed at any moment goes on with the same call and ends with the traces of an
    undisturbed run, bit for bit on the same device, thread count and versions.
    """
    if device is not None:
        posterior = replace(posterior, task=posterior.task.to(torch.device(device)))
    sampler = _move(sampler, posterior.task.device)
    plan = Plan.make(
        posterior, sampler, draws, warmup, chains, thin, batch_size, seed, superchains, jitter,
        observe, measurements, tokens,
    )  # fmt: skip

    def make() -> Chains:
        return TorchChains(plan, posterior.bind(vectorize=vectorize, chunk_size=chunk_size))

    return drive(
        plan, make, draws=draws, store=store, until=until, divergence_bound=divergence_bound,
        on_divergence=on_divergence, max_excess=max_excess, progress=progress,
    )  # fmt: skip


def drive(
    plan: Plan,
    make: Callable[[], Chains],
    *,
    draws: int,
    store: str | os.PathLike[str] | _Store | None,
    until: Until | Callable[[Store], bool] | None,
    divergence_bound: float | None,
    on_divergence: Literal["raise", "drop"],
    max_excess: float,
    progress: bool,
) -> TraceStore | _Store:
    """Bring a store to ``draws`` draws of a plan with the chains that ``make`` gives.

    Everything else is as of :func:`sample`, which the warnings' ``stacklevel`` takes for the
    caller's callee.
    """
    traces = prepare_store(store, plan, draws)
    if traces.failed and (on_divergence == "raise" or not traces.healthy):
        raise DivergenceError(divergence_message(traces.failed, plan))
    watch = Watch(until)
    if traces.draws >= draws or watch.enough(traces):
        return traces
    with torch.no_grad():
        run = Run(plan, make(), traces, divergence_bound, on_divergence, max_excess)
        try:
            run.go(draws, watch, progress)
        finally:
            traces.flush()
    if traces.failed:
        warnings.warn(
            f"chains {sorted(traces.failed)} diverged and were stopped; they are absent from every "
            f"statistic. {traces.failed}",
            FailedChainsWarning,
            stacklevel=3,
        )
    return traces


def _move(sampler: Sampler, device: torch.device) -> Sampler:
    """Put what a kernel is made of where the chains are."""
    parts = {f.name: getattr(sampler, f.name) for f in fields(sampler)}  # type: ignore[arg-type]
    moved = {name: part.to(device) for name, part in parts.items() if hasattr(part, "to")}
    return replace(sampler, **moved) if moved else sampler  # type: ignore[type-var]


def prepare_store(
    store: str | os.PathLike[str] | _Store | None, plan: Plan, draws: int
) -> TraceStore | _Store:
    config = plan.config()
    names = {group: list(m) for group, m in plan.measurements.items()}
    ids = {group: plan.ids(group) for group in plan.observed}
    if isinstance(store, StreamingCovariance):
        store.begin(config, ids, names, plan.token_axes)
        return store
    if store is None or (isinstance(store, str | os.PathLike) and not os.path.exists(store)):
        return TraceStore.create(store, config, ids, names, draws, plan.token_axes)
    found = TraceStore.open(store) if isinstance(store, str | os.PathLike) else store
    found.check_identity(config)
    found.grow(draws)
    return found
