"""The token page in a browser: what is shown follows pointer, keys and controls, off line.

Skipped where playwright or a Chromium is not installed; the browser is found on the PATH.
"""

import re

import numpy as np
import pytest

from bayesinf.plots import token_influence
from tests.browser import CHROMIUM, launched, opened
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

pytest.importorskip(
    "playwright.sync_api", reason="the browser test needs playwright: pip install playwright"
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="the browser test needs chromium on the PATH: apt install chromium"
)

BIF, EKFAC = make_scores(), make_scores(1, mcse=False, scale=1e-5)
ROW = "#query .t[role=button] >> nth={}"  # scored tokens: those after the first
FIRST, THIRD = ROW.format(0), ROW.format(2)


@pytest.fixture(scope="module")
def browser():
    with launched() as found:
        yield found


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    page = token_influence(
        {"BIF": BIF, "EK-FAC": EKFAC},
        query=QUERY,
        texts=TEXTS,
        sums={"BIF": make_sums(BIF)},
    )
    return page.save(tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture
def page(browser, file):
    with opened(browser, file, viewport={"width": 1280, "height": 900}) as tab:
        yield tab


def value_of(text):
    """A number as the page writes it."""
    return float(text.replace("−", "-"))


def shown(page):
    """``{sequence: (sum, error, [alpha with sign of each scored token])}`` in the page's order."""
    found = page.evaluate("""[...document.querySelectorAll('#list > li:not([hidden])')].map(li => [
        li.dataset.id, li.querySelector('.number').textContent,
        [...li.querySelectorAll('.t:not(.blank)')].map(t => t.style.backgroundColor)])""")
    sequences = {}
    for key, number, colours in found:
        value, _, error = number.partition(" ± ")
        shares = []
        for colour in colours:
            match = re.fullmatch(r"rgb\(var\(--(helpful|harmful)\) / ([\d.]+)\)", colour)
            sign = 0 if not match else -1 if match[1] == "helpful" else 1
            shares.append(sign * float(match[2]) if match else 0.0)
        sequences[key] = value_of(value), value_of(error) if error else None, shares
    return sequences


def agrees(page, scores, row, *, harmful=False, factor=0.5):
    """Whether order, numbers, errors and colours are those of a row of the scores (None: whole)."""

    def values(name):
        every = own(scores, name)
        return every.sum(0) if row is None else every[row]

    influence, found = values("influence"), shown(page)
    sums = {key: influence[part].sum() for key, part in SPANS.items()}
    assert list(found) == sorted(sums, key=sums.get, reverse=harmful)
    for key, part in SPANS.items():
        value, error, shares = found[key]
        assert value == pytest.approx(sums[key], rel=0.006)  # three digits
        if "mcse" in scores:
            half = factor * T * values("mcse")[part].sum()
            assert error == pytest.approx(half, rel=0.06)  # two digits
        else:
            assert error is None
        expected = influence[part] / np.abs(influence).max()
        expected[np.abs(expected) < 0.02] = 0  # too faint to see
        np.testing.assert_allclose(shares, expected, atol=0.021)
    return True


def test_the_whole_query_is_shown_first(page):
    assert agrees(page, BIF, None)
    assert page.inner_text("#shown").startswith("Whole query")
    assert page.text_content("#query") == "".join(QUERY_PIECES).replace("\n", "↵")
    assert page.get_attribute("#list .text >> nth=0", "tabindex") == "0"


def test_hovering(page):
    page.hover(THIRD)
    assert agrees(page, BIF, 2)
    assert "↵" in page.inner_text("#shown")
    page.hover(FIRST)
    assert agrees(page, BIF, 0)
    page.hover("h1")
    assert agrees(page, BIF, None)


def test_clicking_pins(page):
    page.click(THIRD)
    page.hover("h1")
    assert agrees(page, BIF, 2)
    assert "position 3, pinned" in page.inner_text("#shown")
    assert page.get_attribute(THIRD, "aria-pressed") == "true"
    page.hover(FIRST)  # a look at another
    assert agrees(page, BIF, 0)
    page.hover("h1")
    assert agrees(page, BIF, 2)
    page.click("#release")
    assert agrees(page, BIF, None)
    page.click(THIRD)
    page.click(THIRD)
    page.hover("h1")
    assert agrees(page, BIF, None)


def test_keys_in_the_query(page):
    page.keyboard.press("Tab")
    assert agrees(page, BIF, 0)
    for key, row in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 4),
                     ("ArrowRight", 4), ("Home", 0), ("ArrowRight", 1)):  # fmt: skip
        page.keyboard.press(key)
        assert agrees(page, BIF, row)
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")  # leaves the query
    assert agrees(page, BIF, 1)
    page.keyboard.press("Escape")
    assert agrees(page, BIF, None)


