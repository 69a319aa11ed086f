"""BM25 and TF-IDF against a plain count, rank_bm25 and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf.attribution._registry import METHODS
from bayesinf.attribution._text_similarity import bm25, tf_idf

V = 12


class Tokens(nn.Module):
    """Logits of a bigram model; the attention mask is not its business."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(V, V)

    def forward(self, input_ids, attention_mask=None):
        return self.table(input_ids)


def make(seed=0, mask=True):
    """Sequences of 2 to 9 tokens, padded on the right with token 3, which also occurs inside."""
    g = torch.Generator().manual_seed(seed)
    sets, texts = {}, {}
    for split, n in (("train", 15), ("query", 4)):
        ids = torch.randint(0, V - 2, (n, 9), generator=g)
        length = torch.randint(2, 10, (n,), generator=g) if mask else torch.full((n,), 9)
        if split == "query":
            ids[0, 0] = V - 1  # in no training sequence
        keep = torch.arange(9) < length[:, None]
        ids = ids.masked_fill(~keep, 3)
        texts[split] = [row[:k].tolist() for row, k in zip(ids, length, strict=True)]
        sets[split] = {
            "input_ids": ids,
            "attention_mask": keep.long(),
            "labels": ids.masked_fill(~keep, -100),
        }
    return bi.Task(Tokens(), bi.CausalLM(), train_ids=[f"t{i}" for i in range(15)], **sets), texts


def by_hand(texts, k1, b):
    train, n = texts["train"], len(texts["train"])
    mean = sum(map(len, train)) / n
    found = np.zeros((len(texts["query"]), n))
    for q, query in enumerate(texts["query"]):
        for d, document in enumerate(train):
            for t in query:
                holds, c = sum(t in other for other in train), document.count(t)
                rarity = math.log(1 + (n - holds + 0.5) / (holds + 0.5))
                low = c + k1 * (1 - b + b * len(document) / mean)
                found[q, d] += rarity * (k1 + 1) * c / low if c else 0.0
    return found


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.0, 0.3), (2.0, 0.0), (0.7, 1.0)])
def test_bm25_by_hand(k1, b):
    task, texts = make()
    np.testing.assert_allclose(-bm25(task, k1=k1, b=b).influence, by_hand(texts, k1, b), atol=1e-12)


def test_bm25_is_that_of_rank_bm25_with_another_rarity():
    """Its own inverse document frequency can be negative and is then replaced by a constant."""
    library = pytest.importorskip("rank_bm25")
    task, texts = make(seed=1)
    peer, n = library.BM25Okapi(texts["train"], k1=1.5, b=0.75), 15
    for t in peer.idf:
        holds = sum(t in document for document in texts["train"])
        peer.idf[t] = math.log(1 + (n - holds + 0.5) / (holds + 0.5))
    expected = np.array([peer.get_scores(query) for query in texts["query"]])
    np.testing.assert_allclose(-bm25(task).influence, expected, rtol=1e-12, atol=1e-14)


def test_tf_idf_is_that_of_scikit_learn():
    library = pytest.importorskip("sklearn.feature_extraction.text")
    task, texts = make(seed=2)
    vectors = library.TfidfVectorizer(analyzer=lambda document: [f"w{t}" for t in document])
    train = vectors.fit_transform(texts["train"])
    expected = (vectors.transform(texts["query"]) @ train.T).toarray()
    np.testing.assert_allclose(-tf_idf(task).influence, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", [bm25, tf_idf])
def test_labels_and_padding(method):
    task, _ = make()
    scores = method(task)
    assert METHODS[method.__name__].function is method
    assert scores.attrs["estimand"] == METHODS[method.__name__].estimand == "similarity"
    assert scores.attrs["method"] == method.__name__
    assert (scores.attrs["forward_examples"], scores.attrs["n"]) == (0, 15)
    assert scores["train"].values.tolist() == [f"t{i}" for i in range(15)]
    wider = {}
    for split in ("train", "query"):
        inputs, target = task.examples(split).batch()
        more = torch.full((len(target), 3), 5)
        wider[split] = {
            "input_ids": torch.cat([more, inputs["input_ids"], more], 1),
            "attention_mask": torch.cat([0 * more, inputs["attention_mask"], 0 * more], 1),
            "labels": torch.cat([0 * more - 100, target, 0 * more - 100], 1),
        }
    padded = method(bi.Task(Tokens(), bi.CausalLM(), **wider))
    np.testing.assert_array_equal(padded.influence, scores.influence)


def test_a_query_of_unknown_words_is_like_nothing():
    task, _ = make(mask=False)
    ids = torch.full((1, 4), V - 1)
    train = task.train.batch()[1]
    alone = bi.Task(Tokens(), bi.CausalLM(), train=(train, train), query=(ids, ids))
    for method in (bm25, tf_idf):
        np.testing.assert_array_equal(method(alone).influence, np.zeros((1, 15)))


def test_refusals():
    task, _ = make()
    with pytest.raises(ValueError, match=r"k1 must be ≥ 0 and b lie in \[0, 1\]; got k1=-1"):
        bm25(task, k1=-1)
    with pytest.raises(ValueError, match=r"b=1.5. Usual: bm25\(task, k1=1.5, b=0.75\)"):
        bm25(task, b=1.5)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    images = bi.Task(nn.Linear(3, 2), bi.Gaussian(), train=(x, x[:, :2]), query=(x, x[:, :2]))
    with pytest.raises(ValueError, match=r"integers \(B, T\); the query inputs are of another"):
        tf_idf(images)
