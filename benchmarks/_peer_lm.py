r"""The language-model task as other libraries' programs leave it in a folder; their conventions.

A folder holds ``lm/`` (a GPT-NeoX checkpoint of 4 layers and width 128), ``lm_ids.npz`` (token ids
``train (N, T)`` and ``query (Q, T)``, all of the same length), and for each program run a
``NAME.npy`` ``[query, train]`` and a ``NAME_token_scores.npy`` ``[query, train, position]``.

**What the two have in common** (read in kronfluence 1.0.1 and bergson 2.5.1, and held to by the
parity program): the loss of a sequence is the sum over its ``T − 1`` predicted tokens; the layers
are the attention and MLP linears of every block, weight and bias as one matrix ``(P, M + 1)``;
factors are summed in float32 and decomposed in float64, so that the means or sums of which they are
taken do not matter to EK-FAC, which keeps only eigenvectors; ``Λ`` is the **mean over sequences**
of squared rotated gradients; the damping of a layer is 0.1 times the mean of its ``Λ``, the bias
column included; scores are ``+∇φ_qᵀ (C + λI)⁻¹ ∇ℓ_t``, without ``1/n``. Per-token scores stand at
the **input** position ``t`` whose terms ``ds_t a_tᵀ`` of the layers' gradients they sum, not at the
token that is predicted there; they add up to the sequence's score.

**Where they differ.** The logits of the last position predict nothing, so that its ``ds`` is 0
(attention is causal) and it has no part in a gradient. kronfluence counts its activations in ``A``
all the same (65,536 positions of 1,024 sequences), bergson leaves them out (64,512). That turns the
eigenvectors of ``A``: the two libraries' scores differ from each other by 1.8e-3, and each from an
independent float64 computation with its own convention by 2e-6. A network that is not given the
last token computes the same losses and gradients, so the task comes in two forms, ``whole`` for
kronfluence and not for bergson.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from bayesinf import Categorical, Task
from bayesinf._likelihoods import CausalLM
from benchmarks._peer_programs import MissingPeerError

__all__ = ["PARAMETERS", "load_lm_task", "token_grid"]

PARAMETERS = r"(network\.)?gpt_neox\.layers\.\d+\.(attention|mlp)\.\w+\.(weight|bias)"
"""Weights and biases of the layers that the peers' programs track."""


class _NextToken(nn.Module):
    """A language model as a classifier of positions: logits ``(B, V, T − 1)``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next token, the vocabulary before the positions."""
        logits: Tensor = self.network(input_ids=ids).logits
        return logits.transpose(1, 2)


def load_lm_task(
    folder: Path,
    *,
    whole: bool = True,
    n_train: int | None = None,
    n_query: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Task:
    """Read network and token ids from the folder.

    Parameters
    ----------
    folder
        Where ``lm/`` and ``lm_ids.npz`` are.
    whole
        Give the network whole sequences. False: all but the last token, which nothing is predicted
        from; see the module.
    n_train, n_query
        Take only the first sequences, as the peers' programs do; default: all.
    dtype
        To convert the weights to.

    Returns
    -------
    Task
        Train and query sequences by position, with the peers' loss and parameters.

    Raises
    ------
    FileNotFoundError
        If a file is not there.
    MissingPeerError
        If transformers is not installed.
    """
    for path in (folder / "lm", folder / "lm_ids.npz"):
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist. The peers' lm_train.py writes it; the programs here run "
                f"it where --peers-python and --peers-programs say how."
            )
    network = _read_network(folder / "lm", dtype)
    with np.load(folder / "lm_ids.npz") as saved:
        train, query = (
            torch.as_tensor(saved[name][:count].astype(np.int64))
            for name, count in (("train", n_train), ("query", n_query))
        )
    if not whole:
        return Task(
            _NextToken(network),
            Categorical(),
            train=(train[:, :-1], train[:, 1:]),
            query=(query[:, :-1], query[:, 1:]),
            parameters=PARAMETERS,
        )
    return Task(
        network,
        CausalLM(),
        train={"input_ids": train, "labels": train},
        query={"input_ids": query, "labels": query},
        parameters=PARAMETERS,
    )


def _read_network(path: Path, dtype: torch.dtype) -> nn.Module:
    """Read the network with the peers' attention: eager, whose softmax is always in float32."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise MissingPeerError("not run: transformers is not installed here") from error
    transformers.utils.logging.disable_progress_bar()
    network: nn.Module = transformers.GPTNeoXForCausalLM.from_pretrained(
        path, attn_implementation="eager" if dtype == torch.float32 else "sdpa"
    )
    return network.to(dtype)


def token_grid(scores: xr.Dataset, length: int) -> np.ndarray:
    """Token scores in the peers' layout and orientation.

    Parameters
    ----------
    scores
        ``influence(query, train_token)`` with coordinates ``train`` (ids ``0 … n − 1``) and
        ``train_position``.
    length
        Positions of a sequence, ``T``.

    Returns
    -------
    np.ndarray
        ``(query, n, T)``: ``−n · influence``, and 0 at positions that have no score.
    """
    influence = scores["influence"].transpose("query", "train_token").values
    train, position = scores["train"].values, scores["train_position"].values
    n = int(train.max()) + 1
    grid = np.zeros((len(influence), n, length), dtype=influence.dtype)
    grid[:, train, position] = -n * influence
    return grid
