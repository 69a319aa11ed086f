"""The driver: chains × draws, warm-up, thinning, what to observe, progress, resume."""

from __future__ import annotations

import io
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bayesinf._accuracy import Until, Watch
from bayesinf._batching import Batches, Batching
from bayesinf._diagnostics import rhat_of_means
from bayesinf._gradient_noise import excess_temperature, warn_of_noise
from bayesinf._gradients import ChainFunctions
from bayesinf._plan import Plan
from bayesinf._posterior import LocalPosterior, Potential
from bayesinf._precision import swallowed, warn_of_rounding
from bayesinf._rng import ChainGenerators, starting_points
from bayesinf._store import Store
from bayesinf._streaming import StreamingCovariance
from bayesinf._task import Measurement
from bayesinf._traces import FailedChainsWarning, StoreError, TraceStore
from bayesinf.samplers import Sampler, State

__all__ = ["DivergenceError", "sample"]

_COMMIT_SECONDS = 30.0

_Store = TypeVar("_Store", bound=Store)


class DivergenceError(RuntimeError):
    """A chain left the region where its draws mean anything."""


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
        If an argument is out of range.

    Warns
    -----
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
        observe, measurements,
    )  # fmt: skip
    traces = _prepare_store(store, plan, draws)
    if traces.failed and (on_divergence == "raise" or not traces.healthy):
        raise DivergenceError(_divergence_message(traces.failed, plan))
    watch = Watch(until)
    if traces.draws >= draws or watch.enough(traces):
        return traces
    potential = posterior.bind(vectorize=vectorize, chunk_size=chunk_size)
    run = _Run(plan, potential, traces, divergence_bound, on_divergence, max_excess)
    with torch.no_grad():
        try:
            run.go(draws, watch, progress)
        finally:
            traces.flush()
    if traces.failed:
        warnings.warn(
            f"chains {sorted(traces.failed)} diverged and were stopped; they are absent from every "
            f"statistic. {traces.failed}",
            FailedChainsWarning,
            stacklevel=2,
        )
    return traces


def _move(sampler: Sampler, device: torch.device) -> Sampler:
    """Put what a kernel is made of where the chains are."""
    parts = {f.name: getattr(sampler, f.name) for f in fields(sampler)}  # type: ignore[arg-type]
    moved = {name: part.to(device) for name, part in parts.items() if hasattr(part, "to")}
    return replace(sampler, **moved) if moved else sampler  # type: ignore[type-var]


def _prepare_store(
    store: str | os.PathLike[str] | _Store | None, plan: Plan, draws: int
) -> TraceStore | _Store:
    config = plan.config()
    names = {group: list(m) for group, m in plan.measurements.items()}
    ids = {group: plan.ids(group) for group in plan.observed}
    if isinstance(store, StreamingCovariance):
        store.begin(config, ids, names)
        return store
    if store is None or (isinstance(store, str | os.PathLike) and not os.path.exists(store)):
        return TraceStore.create(store, config, ids, names, draws)
    found = TraceStore.open(store) if isinstance(store, str | os.PathLike) else store
    found.check_identity(config)
    found.grow(draws)
    return found


