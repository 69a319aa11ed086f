"""What the token page says is what the scores say, and no text gets out of its place."""

import base64
import hashlib
import html
import json
import re

import numpy as np
import pytest

from bayesinf.plots import token_influence
from bayesinf.plots._token_pack import embedded_json, pack, pack_row
from bayesinf.plots._token_scores import read_token_scores
from tests.token_page_cases import (
    QUERY,
    QUERY_PIECES,
    SPANS,
    TEXTS,
    TRAIN_PIECES,
    T,
    make_scores,
    make_sums,
    own,
)


def data_of(page):
    """The data as a browser reads them."""
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page.html)
    return json.loads(text)


def decode(text, kind):
    return np.frombuffer(base64.b64decode(text), kind)


def unpack(row, count):
    """Values and errors of a row ``(count,)``, NaN where it keeps none: the format's own words."""
    kept = decode(row["values"], "i1").astype(float) * row["scale"]
    if "gaps" in row:
        places, at = [], -1
        for gap in decode(row["gaps"], "u1"):
            at += 254 if gap == 255 else int(gap)
            if gap != 255:
                places.append(at)
    else:
        places = list(range(count))
    values, errors = np.full((2, count), np.nan)
    values[places] = kept
    if "errors" in row:
        errors[places] = decode(row["errors"], "u1") * row["error_scale"]
    return values, errors


def test_the_page_holds_the_scores_to_the_stated_rounding():
    bif, ekfac = make_scores(), make_scores(1, mcse=False, scale=1e3)
    data = data_of(token_influence({"BIF": bif, "EK-FAC": ekfac}, query=QUERY))
    assert [m["name"] for m in data["methods"]] == ["BIF", "EK-FAC"]
    assert [p["id"] for p in data["train"]] == list(TRAIN_PIECES)
    for packed, scores in zip(data["methods"], (bif, ekfac), strict=True):
        tokens = own(scores)
        tokens = np.concatenate([tokens.sum(0)[None], tokens])
        sums = np.stack([tokens[:, part].sum(1) for part in SPANS.values()], 1)
        np.testing.assert_allclose(decode(packed["sums"], "<f4"), sums.ravel(), rtol=1e-6)
        for row, expected in zip(packed["rows"], tokens, strict=True):
            values, errors = unpack(row, 10)
            assert row["scale"] == pytest.approx(np.abs(expected).max() / 127)
            np.testing.assert_allclose(values, expected, atol=0.5001 * row["scale"])
            assert np.isfinite(errors).all() == (scores is bif)
    assert "sum_errors" not in data["methods"][1]


def test_errors_of_tokens_and_bounds_of_sums():
    scores = make_scores()
    (packed,) = data_of(token_influence(scores, query=QUERY))["methods"]
    half = T * own(scores, "mcse")
    half = np.concatenate([half.sum(0)[None], half])
    sums = np.stack([half[:, part].sum(1) for part in SPANS.values()], 1)
    np.testing.assert_allclose(decode(packed["sum_errors"], "<f4"), sums.ravel(), rtol=1e-6)
    assert packed["sum_bound"] == [True] * 6
    assert packed["token_bound"] == [True] + [False] * 5
    for row, expected in zip(packed["rows"], half, strict=True):
        np.testing.assert_allclose(unpack(row, 10)[1], expected, atol=expected.max() / 509)


def test_scores_of_sums_bring_their_errors():
    scores = make_scores()
    page = token_influence(scores, query=QUERY, sums=make_sums(scores, 0.5))
    (packed,) = data_of(page)["methods"]
    half = T * own(scores, "mcse")
    half = np.concatenate([half.sum(0)[None], half])
    sums = np.stack([half[:, part].sum(1) for part in SPANS.values()], 1)
    np.testing.assert_allclose(decode(packed["sum_errors"], "<f4"), 0.5 * sums.ravel(), rtol=1e-6)
    assert not any(packed["sum_bound"] + packed["token_bound"])
    whole = unpack(packed["rows"][0], 10)[1]
    np.testing.assert_allclose(whole, 0.5 * half[0], atol=half[0].max() / 1018)


def test_a_query_without_tokens():
    scores = make_sums(make_scores(), 1.0)[1]
    data = data_of(token_influence(scores, query=QUERY, texts=TEXTS))
    assert data["query"]["pieces"] == QUERY_PIECES
    assert data["query"]["scored"] == []
    (packed,) = data["methods"]
    assert len(packed["rows"]) == 1
    assert packed["token_bound"] == [False]
    np.testing.assert_allclose(
        unpack(packed["rows"][0], 10)[0],
        own(make_scores()).sum(0),
        atol=0.5001 * packed["rows"][0]["scale"],
    )


