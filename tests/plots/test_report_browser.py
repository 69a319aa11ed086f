"""The report in a browser: opened from a file off line, it shows and sorts without complaint.

Skipped where playwright or a Chromium is not installed; the browser is found on the PATH.
"""

import numpy as np
import pytest
import xarray as xr

from bayesinf.plots import report
from tests.browser import CHROMIUM, launched, opened

pytest.importorskip(
    "playwright.sync_api", reason="the browser test needs playwright: pip install playwright"
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="the browser test needs chromium on the PATH: apt install chromium"
)

BAD = "<script>alert(1)</script>"
NAMES = ["K-FAC 10", "K-FAC 9", BAD, "tied"]
LDS = np.array([0.2, 0.1, -0.5, 0.2])
SECONDS = [np.nan, 20.0, 3.0, 100.0]
SQUARE = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'


@pytest.fixture(scope="module")
def browser():
    with launched() as found:
        yield found


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "square.svg").write_text(SQUARE)
    table = xr.Dataset(
        {
            "lds": ("scorer", LDS), "lower": ("scorer", LDS - 0.1), "upper": ("scorer", LDS + 0.1),
            "seconds": ("scorer", SECONDS),
            **{f"further_{k}": ("scorer", np.arange(4.0)) for k in range(9)},
        },
        coords={"scorer": NAMES},
        attrs={"confidence": 0.95, "random": "subsets, queries", "recipe": BAD},
    )  # fmt: skip
    tables = {"LDS": table, "LDS again": table[["lds", "lower", "upper"]]}
    figures = {"A square": folder / "square.svg"}
    made = report(tables, title=BAD, figures=figures, configuration={"a": {"b": BAD}})
    return made.save(folder / "report.html")


@pytest.fixture
def page(browser, file):
    with opened(browser, file, viewport={"width": 1280, "height": 900}) as tab:
        yield tab


def order(page, k=0):
    rows = page.locator("table.sortable").nth(k).locator("tbody tr th")
    return [NAMES.index(text) for text in rows.all_text_contents()]


def header(page, name, k=0):
    table = page.locator("table.sortable").nth(k)
    return table.locator("th", has=page.get_by_role("button", name=name, exact=True))


def sorting(page):
    return page.locator("th[aria-sort]").evaluate_all(
        "all => all.map(th => [th.textContent, th.getAttribute('aria-sort')])"
    )


def test_renders_with_names_as_text_and_figures_inside(page):
    assert page.title() == BAD
    assert page.locator("h1").text_content() == BAD
    assert order(page) == [0, 1, 2, 3]
    assert page.locator("svg.interval").count() == 8
    assert page.evaluate("document.querySelector('img').naturalWidth") == 9
    assert page.get_by_text("95 % intervals; random in them: subsets, queries.").count() == 2


def test_a_click_sorts_by_column_and_the_next_turns_it_round(page):
    header(page, "LDS").locator("button").click()
    assert order(page) == [0, 3, 1, 2]  # best first; ties as they were
    assert sorting(page) == [["LDS", "descending"]]
    header(page, "LDS").locator("button").click()
    assert order(page) == [2, 1, 0, 3]
    assert sorting(page) == [["LDS", "ascending"]]
    header(page, "method").locator("button").click()
    assert order(page) == [2, 1, 0, 3]  # numbers in names by size: 9 before 10
    assert sorting(page) == [["method", "ascending"]]
    assert order(page, 1) == [0, 1, 2, 3]  # the other table is as it was


def test_the_unknown_is_last_both_ways(page):
    header(page, "seconds").locator("button").click()
    assert order(page) == [2, 1, 3, 0]
    header(page, "seconds").locator("button").click()
    assert order(page) == [3, 1, 2, 0]


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_keys_sort(page, key):
    button = header(page, "LDS").locator("button")
    header(page, "method").locator("button").focus()
    page.keyboard.press("Tab")
    assert button.evaluate("own => own === document.activeElement")
    page.keyboard.press(key)
    assert order(page) == [0, 3, 1, 2]
    assert sorting(page) == [["LDS", "descending"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_on_its_ground(browser, file, scheme):
    """WCAG 2 contrast of at least 4.5 for text and notes."""
    with opened(browser, file, color_scheme=scheme) as page:
        ground, *inks = page.evaluate("""[
            getComputedStyle(document.documentElement).backgroundColor,
            ...["h1", ".note", "td small", "thead button"].map(
                (at) => getComputedStyle(document.querySelector(at)).color),
        ]""")
    assert (luminance(ground) > 0.5) == (scheme == "light")
    for ink in inks:
        low, high = sorted([luminance(ink), luminance(ground)])
        assert (high + 0.05) / (low + 0.05) >= 4.5


def luminance(color):
    parts = np.array([float(x) for x in color.removeprefix("rgb(").rstrip(")").split(",")]) / 255
    linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_on_a_phone_only_tables_scroll_and_names_stay(browser, file):
    with opened(browser, file, viewport={"width": 360, "height": 640}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        box = page.locator(".scroll").first
        assert box.evaluate("own => own.scrollWidth > own.clientWidth")
        before = page.locator("tbody th").first.bounding_box()["x"]
        box.evaluate("own => { own.scrollLeft = 200; }")
        assert page.locator("tbody th").first.bounding_box()["x"] == before