class _Run:
    """One call of :func:`sample`: owns the mutable state of the chains."""

    def __init__(
        self,
        plan: Plan,
        potential: Potential,
        traces: Store,
        bound: float | None,
        on_divergence: Literal["raise", "drop"],
        max_excess: float,
    ) -> None:
        self.max_excess = max_excess
        self.plan, self.potential, self.traces = plan, potential, traces
        self.functions = potential.functions
        self.chunks = {group: plan.chunks(group, potential.chunk) for group in plan.observed}
        self.drop = on_divergence == "drop"
        task = plan.posterior.task
        self.rng = ChainGenerators(plan.seed, plan.chains, task.device)
        self.batching = Batching(plan.batches, potential, plan.seed, plan.chains)
        self.checks: dict[str, Any] = dict(traces.commit_facts.get("checks", {}))
        self.failed: dict[int, str] = dict(traces.failed)
        self.spent = float(traces.commit_facts.get("seconds", 0.0))  # by earlier calls
        self.began = time.perf_counter()
        self.step = 0
        self.state: State = {}
        self.acceptance: list[Tensor] = []  # of each step since the last draw
        self.starts_with_gradient = False
        self.bound = self._default_bound() if bound is None else bound
        self.full_train = len(plan.observed["train"]) == task.n

    def _default_bound(self) -> float:
        p = self.plan.posterior
        start = float(self._observe(self.potential.center[None], once=True)["train/loss"].mean())
        spread = p.task.dimension / (2 * p.n_beta) if p.n_beta else float("inf")
        return start + 10 * (1 + spread)

    # ------------------------------------------------------------------ the run

    def go(self, draws: int, watch: Watch, progress: bool) -> None:
        if self.traces.payload:
            self._restore(self.traces.payload)
        else:
            self._start()
        total = self.plan.warmup + draws * self.plan.thin
        bar = tqdm(total=total, initial=self.step, disable=not progress, desc="sample", leave=False)
        with bar:
            if self.step < self.plan.warmup:
                self._warm_up(bar)
            self._check()
            buffer = _Buffer(self.traces.chunk_draws)
            means: list[np.ndarray] = []
            while self.traces.draws + len(buffer) < draws:
                self._advance(self.plan.thin, bar)
                record = self._record()
                buffer.add(record)
                means.append(record["train/loss"].mean(1))
                count = self.traces.draws + len(buffer)
                ask = watch.due(count, self._seconds())
                if buffer.full(self.traces) or ask or count == draws:
                    self._commit(buffer)
                    if progress:
                        bar.set_postfix_str(_summary(np.stack(means, axis=1)))
                    if ask and watch.enough(self.traces):
                        break

    def _start(self) -> None:
        plan = self.plan
        start = starting_points(
            self.potential.center, plan.chains, plan.superchains, plan.spread, plan.seed
        )
        self.state = plan.sampler.init(start, self.rng)

    def _warm_up(self, bar: tqdm[Any]) -> None:
        block = 50
        while self.step < self.plan.warmup:
            self._advance(min(block, self.plan.warmup - self.step), bar)
            bad = ~torch.isfinite(self.state["position"]).all(dim=1).cpu().numpy()
            self._stop_chains(bad, "its weights are not finite")
        self.state = self.plan.sampler.freeze(self.state)
        self._commit(_Buffer())

    def _check(self) -> None:
        """Measure once what may spoil every draw, and warn at every call."""
        task, position = self.plan.posterior.task, self.state["position"]
        if not self.checks:
            alive = [c for c in range(self.plan.chains) if c not in self.failed]
            excess = excess_temperature(self.plan.sampler, self.batching, self.state, alive)
            self.checks = {
                "excess_temperature": excess,
                "swallowed_perturbations": swallowed(task, position[alive]),
            }
        warn_of_noise(self.checks["excess_temperature"], self.max_excess, stacklevel=4)
        warn_of_rounding(self.checks["swallowed_perturbations"], task, stacklevel=4)

    def _advance(self, steps: int, bar: tqdm[Any]) -> None:
        if self.step == 0 and self.plan.warmup == 0:
            self.state = self.plan.sampler.freeze(self.state)
        self.acceptance = []
        for _ in range(steps):
            start = self.state["position"]
            batch = self.batching.at(self.step, start)
            potential = self.batching.potential
            potential.first_evaluated = None
            self.state, info = self.plan.sampler.step(self.state, potential, batch, self.rng)
            self.starts_with_gradient = potential.first_evaluated is start
            if "acceptance" in info:
                self.acceptance.append(info["acceptance"])
            self.step += 1
        bar.update(steps)

    # ------------------------------------------------------------------ observing

    def _observe(self, position: Tensor, *, once: bool = False) -> dict[str, np.ndarray]:
        functions = ChainFunctions(self.plan.posterior.task, False) if once else self.functions
        out: dict[str, np.ndarray] = {}
        for group, wanted in self.plan.measurements.items():
            if group == "train" and not once and self._losses_come_with_gradient(position):
                losses = self.batching.potential.evaluate(position)[1]
                out["train/loss"] = losses.float().cpu().numpy()
                continue
            examples = self.plan.posterior.task.examples(group)
            parts = [
                functions.observe(position, examples.batch(where), list(wanted.values()))
                for where in self.chunks[group]
            ]
            for k, name in enumerate(wanted):
                joined = torch.cat([part[k] for part in parts], dim=1)
                out[f"{group}/{name}"] = joined.float().cpu().numpy()
        return out

    def _losses_come_with_gradient(self, position: Tensor) -> bool:
        """Whether the full-batch gradient at ``position`` is known, or the next step's first."""
        whole = isinstance(self.chunks["train"][0], slice)
        known = self.starts_with_gradient or self.batching.potential.evaluated(position)
        return whole and known

    def _record(self) -> dict[str, np.ndarray]:
        position = self.state["position"]
        values = self._observe(position)
        loss = values["train/loss"].mean(1, dtype=np.float64)
        lost = ~torch.isfinite(position).all(dim=1).cpu().numpy()
        self._stop_chains(lost, "its weights are not finite")
        for name, array in values.items():
            for c in np.flatnonzero(~np.isfinite(array).all(axis=1)):
                self._stop_chains(np.arange(len(array)) == c, self._blame(name, array[c]))
        with np.errstate(invalid="ignore"):
            self._stop_chains(
                loss > self.bound, f"its mean loss exceeded the bound {self.bound:.4g}"
            )
        delta = position - self.potential.center
        stats = {
            "lp": self._lp(position, loss),
            "step_size": np.full(self.plan.chains, self.plan.sampler.step_size),
            "distance": delta.norm(dim=1).double().cpu().numpy(),
            "acceptance_rate": self._acceptance(),
        }
        dead = np.array([c in self.failed for c in range(self.plan.chains)])
        for name, array in {**values, **stats}.items():
            array[dead] = np.nan
            values[name if "/" in name else f"sample_stats/{name}"] = array
        values["sample_stats/diverging"] = dead
        return values

    def _acceptance(self) -> np.ndarray:
        """Mean probability of acceptance of the steps since the last draw."""
        if not self.acceptance:
            return np.full(self.plan.chains, np.nan)
        return torch.stack(self.acceptance).mean(0).double().cpu().numpy()

    def _blame(self, name: str, row: np.ndarray) -> str:
        """Name the first example whose value is not finite in a chain."""
        first = np.flatnonzero(~np.isfinite(row))[0]
        group = name.split("/")[0]
        return f"{name} of example {self.plan.ids(group).tolist()[first]!r} is not finite"

    def _lp(self, position: Tensor, loss: np.ndarray) -> np.ndarray:
        """Log density, up to a constant; NaN where only a part of the train set is observed."""
        if not self.full_train:
            return np.full(self.plan.chains, np.nan)
        mean = torch.from_numpy(loss).to(position)
        return -self.potential.value_of_loss(position, mean).double().cpu().numpy()

    # ------------------------------------------------------------------ failure

    def _stop_chains(self, bad: np.ndarray, why: str) -> None:
        new = [c for c in np.flatnonzero(bad).tolist() if c not in self.failed]
        for c in new:
            self.failed[c] = f"{why} at step {self.step}"
            self.state["position"][c] = self.potential.center  # keep the others' arithmetic finite
        if not new:
            return
        if not self.drop or len(self.failed) == self.plan.chains:
            self.traces.append({}, self.traces.payload or b"", self._facts())
            raise DivergenceError(_divergence_message(self.failed, self.plan))

    # ------------------------------------------------------------------ commit and resume

    def _commit(self, buffer: _Buffer) -> None:
        self.traces.append(buffer.take(), self._payload(), self._facts())

    def _seconds(self) -> float:
        """Of this call and the earlier ones on this store."""
        return self.spent + time.perf_counter() - self.began

    def _facts(self) -> dict[str, Any]:
        return {
            "failed": {str(c): why for c, why in self.failed.items()},
            "seconds": self._seconds(),
            "checks": self.checks,
        }

    def _payload(self) -> bytes:
        file = io.BytesIO()
        saved = {
            "step": self.step,
            "state": self.state,
            "rng": self.rng.get_state(),
            "anchors": self.batching.state(),
        }
        torch.save(saved, file)
        return file.getvalue()

    def _restore(self, payload: bytes) -> None:
        saved = torch.load(
            io.BytesIO(payload), weights_only=True, map_location=self.potential.center.device
        )
        self.step, self.state = int(saved["step"]), saved["state"]
        self.rng.set_state(saved["rng"])
        self.batching.restore(saved["anchors"])
        expected = self.plan.warmup + self.traces.draws * self.plan.thin
        if self.step != expected:
            raise StoreError(f"the commit is at step {self.step}, its draws end at {expected}.")


