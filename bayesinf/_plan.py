"""What decides a draw: the checked settings of a run, and their identity."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesinf._axes import Axis
from bayesinf._batching import Batches, normalise
from bayesinf._posterior import LocalPosterior
from bayesinf._task import Measurement
from bayesinf._tokens import counted_tokens
from bayesinf.samplers import Sampler
from bayesinf.samplers._preconditioner import push, summary

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """What decides a draw: the identity of a run."""

    posterior: LocalPosterior
    sampler: Sampler
    warmup: int
    chains: int
    thin: int
    batches: Batches | None
    seed: int
    superchains: int
    jitter: float
    observed: dict[str, np.ndarray]
    measurements: dict[str, dict[str, Measurement]]
    tokens: str | None = None
    token_axes: dict[str, Axis] = field(default_factory=dict)
    token_masks: dict[str, list[np.ndarray]] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        posterior: LocalPosterior,
        sampler: Sampler,
        draws: int,
        warmup: int,
        chains: int,
        thin: int,
        batch_size: int | Batches | None,
        seed: int,
        superchains: int | None,
        jitter: float,
        observe: Mapping[str, Sequence[Any] | None] | None,
        measurements: Sequence[str] | Mapping[str, Measurement],
        tokens: str | None = None,
    ) -> Plan:
        least = (
            ("draws", draws, 1),
            ("warmup", warmup, 0),
            ("chains", chains, 1),
            ("thin", thin, 1),
        )
        for name, value, low in least:
            if value < low:
                raise ValueError(f"{name} must be at least {low}; got {value}.")
        groups = superchains or (4 if chains % 4 == 0 else chains)
        if chains % groups:
            raise ValueError(f"chains={chains} must be a multiple of superchains={groups}.")
        preconditioner = getattr(sampler, "preconditioner", None)
        if preconditioner is not None:
            preconditioner.require_task(posterior.task)
        if jitter > 0 and posterior.prior_precision == 0 and preconditioner is None:
            raise ValueError(
                "starting points are spread by the prior's width 1/√(γ + nβ·wd), which is infinite "
                "here: give the posterior gamma > 0, or start all chains at w0 with jitter=0."
            )
        named: dict[str, Measurement] = (
            dict(measurements)
            if isinstance(measurements, Mapping)
            else {name: name for name in measurements}
        )
        task = posterior.task
        observed = {}
        for group in ("train", "query"):
            ids = (observe or {}).get(group)
            examples = task.examples(group)
            observed[group] = np.arange(len(examples)) if ids is None else examples.positions(ids)
            if not len(observed[group]):
                raise ValueError(f"observe[{group!r}] is empty; None means all examples.")
        unknown = set(observe or {}) - {"train", "query"}
        if unknown:
            raise ValueError(f"observe= knows 'train' and 'query'; got {sorted(unknown)}.")
        batches = normalise(batch_size, posterior)
        if batches is not None and sampler.full_batch:
            raise ValueError(
                f"{type(sampler).__name__} takes no minibatches; got batch_size={batches.size}. A "
                f"decision or a draw made from a part of the examples has another law than the "
                f"posterior. Leave batch_size out, or use a kernel such as SGLD or Underdamped."
            )
        wanted: dict[str, dict[str, Measurement]]
        wanted = {"train": {"loss": "loss"}, "query": {"loss": "loss", **named}}
        axes, masks = _tokens(tokens, posterior, observed, wanted["query"])
        return cls(
            posterior, sampler, warmup, chains, thin, batches, seed, groups, float(jitter),
            observed, wanted, tokens, axes, masks,
        )  # fmt: skip

    def spread(self, noise: Tensor) -> Tensor:
        """Standard normal rows as offsets of starting points from the checkpoint."""
        preconditioner = getattr(self.sampler, "preconditioner", None)
        if not self.jitter:
            return torch.zeros_like(noise)
        if preconditioner is not None:
            return self.jitter * push(preconditioner, noise)
        return self.jitter / self.posterior.prior_precision**0.5 * noise

    def ids(self, group: str) -> np.ndarray:
        return self.posterior.task.examples(group).ids[self.observed[group]]

    def axis(self, group: str) -> Axis:
        """What is recorded of a group's losses: of examples, or of their tokens."""
        return self.token_axes.get(group) or Axis(group, self.ids(group))

    def chunks(self, group: str, limit: int) -> Sequence[Tensor | slice]:
        """Positions of the observed examples, up to ``limit`` at a time.

        All chunks have one size where a size above ``limit/8`` divides both groups: the computation
        is then recorded once for both. Slices, which need no copy, where all are observed in order.
        """
        where = self.observed[group]
        common = math.gcd(*map(len, self.observed.values()))
        size = next((s for s in range(limit, limit // 8, -1) if common % s == 0), limit)
        if np.array_equal(where, np.arange(len(self.posterior.task.examples(group)))):
            return [slice(i, i + size) for i in range(0, len(where), size)]
        return torch.from_numpy(where).split(size)

    def config(self) -> dict[str, Any]:
        """Everything that decides a draw, JSON-able."""
        config = {
            "task": self.posterior.task.fingerprint(),
            "posterior": self.posterior.config(),
            "sampler": _kernel(self.sampler),
            "warmup": self.warmup,
            "chains": self.chains,
            "thin": self.thin,
            "batch_size": None if self.batches is None else self.batches.config(),
            "seed": self.seed,
            "superchains": self.superchains,
            "jitter": self.jitter,
            "observed": {g: _digest(self.ids(g)) for g in self.observed},
            "measurements": {
                g: {k: v if isinstance(v, str) else _function_name(v) for k, v in m.items()}
                for g, m in self.measurements.items()
            },
        }
        if self.tokens is not None:
            config["tokens"] = self.tokens
        plain: dict[str, Any] = json.loads(json.dumps(config, default=lambda number: number.item()))
        return plain


def _tokens(
    tokens: str | None,
    posterior: LocalPosterior,
    observed: Mapping[str, np.ndarray],
    of_queries: Mapping[str, Measurement],
) -> tuple[dict[str, Axis], dict[str, list[np.ndarray]]]:
    """Axes and masks of the groups whose losses are recorded token by token."""
    if tokens not in (None, "train", "query", "both"):
        raise ValueError(f"tokens must be None, 'train', 'query' or 'both'; got {tokens!r}.")
    if tokens in ("query", "both") and of_queries["loss"] != "loss":
        raise ValueError(
            f"tokens={tokens!r} records the likelihood's losses of query tokens under the name "
            f"'loss', which measurements= gives to a function. Call it otherwise."
        )
    found = {
        group: counted_tokens(posterior.task, group, observed[group])
        for group in ("train", "query")
        if tokens in (group, "both")
    }
    return {g: axis for g, (axis, _) in found.items()}, {
        g: masks for g, (_, masks) in found.items()
    }


def _kernel(sampler: Sampler) -> dict[str, Any]:
    """Name and settings of a kernel; a setting with many numbers gives a digest of them."""
    settings = {f.name: getattr(sampler, f.name) for f in fields(sampler)}  # type: ignore[arg-type]
    return {"kernel": type(sampler).__name__, **{k: _setting(v) for k, v in settings.items()}}


def _setting(value: Any) -> Any:
    if hasattr(value, "config"):
        return value.config()
    return summary(value) if hasattr(value, "tensors") else value


def _digest(ids: np.ndarray) -> str:
    digest = hashlib.sha256("\x1f".join(map(str, ids.tolist())).encode()).hexdigest()[:16]
    return f"{len(ids)} examples, {digest}"


def _function_name(function: Any) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
