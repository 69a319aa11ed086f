"""The proximal Bregman response function: what damped Gauss–Newton influence approximates."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from tqdm import tqdm

from bayesinf._scores import label_scores, text_labels
from bayesinf._task import Measurement, Task, measurement_name
from bayesinf.evaluation._descent import minimise
from bayesinf.evaluation._proximal import MOST_ROWS, Neighbourhood, Objective, fit_metric
from bayesinf.evaluation._responses import require_settings, warn_unconverged

__all__ = ["pbrf"]

_SIGNS = (1.0, -1.0)
_LINEAR = 1e-12  # below this part of the largest influence, a nonlinearity is rounding


def pbrf(
    task: Task,
    *,
    damping: float,
    train_ids: Sequence[Any] | np.ndarray | None = None,
    epsilon: float | None = None,
    measurement: Measurement = "loss",
    check_linearity: bool = True,
    examples: int | None = None,
    seed: int = 0,
    tolerance: float = 1e-4,
    max_iterations: int = 200,
    rank: int = 200,
    progress: bool = False,
) -> xr.Dataset:
    r"""Influence measured on the proximal Bregman response function, by minimising it.

    For a training example ``m``, starting from the checkpoint ``ws``,

        w(ε) = argmin_w (1/n) Σ_i D(h(w, x_i), h(ws, x_i)) + ε ℓ_m(w) + (λ/2)‖w − ws‖²
        influence[q, m] = (1/n) [φ_q(w(ε)) − φ_q(w(−ε))] / (2ε)

    ``D`` is the Bregman divergence of the loss in the outputs, so that ``ws`` is the minimum at
    ``ε = 0`` whatever the state of training, and the limit ``ε → 0`` is exactly
    :func:`bayesinf.gauss_newton` at the same damping. At a finite ``ε`` it is the nonlinear
    response that influence functions linearise: the truth to judge approximate *solvers* by, while
    retraining judges the *question*.

    The minimisation is deterministic, full-batch and in float64, for all examples and signs at
    once. It ends where the norm of the gradient is ``tolerance·‖ε∇ℓ_m(ws)‖``; at a minimum on a
    kink (ReLU networks), where the objective has ceased to fall, to the same relative error of the
    response. The even terms in ``ε`` cancel in the difference.

    Parameters
    ----------
    task
        Network, likelihood, training and query examples. All queries are measured.
    damping
        ``λ`` = γ/(nβ) + weight decay, in units of the mean loss. 0 only where the Gauss–Newton
        matrix is not singular.
    train_ids
        Training examples whose influence is measured; all by default.
    epsilon
        ``ε``, in units of the mean loss. Default ``1/n``: between leaving the example out and
        counting it twice.
    measurement
        φ of the queries: ``"loss"``, ``"margin"``, or ``f(task, params, batch) -> (B,)``.
    check_linearity
        Also compute the responses to ``±ε/2`` and report how the influence changes.
    examples
        Average the divergence over this many random training examples, the same ones for all
        ``m`` and both signs (common random numbers); all ``n`` by default.
    seed
        Of those examples, and of the random directions of the preconditioner.
    tolerance, max_iterations
        When a minimisation ends.
    rank
        Products with the Gauss–Newton matrix that the preconditioner is made from. Memory is
        ``3·rank·d`` numbers; the result depends on it only within the tolerance.
    progress
        Show a progress bar.

    Returns
    -------
    xr.Dataset
        Scores ``influence(query, train)``, negative = helpful. By ``train``: ``residual``, the
        norm of the gradient reached relative to ``‖ε∇ℓ_m‖``, or that relative error (the worse of
        the signs);
        ``converged``; ``iterations``; and ``nonlinearity``,
        ``‖influence(ε) − influence(ε/2)‖ / ‖influence(ε)‖`` over the queries: about ¾ of the
        relative distance to the limit ``ε → 0`` where that is smooth. Attributes: damping,
        epsilon, tolerance, the largest residual and nonlinearity, seconds by stage,
        forward_examples and backward_examples (``passes`` is their number per training example in
        use), checkpoint.

    Raises
    ------
    ValueError
        If an argument is out of range, ids are none or repeat, or a gradient or measurement is not
        finite.
    KeyError
        If a training id is unknown.
    NotImplementedError
        If the likelihood lacks ``bregman`` or the measurement.

    Warns
    -----
    ConvergenceWarning
        If responses have not reached the tolerance; it names their examples.

    References
    ----------
    Bae, Ng, Lo, Ghassemi & Grosse 2022, "If influence functions are the answer, then what is the
    question?" (arXiv 2209.05364), §4.
    """
    require_settings(damping, tolerance, max_iterations, rank)
    epsilon = _require_epsilon(epsilon, task.n)
    chosen = _chosen(task, train_ids)
    began = time.perf_counter()
    near, places, divergence = _neighbourhood(task, chosen, examples, seed)
    generator = torch.Generator().manual_seed(seed)
    metric = fit_metric(near, divergence, rank=rank, generator=generator)
    seconds = {"preconditioner": time.perf_counter() - began}
    began = time.perf_counter()
    steps = [epsilon * s for s in _SIGNS] + [0.5 * epsilon * s for s in _SIGNS] * check_linearity
    size, found = max(1, MOST_ROWS // len(steps)), []
    with tqdm(total=len(chosen), disable=not progress) as bar:
        for k in range(0, len(chosen), size):
            part = slice(k, k + size)
            objective, scale = _objectives(near, divergence, damping, places[part], steps)
            ends = minimise(
                near, objective, metric, scale, tolerance=tolerance, max_iterations=max_iterations
            )
            values = near.measure(measurement, ends.position)
            found.append((values, ends.residual, ends.iterations))
            bar.update(len(places[part]))
    values, residual, iterations = (
        torch.cat(x).unflatten(0, (-1, len(steps))).cpu().numpy() for x in zip(*found, strict=True)
    )  # (M, steps, Q) and twice (M, steps)
    seconds["responses"] = time.perf_counter() - began
    ids = task.train.ids[chosen]
    _require_finite(values, ids)
    influence = (values[:, 0] - values[:, 1]) / (2 * epsilon * task.n)
    by_train = {
        "residual": residual.max(axis=1),
        "converged": residual.max(axis=1) <= tolerance,
        "iterations": iterations.max(axis=1),
    }
    if check_linearity:
        half = (values[:, 2] - values[:, 3]) / (epsilon * task.n)
        by_train["nonlinearity"] = _relative_change(influence, half)
    warn_unconverged(ids, by_train["residual"], tolerance, max_iterations)
    attrs: dict[str, Any] = {
        "checkpoint": task.fingerprint()["checkpoint"],
        "n": task.n,
        "parameters": task.dimension,
        "measurement": measurement_name(measurement),
        "damping": float(damping),
        "epsilon": epsilon,
        "tolerance": tolerance,
        "residual": float(residual.max()),
        "examples": len(divergence.nonzero()),
        "rank": len(metric.values),
        "seed": seed,
        "seconds": {name: round(spent, 6) for name, spent in seconds.items()},
        "forward_examples": near.forward_examples,
        "backward_examples": near.backward_examples,
        "passes": near.backward_examples / len(near.positions),
    }
    if check_linearity:
        attrs["nonlinearity"] = float(by_train["nonlinearity"].max())
    return label_scores(
        {
            "influence": (("query", "train"), np.ascontiguousarray(influence.T)),
            **{name: (("train",), array) for name, array in by_train.items()},
        },
        {"query": text_labels(task.query.ids), "train": text_labels(ids)},
        "pbrf",
        "influence",
        attrs,
    )


# ---------------------------------------------------------------------------- the responses


def _neighbourhood(
    task: Task, chosen: np.ndarray, examples: int | None, seed: int
) -> tuple[Neighbourhood, torch.Tensor, torch.Tensor]:
    """Examples in use, places of the chosen ones among them, weights of their divergences."""
    count = task.n if examples is None else examples
    if not isinstance(count, int) or not 1 <= count <= task.n:
        raise ValueError(
            f"examples must lie between 1 and the {task.n} training examples, or be None for all "
            f"of them; got {examples!r}."
        )
    sample = np.random.default_rng(seed).permutation(task.n)[:count]
    positions = np.union1d(sample, chosen)
    divergence = torch.from_numpy(np.isin(positions, sample) / count).to(task.device)
    places = torch.from_numpy(np.searchsorted(positions, chosen))
    return Neighbourhood(task, torch.from_numpy(positions)), places, divergence


def _objectives(
    near: Neighbourhood,
    divergence: torch.Tensor,
    damping: float,
    places: torch.Tensor,
    steps: list[float],
) -> tuple[Objective, torch.Tensor]:
    """Objectives of some examples, all steps of one together, and ``‖ε∇ℓ_m‖`` of each."""
    unit = divergence.new_zeros(len(places), len(divergence))
    unit[torch.arange(len(places)), places] = 1.0
    size = near.loss_gradients(unit).norm(dim=1)
    step = divergence.new_tensor(steps)
    losses = (unit[:, None, :] * step[None, :, None]).flatten(0, 1)
    zero = losses.new_zeros(len(losses))
    scale = (size[:, None] * step.abs()).flatten()
    return Objective(losses, divergence, zero + damping, zero), scale


def _relative_change(full: np.ndarray, half: np.ndarray) -> np.ndarray:
    """``‖full − half‖ / ‖full‖`` of each row; 0 where there is no influence but rounding."""
    change = np.linalg.norm(full - half, axis=1)
    size = np.linalg.norm(full, axis=1)
    real = size > _LINEAR * max(size.max(), np.finfo(float).tiny)
    return np.where(real, change / np.where(real, size, 1.0), 0.0)


def _require_epsilon(epsilon: Any, n: int) -> float:
    if epsilon is None:
        return 1.0 / n
    number = isinstance(epsilon, (int, float)) and not isinstance(epsilon, bool)
    if not number or not math.isfinite(epsilon) or epsilon <= 0:
        raise ValueError(
            f"epsilon must be a positive number, or None for 1/n = {1 / n:g}; got {epsilon!r}. It "
            f"is the weight that the example's loss gains or loses, in units of the mean loss; "
            f"both signs are used."
        )
    return float(epsilon)


def _chosen(task: Task, train_ids: Sequence[Any] | np.ndarray | None) -> np.ndarray:
    if train_ids is None:
        return np.arange(task.n)
    positions = task.train.positions(train_ids)
    if not len(positions) or len(np.unique(positions)) < len(positions):
        raise ValueError(
            f"train_ids must name at least one training example, each once; got "
            f"{np.asarray(train_ids).tolist()[:8]}."
        )
    return positions


def _require_finite(values: np.ndarray, ids: np.ndarray) -> None:
    bad = ~np.isfinite(values).all(axis=(1, 2))
    if bad.any():
        raise ValueError(
            f"the measurement is not finite after the response to training example "
            f"{ids[bad].tolist()[0]!r} ({int(bad.sum())} examples in all). Usual causes: an "
            f"epsilon so large that the response leaves the neighbourhood, or a measurement such "
            f"as a margin that overflows."
        )
