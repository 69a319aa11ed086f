r"""How hard each training example is: scores without a query, as used to prune and to find errors.

All return a Dataset with ``value (train)``; **high = hard, suspicious**. With several checkpoints
(seeds early in training, as GraNd and EL2N were meant, or steps of one run) a value is the mean
over them, except for :func:`vog`, which is a variance over them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from bayesinf._checkpoint import Checkpoint
from bayesinf._data import Batch
from bayesinf._scores import text_labels, versions
from bayesinf._task import Task
from bayesinf.attribution._grad_dot import grad_dot
from bayesinf.curvature._accounting import Costs

__all__ = ["el2n", "example_loss", "grand", "vog"]

BATCH = 256


def example_loss(task: Task, checkpoints: Sequence[Checkpoint] | None = None) -> xr.Dataset:
    """Losses ``ℓ_i`` of the training examples: the baseline of every search for wrong labels.

    Parameters
    ----------
    task
        Network, likelihood and training examples.
    checkpoints
        To average over; the task's own by default.

    Returns
    -------
    xr.Dataset
        ``value (train)``, high = hard; attributes ``method``, ``seconds``, ``forward_examples``,
        ``backward_examples``.

    Raises
    ------
    ValueError
        If a loss is not finite, or checkpoints are empty or of another network.
    """

    def measure(at: Task, costs: Costs) -> np.ndarray:
        costs.forward_examples += at.n
        with torch.no_grad():
            return _by_batch(at, lambda batch: at.losses(at.params, batch))

    return _mean(task, checkpoints, "loss", measure)


def el2n(task: Task, checkpoints: Sequence[Checkpoint] | None = None) -> xr.Dataset:
    r"""EL2N, the norm of the error: ``‖∇_f ℓ_i‖₂`` in the network's outputs ``f``.

    For :class:`~bayesinf.Categorical` it is ``‖softmax(f) − onehot(y)‖₂``, for
    :class:`~bayesinf.Gaussian` the length of the residual.

    Parameters
    ----------
    task, checkpoints
        As of :func:`example_loss`. Paul et al. average ten networks after 10 to 20 epochs.

    Returns
    -------
    xr.Dataset
        As of :func:`example_loss`.

    Raises
    ------
    ValueError
        As of :func:`example_loss`.

    References
    ----------
    Paul, Ganguli & Dziugaite 2021, "Deep learning on a data diet" (arXiv 2107.07075), Def. 2.2.
    """

    def measure(at: Task, costs: Costs) -> np.ndarray:
        costs.forward_examples += at.n

        def norms(batch: Batch) -> Tensor:
            with torch.no_grad():
                outputs = at.outputs(at.params, batch)
            outputs.requires_grad_()
            with torch.enable_grad():
                loss = at.likelihood.loss(outputs, batch[1]).sum()
            (error,) = torch.autograd.grad(loss, outputs)
            return error.flatten(1).norm(dim=1) if error.ndim > 1 else error.abs()

        return _by_batch(at, norms)

    return _mean(task, checkpoints, "el2n", measure)


def grand(task: Task, checkpoints: Sequence[Checkpoint] | None = None) -> xr.Dataset:
    r"""GraNd, the norm of the gradient: ``‖∇_w ℓ_i‖₂`` over the task's parameters.

    For a linear softmax model it is EL2N times ``‖x‖``.

    Parameters
    ----------
    task, checkpoints
        As of :func:`el2n`.

    Returns
    -------
    xr.Dataset
        As of :func:`example_loss`.

    Raises
    ------
    ValueError
        As of :func:`example_loss`, and if a gradient is not finite.

    References
    ----------
    Paul, Ganguli & Dziugaite 2021, "Deep learning on a data diet" (arXiv 2107.07075), Def. 2.1.
    """

    def measure(at: Task, costs: Costs) -> np.ndarray:
        products = grad_dot(at, pairs="self")
        costs.forward_examples += int(products.attrs["forward_examples"])
        costs.backward_examples += int(products.attrs["backward_examples"])
        return np.sqrt(-products["influence"].values)

    return _mean(task, checkpoints, "grand", measure)


def vog(task: Task, checkpoints: Sequence[Checkpoint]) -> xr.Dataset:
    r"""VoG, the variance over checkpoints of the gradient of the label's output in the input.

    With ``s_{kp} = ∂f_y(x; w_k)/∂x_p`` for input entry (pixel) ``p``, the value is the mean over
    ``p`` of ``(1/K) Σ_k (s_{kp} − s̄_p)²``, then standardised among the examples of the same label:
    less their mean, over their standard deviation.

    Parameters
    ----------
    task
        A classifier: inputs one floating-point tensor, outputs ``(B, C)``, integer targets
        ``(B,)``.
    checkpoints
        Steps of one training run, at least two.

    Returns
    -------
    xr.Dataset
        ``value (train)``, high = hard; as of :func:`example_loss`.

    Raises
    ------
    ValueError
        If there are fewer than two checkpoints, the task is no such classifier, or a label has too
        few or equal examples to standardise.

    References
    ----------
    Agarwal, D'souza & Hooker 2022, "Estimating example difficulty using variance of gradients"
    (arXiv 2008.11600), Eqs. 1–3. Their factor ``√K`` changes no rank.
    """
    if len(checkpoints) < 2:
        raise ValueError(
            f"VoG is a variance over checkpoints and needs at least two; got {len(checkpoints)}. "
            f"Keep state dicts while training: vog(task, checkpoints=[early, …, late])."
        )
    costs = Costs()
    with costs.stage("gradients"):
        variance = np.zeros(task.n)
        labels = np.zeros(task.n, dtype=np.int64)
        tasks = [task.at(checkpoint) for checkpoint in checkpoints]
        for where, batch in task.train.batches(BATCH):
            gradients = torch.stack([_input_gradients(at, batch) for at in tasks])
            spread = gradients.double().var(dim=0, correction=0)
            variance[where] = spread.flatten(1).mean(1).cpu().numpy()
            labels[where] = batch[1].cpu().numpy()
        costs.forward_examples += task.n * len(tasks)
        costs.backward_examples += task.n * len(tasks)
    values = _standardised(variance, labels)
    return _labelled(task, values, "vog", len(checkpoints), costs)


def _input_gradients(task: Task, batch: Batch) -> Tensor:
    """``∂f_y/∂x``, in the shape of the inputs."""
    inputs, target = batch
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(
            f"VoG differentiates in the inputs, which must be one floating-point tensor; got "
            f"{kind}. Token ids have no gradient: use grand() or el2n()."
        )
    inputs = inputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        outputs = task.outputs(task.params, (inputs, target))
        if outputs.ndim != 2 or target.ndim != 1 or target.is_floating_point():
            raise ValueError(
                f"VoG needs a classifier with outputs (B, C) and integer targets (B,); got outputs "
                f"{tuple(outputs.shape)} and a {target.dtype} target {tuple(target.shape)}. Use "
                f"grand() or el2n()."
            )
        label = outputs.gather(1, target.unsqueeze(1)).sum()
    return torch.autograd.grad(label, inputs)[0]


def _standardised(variance: np.ndarray, labels: np.ndarray) -> np.ndarray:
    values = np.empty_like(variance)
    for label in np.unique(labels):
        own = variance[labels == label]
        if own.std() == 0:
            raise ValueError(
                f"the {len(own)} training examples of label {label} have equal variances of their "
                f"gradients, so that VoG cannot be standardised among them. Usual causes: a label "
                f"with one example, or equal checkpoints."
            )
        values[labels == label] = (own - own.mean()) / own.std()
    return values


# ---------------------------------------------------------------------------- what all share


def _by_batch(task: Task, measure: Callable[[Batch], Tensor]) -> np.ndarray:
    parts = [measure(batch).detach().cpu().numpy() for _, batch in task.train.batches(BATCH)]
    return np.concatenate(parts).astype(np.float64)


def _mean(
    task: Task,
    checkpoints: Sequence[Checkpoint] | None,
    method: str,
    measure: Callable[[Task, Costs], np.ndarray],
) -> xr.Dataset:
    """Average a measure ``(n,)`` over checkpoints."""
    if checkpoints is not None and not len(checkpoints):
        raise ValueError(
            "checkpoints= holds none. Leave it out to score at the task's own checkpoint."
        )
    costs = Costs()
    with costs.stage("values"):
        tasks = [task] if checkpoints is None else (task.at(one) for one in checkpoints)
        rows = [measure(at, costs) for at in tasks]
    return _labelled(task, np.mean(rows, axis=0), method, len(rows), costs)


def _labelled(
    task: Task, values: np.ndarray, method: str, checkpoints: int, costs: Costs
) -> xr.Dataset:
    bad = ~np.isfinite(values)
    if bad.any():
        raise ValueError(
            f"{method} is not finite for {int(bad.sum())} of {task.n} training examples, first "
            f"{task.train.ids[bad][0]!r}. Usual cause: inf or NaN in an example."
        )
    account = costs.attrs()
    return xr.Dataset(
        {"value": ("train", values)},
        coords={"train": text_labels(task.train.ids)},
        attrs={
            "method": method,
            "high": "hard or suspicious",
            "checkpoints": checkpoints,
            "checkpoint": task.fingerprint()["checkpoint"],
            "n": task.n,
            **account,
            "seconds": json.dumps(account["seconds"]),
            **versions(),
        },
    )
