"""The digits task as other libraries' programs leave it in a folder, and what they measured there.

A folder holds ``digits.pt`` and ``digits_nobias.pt`` (weights and data), ``lds_truth.npz``
(retrainings), and a ``NAME.npy`` of scores and a ``NAME.json`` of stage times for each program run.
Their scores are ``[query, train]`` with **positive** = up-weighting lowers the query's loss and
without the ``1/n``: ``influence = −scores/n``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from bayesinf import Categorical, Task
from bayesinf._scores import make_scores

__all__ = ["bank_from_truth", "load_task", "relative_difference", "to_influence", "to_peer"]


class _Network(nn.Module):
    """Three linear layers with ReLU between, under the names of the saved weights."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (
            _linear(weights[f"{name}.weight"], f"{name}.bias" in weights)
            for name in ("fc1", "fc2", "fc3")
        )
        self.load_state_dict(weights)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of flat images."""
        logits: Tensor = self.fc3(self.fc2(self.fc1(x).relu()).relu())
        return logits


def _linear(weight: Tensor, bias: bool) -> nn.Linear:
    outputs, inputs = weight.shape
    return nn.Linear(inputs, outputs, bias=bias)


def load_task(folder: Path, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> Task:
    """Read weights and data from the folder.

    Parameters
    ----------
    folder
        Where ``digits.pt`` (or ``digits_nobias.pt``) is.
    bias
        Which of the two.
    dtype
        To convert weights and inputs to.

    Returns
    -------
    Task
        Train and query examples by position.

    Raises
    ------
    FileNotFoundError
        If the file is not there.
    """
    path = folder / ("digits.pt" if bias else "digits_nobias.pt")
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist. The peers' digits_train.py writes it; the programs here run "
            f"it where --peers-python and --peers-programs say how."
        )
    saved = torch.load(path, weights_only=True)
    train_x, train_y, query_x, query_y = saved["data"]
    network = _Network(saved["state_dict"]).to(dtype)
    return Task(network, Categorical(), train=(train_x, train_y), query=(query_x, query_y))


def bank_from_truth(path: Path) -> xr.Dataset:
    """Read retrainings as a bank for :func:`bayesinf.evaluation.lds`.

    Parameters
    ----------
    path
        ``.npz`` with ``masks (M, n)`` and ``losses``, ``margins`` ``(M, R, Q)``.

    Returns
    -------
    xr.Dataset
        ``subset_mask (subset, train)``, ``loss`` and ``margin`` ``(subset, seed, query)``.
    """
    with np.load(path) as truth:
        masks, losses, margins = truth["masks"], truth["losses"], truth["margins"]
    subsets, seeds, queries = losses.shape
    dims = ("subset", "seed", "query")
    return xr.Dataset(
        {
            "subset_mask": (("subset", "train"), masks.astype(bool)),
            "loss": (dims, losses),
            "margin": (dims, margins),
        },
        coords={
            "subset": np.arange(subsets),
            "seed": np.arange(seeds),
            "query": np.arange(queries),
            "train": np.arange(masks.shape[1]),
        },
    )


def to_influence(scores: np.ndarray, name: str) -> xr.Dataset:
    """Turn a peer's ``[query, train]`` matrix into scores: ``influence = −scores/n``."""
    queries, n = scores.shape
    return make_scores(
        -scores.astype(np.float64) / n,
        query=np.arange(queries),
        train=np.arange(n),
        method=name,
        estimand="influence",
    )


def to_peer(scores: xr.Dataset) -> np.ndarray:
    """Invert :func:`to_influence`."""
    influence = scores["influence"].transpose("query", "train").values
    return -influence.shape[1] * influence


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    """``‖a − b‖_F / ‖b‖_F`` in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