def test_the_order_of_entries_does_not_matter():
    scores, rng = make_scores(), np.random.default_rng(3)
    mixed = scores.isel(query_token=rng.permutation(6), train_token=rng.permutation(10))
    one = token_influence({"a": scores, "b": mixed}, query=QUERY, sums={"b": make_sums(scores)})
    first, second = data_of(one)["methods"]
    assert first["rows"][1:] == second["rows"][1:]
    np.testing.assert_allclose(
        decode(first["sums"], "<f4"), decode(second["sums"], "<f4"), rtol=1e-5
    )
    assert not any(second["sum_bound"])


def test_whole_texts_show_tokens_without_a_score():
    data = data_of(token_influence(make_scores(), query=QUERY, texts=TEXTS))
    assert data["query"] == {
        "id": "7", "pieces": QUERY_PIECES, "positions": [[0, 6]], "scored": [[1, 5]],
    }  # fmt: skip
    assert [p["pieces"] for p in data["train"]] == list(TRAIN_PIECES.values())
    bare = data_of(token_influence(make_scores(), query=QUERY))
    assert bare["query"]["pieces"] == QUERY_PIECES[1:]
    assert bare["query"]["positions"] == [[1, 5]]
    assert bare["query"]["scored"] == [[0, 5]]


def test_the_sequences_that_matter_most_are_kept():
    scores = make_scores()
    scores["influence"].values[:, SPANS["a"]] *= 1e-3
    data = data_of(token_influence(scores, query=QUERY, n_sequences=2))
    assert [p["id"] for p in data["train"]] == ["b</script>", "c"]
    assert data["available"] == 3
    (packed,) = data["methods"]
    kept = np.concatenate([own(scores)[0, SPANS["b</script>"]], own(scores)[0, SPANS["c"]]])
    values, errors = unpack(packed["rows"][1], 7)
    np.testing.assert_allclose(values, kept, atol=0.5001 * packed["rows"][1]["scale"])
    assert np.isfinite(errors).all()


@pytest.mark.parametrize("kept", [1, 3, 200, 1499, 1500])
def test_a_sparse_row_keeps_the_strongest(kept):
    rng = np.random.default_rng(kept)
    values = rng.standard_normal(1500) ** 3
    values[300:900] *= 1e-9  # gaps longer than a byte
    half = rng.uniform(1, 2, 1500)
    row = pack_row(values, half, kept)
    found, errors = unpack(row, 1500)
    chosen = np.argsort(-np.abs(values))[:kept]
    assert set(np.flatnonzero(np.isfinite(found))) == set(chosen)
    np.testing.assert_allclose(found[chosen], values[chosen], atol=0.5001 * row["scale"])
    np.testing.assert_allclose(errors[chosen], half[chosen], atol=0.5001 * row["error_scale"])
    dropped = np.delete(np.abs(values), chosen)
    assert row["below"] == (dropped.max() if dropped.size else 0.0)


def test_rows_of_zeros():
    values, errors = unpack(pack_row(np.zeros(4), np.zeros(4), 4), 4)
    np.testing.assert_array_equal([values, errors], np.zeros((2, 4)))


def test_a_large_page_is_under_three_megabytes():
    from benchmarks.token_page import QUERY as NAME
    from benchmarks.token_page import made_up_scores

    scores, sums = made_up_scores()
    page = token_influence(scores, query=NAME, sums=sums)
    assert len(page.html.encode()) < 3e6
    data = data_of(page)
    assert len(data["train"]) == 200
    rows = data["methods"][0]["rows"]
    assert len(rows) == 129
    assert "gaps" not in rows[0]
    assert len(decode(rows[5]["values"], "i1")) > 2000  # what fits, of 25,600


def test_the_size_asked_for_is_kept():
    scores = read_token_scores(make_scores(), QUERY, None, TEXTS, 200)
    assert len(embedded_json(pack(scores))) == len(embedded_json(pack(scores, 10**9)))


def test_text_cannot_leave_its_script_element():
    page = token_influence({"<b>&": make_scores()}, query=QUERY, texts=TEXTS)
    assert page.html.count("<script") == 2
    assert page.html.count("</script") == 2
    assert "alert(1)" in page.html  # as data
    assert "\u2028" not in page.html
    data = data_of(page)
    assert data["train"][0]["pieces"] == TRAIN_PIECES["b</script>"]
    assert data["methods"][0]["name"] == "<b>&"
    assert embedded_json("<>&\u2029\ud800").isascii()
    assert json.loads(embedded_json("<>&\u2029")) == "<>&\u2029"


