r"""Baselines that read the text alone: which training sequences share a query's words.

Sequences are bags of token ids. Shapes: counts ``c (N, V)`` of the train and ``(Q, V)`` of the
query sequences, sparse; ``n_t`` of the ``N`` training sequences hold token ``t``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
from scipy import sparse

from bayesinf._scores import make_scores
from bayesinf._task import Task
from bayesinf.attribution._needs import TOKEN_IDS
from bayesinf.attribution._registry import register
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._sources import token_grid

__all__ = ["bm25", "tf_idf"]


@register("similarity", "words in common, rare ones first (BM25)", needs=(TOKEN_IDS,))
def bm25(task: Task, *, k1: float = 1.5, b: float = 0.75) -> xr.Dataset:
    r"""Negative BM25 of training sequences for each query, on token ids.

    .. math::
        \mathrm{BM25}(q, d) = \sum_{t \in q} \log\!\left(1 + \frac{N - n_t + 1/2}{n_t + 1/2}\right)
        \frac{(k_1 + 1)\, c_{dt}}{c_{dt} + k_1 (1 - b + b\, |d| / \overline{|d|})}

    The sum runs over the query's tokens as often as they occur; ``|d|`` is the length of a
    training sequence, its mean taken over the training set. Tokens outside the attention mask do
    not count; the network is not used.

    Parameters
    ----------
    task
        With token ids as inputs.
    k1
        How fast repetitions of a token saturate; 0 counts presence alone.
    b
        How much long sequences are discounted, from 0 to 1.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)``, negative = similar; attribute ``estimand = "similarity"``.

    Raises
    ------
    ValueError
        If the inputs are no token ids, or ``k1`` or ``b`` is out of range.

    References
    ----------
    Robertson and Zaragoza 2009, "The probabilistic relevance framework: BM25 and beyond", with
    the positive inverse document frequency of Lucene.
    """
    if not (math.isfinite(k1) and k1 >= 0 and 0 <= b <= 1):
        raise ValueError(f"k1 must be ≥ 0 and b lie in [0, 1]; got k1={k1!r}, b={b!r}. Usual: "
                         f"bm25(task, k1=1.5, b=0.75).")  # fmt: skip

    def similarity(query: sparse.csr_array, train: sparse.csr_array) -> np.ndarray:
        n, length = train.shape[0], train.sum(axis=1)
        holds = (train > 0).sum(axis=0)
        rarity = np.log1p((n - holds + 0.5) / (holds + 0.5))
        weights = train.tocoo()
        saturation = k1 * (1 - b + b * length[weights.row] / length.mean())
        weights.data = (k1 + 1) * weights.data / (weights.data + saturation)
        return np.asarray(((query * rarity) @ weights.T.tocsc()).todense())

    return _scores(task, "bm25", similarity, {"k1": k1, "b": b})


@register("similarity", "cosine of word counts, rare ones weighted up (TF-IDF)", needs=(TOKEN_IDS,))
def tf_idf(task: Task) -> xr.Dataset:
    r"""Negative cosine of TF-IDF vectors of token ids.

    A sequence's vector is ``c_t (1 + log((1 + N)/(1 + n_t)))`` over the tokens ``t`` of the
    training set. Tokens outside the attention mask do not count; the network is not used. A query
    without any token of the training set has cosine 0 with everything.

    Parameters
    ----------
    task
        With token ids as inputs.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)``, negative = similar; attribute ``estimand = "similarity"``.

    Raises
    ------
    ValueError
        If the inputs are no token ids.

    References
    ----------
    Salton and Buckley 1988, "Term-weighting approaches in automatic text retrieval"; smoothed as
    in scikit-learn.
    """

    def similarity(query: sparse.csr_array, train: sparse.csr_array) -> np.ndarray:
        holds = (train > 0).sum(axis=0)
        rarity = (1 + np.log((1 + train.shape[0]) / (1 + holds))) * (holds > 0)
        left, right = (_unit((c * rarity).tocsr()) for c in (query, train))
        return np.asarray((left @ right.T).todense())

    return _scores(task, "tf_idf", similarity, {})


def _scores(
    task: Task,
    method: str,
    similarity: Callable[[sparse.csr_array, sparse.csr_array], np.ndarray],
    settings: dict[str, Any],
) -> xr.Dataset:
    costs = Costs()
    with costs.stage("scores"):
        query, train = _bags(task, "query"), _bags(task, "train")
        vocabulary = max(query.shape[1], train.shape[1])
        for counts in (query, train):
            counts.resize(counts.shape[0], vocabulary)
        values = -similarity(query, train)
    return make_scores(
        values,
        query=task.query.ids,
        train=task.train.ids,
        method=method,
        estimand="similarity",
        attrs={"n": task.n, **settings, **costs.attrs()},
    )


def _bags(task: Task, split: str, batch_size: int = 1024) -> sparse.csr_array:
    """Counts ``(examples, V)`` of the ids that sequences attend to."""
    rows, tokens = [], []
    for where, batch in task.examples(split).batches(batch_size):
        mask, ids = token_grid(batch)
        if ids is None:
            raise ValueError(
                f"words are compared by token ids, integers (B, T); the {split} inputs are of "
                f"another kind. Use representation_similarity(task) or grad_dot(task) here."
            )
        keep = mask.cpu().numpy().astype(bool)
        rows.append(np.repeat(np.arange(where.start, where.stop), keep.sum(axis=1)))
        tokens.append(ids.cpu().numpy()[keep])
    place = np.concatenate(rows), np.concatenate(tokens)
    counts = sparse.coo_array(
        (np.ones(len(place[0])), place),
        shape=(len(task.examples(split)), int(place[1].max(initial=0)) + 1),
    )
    return counts.tocsr()  # adds what is at one place


def _unit(rows: sparse.csr_array) -> sparse.csr_array:
    """Rows of length 1; those of zeros stay."""
    norm = np.sqrt(rows.power(2).sum(axis=1))
    return (rows * (1 / np.where(norm > 0, norm, 1.0))[:, None]).tocsr()
