"""One call of the driver: chains that move, are observed, fail, are committed and go on."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bayesinf._accuracy import Watch
from bayesinf._batching import Batching
from bayesinf._diagnostics import rhat_of_means
from bayesinf._disk import StoreError
from bayesinf._gradient_noise import excess_temperature, warn_of_noise
from bayesinf._gradients import ChainFunctions
from bayesinf._observing import Observer, fitting
from bayesinf._plan import Plan
from bayesinf._posterior import Potential
from bayesinf._precision import swallowed, warn_of_rounding
from bayesinf._rng import ChainGenerators, starting_points
from bayesinf._store import Store
from bayesinf.samplers import State

__all__ = ["DivergenceError", "Run", "divergence_message"]

_COMMIT_SECONDS = 30.0


class DivergenceError(RuntimeError):
    """A chain left the region where its draws mean anything."""


class Run:
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
        self.drop = on_divergence == "drop"
        task = plan.posterior.task
        at_once = plan.chains if self.functions.vectorize else 1
        limit = fitting(task, potential.chunk, at_once)
        self.observers = {group: Observer(plan, group, limit) for group in plan.observed}
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
        spread = p.task.dimension / (2 * p.n_beta) if p.n_beta else float("inf")
        return self._loss_at_checkpoint + 10 * (1 + spread)

    @cached_property
    def _loss_at_checkpoint(self) -> float:
        """Mean over the observed train examples."""
        values = self._observe(self.potential.center[None], once=True)
        return float(self._train_losses(values).mean(dtype=np.float64))

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
                means.append(self._train_losses(record).mean(1))
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
                "loss_at_checkpoint": self._loss_at_checkpoint,
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
        for group, observer in self.observers.items():
            if group == "train" and not once and self._losses_come_with_gradient(position):
                losses = self.batching.potential.evaluate(position)[1]
                out["train/loss"] = losses.float().cpu().numpy()
            else:
                out.update(observer(functions, position))
        return out

    def _train_losses(self, values: dict[str, np.ndarray]) -> np.ndarray:
        """Losses ``(C, n)`` of the observed train examples, sums over tokens where these are."""
        axis = self.plan.axis("train")
        return axis.sums(values[f"{axis.dim}/loss"])

    def _losses_come_with_gradient(self, position: Tensor) -> bool:
        """Whether the full-batch gradient at ``position`` is known, or the next step's first."""
        known = self.starts_with_gradient or self.batching.potential.evaluated(position)
        return self.observers["train"].whole and known

    def _record(self) -> dict[str, np.ndarray]:
        position = self.state["position"]
        values = self._observe(position)
        loss = self._train_losses(values).mean(1, dtype=np.float64)
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
