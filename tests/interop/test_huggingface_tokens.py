"""Text to batches: which tokens there are, which count; and ids back to text."""

import numpy as np
import pytest
import torch
import xarray as xr

import bayesinf as bi
from bayesinf.interop.huggingface import (
    LanguageModel,
    TruncationWarning,
    add_token_text,
    tokenize,
)
from tests.interop.networks import gpt2, large, llama
from tests.interop.tokenizers_of_tests import TEXTS, byte_level, metaspace

WORD, META = byte_level(), metaspace()


def reader(model, tokenizer):
    """A network as the given one, for a tokeniser's vocabulary."""
    model.config.vocab_size = len(tokenizer)
    return type(model)(model.config)


def counted_text(data, tokenizer):
    """The text of the tokens that count, row by row."""
    return [tokenizer.decode(row[row != -100]) for row in data["labels"]]


def test_whole_texts():
    data = tokenize(TEXTS, WORD, max_length=64)
    assert sorted(data) == ["attention_mask", "input_ids", "labels"]
    for row, text in enumerate(TEXTS):
        ids = WORD(text)["input_ids"]
        real = data["attention_mask"][row].bool()
        assert data["input_ids"][row, real].tolist() == ids
        assert bool(real[: len(ids)].all())
        assert data["labels"][row].tolist() == [
            -100, *ids[1:], *[-100] * (len(real) - len(ids))
        ]  # fmt: skip
    left = tokenize(TEXTS, WORD, max_length=64, padding_side="left")
    for row in range(3):
        n = int(data["attention_mask"][row].sum())
        for key in data:
            assert torch.equal(left[key][row, -n:], data[key][row, :n])
            assert data[key].dtype == torch.long
    assert int(left["attention_mask"].sum()) == int(data["attention_mask"].sum())
    assert int((left["labels"] != -100).sum()) == int((data["labels"] != -100).sum())


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("The fox", " jumps over"),
        ("The lazy ", "dog was quick"),  # the space is the response's first token's
        ("The fox", "   \n jumps"),  # tokens that are spaces alone
        ("Prix: 5 €", " ñandú ✓."),  # characters of several tokens
        ("The do", "zen jugs"),  # one token straddles the border
        ("", "The fox"),
    ],
)
def test_the_loss_of_a_response(prompt, response):
    """In byte-level BPE, a token's name has a character for each byte that it holds."""
    data = tokenize([{"prompt": prompt, "response": response}], WORD, max_length=64)
    ids, labels = data["input_ids"][0], data["labels"][0]
    assert ids.tolist() == WORD(prompt + response)["input_ids"]
    ends = np.cumsum([len(WORD.convert_ids_to_tokens(int(i))) for i in ids])
    expected = ends > len(prompt.encode())
    expected[0] = False
    assert (labels != -100).tolist() == expected.tolist()
    assert torch.equal(labels[expected], ids[expected])


def test_borders_by_hand():
    """A tokeniser of known pieces: one token a character, so that borders are where they are."""
    data = tokenize([{"prompt": "ab", "completion": "cd"}], byte_level(257), max_length=9)
    assert data["labels"][0].tolist() == [-100, -100, *data["input_ids"][0, 2:].tolist()]
    straddling = [{"prompt": "The q", "response": "uick fox"}]
    (text,) = counted_text(tokenize(straddling, WORD, max_length=64), WORD)
    assert text == " quick fox"
    (text,) = counted_text(
        tokenize([{"prompt": "The lazy", "response": " dog"}], META, max_length=64), META
    )
    assert text.strip() == "dog</s>"


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_the_loss_of_what_the_assistant_says():
    tokenizer = byte_level(257)
    tokenizer.chat_template = CHAT
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "ciao"},
    ]
    data = tokenize([messages, {"messages": messages[:2]}], tokenizer, max_length=99)
    assert tokenizer.decode(data["input_ids"][0]) == (
        "<user>hi\n<assistant>hello\n<user>bye\n<assistant>ciao\n"
    )
    assert counted_text(data, tokenizer) == ["hello\nciao\n", "hello\n"]
    with pytest.raises(ValueError, match="no chat_template"):
        tokenize([messages], WORD, max_length=9)
    tokenizer.chat_template = "{{ messages|length }}" + CHAT
    with pytest.raises(ValueError, match="text 0: the chat template writes"):
        tokenize([messages], tokenizer, max_length=9)


