"""Networks of transformers behind one call that padding, packing and ``vmap`` agree with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesinf._head import Head
from bayesinf.interop.huggingface._masks import additive, attends, within_window
from bayesinf.interop.huggingface._prefix import starting_from

__all__ = ["LanguageModel", "SequenceClassifier"]

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


class LanguageModel(nn.Module):
    """A causal language model of transformers, for tasks with :class:`~bayesinf.CausalLM`.

    Attention masks and position ids are made here, from the padding mask and the documents of a
    packed sequence, and handed to the network as they are. Padding on either side, more padding and
    packing change no token's logits beyond rounding, and what transformers does with a padding mask
    (branches on its values, which ``torch.func.vmap`` cannot follow) is never reached, so that
    chains are vectorised.

    Parameters
    ----------
    model
        Any ``AutoModelForCausalLM`` that takes a mask of four dimensions and position ids (GPT-2,
        GPT-NeoX, Llama, Qwen, Mistral, Gemma, …), or a PEFT model around one, with
        ``attn_implementation`` ``"sdpa"`` or ``"eager"``. It is held, not copied.
    chunked_head
        Whether losses are computed a block of tokens at a time from the last hidden states, so that
        the logits ``(B, T, V)`` never exist. Slower by one more product with the output embedding.

    Raises
    ------
    TypeError
        If the network cannot be called this way.
    ValueError
        If its outputs then differ from what it computes on its own, or, for a chunked head, its
        logits are not a linear map of its last hidden states.
    NotImplementedError
        For kinds of attention whose masks are not made here.

    Examples
    --------
    >>> import bayesinf as bi
    >>> from transformers import AutoModelForCausalLM
    >>> from bayesinf.interop.huggingface import LanguageModel
    >>> model = LanguageModel(AutoModelForCausalLM.from_pretrained(path))  # doctest: +SKIP
    >>> task = bi.Task(model, bi.CausalLM(), train=train, query=query)  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, *, chunked_head: bool = False) -> None:
        super().__init__()
        self.model = model
        self.chunked_head = chunked_head
        _require_masks(model)
        _require_same(self)
        if chunked_head:
            self._require_linear_head()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        prefix: Tensor | None = None,
        return_head: bool = False,
    ) -> Tensor | Head:
        """Logits ``(B, T, V)``, those at ``t − 1`` predicting token ``t``.

        Parameters
        ----------
        input_ids
            ``(B, T)``.
        attention_mask
            ``(B, T)``, 1 where a token is real; all by default.
        position_ids
            ``(B, T)``; by default counted from the first real token of each document.
        segment_ids
            ``(B, T)``, equal for the tokens of one document of a packed sequence. Tokens read only
            their own document.
        prefix
            ``(B, T, width)``: hidden states to go on from, of a task of :func:`reuse_prefix`.
        return_head
            Return what the logits are made of instead.
        """
        given = _arguments(
            self.model, input_ids, attention_mask, position_ids, segment_ids, causal=True
        )
        with starting_from(self.model, prefix):
            if not return_head:
                return self.model(**given).logits
            network = _network(self.model)
            head = network.get_output_embeddings()
            return Head(_hidden(network, given), head.weight, head.bias)

    def _require_linear_head(self) -> None:
        head = _network(self.model).get_output_embeddings()
        capped = getattr(_config(self.model), "final_logit_softcapping", None)
        linear = type(head) is nn.Linear and _hooks(head) == 0 and not capped
        if linear:
            ids = torch.arange(3, device=head.weight.device).unsqueeze(0) % head.out_features
            with torch.no_grad(), _eval(self):
                found = self(ids, return_head=True)
                assert isinstance(found, Head)
                linear = _close(found.all_logits(), self(ids))
        if not linear:
            raise ValueError(
                f"chunked_head=True needs logits that are a linear map of the last hidden states; "
                f"those of {type(_network(self.model)).__name__} are not. Usual causes: logits "
                f"that are scaled or capped, an adapter on the output embedding. Use "
                f"chunked_head=False."
            )


class SequenceClassifier(nn.Module):
    """A sequence classifier of transformers, for tasks with :class:`~bayesinf.Categorical`.

    Causal networks with a ``score`` head classify by the last real token, wherever padding stands
    (transformers looks for the last id that is not ``pad_token_id`` instead). Others (BERT and its
    kin) classify by the first position: pad them on the right.

    Parameters
    ----------
    model
        Any ``AutoModelForSequenceClassification``, or a PEFT model around one.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As :class:`LanguageModel`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.causal = isinstance(getattr(_network(model), "score", None), nn.Module)
        _require_masks(model)
        _require_same(self)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Logits ``(B, classes)``; arguments as of :class:`LanguageModel`."""
        given = _arguments(
            self.model, input_ids, attention_mask, position_ids, None, causal=self.causal
        )
        if token_type_ids is not None:
            given["token_type_ids"] = token_type_ids
        network = _network(self.model)
        with starting_from(self.model, prefix):
            if not self.causal:
                del given["use_cache"]
                if position_ids is None:  # some number positions by the padding id
                    del given["position_ids"]
                return self.model(**given).logits
            logits = network.score(_hidden(network, given))
        if attention_mask is None:
            return logits[:, -1]
        at = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (at * attention_mask.ne(0)).amax(1)
        return logits.gather(1, last[:, None, None].expand(-1, 1, logits.shape[2])).squeeze(1)


