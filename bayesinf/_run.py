"""One call of the driver: chains that move, are observed, fail, are committed and go on."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch
from tqdm import tqdm

from bayesinf._accuracy import Watch
from bayesinf._diagnostics import rhat_of_means
from bayesinf._disk import StoreError
from bayesinf._gradient_noise import warn_of_noise
from bayesinf._plan import Plan
from bayesinf._precision import warn_of_rounding
from bayesinf._store import Store

__all__ = ["Chains", "DivergenceError", "Run", "divergence_message"]

_COMMIT_SECONDS = 30.0


class DivergenceError(RuntimeError):
    """A chain left the region where its draws mean anything."""


class Chains(Protocol):
    """The ``C`` chains of a run, whatever computes them."""

    step: int

    def start(self) -> None:
        """Put every chain where it starts."""
        ...

    def freeze(self) -> None:
        """Stop whatever adapts."""
        ...

    def advance(self, steps: int) -> None:
        """Move every chain by so many steps."""
        ...

    def finite(self) -> np.ndarray:
        """``(C,)``: whether the weights are finite."""
        ...

    def hold(self, chain: int) -> None:
        """Put a failed chain back to the checkpoint, so that the others' arithmetic is finite."""
        ...

    def observe(self) -> dict[str, np.ndarray]:
        """Values ``(C, N)`` of what is recorded, by their names in a store."""
        ...

    def observe_checkpoint(self) -> dict[str, np.ndarray]:
        """The same ``(1, N)`` at the checkpoint."""
        ...

    def statistics(self, loss: np.ndarray | None) -> dict[str, np.ndarray]:
        """``lp``, ``distance`` and ``acceptance_rate`` ``(C,)``, the last since the last draw.

        ``loss (C,)`` is the mean over all train examples; without it ``lp`` may be NaN. Chains that
        adapt steps of their own also give ``step_size``, and ``diverging`` where moves can diverge.
        """
        ...

    def checks(self, alive: list[int]) -> dict[str, Any]:
        """``excess_temperature`` and ``swallowed_perturbations`` of some of the chains."""
        ...

    def saved(self) -> dict[str, Any]:
        """Tensors and plain numbers from which :meth:`restore` goes on."""
        ...

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what :meth:`saved` gave."""
        ...


class Run:
    """One call of :func:`sample`: what becomes of the chains."""

    def __init__(
        self,
        plan: Plan,
        chains: Chains,
        traces: Store,
        bound: float | None,
        on_divergence: Literal["raise", "drop"],
        max_excess: float,
    ) -> None:
        self.max_excess = max_excess
        self.plan, self.chains, self.traces = plan, chains, traces
        self.drop = on_divergence == "drop"
        self.checks: dict[str, Any] = dict(traces.commit_facts.get("checks", {}))
        self.failed: dict[int, str] = dict(traces.failed)
        self.spent = float(traces.commit_facts.get("seconds", 0.0))  # by earlier calls
        self.began = time.perf_counter()
        self.bound = self._default_bound() if bound is None else bound
        self.full_train = len(plan.observed["train"]) == plan.posterior.task.n

    def _default_bound(self) -> float:
        p = self.plan.posterior
        spread = p.task.dimension / (2 * p.n_beta) if p.n_beta else float("inf")
        return self._loss_at_checkpoint + 10 * (1 + spread)

    @cached_property
    def _loss_at_checkpoint(self) -> float:
        """Mean over the observed train examples."""
        values = self.chains.observe_checkpoint()
        return float(self._train_losses(values).mean(dtype=np.float64))

    # ------------------------------------------------------------------ the run

    def go(self, draws: int, watch: Watch, progress: bool) -> None:
        if payload := self.traces.payload:
            self._restore(payload)
        else:
            self.chains.start()
        total, done = self.plan.warmup + draws * self.plan.thin, self.chains.step
        bar = tqdm(total=total, initial=done, disable=not progress, desc="sample", leave=False)
        with bar:
            if self.chains.step < self.plan.warmup:
                self._warm_up(bar)
            self._check()
            buffer = _Buffer(self.traces.chunk_draws)
            means: list[np.ndarray] = []
            while self.traces.draws + len(buffer) < draws:
                self._advance(self.plan.thin, bar)
                record = self._record()
                buffer.add(record)
                means.append(self._train_losses(record).mean(1))
                count = self.traces.draws + len(buffer)
                ask = watch.due(count, self._seconds())
                if buffer.full(self.traces) or ask or count == draws:
                    self._commit(buffer)
                    if progress:
                        bar.set_postfix_str(_summary(np.stack(means, axis=1)))
                    if ask and watch.enough(self.traces):
                        break

    def _warm_up(self, bar: tqdm[Any]) -> None:
        block = 50
        while self.chains.step < self.plan.warmup:
            self._advance(min(block, self.plan.warmup - self.chains.step), bar)
            self._stop_chains(~self.chains.finite(), "its weights are not finite")
        self.chains.freeze()
        self._commit(_Buffer())

    def _check(self) -> None:
        """Measure once what may spoil every draw, and warn at every call."""
        if not self.checks:
            alive = [c for c in range(self.plan.chains) if c not in self.failed]
            self.checks = {
                **self.chains.checks(alive),
                "loss_at_checkpoint": self._loss_at_checkpoint,
            }
        warn_of_noise(self.checks["excess_temperature"], self.max_excess, stacklevel=5)
        task = self.plan.posterior.task
        warn_of_rounding(self.checks["swallowed_perturbations"], task, stacklevel=5)

    def _advance(self, steps: int, bar: tqdm[Any]) -> None:
        if self.chains.step == 0 and self.plan.warmup == 0:
            self.chains.freeze()
        self.chains.advance(steps)
        bar.update(steps)

    # ------------------------------------------------------------------ observing

    def _train_losses(self, values: dict[str, np.ndarray]) -> np.ndarray:
        """Losses ``(C, n)`` of the observed train examples, sums over tokens where these are."""
        axis = self.plan.axis("train")
        return axis.sums(values[f"{axis.dim}/loss"])

    def _record(self) -> dict[str, np.ndarray]:
        values = self.chains.observe()
        loss = self._train_losses(values).mean(1, dtype=np.float64)
        lost = ~self.chains.finite()
        self._stop_chains(lost, "its weights are not finite")
        for name, array in values.items():
            for c in np.flatnonzero(~np.isfinite(array).all(axis=1)):
                self._stop_chains(np.arange(len(array)) == c, self._blame(name, array[c]))
        with np.errstate(invalid="ignore"):
            self._stop_chains(
                loss > self.bound, f"its mean loss exceeded the bound {self.bound:.4g}"
            )
        stats = {
            "step_size": np.full(self.plan.chains, self.plan.sampler.step_size),
            **self.chains.statistics(loss if self.full_train else None),
        }
        dead = np.array([c in self.failed for c in range(self.plan.chains)])
        for name, array in {**values, **stats}.items():
            array[dead] = np.nan
            values[name if "/" in name else f"sample_stats/{name}"] = array
        values["sample_stats/diverging"] = dead | values.get("sample_stats/diverging", dead)
        return values

    def _blame(self, name: str, row: np.ndarray) -> str:
        """Name the first example, or token, whose value is not finite in a chain."""
        first = int(np.flatnonzero(~np.isfinite(row))[0])
        group, measurement = name.split("/")
        if not group.endswith("_token"):
            return f"{name} of example {self.plan.ids(group).tolist()[first]!r} is not finite"
        axis = self.plan.token_axes[group.removesuffix("_token")]
        assert axis.position is not None
        word = "" if axis.token_id is None else f" (id {int(axis.token_id[first])})"
        return (
            f"{axis.split}/{measurement} of the token at position {int(axis.position[first])}"
            f"{word} of example {axis.ids[first : first + 1].tolist()[0]!r} is not finite"
        )

    # ------------------------------------------------------------------ failure

    def _stop_chains(self, bad: np.ndarray, why: str) -> None:
        new = [c for c in np.flatnonzero(bad).tolist() if c not in self.failed]
        for c in new:
            self.failed[c] = f"{why} at step {self.chains.step}"
            self.chains.hold(c)
        if not new:
            return
        if not self.drop or len(self.failed) == self.plan.chains:
            self.traces.append({}, self.traces.payload or b"", self._facts())
            raise DivergenceError(divergence_message(self.failed, self.plan))

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
        torch.save({"step": self.chains.step, **self.chains.saved()}, file)
        return file.getvalue()

    def _restore(self, payload: bytes) -> None:
        saved = torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")
        expected = self.plan.warmup + self.traces.draws * self.plan.thin
        if int(saved["step"]) != expected:
            raise StoreError(f"the commit is at step {saved['step']}, its draws end at {expected}.")
        self.chains.restore(saved)


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


def divergence_message(failed: Mapping[int, str], plan: Plan) -> str:
    rows = "\n".join(f"  chain {c}: {why}" for c, why in sorted(failed.items()))
    p = plan.posterior
    return (
        f"{len(failed)} of {plan.chains} chains diverged:\n{rows}\nUsual causes: step_size "
        f"({plan.sampler.step_size:g}) above 4 / (n_beta·λ_max + prior precision), with n_beta="
        f"{p.n_beta:g} and prior precision {p.prior_precision:g}; starting points too far out "
        f"(jitter={plan.jitter:g}); gamma too small to hold the chain. Lower the step size first. "
        f"on_divergence='drop' keeps the healthy chains."
    )
