"""Checkpoints of language models from folders or the hub, with an adapter or without."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from bayesinf.interop.huggingface._model import LanguageModel

__all__ = ["from_pretrained"]


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    gguf_file: str | None = None,
    chunked_head: bool = False,
    **kwargs: Any,
) -> LanguageModel:
    """Load a causal language model, ready for a task.

    Weights are read from safetensors files, in one piece or sharded; nothing is unpickled and no
    code of the checkpoint is run.

    Parameters
    ----------
    path
        Folder with ``config.json`` and ``*.safetensors``, as ``save_pretrained`` writes it, or the
        name of a model on the hub.
    dtype
        Precision of the weights; by default that of the checkpoint. ``torch.float32`` for
        classical methods.
    attn_implementation
        ``"sdpa"`` or ``"eager"``; transformers chooses by default.
    adapter
        Folder or hub name of a PEFT checkpoint (LoRA, say) for this model. The adapter's parameters
        alone have ``requires_grad``, so that a task selects them and nothing else.
    gguf_file
        Name of a GGUF file in the folder, to read in place of safetensors.
    chunked_head
        As of :class:`LanguageModel`.
    **kwargs
        For ``AutoModelForCausalLM.from_pretrained``: ``revision``, ``device_map``, …

    Returns
    -------
    LanguageModel
        In eval mode.

    Raises
    ------
    ImportError
        If transformers, or peft for an adapter, is not installed.
    FileNotFoundError
        If a folder or what it must hold is missing.
    ValueError
        If the checkpoint lacks weights of the model, which would be left random.
    """
    transformers = _require("transformers", "models of Hugging Face need")
    where = _checked(path, gguf_file)
    options = {"dtype": dtype, "attn_implementation": attn_implementation, **kwargs}
    options = {key: value for key, value in options.items() if value is not None}
    if gguf_file is None:
        options["use_safetensors"] = True
    else:
        options["gguf_file"] = gguf_file
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            where, output_loading_info=True, **options
        )
    except OSError as error:
        raise FileNotFoundError(
            f"transformers finds no model {where!r} with safetensors weights: "
            f"{str(error).splitlines()[0]} Give a folder that save_pretrained wrote, or a hub name "
            f"where there is a network."
        ) from error
    missing = sorted(found["missing_keys"]) + sorted(map(str, found["mismatched_keys"]))
    if missing:
        raise ValueError(
            f"{where!r} lacks {len(missing)} weights of {type(model).__name__}, which would be "
            f"random: {missing[:4]}{' …' if len(missing) > 4 else ''}. Usual cause: a checkpoint "
            f"of a network without this head, or an interrupted save."
        )
    if adapter is not None:
        model = _adapted(model, adapter)
    return LanguageModel(model, chunked_head=chunked_head).eval()


def _adapted(model: Any, adapter: str | os.PathLike[str]) -> Any:
    """Put a PEFT checkpoint on a model, in the model's precision, itself alone trainable."""
    peft = _require("peft", "adapter= needs")
    where = os.fspath(adapter)
    if _is_path(adapter):
        folder = Path(where)
        _require_file(
            folder, "adapter_config.json", "adapter=", "what peft's save_pretrained wrote"
        )
        if not (folder / "adapter_model.safetensors").exists():
            raise FileNotFoundError(
                _PICKLED.format(folder=folder, file="adapter_model.safetensors")
            )
    with warnings.catch_warnings():  # peft asks transformers for an attribute that it deprecates
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return peft.PeftModel.from_pretrained(
            model, where, is_trainable=True, autocast_adapter_dtype=False
        )


def _checked(path: str | os.PathLike[str], gguf_file: str | None) -> str:
    """Refuse folders that lack what is needed; the name for transformers."""
    where = os.fspath(path)
    if not _is_path(path):
        return where
    folder = Path(where)
    if gguf_file is not None:
        _require_file(folder, gguf_file, "path", "the GGUF file")
        return where
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{folder} holds an adapter, not a model. Load the model that it adapts, with the "
            f"adapter beside it: from_pretrained(path_of_model, adapter={where!r})."
        )
    _require_file(folder, "config.json", "path", "what save_pretrained wrote of a model")
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(_PICKLED.format(folder=folder, file="*.safetensors"))
    return where


_PICKLED = (
    "{folder} holds no {file}, and nothing else is read: other formats can run code when they are "
    "loaded. Load the weights where you trust them and save them again with save_pretrained, "
    "which writes safetensors."
)


def _require_file(folder: Path, name: str, what: str, meaning: str) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{what}: there is no folder {folder}. Expected {meaning}.")
    if not (folder / name).exists():
        inside = sorted(entry.name for entry in folder.iterdir())[:8]
        raise FileNotFoundError(
            f"{what}: {folder} has no {name}; it holds {inside}. Expected {meaning}. Usual causes: "
            f"a folder above or below the right one, or a state dict saved by itself."
        )


def _is_path(path: str | os.PathLike[str]) -> bool:
    """Whether a name means a place on this machine; hub names have at most one slash."""
    text = os.fspath(path)
    looks = isinstance(path, os.PathLike) or text.startswith((".", "~", os.sep))
    return looks or text.count("/") > 1 or os.sep * 2 in text or Path(text).exists()


def _require(name: str, what: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(
            f"{what} {name}, which is not installed. Install it: pip install 'bayesinf[hf]'."
        ) from error
