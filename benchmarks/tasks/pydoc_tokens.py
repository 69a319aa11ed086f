"""Token ids of the task pydoc-gpt: ``python -m benchmarks.tasks.pydoc_tokens [--out FILE]``.

The help texts of Python (``pydoc_data.topics``) differ between its versions, so that the ids ship
with the ground truth, and this program is how they were made: a byte-level BPE of 1,024 entries is
learned from all topics, whole topics in random order, each closed by an end-of-text token, are
joined until there are 432 sequences of 64 tokens, and 48 random ones of these are the queries. A
query thus often has its neighbours of the same topic in the training set.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.tasks._task import GROUND_TRUTH

__all__ = ["TOKENS", "encode", "main"]

TOKENS = GROUND_TRUTH / "pydoc-gpt" / "tokens.npz"
VOCABULARY, LENGTH, TRAIN, QUERIES = 1024, 64, 384, 48
END = "<|endoftext|>"


def encode(texts: list[str], vocabulary: int = VOCABULARY) -> tuple[list[list[int]], list[str]]:
    """Learn a byte-level BPE from texts.

    Parameters
    ----------
    texts
        Documents.
    vocabulary
        Number of entries, the 256 bytes and the end-of-text token (entry 0) among them.

    Returns
    -------
    ids, pieces
        Ids of each document without end-of-text; the entries as text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainer)
    entries = tokenizer.get_vocab()
    pieces = sorted(entries, key=entries.__getitem__)
    return [tokenizer.encode(text).ids for text in texts], [
        piece if piece == END else tokenizer.decoder.decode([piece]) for piece in pieces
    ]


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    from pydoc_data.topics import topics

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tasks.pydoc_tokens", description=__doc__
    )
    parser.add_argument("--out", type=Path, default=TOKENS, help="default: %(default)s")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    names = sorted(topics)
    documents, pieces = encode([topics[name] for name in names])
    stream: list[int] = []
    for k in rng.permutation(len(documents)):
        stream += [*documents[k], 0]
    ids = np.array(stream[: (TRAIN + QUERIES) * LENGTH], dtype=np.uint16).reshape(-1, LENGTH)
    query = np.zeros(len(ids), dtype=bool)
    query[rng.permutation(len(ids))[:QUERIES]] = True
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, train=ids[~query], query=ids[query], pieces=np.array(pieces))
    print(f"{args.out}: {TRAIN} + {QUERIES} sequences of {LENGTH} tokens")


if __name__ == "__main__":
    main()