def test_only_the_pages_own_script_and_style_may_run():
    page = token_influence(make_scores(), query=QUERY).html
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; ")
    for tag, name in (("style", "style-src"), ("script", "script-src")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy
    assert not re.findall(r"https?://|src=|@import|url\(|innerHTML|eval\(", page)


def test_saved_and_shown_in_a_notebook(tmp_path):
    page = token_influence(make_scores(), query=QUERY)
    path = page.save(tmp_path / "page.html")
    assert path.read_bytes().decode("utf-8") == page.html
    frame = page._repr_html_()
    assert html.unescape(re.search(r'srcdoc="([^"]*)"', frame)[1]) == page.html
    assert 'sandbox="allow-scripts"' in frame
    assert repr(page) == "TokenPage()"


def nan(scores):
    scores["influence"].values[2, 4] = np.nan
    return scores


def doubled(scores):
    position = scores["train_position"].values.copy()
    position[1] = position[0]
    return scores.assign_coords(train_position=("train_token", position))


BAD = {
    "no influence": (lambda s: s.rename(influence="value"), r"have the variable 'influence'"),
    "sequences": (lambda s: s.groupby("train").sum(), r"has \['query_token', 'train'\]"),
    "no position": (lambda s: s.drop_vars("train_position"), r"lack the coordinates \['train_pos"),
    "no text": (lambda s: s.drop_vars("train_token_text"), r"add_token_text\(scores, tokenizer\)"),
    "no query text": (lambda s: s.drop_vars("query_token_text"), r"text of query 7 is unknown"),
    "nan": (nan, r"1 of 50 pairs.*query_position 2, train 'a', train_position 1"),
    "no freedom": (lambda s: s.drop_attrs(), r"attrs\['mcse_df'\]"),
    "twice": (doubled, r"train 'b</script>' has two tokens at position 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals(name):
    spoil, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        token_influence(spoil(make_scores()), query=QUERY)


def test_refused_queries_and_counts():
    with pytest.raises(ValueError, match=r"no query '7' \(str\); the scores have 3, 7. Choose"):
        token_influence(make_scores(), query="7")
    with pytest.raises(ValueError, match="n_sequences must be at least 1; got 0"):
        token_influence(make_scores(), query=QUERY, n_sequences=0)
    with pytest.raises(ValueError, match="there are no scores"):
        token_influence({}, query=QUERY)


def test_refused_pairs_of_methods():
    scores = make_scores()
    for split, less in (("train", scores[{"train_token": slice(1, None)}]),
                        ("query", scores[{"query_token": slice(0, -1)}])):  # fmt: skip
        with pytest.raises(ValueError, match=f"BIF and EK-FAC have scores of different {split}"):
            token_influence({"BIF": scores, "EK-FAC": less}, query=QUERY)


def test_refused_texts():
    short = {"query": {QUERY: QUERY_PIECES[:-1]}}
    with pytest.raises(ValueError, match="has 5 pieces, but its scores have positions up to 5"):
        token_influence(make_scores(), query=QUERY, texts=short)
    shifted = {"query": {QUERY: ["<pad>", *QUERY_PIECES]}}
    with pytest.raises(ValueError, match="has 'The' at position 1, where the scores have"):
        token_influence(make_scores(), query=QUERY, texts=shifted)


def test_refused_sums():
    scores = make_scores()
    sums = make_sums(scores)
    refused = [
        (scores, "takes scores of sums"),
        (sums[0].drop_vars("mcse"), "takes scores of sums"),
        (sums[0].drop_attrs(), "takes scores of sums"),
        (sums[0].assign(influence=2 * sums[0].influence), "are not those of the token scores"),
        (sums[0].isel(train=[0, 1]), "lack query 7, or their tokens"),
        (sums[2].sel(query=[3]), "lack query 7"),
        (sums[1].isel(train_token=slice(1, None)), "lack query 7, or"),
    ]
    for part, message in refused:
        with pytest.raises(ValueError, match=message):
            token_influence(scores, query=QUERY, sums=part)
    two = {"BIF": scores, "EK-FAC": make_scores(1, mcse=False)}
    with pytest.raises(ValueError, match="does not say whose it is"):
        token_influence(two, query=QUERY, sums=sums)
    with pytest.raises(ValueError, match=r"sums= has \['bif'\]"):
        token_influence(two, query=QUERY, sums={"bif": sums})
    with pytest.raises(ValueError, match="these scores have no mcse"):
        token_influence(two, query=QUERY, sums={"EK-FAC": make_sums(scores)})
