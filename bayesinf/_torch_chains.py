"""Chains computed by torch: kernels that step, batches, and observers at their positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesinf._batching import Batching
from bayesinf._gradient_noise import excess_temperature
from bayesinf._gradients import ChainFunctions
from bayesinf._observing import Observer, fitting
from bayesinf._plan import Plan
from bayesinf._posterior import Potential
from bayesinf._precision import swallowed
from bayesinf._rng import ChainGenerators, starting_points
from bayesinf.samplers import State

__all__ = ["TorchChains"]


class TorchChains:
    """State of the chains of a plan; meets :class:`bayesinf._run.Chains`."""

    def __init__(self, plan: Plan, potential: Potential) -> None:
        self.plan, self.potential = plan, potential
        self.functions = potential.functions
        task = plan.posterior.task
        at_once = plan.chains if self.functions.vectorize else 1
        limit = fitting(task, potential.chunk, at_once)
        self.observers = {group: Observer(plan, group, limit) for group in plan.observed}
        self.rng = ChainGenerators(plan.seed, plan.chains, task.device)
        self.batching = Batching(plan.batches, potential, plan.seed, plan.chains)
        self.step = 0
        self.state: State = {}
        self.acceptance: list[Tensor] = []  # of each step since the last draw
        self.starts_with_gradient = False

    # ------------------------------------------------------------------ moving

    def start(self) -> None:
        """Put every chain where it starts."""
        plan = self.plan
        start = starting_points(
            self.potential.center, plan.chains, plan.superchains, plan.spread, plan.seed
        )
        self.state = plan.sampler.init(start, self.rng)

    def freeze(self) -> None:
        """Stop whatever adapts."""
        self.state = self.plan.sampler.freeze(self.state)

    def advance(self, steps: int) -> None:
        """Move every chain by so many steps."""
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

    def finite(self) -> np.ndarray:
        """``(C,)``: whether the weights are finite."""
        found: np.ndarray = torch.isfinite(self.state["position"]).all(dim=1).cpu().numpy()
        return found

    def hold(self, chain: int) -> None:
        """Put a failed chain back to the checkpoint."""
        self.state["position"][chain] = self.potential.center

    # ------------------------------------------------------------------ observing

    def observe(self) -> dict[str, np.ndarray]:
        """Values ``(C, N)`` of what is recorded, by their names in a store."""
        position = self.state["position"]
        out: dict[str, np.ndarray] = {}
        for group, observer in self.observers.items():
            if group == "train" and self._losses_come_with_gradient(position):
                losses = self.batching.potential.evaluate(position)[1]
                out["train/loss"] = losses.float().cpu().numpy()
            else:
                out.update(observer(self.functions, position))
        return out

    def observe_checkpoint(self) -> dict[str, np.ndarray]:
        """The same ``(1, N)`` at the checkpoint."""
        functions, out = ChainFunctions(self.plan.posterior.task, False), {}
        for observer in self.observers.values():
            out.update(observer(functions, self.potential.center[None]))
        return out

    def _losses_come_with_gradient(self, position: Tensor) -> bool:
        """Whether the full-batch gradient at ``position`` is known, or the next step's first."""
        known = self.starts_with_gradient or self.batching.potential.evaluated(position)
        return self.observers["train"].whole and known

    def statistics(self, loss: np.ndarray | None) -> dict[str, np.ndarray]:
        """``lp``, ``distance`` and ``acceptance_rate``, each ``(C,)``."""
        position = self.state["position"]
        unknown = np.full(self.plan.chains, np.nan)
        lp, acceptance = unknown, unknown.copy()
        if loss is not None:
            value = self.potential.value_of_loss(position, torch.from_numpy(loss).to(position))
            lp = -value.double().cpu().numpy()
        if self.acceptance:
            acceptance = torch.stack(self.acceptance).mean(0).double().cpu().numpy()
        distance = (position - self.potential.center).norm(dim=1).double().cpu().numpy()
        return {"lp": lp, "distance": distance, "acceptance_rate": acceptance}

    def checks(self, alive: list[int]) -> dict[str, Any]:
        """Heat of the gradient noise, and how much of the perturbations rounding takes."""
        task, position = self.plan.posterior.task, self.state["position"]
        excess = excess_temperature(self.plan.sampler, self.batching, self.state, alive)
        return {
            "excess_temperature": excess,
            "swallowed_perturbations": swallowed(task, position[alive]),
        }

    # ------------------------------------------------------------------ commit and resume

    def saved(self) -> dict[str, Any]:
        """What a commit must hold."""
        return {
            "state": self.state,
            "rng": self.rng.get_state(),
            "anchors": self.batching.state(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a commit."""
        device = self.potential.center.device
        self.step = int(saved["step"])
        self.state = {name: value.to(device) for name, value in saved["state"].items()}
        self.rng.set_state(saved["rng"])
        self.batching.restore({k: v.to(device) for k, v in saved["anchors"].items()})
