r"""Structural components of transformers, as entries of parameters to restrict a posterior to.

Rows and columns of heads, with ``H`` heads of width ``k``, ``G`` groups of keys and values:

* GPT-2: ``c_attn`` is stored ``(inputs, 3Hk)``, first all queries, then all keys, then all values;
  ``c_proj`` ``(Hk, outputs)``.
* GPT-NeoX: ``query_key_value (3Hk, inputs)``, each head's queries, keys and values side by side;
  ``dense (outputs, Hk)``.
* Llama, Mistral and Qwen2: ``q_proj (Hk, inputs)``, ``k_proj`` and ``v_proj (Gk, inputs)``,
  ``o_proj (outputs, Hk)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

__all__ = ["Component", "ComponentKind", "block_paths", "components"]

Component = dict[str, Tensor | None]
"""Parameters by name, whole (None) or in part (a mask); what ``task.restrict`` takes."""

ComponentKind = Literal[
    "layers", "attention", "heads", "kv_groups", "mlps", "embedding", "unembedding", "adapters"
]


@dataclass(frozen=True)
class _Layout:
    """Where a kind of network keeps its parts."""

    blocks: str
    attention: str
    embeddings: tuple[str, ...]
    unembedding: str
    projections: tuple[str, ...]  # queries, keys, values; or all in one
    output: str
    order: Literal["split", "by part", "by head"]
    transposed: bool = False  # weights are (inputs, outputs)


_LLAMA = _Layout(
    "model.layers", "self_attn", ("model.embed_tokens",), "lm_head",
    ("q_proj", "k_proj", "v_proj"), "o_proj", "split",
)  # fmt: skip
_LAYOUTS = {
    "gpt2": _Layout(
        "transformer.h", "attn", ("transformer.wte", "transformer.wpe"), "lm_head",
        ("c_attn",), "c_proj", "by part", transposed=True,
    ),
    "gpt_neox": _Layout(
        "gpt_neox.layers", "attention", ("gpt_neox.embed_in",), "embed_out",
        ("query_key_value",), "dense", "by head",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}  # fmt: skip


def components(model: nn.Module, *kinds: ComponentKind) -> dict[str, Component]:
    """Parts of a transformer, each as the parameters, or entries of them, that make it up.

    Parameters
    ----------
    model
        A causal language model of transformers (GPT-2, GPT-NeoX and Pythia, Llama, Mistral, Qwen2),
        or a module that holds one: of PEFT, or what a task was made of.
    *kinds
        ``"layers"``: all of a block (``"l0"``). ``"attention"``, ``"mlps"``: all of that part of
        it (``"l0.attention"``, ``"l0.mlp"``). ``"heads"``: a head's queries, keys and values and
        what it writes (``"l0.h1"``); with grouped keys and values its queries and what it writes
        alone, and ``"kv_groups"``, the keys and values (``"l0.g0"``). ``"embedding"`` (of tokens
        and positions), ``"unembedding"``: the same parameters where they are tied. ``"adapters"``:
        a block's LoRA parameters (``"l0.adapters"``), which no other kind holds.

    Returns
    -------
    dict[str, dict[str, Tensor | None]]
        By name, in the order of the blocks; each value is what ``task.restrict`` and
        ``Task(parameters=…)`` take.

    Raises
    ------
    ValueError
        If the architecture or a kind is unknown, or the network has no such part.

    Examples
    --------
    >>> tasks = {name: task.restrict(part)
    ...          for name, part in components(model, "heads", "mlps").items()}  # doctest: +SKIP
    """
    if not kinds or not set(kinds) <= set(get_args(ComponentKind)):
        raise ValueError(
            f"kinds must be among {get_args(ComponentKind)}; got {kinds}. For example "
            f"components(model, 'heads', 'mlps')."
        )
    network = _Network(model)
    found: dict[str, Component] = {}
    for kind in kinds:
        part = network.embeddings(kind) if "embedding" in kind else network.by_block(kind)
        if not part:
            raise ValueError(f"{type(model).__name__} has no {kind}.{_HINTS.get(kind, '')}")
        found.update(part)
    return found


def block_paths(model: nn.Module) -> list[str]:
    """Where a transformer's blocks are, in their order; errors of :func:`components`."""
    return _Network(model).blocks


_HINTS = {
    "kv_groups": " Each head has keys and values of its own, a part of 'heads'.",
    "adapters": " They are parameters with 'lora_' in their name; give the PEFT model itself.",
}


