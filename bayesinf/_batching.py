r"""Which examples a gradient is computed from, and how it stays unbiased.

A batch ``B`` of a chain estimates the gradient of the mean loss by

    (1/|B|) Σ_{i∈B} weight_i [∇ℓ_i(w) − ∇ℓ_i(a)] + ∇L(a)

with weights that make up for how often an example is drawn, and an anchor ``a`` near which the
noise vanishes (without one both terms in ``a`` are absent).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from bayesinf._posterior import Anchor, LocalPosterior, Potential
from bayesinf._rng import BatchStream
from bayesinf._task import Task

__all__ = ["Batches", "Batching"]

AnchorKind = Literal["none", "checkpoint", "moving"]

_GRADIENT_NUMBERS = 2**24
"""Numbers in one block of per-example gradients."""


@dataclass(frozen=True, eq=False)
class Batches:
    r"""Minibatches for :func:`bayesinf.sample`; ``batch_size=100`` is short for ``Batches(100)``.

    Uniform batches without replacement by default; or with probabilities, or stratified. Every
    kind estimates the gradient of the mean loss without bias.

    Parameters
    ----------
    size
        Examples of a batch.
    probabilities
        How often an example is drawn, in proportion: ``"loss"`` or ``"gradient"`` (its loss, or the
        norm of its gradient, at the checkpoint), or a number for each. Weights are ``1/(n p_i)``.
        Best are numbers in proportion to what an example's gradient varies by: the norm at the
        checkpoint comes close on trained classifiers, whose hard examples make most of the noise.
    floor
        Share of the uniform law in ``p``, in (0, 1]: no weight exceeds ``1/floor``.
    strata
        Groups that every batch takes examples of in proportion to their size, at least one:
        ``"label"`` (integer targets), ``"loss"`` (quantiles of the loss at the checkpoint), or a
        label for each example. Weights make up for the rounding of the shares.
    quantiles
        Number of groups of ``strata="loss"``.
    anchor
        ``"none"``; ``"checkpoint"``; or ``"moving"``: each chain's own position, taken anew every
        ``every`` steps at the price of one gradient over all examples. None takes the checkpoint
        for the tilted potential, whose noise it makes vanish there, and no anchor for the plain
        one.
    every
        Steps between new anchors, where they move.

    Raises
    ------
    ValueError
        If a setting is out of range, or two exclude each other.

    References
    ----------
    Moving anchors: Dubey et al. 2016 (SVRG Langevin dynamics, algorithm 2); importance sampling:
    Zhao and Zhang 2015 (arXiv 1401.2753), eq. 9.
    """

    size: int
    probabilities: Literal["loss", "gradient"] | Sequence[float] | np.ndarray | Tensor | None = None
    floor: float = 0.1
    strata: Literal["label", "loss"] | Sequence[Any] | np.ndarray | Tensor | None = None
    quantiles: int = 8
    anchor: AnchorKind | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        if self.probabilities is not None and self.strata is not None:
            raise ValueError("batches are drawn by probabilities or by strata; got both.")
        for name, choices in (("probabilities", ("loss", "gradient")), ("strata", _STRATA)):
            value = getattr(self, name)
            if isinstance(value, str) and value not in choices:
                raise ValueError(
                    f"{name} must be one of {choices} or one value per training example; got "
                    f"{value!r}."
                )
        if not 0 < self.floor <= 1:
            raise ValueError(f"floor must lie in (0, 1]; got {self.floor}.")
        if self.quantiles < 2:
            raise ValueError(f"quantiles must be at least 2; got {self.quantiles}.")
        if self.anchor not in (None, *get_args(AnchorKind)):
            raise ValueError(
                f"anchor must be one of {get_args(AnchorKind)} or None; got {self.anchor!r}."
            )
        fits = (self.anchor == "moving") == (self.every is not None)
        if not fits or (self.every is not None and self.every < 1):
            raise ValueError(
                f"a moving anchor needs every=, the steps between new anchors, at least 1, and "
                f"no other takes it; got anchor={self.anchor!r}, every={self.every}. An anchor "
                f"costs n/size gradients of a batch: every=2n/size steps add half to the price."
            )

    def config(self) -> int | dict[str, Any]:
        """What identifies them; the size alone where nothing else was chosen."""
        chosen: dict[str, Any] = {}
        if self.probabilities is not None:
            chosen = {"probabilities": _named(self.probabilities), "floor": float(self.floor)}
        if self.strata is not None:
            chosen["strata"] = _named(self.strata)
            if isinstance(self.strata, str) and self.strata == "loss":
                chosen["quantiles"] = int(self.quantiles)
        if self.anchor is not None:
            chosen["anchor"] = self.anchor
        if self.every is not None:
            chosen["every"] = int(self.every)
        return {"size": int(self.size), **chosen} if chosen else int(self.size)


_STRATA = ("label", "loss")


def normalise(batches: int | Batches | None, posterior: LocalPosterior) -> Batches | None:
    """Return the one way to say it: None for the full batch, None for the default anchor."""
    given = batches if isinstance(batches, Batches) or batches is None else Batches(int(batches))
    if given is None or given.config() == posterior.task.n:
        return None
    BatchStream(0, 1, posterior.task.n, given.size)  # is the size possible?
    if given.anchor == ("checkpoint" if posterior.potential == "tilted" else "none"):
        return replace(given, anchor=None)
    return given


class Batching:
    """The batches of a run and what they estimate; owns the moving anchors.

    Parameters
    ----------
    batches
        As :func:`normalise` returns them.
    potential
        The potential whose gradient is estimated.
    seed, chains
        Of the run.

    Attributes
    ----------
    potential : Potential
        With the weights and the anchor of the present step.
    stream : BatchStream
        Positions of every step's batches.
    """

    def __init__(
        self, batches: Batches | None, potential: Potential, seed: int, chains: int
    ) -> None:
        n = potential.posterior.task.n
        self.potential, self.every = potential, None
        if batches is None:
            self.stream = BatchStream(seed, chains, n, None)
            return
        strata = probabilities = weights = None
        if batches.strata is not None:
            strata, weights = _stratify(batches, potential)
        elif batches.probabilities is not None:
            probabilities = _probabilities(batches, potential)
            weights = 1 / (n * probabilities)
        self.stream = BatchStream(seed, chains, n, batches.size, strata, probabilities)
        anchor = potential.anchor
        if batches.anchor is not None:
            anchor = None if batches.anchor == "none" else Anchor(potential.center)
        table = None if weights is None else torch.from_numpy(weights).to(potential.center)
        self.potential, self.every = potential.estimated(table, anchor), batches.every

    def at(self, step: int, position: Tensor) -> Tensor | None:
        """Batch of a step that starts at ``position``; takes new anchors when it is time."""
        if self.every is not None and step % self.every == 0:
            here = position.clone()
            anchor = Anchor(here, self.potential.evaluate(here)[0])
            self.potential = self.potential.estimated(self.potential.weights, anchor)
        return self.stream.at(step)

    def state(self) -> dict[str, Tensor]:
        """What a commit must hold: the moving anchors."""
        anchor = self.potential.anchor
        if self.every is None or anchor is None or anchor.gradient is None:
            return {}
        return {"position": anchor.position, "gradient": anchor.gradient}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on with the anchors of a commit."""
        if state:
            self.potential = self.potential.estimated(self.potential.weights, Anchor(**state))


