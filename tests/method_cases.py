"""What is expected of every registered method, as data: one without a row here fails a test."""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bayesinf as bi
import bayesinf._attribute
import bayesinf.attribution
from bayesinf.attribution._registry import METHODS, Method
from bayesinf.training import CheckpointRecorder, Checkpoints, open_checkpoints
from tests import exact
from tests.layered_cases import LAYERED_BY_NAME

CASES = (
    "linear-gaussian-2",
    "softmax-regression",
    "logistic",
    "mlp-categorical",
    "cnn",
    "called-twice",
    "tied",
    "decoder-left",
)
"""Small networks: without layers between, with convolutions, shared weights, padded text."""

DAMPING = 5.0
"""On these networks, which are not trained: more than minus any eigenvalue of their Hessians."""

RIDGE = 0.2
"""Weight decay, and damping, of the regression."""

Reference = Callable[[bi.Task], np.ndarray]


@dataclass(frozen=True)
class Expected:
    """What must hold of a method.

    Attributes
    ----------
    options
        With which it is as exact as it can be, of a task and λ.
    reference
        Scores on the ridge regression at its optimum; None: values mean nothing.
    tolerance
        Distance from them, relative, in Frobenius norm.
    removal
        Least correlation of ``−influence`` with the exact effects of removals there; None: it says
        nothing of losses.
    own
        Whether it is tested that examples help themselves.
    run
        Whether it takes the checkpoints of a recorded run.
    cases
        Where it is tried; others would take long, or need what the grid has not.
    rounding
        What the order of examples, batch sizes and shared modules may change.
    """

    options: Callable[[bi.Task, float], dict[str, Any]] = lambda task, damping: {}
    reference: Reference | None = None
    tolerance: float = 1e-9
    removal: float | None = None
    own: bool = True
    run: bool = False
    cases: tuple[str, ...] = CASES
    rounding: float = 1e-9


# ---------------------------------------------------------------- references on the regression


def gauss_newton(task: bi.Task) -> np.ndarray:
    return exact.influence(task, exact.gauss_newton(task), RIDGE)


def empirical(task: bi.Task) -> np.ndarray:
    return exact.influence(task, exact.empirical_fisher(task), RIDGE)


def mean_of_inverses(task: bi.Task) -> np.ndarray:
    g, eye = exact.gradients(task), torch.eye(task.dimension, dtype=torch.float64)
    inverse = torch.stack([torch.linalg.inv(torch.outer(x, x) + RIDGE * eye) for x in g]).mean(0)
    return (-exact.gradients(task, "query") @ inverse @ g.T / task.n).numpy()


# ---------------------------------------------------------------- the rows


def given(**options: Any) -> Callable[[bi.Task, float], dict[str, Any]]:
    return lambda task, damping: dict(options)


def damped(**options: Any) -> Callable[[bi.Task, float], dict[str, Any]]:
    return lambda task, damping: {"damping": damping, **options}


def ranked(**options: Any) -> Callable[[bi.Task, float], dict[str, Any]]:
    """With as many directions as the regression has parameters."""
    return lambda task, damping: {"damping": damping, "rank": min(task.dimension, 12), **options}


_FISHER = damped(fisher="enumerated")
_TIGHT = {"tolerance": 1e-10, "iterations": 2000}

EXPECTED: dict[str, Expected] = {
    "hessian": Expected(damped(), gauss_newton, removal=0.99),
    "gauss_newton": Expected(damped(), gauss_newton, removal=0.99),
    "ekfac": Expected(_FISHER, gauss_newton, removal=0.99),
    "kfac": Expected(_FISHER, gauss_newton, removal=0.99),
    "deflated_ekfac": Expected(
        damped(fisher="enumerated", deflate=2), gauss_newton, removal=0.99, rounding=1e-6
    ),
    "conjugate_gradient": Expected(
        damped(fisher="enumerated", **_TIGHT), gauss_newton, 1e-8, removal=0.99, rounding=1e-7
    ),
    "astra": Expected(
        damped(fisher="enumerated", deflate=0, **_TIGHT),
        gauss_newton,
        1e-8,
        removal=0.99,
        rounding=1e-7,
    ),
    "lissa": Expected(damped(**_TIGHT), gauss_newton, 1e-8, removal=0.99, rounding=1e-7),
    "arnoldi": Expected(ranked(), gauss_newton, 1e-7, removal=0.99, rounding=1e-6),
    "nystrom": Expected(ranked(), gauss_newton, 1e-7, removal=0.99, rounding=1e-6),
    "logra": Expected(_FISHER, gauss_newton, removal=0.99, rounding=1e-7),
    "mfac": Expected(damped(), empirical, 1e-8, removal=0.9),
    "datainf": Expected(damped(), mean_of_inverses, removal=0.95),
    "source": Expected(given(fisher="enumerated"), gauss_newton, 1e-3, removal=0.99, run=True),
    "bif": Expected(  # 100 effective draws: errors of correlations are about 0.1
        damped(n_beta=1e4, error=0.1, chains=4),
        gauss_newton,
        0.4,
        removal=0.9,
        own=False,  # it takes long, and the signs of removals are tested
        cases=("softmax-regression",),
        rounding=1e-5,
    ),
    "tracin": Expected(removal=0.95, run=True),
    "trak": Expected(damped(dimension=16)),
    "grad_dot": Expected(removal=0.95),
    "grad_cos": Expected(removal=0.5),
    "representation_similarity": Expected(),
    "knn_shapley": Expected(given(k=3)),
    "same_class_random": Expected(),
    "random_scores": Expected(own=False),
    "train_loss": Expected(),
    "bm25": Expected(),
    "tf_idf": Expected(),
}