class _Buffer:
    """Draws that are not written yet."""

    def __init__(self, chunk: int = 1) -> None:
        self.chunk = chunk
        self.records: list[dict[str, np.ndarray]] = []
        self.since = time.monotonic()

    def __len__(self) -> int:
        return len(self.records)

    def add(self, record: dict[str, np.ndarray]) -> None:
        self.records.append(record)

    def full(self, traces: Store) -> bool:
        """Whether a chunk is complete, or the last commit is long ago."""
        whole = (traces.draws + len(self.records)) % self.chunk == 0
        return whole or time.monotonic() - self.since > _COMMIT_SECONDS

    def take(self) -> dict[str, np.ndarray]:
        records, self.records = self.records, []
        self.since = time.monotonic()
        names = records[0] if records else {}
        return {name: np.stack([r[name] for r in records], axis=1) for name in names if "/" in name}


def _summary(means: np.ndarray) -> str:
    if means.shape[1] < 8:
        return f"loss {np.nanmean(means):.4g}"
    return f"loss {np.nanmean(means):.4g}, R-hat {rhat_of_means(means):.3f}"


def _divergence_message(failed: Mapping[int, str], plan: Plan) -> str:
    rows = "\n".join(f"  chain {c}: {why}" for c, why in sorted(failed.items()))
    p = plan.posterior
    return (
        f"{len(failed)} of {plan.chains} chains diverged:\n{rows}\nUsual causes: step_size "
        f"({plan.sampler.step_size:g}) above 4 / (n_beta·λ_max + prior precision), with n_beta="
        f"{p.n_beta:g} and prior precision {p.prior_precision:g}; starting points too far out "
        f"(jitter={plan.jitter:g}); gamma too small to hold the chain. Lower the step size first. "
        f"on_divergence='drop' keeps the healthy chains."
    )