# ---------------------------------------------------------------- who is drawn how often


def _probabilities(batches: Batches, potential: Potential) -> np.ndarray:
    """``(1 − floor) q + floor/n``, float64."""
    n = potential.posterior.task.n
    if isinstance(batches.probabilities, str):
        by_loss = batches.probabilities == "loss"
        raw = (_losses if by_loss else _gradient_norms)(potential)
        raw = raw.clip(min=0)  # a log density may be positive: such an example is an easy one
    else:
        raw = _values(batches.probabilities, n, "probabilities").astype(np.float64)
    if not (np.isfinite(raw).all() and (raw >= 0).all() and raw.sum() > 0):
        raise ValueError(
            f"probabilities must be finite, none negative and not all 0; got values from "
            f"{raw.min():.4g} to {raw.max():.4g}."
        )
    mixed = (1 - batches.floor) * raw / raw.sum() + batches.floor / n
    return np.asarray(mixed / mixed.sum())


def _stratify(
    batches: Batches, potential: Potential
) -> tuple[list[tuple[np.ndarray, int]], np.ndarray]:
    """Members and share of each stratum, and the weights of the examples."""
    task = potential.posterior.task
    if isinstance(batches.strata, str):
        labels = (
            _labels(task) if batches.strata == "label" else _quantile(batches.quantiles, potential)
        )
    else:
        labels = _values(batches.strata, task.n, "strata")
    _, group = np.unique(labels, return_inverse=True)
    sizes = np.bincount(group)
    counts = _allocate(sizes, batches.size)
    weights = (sizes * batches.size / (task.n * counts))[group]
    members = [np.flatnonzero(group == h) for h in range(len(sizes))]
    return list(zip(members, counts.tolist(), strict=True)), weights


