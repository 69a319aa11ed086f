"""EK-FAC scores of a GPT-NeoX by nothing but torch: the oracle of the parity program's rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rows = dict[str, tuple[Tensor, Tensor]]


def _rows(network: nn.Module, ids: Tensor) -> Rows:
    """Inputs with a 1 last ``(B, T, M + 1)`` and output derivatives ``(B, T, P)`` by layer."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:

            def keep(_: nn.Module, args: tuple[Tensor], out: Tensor, name: str = name) -> None:
                seen[name] = (args[0].detach(), out)

            handles.append(module.register_forward_hook(keep))
    logits = network(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    slopes = torch.autograd.grad(loss, [out for _, out in seen.values()])
    return {
        name: (F.pad(a, (0, 1), value=1.0), ds)
        for (name, (a, _)), ds in zip(seen.items(), slopes, strict=True)
    }


def reference_scores(folder: Path, *, whole: bool) -> np.ndarray:
    """``+∇φ_qᵀ (C + λI)⁻¹ ds_t a_tᵀ`` ``(query, train, position)`` in float64.

    ``whole``: inputs of the last position count in the covariance, which is all that it changes.
    """
    import transformers

    network = transformers.GPTNeoXForCausalLM.from_pretrained(folder / "lm").double()
    with np.load(folder / "lm_ids.npz") as saved:
        train, query = (_rows(network, torch.as_tensor(saved[k])) for k in ("train", "query"))
    total = torch.zeros(1, dtype=torch.float64)
    for name, (a, ds) in train.items():
        counted = (a if whole else a[:, :-1]).flatten(0, 1)
        q_a = torch.linalg.eigh(counted.T @ counted)[1]
        q_s = torch.linalg.eigh(ds.flatten(0, 1).T @ ds.flatten(0, 1))[1]
        rotated = torch.einsum("btp,btm->bpm", ds @ q_s, a @ q_a)
        values = rotated.square().mean(0)
        wanted = torch.einsum("btp,btm->bpm", query[name][1] @ q_s, query[name][0] @ q_a)
        wanted = q_s @ (wanted / (values + 0.1 * values.mean())) @ q_a.T
        total = total + torch.einsum("qpm,btp,btm->qbt", wanted, ds, a)
    scores: np.ndarray = total.numpy()
    return scores


def write_folder(folder: Path, train: int, query: int, length: int) -> None:
    """A working folder with a tiny random GPT-NeoX and token ids."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoXConfig(
        vocab_size=13, hidden_size=8, num_attention_heads=2, num_hidden_layers=2,
        intermediate_size=12, max_position_embeddings=16, initializer_range=0.5,
    )  # fmt: skip
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder / "lm")
    ids = np.random.default_rng(0).integers(13, size=(train + query, length))
    np.savez(folder / "lm_ids.npz", train=ids[:train], query=ids[train:])
