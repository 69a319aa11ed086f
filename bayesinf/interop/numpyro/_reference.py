"""NUTS on the very posterior that our own kernels sample: what to judge them by."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bayesinf._accuracy import Until
from bayesinf._diagnostics import ConvergenceWarning, diagnose
from bayesinf._plan import Plan
from bayesinf._posterior import LocalPosterior
from bayesinf._sampling import drive
from bayesinf._store import Store
from bayesinf._traces import TraceStore
from bayesinf.interop.numpyro._nuts import NUTS, NUTSChains

__all__ = ["reference_posterior"]

_EXAMPLES = 100


def reference_posterior(
    posterior: LocalPosterior,
    *,
    draws: int,
    warmup: int = 500,
    chains: int = 8,
    thin: int = 1,
    seed: int = 0,
    observe: Mapping[str, Sequence[Any] | None] | None = None,
    store: str | os.PathLike[str] | TraceStore | None = None,
    until: Until | Callable[[Store], bool] | None = None,
    superchains: int | None = None,
    jitter: float = 2.0,
    target_accept_prob: float = 0.8,
    max_tree_depth: int = 10,
    progress: bool = True,
) -> TraceStore:
    r"""Sample a local posterior with NumPyro's NUTS, in float64, and record losses.

    The posterior is that of :func:`bayesinf.sample`, potential and all, so that what the two say
    may differ by Monte-Carlo error alone, and the traces are of the same form: :func:`bayesinf.bif`
    and :func:`bayesinf.diagnose` read them. NUTS has an exact law at any step and no setting that
    biases it; where its chains meet, it is the truth for kernels that are faster or approximate.

    Parameters
    ----------
    posterior
        Of a network that is a layer or an ``nn.Sequential`` of Linear, Conv2d, Flatten, Unflatten,
        pooling in two dimensions, Dropout, Identity and the usual activations, with the likelihood
        ``Categorical``, ``Gaussian`` or ``Bernoulli``.
    draws
        Kept draws per chain in all; with a store that holds some already, the rest is added.
    warmup
        Transitions in which step size and scales adapt, thrown away.
    chains
        Number of chains; they move together.
    thin
        Transitions per kept draw.
    seed
        Of starting points and chains.
    observe, store, until, superchains
        As of :func:`bayesinf.sample`.
    jitter
        Spread of the starting points, in standard deviations of the Gaussian approximation at the
        checkpoint: 2 is over-dispersed in every direction, 0 starts all chains at ``w0``.
    target_accept_prob, max_tree_depth
        As of ``numpyro.infer.NUTS``.
    progress
        Whether to show a progress bar.

    Returns
    -------
    TraceStore
        ``sample_stats`` has ``diverging``, whether a transition before the draw diverged; scores
        made of the traces carry ``divergences`` (the number of such draws) and ``rhat`` (split
        R-hat of losses, 95 % quantile) in their attributes.

    Raises
    ------
    NotImplementedError
        If a module or the likelihood has no counterpart in JAX.
    TypeError
        If the network computes in half precision or takes other inputs than one tensor.
    ValueError
        If an argument is out of range, the potential is not finite where a chain starts, or the
        losses of PyTorch and JAX differ at the checkpoint.
    StoreError
        If the store has other settings or cannot be written.

    Warns
    -----
    ConvergenceWarning
        If transitions diverged, or chains have not met (R-hat above 1.05).

    Notes
    -----
    Hoffman and Gelman 2014; Phan et al. 2019 (NumPyro). Chains move in coordinates that the
    Gauss–Newton matrix at the checkpoint makes nearly spherical, which changes their speed and not
    their law.
    """
    kernel = NUTS(target_accept_prob, max_tree_depth)
    sampler: Any = kernel  # of a Sampler it has what decides a draw, and no step of its own
    plan = Plan.make(
        posterior, sampler, draws, warmup, chains, thin, None, seed, superchains, jitter, observe,
        ("loss",),
    )  # fmt: skip
    with jax.enable_x64(True):
        traces = drive(
            plan, lambda: NUTSChains(plan, kernel), draws=draws, store=store, until=until,
            divergence_bound=math.inf, on_divergence="raise", max_excess=math.inf,
            progress=progress,
        )  # fmt: skip
    assert isinstance(traces, TraceStore)
    _warn(_checked(traces), traces)
    return traces


def _checked(traces: TraceStore) -> dict[str, Any]:
    """Number of divergences and R-hat, kept in the store's facts as well."""
    facts = traces.commit_facts
    checks = facts["checks"]
    if checks.get("judged_at") != traces.draws:
        diverging = traces.tree["sample_stats"].to_dataset()["diverging"].values
        checks = {**checks, "divergences": int(diverging.sum()), "judged_at": traces.draws}
        if traces.draws >= 4:
            found = diagnose(traces, max_examples=_EXAMPLES)
            values = np.concatenate([found["rhat_train"], found["rhat_query"]])
            checks["rhat"] = float(np.nanquantile(values, 0.95))
        kept = {name: fact for name, fact in facts.items() if name != "draws_written"}
        traces.append({}, traces.payload or b"", {**kept, "checks": checks})
    return checks


def _warn(checks: Mapping[str, Any], traces: TraceStore) -> None:
    problems = []
    if checks["divergences"]:
        problems.append(
            f"{checks['divergences']} of {traces.chains * traces.draws} draws come after "
            f"transitions that diverged: raise target_accept_prob, or localise more (gamma)"
        )
    if checks.get("rhat", 1.0) > 1.05:
        problems.append(
            f"R-hat of the losses reaches {checks['rhat']:.2f} (95 % quantile; at most 1.05 is "
            f"fine): lengthen warmup, or draw more"
        )
    if problems:
        warnings.warn(
            f"this reference is in doubt: {'; '.join(problems)}.", ConvergenceWarning, stacklevel=3
        )
