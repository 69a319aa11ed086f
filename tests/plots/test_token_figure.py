"""The token figure's colours and bars are the scores."""

import builtins

import numpy as np
import pytest

from bayesinf.plots import token_figure
from bayesinf.plots._token_figure import COLUMNS, HELPFUL, LINES, excerpt, wrap
from tests.token_page_cases import QUERY, SPANS, TEXTS, T, make_scores, make_sums, own

plt = pytest.importorskip("matplotlib.pyplot")
from matplotlib.colors import to_rgba  # noqa: E402


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def strongest(sums):
    return sorted(sums, key=lambda key: -abs(sums[key]))


def test_colours_bars_and_intervals():
    bif, ekfac = make_scores(), make_scores(1, mcse=False, scale=1e-5)
    figure = token_figure(
        {"BIF": bif, "EK-FAC": ekfac},
        query=QUERY,
        query_token=3,
        sums={"BIF": make_sums(bif, 0.5)},
        texts=TEXTS,
        n_sequences=2,
    )
    figure.canvas.draw()
    text, first, second = figure.axes
    influence = own(bif)[2]
    order = strongest({key: influence[part].sum() for key, part in SPANS.items()})[:2]
    for axes, scores in ((first, bif), (second, ekfac)):
        widths = [own(scores)[2, SPANS[key]].sum() for key in order]
        np.testing.assert_allclose([bar.get_width() for bar in axes.patches], widths)
    half = [0.5 * T * own(bif, "mcse")[2, SPANS[key]].sum() for key in order]
    (segments,) = first.collections
    found = [np.ptp(path.vertices[:, 0]) / 2 for path in segments.get_paths()]
    np.testing.assert_allclose(found, half)
    assert segments.get_linestyle()[0][1] is None  # solid: these are no bounds
    assert not second.collections
    boxes = [patch for patch in text.patches if patch.get_gid()]
    values = np.concatenate([influence[SPANS[key]] for key in order])
    shown = np.concatenate([[v] * (t != "") for key in order
                            for v, t in zip(influence[SPANS[key]], TEXTS["train"][key][1:],
                                            strict=True)])  # fmt: skip
    signs = [-1 if box.get_facecolor()[:3] == to_rgba(HELPFUL)[:3] else 1 for box in boxes]
    shares = [sign * box.get_alpha() for sign, box in zip(signs, boxes, strict=True)]
    drawn = [share for box, share in zip(boxes, shares, strict=True) if box.get_width()]
    np.testing.assert_allclose(drawn, shown / np.abs(values).max())
    lines = [t.get_text() for t in text.texts]
    assert lines[0] == "The <script> sky↵ is</script>"
    assert order[0] in lines
    (frame,) = [patch for patch in text.patches if not patch.get_gid()]
    assert (frame.get_x(), frame.get_width()) == (len("The <script> sky"), 1)


def test_bounds_are_dashed_and_the_whole_query_is_the_default():
    scores = make_scores()
    figure = token_figure(scores, query=QUERY)
    text, bars = figure.axes
    influence = own(scores).sum(0)
    sums = {key: influence[part].sum() for key, part in SPANS.items()}
    widths = [bar.get_width() for bar in bars.patches]
    np.testing.assert_allclose(widths, [sums[key] for key in strongest(sums)])
    assert bars.collections[0].get_linestyle()[0][1] is not None
    assert not [patch for patch in text.patches if not patch.get_gid()]
    assert bars.get_xlabel() == "bif: influence"


def test_a_character_of_text_is_as_wide_as_its_box():
    figure = token_figure(make_scores(), query=QUERY, texts=TEXTS)
    text, line = figure.axes[0], figure.axes[0].texts[0]
    figure.canvas.draw()
    ends = text.transData.inverted().transform(line.get_window_extent())[:, 0]
    assert np.ptp(ends) == pytest.approx(len(line.get_text()), rel=0.03)


def test_lines_hold_every_piece_once():
    rng = np.random.default_rng(0)
    pieces = ["x" * n for n in rng.integers(1, 12, 60)] + ["y" * 200, "z"]
    segments = wrap(pieces)
    for k, piece in enumerate(pieces):
        assert "".join(s.text for s in segments if s.piece == k) == piece
    assert max(s.column + len(s.text) for s in segments) <= COLUMNS
    cut = wrap(pieces, 3, 5)
    assert [s.piece for s in cut] == [-1, 3, 4, -1]
    assert wrap(["\n\t\x07\u4e00"])[0].text == "↵→□□"


def test_excerpts_hold_the_strongest_pieces():
    rng = np.random.default_rng(0)
    for _ in range(20):
        pieces = ["x" * n for n in rng.integers(1, 12, 150)]
        values = rng.standard_normal(150) ** 3
        start, stop = excerpt(pieces, values)
        room = 0.9 * COLUMNS * LINES
        weights = {}
        for a in range(150):
            b = a + 1
            while b < 150 and sum(map(len, pieces[a : b + 1])) <= room:
                b += 1
            weights[a] = np.abs(values[a:b]).sum()
        assert np.abs(values[start:stop]).sum() == pytest.approx(max(weights.values()))
        assert sum(map(len, pieces[start:stop])) <= room
    assert excerpt(["a", "b"], np.array([0.0, 1.0])) == (0, 2)


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match="no score at position 0; positions with one: 1 to 5"):
        token_figure(make_scores(), query=QUERY, query_token=0)
    with pytest.raises(ValueError, match="n_sequences must be at least 1"):
        token_figure(make_scores(), query=QUERY, n_sequences=0)
    whole = make_sums(make_scores())[1]
    with pytest.raises(ValueError, match="positions with one: none"):
        token_figure(whole, query=QUERY, query_token=1)
    real = builtins.__import__

    def absent(name, *rest, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **options)

    from bayesinf.plots import _token_figure

    _token_figure._characters()  # found before
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"pip install 'bayesinf\[plots\]'"):
        token_figure(make_scores(), query=QUERY)