def _allocate(sizes: np.ndarray, total: int) -> np.ndarray:
    """Shares of ``total`` in proportion to ``sizes``, each at least 1 and at most the size."""
    if len(sizes) > total:
        raise ValueError(
            f"a batch of {total} cannot hold one example of each of {len(sizes)} strata. Raise the "
            f"batch size or merge strata."
        )
    exact = sizes * total / sizes.sum()
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    while counts.sum() > total:
        counts[np.argmax(np.where(counts > 1, counts - exact, -np.inf))] -= 1
    while counts.sum() < total:
        counts[np.argmax(np.where(counts < sizes, exact - counts, -np.inf))] += 1
    return counts


# ---------------------------------------------------------------- what the checkpoint says


def _losses(potential: Potential) -> np.ndarray:
    """Losses at the checkpoint, ``(n,)``."""
    losses = potential.evaluate(potential.center[None])[1][0]
    return losses.double().cpu().numpy()


def _gradient_norms(potential: Potential) -> np.ndarray:
    """Norms of the examples' gradients at the checkpoint: every example a chain of its own."""
    task, center = potential.posterior.task, potential.center
    index = torch.arange(task.n)[:, None].split(max(1, _GRADIENT_NUMBERS // task.dimension))
    norms = []
    for rows in index:
        here = center.expand(len(rows), -1)
        gradient = potential.functions.loss_grad(here, task.train.batch(rows), shared=False)[0]
        norms.append(gradient.norm(dim=1))
    return torch.cat(norms).double().cpu().numpy()


def _labels(task: Task) -> np.ndarray:
    parts = [target for _, (_, target) in task.train.batches(1000)]
    target = torch.cat(parts) if isinstance(parts[0], Tensor) else None
    if target is None or target.ndim != 1 or target.is_floating_point():
        got = type(parts[0]).__name__ if target is None else f"{target.dtype} {tuple(target.shape)}"
        raise ValueError(
            f"strata='label' needs one integer target per example; got {got}. Use strata='loss', "
            f"or give a label for each training example."
        )
    return target.cpu().numpy()


def _quantile(count: int, potential: Potential) -> np.ndarray:
    order = np.argsort(_losses(potential), kind="stable")
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank * count // len(order)


def _values(given: Any, n: int, name: str) -> np.ndarray:
    array = np.asarray(given.cpu() if isinstance(given, Tensor) else given)
    if array.shape != (n,):
        raise ValueError(
            f"{name} must have one value for each of the {n} training examples; got shape "
            f"{array.shape}."
        )
    return array


def _named(given: Any) -> str:
    """A name as it is, values as a digest."""
    if isinstance(given, str):
        return given
    array = np.asarray(given.cpu() if isinstance(given, Tensor) else given)
    digest = hashlib.sha256("\x1f".join(map(str, array.tolist())).encode()).hexdigest()[:16]
    return f"{array.shape} values, {digest}"
