"""Planted facts: BIF and EK-FAC find the document, and the words, that a fact was learnt from.

The experiment is that of tutorial 04 (20 made-up facts in 20 of 220 documents, a GPT-NeoX of one
layer), with other data, another network and other draws: its cells run with another seed, and what
they find is judged here from the losses and the scores, not by their own functions. It takes 50 s
of processor time, half of it for 800 draws with the losses of all tokens. Every run tests the
tutorial itself, which ends in the same bars for its own seed.
"""

from pathlib import Path
from typing import Any

import jupytext
import numpy as np
import pytest

SCRIPT = "04_which_sentences_taught_this_token.py"
TUTORIAL = Path(__file__).resolve().parent.parent / "tutorials" / "scripts" / SCRIPT
SEED, BAR, SENTENCE = 1, 0.8, 6

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def experiment() -> dict[str, Any]:
    """Everything that the tutorial's cells name, up to its scores of tokens."""
    names: dict[str, Any] = {}
    for cell in jupytext.read(TUTORIAL).cells:
        if cell.cell_type == "code" and "in_source" not in names:
            exec(cell.source.replace("SEED = 0", f"SEED = {SEED}"), names)
    assert names["SEED"] == SEED
    return names


def places(influence: np.ndarray) -> np.ndarray:
    """Of the source of each query: document ``q`` carries the fact of query ``q``; 1 is first."""
    return np.array([1 + (row < row[q]).sum() for q, row in enumerate(influence)])


def bif(experiment: dict[str, Any]) -> np.ndarray:
    """Minus the covariance of losses, by numpy, up to a positive factor."""
    train, query = (experiment["traces"].values(split).values for split in ("train", "query"))
    train, query = (x.reshape(-1, x.shape[2]).astype(np.float64) for x in (train, query))
    return -(query - query.mean(0)).T @ (train - train.mean(0))


def ekfac(experiment: dict[str, Any]) -> np.ndarray:
    return experiment["scores"]["EK-FAC"]["influence"].values


def test_facts_are_learnt(experiment: dict[str, Any]) -> None:
    assert len(experiment["documents"]) == 220
    assert len({d.split(".")[0] for d in experiment["documents"][:20]}) == 20
    assert experiment["learnt"].double().mean() >= BAR


def test_chains_are_diagnosed(experiment: dict[str, Any]) -> None:
    assert experiment["verdict"] == "the chains show no sign of trouble"


@pytest.mark.parametrize("method", [bif, ekfac])
def test_source_is_in_the_top_five(experiment: dict[str, Any], method: Any) -> None:
    """A document at random is among five of 220 for 2 % of the queries."""
    found = {m.__name__: places(m(experiment)) for m in (bif, ekfac)}
    found["bm25"] = places(experiment["scores"]["BM25"]["influence"].values)
    print({name: found[name].tolist() for name in found})
    assert (found[method.__name__] <= 5).mean() >= BAR


@pytest.mark.parametrize("method", ["BIF", "EK-FAC"])
def test_top_token_of_the_source_lies_in_its_sentence(
    experiment: dict[str, Any], method: str
) -> None:
    """Fewer than half of a source's tokens are the sentence's."""
    scores = experiment["tokens"][method]
    inside = []
    for q, row in enumerate(scores["influence"].values):
        own = scores["train"].values == experiment["names"][q]
        inside.append(scores["train_position"].values[own][row[own].argmin()] <= SENTENCE)
    assert len(inside) == 20
    assert np.mean(inside) >= BAR


def test_sums_of_tokens_are_the_documents(experiment: dict[str, Any]) -> None:
    for method, scores in experiment["tokens"].items():
        whole = experiment["scores"][method]["influence"].values
        starts = np.flatnonzero(
            np.r_[True, scores["train"].values[1:] != scores["train"].values[:-1]]
        )
        parts = np.add.reduceat(scores["influence"].values.astype(np.float64), starts, axis=1)
        np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-4 * abs(whole).max())