def test_ids_and_columns():
    class Columns:  # as datasets.Dataset: rows are dicts
        def __iter__(self):
            return iter([{"text": text, "source": i} for i, text in enumerate(TEXTS)])

    expected = tokenize(TEXTS, WORD, max_length=64)
    ids = WORD(TEXTS)["input_ids"]
    for same in (
        Columns(), {"text": TEXTS}, ids, [torch.tensor(i) for i in ids], [np.array(i) for i in ids],
        {"input_ids": ids}, [{"input_ids": i, "attention_mask": [1] * len(i)} for i in ids],
    ):  # fmt: skip
        got = tokenize(same, WORD, max_length=64)
        assert all(torch.equal(got[key], expected[key]) for key in expected)
    row = {"input_ids": [0, 5, 6, 7], "attention_mask": [0, 1, 1, 1], "labels": [-100, 5, -100, 7]}
    data = tokenize([row], None, max_length=4)
    assert data["input_ids"].tolist() == [[5, 6, 7]]
    assert data["labels"].tolist() == [[-100, -100, 7]]


def test_truncation_is_said_and_counted():
    rows = [list(range(1, 8)), [1, 2], list(range(1, 6))]
    with pytest.warns(TruncationWarning, match=r"2 of 3 texts .*max_length=4 .* 4 of 14 tokens"):
        data = tokenize(rows, None, max_length=4)
    assert data["input_ids"].tolist() == [[1, 2, 3, 4], [1, 2, 0, 0], [1, 2, 3, 4]]


def test_windows_count_every_token_once():
    rows = [list(range(10, 21)), [5, 6], list(range(30, 35))]
    data = tokenize(rows, None, max_length=5, stride=3)
    assert data["input_ids"].tolist() == [
        [10, 11, 12, 13, 14], [13, 14, 15, 16, 17], [16, 17, 18, 19, 20], [5, 6, 0, 0, 0],
        [30, 31, 32, 33, 34],
    ]  # fmt: skip
    counted = data["labels"] != -100
    assert data["labels"][counted].tolist() == [*range(11, 21), 6, *range(31, 35)]
    assert torch.equal(data["labels"][counted], data["input_ids"][counted])
    assert data["segment_ids"].tolist() == [[0] * 5, [0] * 5, [0] * 5, [1, 1, -1, -1, -1], [2] * 5]


def test_packed_texts_have_the_losses_that_they_have_alone(rng):
    texts = [*TEXTS, "The fox.", "A dog jumps.", *TEXTS[::-1]]
    options = {"tokenizer": WORD, "max_length": 32}
    apart = tokenize(texts, **options)
    for side in ("right", "left"):
        data = tokenize(texts, **options, pack=True, padding_side=side)
        assert len(data["input_ids"]) < len(texts)
        assert data["input_ids"].shape[1] <= 32
        model, lm = LanguageModel(large(reader(gpt2(), WORD)).eval()), bi.CausalLM()
        with torch.no_grad():
            losses = {
                kind: lm.token_losses(
                    model(**{k: v for k, v in batch.items() if k != "labels"}), batch["labels"]
                )
                for kind, batch in (("apart", apart), ("packed", data))
            }
        sums = torch.zeros(len(texts)).index_add(
            0, data["segment_ids"].clamp(min=0).flatten(), losses["packed"].flatten()
        )
        torch.testing.assert_close(sums, losses["apart"].sum(1), rtol=1e-5, atol=1e-5)