def test_keys_in_the_list(page):
    page.focus("#search input")
    page.keyboard.press("Tab")
    first, second, _ = shown(page)
    influence, largest = own(BIF).sum(0), np.abs(own(BIF).sum(0)).max()

    def told():
        """Number of the training token that the page tells of, found by its value."""
        value = value_of(page.inner_text("#tip strong"))
        (k,) = np.flatnonzero(np.abs(influence - value) < largest / 200)
        return int(k)

    strongest = SPANS[first].start + int(np.argmax(np.abs(influence[SPANS[first]])))
    assert told() == strongest
    step = 1 if strongest + 1 < SPANS[first].stop else -1
    page.keyboard.press("ArrowRight" if step == 1 else "ArrowLeft")
    assert told() == strongest + step
    page.keyboard.press("ArrowDown")
    assert told() == SPANS[second].start + int(np.argmax(np.abs(influence[SPANS[second]])))
    page.keyboard.press("ArrowUp")
    assert told() == strongest


def test_the_switch_of_methods(page):
    page.click(THIRD)
    page.check("#methods input[value='EK-FAC']", force=True)
    page.hover("h1")
    assert agrees(page, EKFAC, 2)
    page.check("#methods input[value='BIF']", force=True)
    assert agrees(page, BIF, 2)


def test_harmful_first(page):
    page.check("#order input[value='harmful']", force=True)
    assert agrees(page, BIF, None, harmful=True)
    page.hover(FIRST)
    assert agrees(page, BIF, 0, harmful=True)


def test_searching(page):
    page.fill("#search input", "bLuE")
    assert set(shown(page)) == {"b</script>", "c"}
    assert "2 of 3 sequences contain" in page.inner_text("#count")
    page.fill("#search input", "<script>")
    assert set(shown(page)) == {"b</script>"}
    page.fill("#search input", "nowhere")
    assert shown(page) == {}
    page.fill("#search input", "")
    assert agrees(page, BIF, None)


def test_a_training_token_tells_its_number(page):
    page.click(THIRD)
    token = page.locator("#list li[data-id='c'] .t").nth(1)
    token.hover()
    text = page.inner_text("#tip")
    influence, mcse = own(BIF)[2], own(BIF, "mcse")[2]
    k = SPANS["c"].start
    assert "“ Blue”" in text
    assert "position 1 of c" in text
    number, error = re.search(r"([+−]?[\d.]+) ± ([\d.]+)", text).groups()
    assert value_of(number) == pytest.approx(influence[k], abs=np.abs(influence).max() / 200)
    assert value_of(error) == pytest.approx(T * mcse[k], rel=0.06)
    page.locator("#list li[data-id='c'] .t").nth(0).hover()
    assert "no score" in page.inner_text("#tip")


def test_a_phone(browser, file):
    size = {"width": 390, "height": 844}
    with opened(browser, file, viewport=size, has_touch=True, is_mobile=True) as tab:
        tab.tap(THIRD)
        assert agrees(tab, BIF, 2)
        tab.locator("#list li[data-id='a'] .t").nth(1).tap()
        assert "position 1 of a" in tab.inner_text("#tip")
        tab.tap(THIRD)
        assert agrees(tab, BIF, None)
        assert tab.evaluate("document.documentElement.scrollWidth") == 390


def test_tokens_are_text(page):
    spans = page.locator("#list li[data-id='b</script>'] .t")
    assert spans.all_text_contents() == TRAIN_PIECES["b</script>"]
    assert page.locator("#query .t").nth(5).text_content() == "</script>"
    assert page.evaluate("document.scripts.length") == 2  # the page's own, and its data
    assert page.locator(".text script").count() == 0


def test_an_injected_script_does_not_run(browser, tmp_path):
    """The second line of defence: a page into which markup got does not run it."""
    html = token_influence(make_scores(), query=QUERY).html
    bad = html.replace("<main>", "<main><script>window.ran = 1</script><img src=x onerror=ran=1>")
    (tmp_path / "bad.html").write_text(bad, encoding="utf-8")
    tab = browser.new_page()
    tab.goto((tmp_path / "bad.html").as_uri())
    tab.wait_for_selector("html[data-ready]")
    assert tab.evaluate("window.ran === undefined")
    tab.close()
