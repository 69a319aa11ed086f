"""Whether a network in half precision sees the perturbations that it is sampled with."""

from __future__ import annotations

import warnings

from torch import Tensor

from bayesinf._task import Task

__all__ = ["PrecisionWarning", "swallowed", "warn_of_rounding"]


class PrecisionWarning(UserWarning):
    """Rounding in the forward pass swallows most perturbations of the weights."""


def swallowed(task: Task, position: Tensor) -> float | None:
    """Share of the weights of ``position (C, d)`` that round to the checkpoint's own value.

    None where the network computes in the precision of the positions: nothing is rounded there.
    """
    if task.module_dtype == task.dtype:
        return None
    center = task.flatten(task.params).to(task.module_dtype)
    return float((position.to(task.module_dtype) == center).double().mean())


def warn_of_rounding(share: float | None, task: Task, stacklevel: int) -> None:
    """Warn where most perturbations are swallowed."""
    if share is not None and share > 0.5:
        warnings.warn(
            f"{share:.0%} of the perturbed weights round to the checkpoint's own value in "
            f"{str(task.module_dtype).removeprefix('torch.')}, in which the network computes: its "
            f"losses hardly see what is sampled. Usual cause: a posterior narrower than the "
            f"rounding step of the weights. Use a float32 model (model.float()), or a wider "
            f"posterior: smaller n_beta and gamma.",
            PrecisionWarning,
            stacklevel=stacklevel + 1,
        )
