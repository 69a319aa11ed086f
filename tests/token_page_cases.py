"""Small token scores with everything that makes a page difficult."""

import numpy as np
import xarray as xr
from scipy import stats

QUERY = 7
QUERY_PIECES = ["The", " <script>", " sky", "\n", " is", "</script>"]
TRAIN_PIECES = {
    "b</script>": ["A", " blue", "<script>alert(1)</script>", " day", "&amp;"],
    "a": ["\u2028", " grey", "", " \U0001f600"],
    "c": ["x", " Blue", "\t", "$y$"],
}
TEXTS = {"train": TRAIN_PIECES, "query": {QUERY: QUERY_PIECES}}
MCSE_DF = 5
T = float(stats.t.ppf(0.975, MCSE_DF))


def coords(split, pieces):
    """Coordinates of scored tokens: all but the first of each sequence."""
    dim = f"{split}_token"
    rows = [(key, k, text) for key, own in pieces.items() for k, text in enumerate(own) if k]
    ids, positions, texts = zip(*rows, strict=True)
    text = np.array(texts, dtype=np.dtypes.StringDType())
    return {
        split: (dim, np.array(ids)),
        f"{split}_position": (dim, np.array(positions)),
        f"{dim}_text": (dim, text),
    }


def make_scores(seed=0, mcse=True, scale=1.0):
    """Scores of two queries, the other one first; 10 training tokens."""
    rng = np.random.default_rng(seed)
    queries = {3: ["other", " query"], QUERY: QUERY_PIECES}
    where = coords("query", queries) | coords("train", TRAIN_PIECES)
    shape = len(where["query"][1]), len(where["train"][1])
    dims = "query_token", "train_token"
    arrays = {"influence": (dims, scale * rng.standard_normal(shape))}
    if mcse:
        arrays["mcse"] = dims, scale * rng.uniform(0.1, 0.3, shape)
    attrs = {"method": "bif", "mcse_df": MCSE_DF} if mcse else {"method": "ekfac"}
    return xr.Dataset(arrays, where, attrs | {"estimand": "influence"})


def make_sums(scores, factor=0.5):
    """Sums over each side and both, with ``factor`` of the bound as error."""

    def over_train(part):
        total = part.groupby("train").sum()
        return total.isel(train=slice(None, None, -1))  # in an order of their own

    def over_query(part):
        return part.groupby("query").sum()

    found = [over_train(scores), over_query(scores), over_query(over_train(scores))]
    return [part.assign(mcse=factor * part["mcse"]).assign_attrs(scores.attrs) for part in found]


def own(scores, variable="influence"):
    """``(5, 10)`` values of the query, tokens in the order of ``TRAIN_PIECES``."""
    return scores[variable].values[scores["query"].values == QUERY]


SPANS = {"b</script>": slice(0, 4), "a": slice(4, 7), "c": slice(7, 10)}