@cache
def methods() -> dict[str, Method]:
    """Every registered method, also of modules that the package does not import."""
    for module in pkgutil.iter_modules(bayesinf.attribution.__path__):
        importlib.import_module(f"bayesinf.attribution.{module.name}")
    return dict(sorted(METHODS.items()))


# ---------------------------------------------------------------- tasks


def data(batch: Any) -> Any:
    """A batch as a task takes it."""
    inputs, target = batch
    if isinstance(inputs, dict):
        return {**inputs, "labels": target}
    return (*inputs, target) if isinstance(inputs, tuple) else (inputs, target)


def rebuilt(task: bi.Task, module: nn.Module | None = None, **places: Tensor) -> bi.Task:
    """The task with another network, or some of its examples in another order."""
    sets: dict[str, Any] = {}
    for split in ("train", "query"):
        examples = task.examples(split)
        pick = places.get(split, torch.arange(len(examples)))
        sets[split] = data(examples.batch(pick))
        sets[f"{split}_ids"] = examples.ids[pick.numpy()]
    return bi.Task(module or task.module, task.likelihood, parameters=list(task.params), **sets)


def labelled(name: str) -> bi.Task:
    """A case of the grid whose examples have names."""
    case = LAYERED_BY_NAME[name]
    return case.task(
        train_ids=[f"t{i}" for i in range(case.n)], query_ids=[f"q{i}" for i in range(case.queries)]
    )


def recorded(
    task: bi.Task, folder: Path, steps: int = 12, rate: float = 0.05, decay: float = 0.0
) -> tuple[bi.Task, Checkpoints]:
    """Gradient descent from the task's network, and the task at its end."""
    module = copy.deepcopy(task.module).requires_grad_(True)
    optimizer = torch.optim.SGD(module.parameters(), rate, weight_decay=decay)
    recorder = CheckpointRecorder(folder, module, optimizer, every=steps // 6)
    for _ in range(steps):
        optimizer.zero_grad()
        task.losses(dict(module.named_parameters()), task.train.batch()).mean().backward()
        optimizer.step()
        recorder.step(task.train.ids)
    recorder.close()
    return rebuilt(task, module), open_checkpoints(folder)


def regression(folder: Path) -> tuple[bi.Task, Checkpoints]:
    """Ridge regression at its optimum, reached by gradient descent."""
    g = torch.Generator().manual_seed(5)
    x, z = (torch.randn(k, 3, generator=g, dtype=torch.float64) for k in (40, 6))
    slope = torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)
    y, t = (a @ slope + 0.7 * torch.randn(len(a), 1, generator=g).double() for a in (x, z))
    start = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(start.weight)
    task = bi.Task(start, bi.Gaussian(), train=(x, y), query=(z, t))
    return recorded(task, folder, steps=300, rate=0.3, decay=RIDGE)


def removals(task: bi.Task) -> np.ndarray:
    """Change ``(query, train)`` of the regression's query losses by refitting without an example.

    The mean loss keeps its 1/n: the example's weight goes from 1 to 0.
    """
    (x, y), (z, t) = (task.examples(split).batch() for split in ("train", "query"))
    eye = task.n * RIDGE * torch.eye(x.shape[1], dtype=x.dtype)

    def losses(keep: Tensor) -> Tensor:
        weight = torch.linalg.solve(x[keep].T @ x[keep] + eye, x[keep].T @ y[keep])
        return 0.5 * (z @ weight - t).square().squeeze(1)

    every = torch.arange(task.n)
    whole = losses(every)
    return torch.stack([losses(every[every != i]) - whole for i in range(task.n)], dim=1).numpy()