def test_packed_windows_of_one_text_are_apart():
    data = tokenize([list(range(1, 8)), [8, 9]], None, max_length=6, stride=3, pack=True)
    assert data["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6], [4, 5, 6, 7, 8, 9]]
    assert data["segment_ids"].tolist() == [[0] * 6, [0, 0, 0, 0, 1, 1]]
    assert data["labels"].tolist() == [[-100, 2, 3, 4, 5, 6], [-100, -100, -100, 7, -100, 9]]


def test_texts_that_cannot_be_used_are_named():
    with pytest.raises(ValueError, match=r"2 of 3 texts have no token that counts: \[1, 2\]"):
        tokenize([[1, 2], [3], []], None, max_length=4)
    long = {"prompt": TEXTS[0], "response": " fox"}
    with (
        pytest.warns(TruncationWarning),
        pytest.raises(ValueError, match=r"\[0\].*a prompt that fills max_length=5"),
    ):
        tokenize([long], WORD, max_length=5)
    for wrong, kind in (([3.5], "a float"), ([{"body": "x"}], r"a dict with \['body'\]"),
                        ([["a", "b"]], "a list")):  # fmt: skip
        with pytest.raises(TypeError, match=f"text 0 is {kind}; expected a string"):
            tokenize(wrong, WORD, max_length=9)
    with pytest.raises(TypeError, match=r"\[text\] for a single one"):
        tokenize("text", WORD, max_length=9)
    with pytest.raises(ValueError, match="texts is empty"):
        tokenize([], WORD, max_length=9)
    with pytest.raises(ValueError, match=r"of one length; got \{'text': 3, 'label': 1}"):
        tokenize({"text": TEXTS, "label": [0]}, WORD, max_length=9)
    with pytest.raises(ValueError, match="text 0: labels must be the input_ids themselves"):
        tokenize([{"input_ids": [1, 2, 3], "labels": [2, 3, -100]}], None, max_length=9)
    with pytest.raises(ValueError, match="of one length; got 2, 2 and 1"):
        tokenize([{"input_ids": [1, 2], "labels": [2]}], None, max_length=9)
    with pytest.raises(ValueError, match="stride between 1 and"):
        tokenize(TEXTS, WORD, max_length=9, stride=9)
    with pytest.raises(ValueError, match="'right' or 'left'; got 'top'"):
        tokenize(TEXTS, WORD, max_length=9, padding_side="top")

    def slow(text):
        return {"input_ids": [ord(c) for c in text]}

    with pytest.raises(TypeError, match="does not tell which characters"):
        tokenize([{"prompt": "a", "response": "b"}], slow, max_length=9)
    assert tokenize(["abc"], slow, max_length=9)["input_ids"].tolist() == [[97, 98, 99]]


# ------------------------------------------------------------------ text of tokens


def scores_of(ids):
    at = np.arange(len(ids))
    return xr.Dataset(
        {"influence": (("query", "train_token"), np.zeros((1, len(ids))))},
        {
            "train": ("train_token", at),
            "train_position": ("train_token", at),
            "train_token_id": ("train_token", ids),
        },
    )


@pytest.mark.parametrize("text", ["The quick fox\n\tjumps  over", "lazy <script> dog", "naïve ñ"])
def test_texts_of_tokens_join_to_the_text(text):
    found = add_token_text(scores_of(WORD(text)["input_ids"]), WORD).train_token_text
    assert found.dims == ("train_token",)
    pieces = [str(piece) for piece in found.values]
    shown = "".join(pieces)
    for character in "ïñ":
        coded = "".join(f"<0x{byte:02X}>" for byte in character.encode())
        shown = shown.replace(coded, character)
    assert shown == text
    assert all(piece == piece.strip() or piece[0] in " \n\t" for piece in pieces)


def test_texts_of_metaspace_tokens_keep_their_spaces():
    ids = META("The lazy dog")["input_ids"]
    pieces = [str(piece) for piece in add_token_text(scores_of(ids), META).train_token_text.values]
    assert pieces[0] == "<s>"
    assert pieces[-1] == "</s>"
    assert "".join(pieces[1:-1]) == " The lazy dog"


def test_scores_of_tokens_get_their_text_and_can_be_stored(tmp_path):
    data = tokenize(TEXTS, META, max_length=16, pack=False, stride=8)
    task = bi.Task(LanguageModel(reader(llama(1), META)), bi.CausalLM(), train=data, query=data)
    scores = bi.grad_dot(task, train_tokens="loss", query_tokens="loss")
    found = add_token_text(scores, META)
    for split in ("train", "query"):
        ids, texts = found[f"{split}_token_id"].values, found[f"{split}_token_text"].values
        assert [META.convert_ids_to_tokens(int(i)).replace("▁", " ") for i in ids] == texts.tolist()
    found.to_zarr(tmp_path / "scores.zarr", consolidated=False)
    again = xr.open_zarr(tmp_path / "scores.zarr", consolidated=False)
    assert again.train_token_text.values.tolist() == found.train_token_text.values.tolist()
    with pytest.raises(ValueError, match="no train_token_id or query_token_id"):
        add_token_text(bi.grad_dot(task), META)
