"""Pages in a headless Chromium, opened from a file and off line."""

import shutil
from contextlib import contextmanager

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@contextmanager
def launched():
    """The Chromium on the PATH."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@contextmanager
def opened(browser, file, **options):
    """The page, opened off line; whatever it asks for or complains of fails the test."""
    context = browser.new_context(offline=True, reduced_motion="reduce", **options)
    tab = context.new_page()
    asked, said = [], []
    tab.on("request", lambda r: asked.append(r.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: (said.append("dialog"), dialog.dismiss()))
    tab.goto(file.as_uri())
    tab.wait_for_selector("html[data-ready]")
    yield tab
    context.close()
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    assert said == []