# ------------------------------------------------------------------ how a network is called


def _arguments(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    segment_ids: Tensor | None,
    *,
    causal: bool,
) -> dict[str, Any]:
    """What the network is called with: its masks by kind of layer, positions, no cache."""
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    seen = attends(real.ne(0), segment_ids, causal=causal)
    if position_ids is None:
        position_ids = seen.tril().sum(2) - 1
    dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
    config = _config(model)
    window = getattr(config, "sliding_window", None)
    narrow = additive(within_window(seen, window) if window else seen, dtype)
    mask: Any = narrow
    if "sliding_attention" in _kinds(config):
        mask = {"full_attention": additive(seen, dtype), "sliding_attention": narrow}
    elif _kinds(config):
        mask = additive(seen, dtype)
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "position_ids": position_ids,
        "use_cache": False,
    }


def _hidden(network: Any, given: dict[str, Any]) -> Tensor:
    return network.base_model(**given).last_hidden_state


def _network(model: Any) -> Any:
    """Return the model of transformers itself, inside whatever an adapter wraps around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _config(model: Any) -> Any:
    config = _network(model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _kinds(config: Any) -> set[str]:
    return set(getattr(config, "layer_types", None) or ())


# ------------------------------------------------------------------ checks


def _require_masks(model: nn.Module) -> None:
    name = type(_network(model)).__name__
    if not hasattr(_network(model), "config"):
        raise TypeError(
            f"expected a model of transformers, which has a config; got {name}. A network of your "
            f"own needs no wrapper: give it to Task as it is."
        )
    config = _config(model)
    unknown = _kinds(config) - {"full_attention", "sliding_attention"}
    if unknown:
        raise NotImplementedError(
            f"{name} has layers of kind {sorted(unknown)}; masks are made for full and sliding "
            f"attention. {_UNWRAPPED}"
        )
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "eager", "sdpa"):
        raise ValueError(
            f"{name} uses attn_implementation={attention!r}, which takes no mask of four "
            f"dimensions. Load it with attn_implementation='sdpa' or 'eager'."
        )


def _require_same(wrapper: LanguageModel | SequenceClassifier) -> None:
    """Compare three tokens beside a padded one with the network's own outputs on the three."""
    network = _network(wrapper.model)
    name = type(network).__name__
    left = getattr(wrapper, "causal", True)
    embedding = network.get_input_embeddings().weight
    if embedding.is_meta:
        return
    padding = getattr(_config(network), "pad_token_id", None)
    known = [i for i in range(min(4, len(embedding))) if i != padding]
    ids = torch.tensor([(known * 3)[:3]], device=embedding.device)
    beside = (1, 0) if left else (0, 1)
    with torch.no_grad(), _eval(wrapper):
        expected = wrapper.model(input_ids=ids).logits
        try:
            got = wrapper(F.pad(ids, beside, value=padding or 0), F.pad(ids >= 0, beside))
        except (TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{name} cannot be called with a mask of four dimensions and position ids: "
                f"{str(error).splitlines()[0]}. {_UNWRAPPED}"
            ) from error
    if not _close(got[:, 1:] if isinstance(wrapper, LanguageModel) else got, expected):
        raise ValueError(
            f"{name} computes something else beside a padded position than on its own, so that "
            f"masks or position ids do not reach it. {_UNWRAPPED}"
        )


_UNWRAPPED = "Give it to Task without a wrapper, its sequences of one length."


class _eval:
    """Eval mode for the length of a ``with`` block; every module's flag is put back."""

    def __init__(self, module: nn.Module) -> None:
        self._flags = [(m, m.training) for m in module.modules()]

    def __enter__(self) -> None:
        for module, _ in self._flags:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module, flag in self._flags:
            module.training = flag


def _hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def _close(got: Tensor, expected: Tensor) -> bool:
    if got.shape != expected.shape:
        return False
    tolerance = _TOLERANCE.get(expected.dtype, 0.05)
    got, expected = got.double(), expected.double()
    return float((got - expected).norm()) <= tolerance * float(expected.norm())