class _Network:
    """A network's parameters by where they are."""

    def __init__(self, model: nn.Module) -> None:
        configs: list[Any] = [m.config for m in model.modules() if hasattr(m, "config")]
        known = [c for c in configs if getattr(c, "model_type", None) in _LAYOUTS]
        if not known:
            kinds = sorted({str(getattr(c, "model_type", type(c).__name__)) for c in configs})
            raise ValueError(
                f"components are known of {sorted(_LAYOUTS)}; this {type(model).__name__} is "
                f"{' or '.join(kinds) or 'no model of transformers'}. Name parameters yourself: "
                f"task.restrict({{name or pattern: None or mask}})."
            )
        self.config: Any = known[0]
        self.layout = _LAYOUTS[self.config.model_type]
        self.shapes = {n: p.shape for n, p in model.named_parameters(remove_duplicate=False)}
        paths = [name for name, _ in model.named_modules()]
        ends = [p for p in paths if f".{p}".endswith(f".{self.layout.blocks}")]
        if not ends:
            raise ValueError(
                f"{type(model).__name__} has no {self.layout.blocks!r}. Give the model with its "
                f"head, an AutoModelForCausalLM, or a module that holds it."
            )
        self.prefix = ends[0].removesuffix(self.layout.blocks)
        self.blocks = [f"{ends[0]}.{i}" for i in range(len(model.get_submodule(ends[0])))]  # type: ignore[arg-type]

    def by_block(self, kind: ComponentKind) -> dict[str, Component]:
        """Components of one kind, block by block."""
        found: dict[str, Component] = {}
        for i, block in enumerate(self.blocks):
            if kind in ("heads", "kv_groups"):
                split = self._heads(block) if kind == "heads" else self._groups(block)
                found.update({f"l{i}.{name}": part for name, part in split.items()})
                continue
            name, path = {
                "layers": (f"l{i}", block),
                "adapters": (f"l{i}.adapters", block),
                "attention": (f"l{i}.attention", f"{block}.{self.layout.attention}"),
                "mlps": (f"l{i}.mlp", f"{block}.mlp"),
            }[kind]
            whole = self._whole(path, kind == "adapters")
            if whole:
                found[name] = whole
        return found

    def embeddings(self, kind: ComponentKind) -> dict[str, Component]:
        """The embedding or the unembedding."""
        sites = self.layout.embeddings if kind == "embedding" else (self.layout.unembedding,)
        parts = [self._whole(self.prefix + site, False) for site in sites]
        merged = {name: mask for part in parts for name, mask in part.items()}
        return {kind: merged} if merged else {}

    def _whole(self, path: str, adapters: bool) -> Component:
        inside = [name for name in self.shapes if name.startswith(f"{path}.")]
        return {name: None for name in inside if ("lora_" in name) == adapters}

    # ------------------------------------------------------------------ heads

    @property
    def _counts(self) -> tuple[int, int, int]:
        """Heads, groups of keys and values, and the width of a head."""
        c = self.config
        heads = c.num_attention_heads
        groups = getattr(c, "num_key_value_heads", None) or heads
        return heads, groups, getattr(c, "head_dim", None) or c.hidden_size // heads

    def _heads(self, block: str) -> dict[str, Component]:
        heads, groups, width = self._counts
        found = {}
        for h in range(heads):
            own = self._slices(h * width, width, heads * width, own_keys=groups == heads)
            part: Component = {}
            for site, rows in own.items():
                part.update(self._masks(block, site, rows, outputs=True))
            columns = [slice(h * width, (h + 1) * width)]
            part.update(self._masks(block, self.layout.output, columns, outputs=False))
            found[f"h{h}"] = part
        return found

    def _slices(self, start: int, width: int, total: int, own_keys: bool) -> dict[str, list[slice]]:
        """Outputs of each projection that make a head's queries (keys and values)."""
        sites = self.layout.projections
        own = slice(start, start + width)
        if self.layout.order == "by part":
            return {sites[0]: [slice(k * total + start, k * total + own.stop) for k in range(3)]}
        if self.layout.order == "by head":
            return {sites[0]: [slice(3 * start, 3 * own.stop)]}
        return {site: [own] for site in (sites if own_keys else sites[:1])}

    def _groups(self, block: str) -> dict[str, Component]:
        heads, groups, width = self._counts
        if groups == heads:
            return {}
        found = {}
        for g in range(groups):
            rows = [slice(g * width, (g + 1) * width)]
            keys, values = (
                self._masks(block, s, rows, outputs=True) for s in self.layout.projections[1:]
            )
            found[f"g{g}"] = {**keys, **values}
        return found

    def _masks(self, block: str, site: str, where: list[slice], *, outputs: bool) -> Component:
        """Masks of some outputs of a linear layer (weight and bias), or of some of its inputs."""
        path = f"{block}.{self.layout.attention}.{site}"
        path = f"{path}.base_layer" if f"{path}.base_layer.weight" in self.shapes else path
        names = [f"{path}.weight", f"{path}.bias"] if outputs else [f"{path}.weight"]
        found: Component = {}
        for name in names:
            if name not in self.shapes:
                continue
            mask = torch.zeros(self.shapes[name], dtype=torch.bool)
            along_columns = mask.ndim == 2 and outputs == self.layout.transposed
            rows = mask.T if along_columns else mask
            for own in where:
                rows[own] = True
            found[name] = mask
        return found
