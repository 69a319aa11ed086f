"""One example of text, in whatever form it comes, as ids with those that count marked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Piece", "make_piece", "rows_of"]

_IGNORED = -100


class Piece(NamedTuple):
    """Ids of a text, and which of them count in the loss."""

    ids: list[int]
    counted: list[bool]


def rows_of(texts: Iterable[Any] | Mapping[str, Sequence[Any]]) -> Iterator[Any]:
    """Examples one by one; of a mapping of columns, as dicts."""
    if isinstance(texts, str):
        raise TypeError("texts must be several: [text] for a single one; got a str.")
    if not isinstance(texts, Mapping):
        yield from texts
        return
    lengths = {key: len(column) for key, column in texts.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns of texts must be of one length; got {lengths}.")
    for values in zip(*texts.values(), strict=True):
        yield dict(zip(texts, values, strict=True))


def make_piece(number: int, example: Any, tokenizer: Any) -> Piece:
    """Tokenise an example.

    Parameters
    ----------
    number
        For messages.
    example
        As :func:`bayesinf.interop.huggingface.tokenize` takes them.
    tokenizer
        A fast tokeniser; unused for ids.
    """
    if isinstance(example, str):
        return _whole(example, tokenizer)
    if isinstance(example, Mapping):
        return _from_keys(number, example, tokenizer)
    values = example.tolist() if hasattr(example, "tolist") else example
    if isinstance(values, Sequence) and values and isinstance(values[0], Mapping):
        return _chat(number, values, tokenizer)
    if isinstance(values, Sequence) and all(isinstance(value, int) for value in values):
        return Piece(list(values), [True] * len(values))
    raise TypeError(_unknown(number, type(example).__name__))


def _unknown(number: int, what: str) -> str:
    return (
        f"text {number} is a {what}; expected a string, a list of ids, a list of chat messages, or "
        f"a dict with 'text', with 'prompt' and 'response', with 'messages' or with 'input_ids'."
    )


def _from_keys(number: int, example: Mapping[str, Any], tokenizer: Any) -> Piece:
    if "input_ids" in example:
        return _given(number, example)
    if "messages" in example:
        return _chat(number, example["messages"], tokenizer)
    if "prompt" in example:
        for key in ("response", "completion"):
            if key in example:
                prompt = example["prompt"]
                text = prompt + example[key]
                return _marked(text, [(len(prompt), len(text))], tokenizer, special=True)
    if "text" in example:
        return _whole(example["text"], tokenizer)
    raise TypeError(_unknown(number, f"dict with {sorted(example)}"))


def _given(number: int, example: Mapping[str, Any]) -> Piece:
    """Ids as they are, without padding."""
    columns = {
        key: value.tolist() if hasattr(value, "tolist") else list(value)
        for key, value in example.items()
        if key in ("input_ids", "attention_mask", "labels")
    }
    ids = columns["input_ids"]
    real = columns.get("attention_mask", [1] * len(ids))
    labels = columns.get("labels", ids)
    if not len(ids) == len(real) == len(labels):
        raise ValueError(
            f"text {number}: input_ids, attention_mask and labels must be of one length; got "
            f"{len(ids)}, {len(real)} and {len(labels)}."
        )
    kept = [(i, label) for i, there, label in zip(ids, real, labels, strict=True) if there]
    if any(label not in (i, _IGNORED) for i, label in kept):
        raise ValueError(
            f"text {number}: labels must be the input_ids themselves, or −100 where a token does "
            f"not count. Usual cause: labels that were already shifted."
        )
    return Piece([i for i, _ in kept], [label != _IGNORED for _, label in kept])


def _whole(text: str, tokenizer: Any) -> Piece:
    ids = list(tokenizer(text)["input_ids"])
    return Piece(ids, [True] * len(ids))


def _marked(text: str, spans: list[tuple[int, int]], tokenizer: Any, *, special: bool) -> Piece:
    """Tokens that hold characters of the spans; and special ones after the text's end."""
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{type(tokenizer).__name__} does not tell which characters a token holds, so that a "
            f"response cannot be told from its prompt. Use a fast tokeniser: "
            f"AutoTokenizer.from_pretrained(path, use_fast=True)."
        )
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    ids, offsets = list(found["input_ids"]), found["offset_mapping"]
    counted, done = [], 0
    for a, b in offsets:  # a token holds the spaces before it, which offsets leave out
        begin = min(a, done)
        counted.append(any(begin < stop and start < b for start, stop in spans))
        done = max(done, b)
    last = max((i for i, (_, b) in enumerate(offsets) if b), default=-1)
    if last >= 0 and counted[last]:
        counted[last + 1 :] = [True] * (len(ids) - last - 1)
    return Piece(ids, counted)


def _chat(number: int, messages: Sequence[Mapping[str, str]], tokenizer: Any) -> Piece:
    """What the assistant says, by the tokeniser's own template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"text {number} is a list of chat messages, and this tokeniser has no chat_template. "
            f"Give dicts with 'prompt' and 'response', or set tokenizer.chat_template."
        )

    def render(upto: int, prompt: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                list(messages[:upto]), tokenize=False, add_generation_prompt=prompt
            )
        )

    text, spans = render(len(messages), False), []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(i, True), render(i + 1, False)
        if not (text.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"text {number}: the chat template writes the messages before number {i} "
                f"differently when it follows, so that its tokens cannot be found. Give dicts with "
                f"'prompt' and 'response'."
            )
        spans.append((len(before), len(after)))
    return _marked(text, spans, tokenizer, special=False)
