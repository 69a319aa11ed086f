"""The sign of a score, and whether self-influences agree with it.

Training more on an example lowers its own loss, whatever the method: to first order the
self-influence is ``−(1/n) ∇ℓᵀ (C + λI)⁻¹ ∇ℓ ≤ 0``, or ``−(nβ/n) Var(ℓ) ≤ 0``.
"""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np

__all__ = ["HELP", "Sign", "SignWarning", "check_self", "shared_diagonal"]

Sign = Literal["helpful", "harmful", "lowers", "raises"]
"""What a positive score says of a training example: that it helps the query or harms it, or, for
any measurement φ, that up-weighting it lowers or raises φ."""

HELP = {"loss": -1, "margin": 1}
"""The direction in which a helpful example moves φ."""

_OPPOSITE = {"helpful": "harmful", "harmful": "helpful", "lowers": "raises", "raises": "lowers"}


class SignWarning(UserWarning):
    """Self-influence contradicts the sign that scores were said to have."""


def shared_diagonal(influence: np.ndarray, query: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Self-influences of examples that are on both sides.

    Numbers are often positions, which coincide for different examples: they count as the same
    examples only where the sets are the same. Names do wherever they are shared.
    """
    shared, rows, columns = np.intersect1d(
        query.astype(str), train.astype(str), return_indices=True
    )
    named = query.dtype.kind != "i" and train.dtype.kind != "i"
    if not named and not len(shared) == len(query) == len(train):
        return np.empty(0)
    return influence[rows, columns]


def check_self(own: np.ndarray, measurement: str, sign: Sign, where: str) -> None:
    """Warn where more than half of the self-influences say that an example harms itself.

    The warning points to the caller of the public function whose conversion this is part of.
    """
    moving = own[own != 0]
    if measurement not in HELP or not len(moving):
        return
    wrong = int((np.sign(moving) != HELP[measurement]).sum())
    if 2 * wrong <= len(moving):
        return
    harm = "raise its own loss" if measurement == "loss" else f"lower its own {measurement}"
    warnings.warn(
        f"{wrong} of {len(moving)} self-influences {where} have the wrong sign: up-weighting an "
        f"example would {harm}. Usual cause: scores of the opposite sign convention, read with "
        f"sign={sign!r}. If so, read them with sign={_OPPOSITE[sign]!r}. If queries are other "
        f"examples that happen to have the same ids, give them ids of their own.",
        SignWarning,
        stacklevel=4,
    )
