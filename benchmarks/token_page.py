"""Size and load time of the token page: ``python -m benchmarks.token_page [--out FILE]``.

One query and 200 training sequences of 128 tokens, two methods, one of them with error bars for
every token and sum. Text is Python's own help; the scores are made up (products of random vectors
of the words and their neighbours, with noise), as their values do not matter here, only how many
they are. The page is opened from a file in headless Chromium with the network off, five times, each
in a fresh browser context; the clock runs from navigation until the page has drawn itself. Where
other programs crowd the machine the clock says little: the processor seconds beside it tell.

The exit status is 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from benchmarks._table import format_table, verdict

__all__ = ["load_seconds", "made_up_scores", "main"]

QUERY, SEQUENCES, TOKENS, REPEATS = "comparisons-2", 200, 128, 5
SIZE_BAR, LOAD_BAR = 3e6, 2.0
MCSE_DF = 11


def made_up_scores(
    sequences: int = SEQUENCES, tokens: int = TOKENS, seed: int = 0
) -> tuple[dict[str, xr.Dataset], dict[str, list[xr.Dataset]]]:
    """Scores of two methods for one query, and the first one's sums with their errors.

    Parameters
    ----------
    sequences, tokens
        How many training sequences, and how many tokens each and the query have.
    seed
        Of the made-up numbers.

    Returns
    -------
    scores, sums
        As :func:`bayesinf.plots.token_influence` takes them.
    """
    rng = np.random.default_rng(seed)
    passages = _passages(tokens)
    texts = {QUERY: passages.pop(QUERY)}
    names = rng.permutation(list(passages))[:sequences]
    texts |= {str(name): passages[name] for name in sorted(names)}
    vectors = _vectors(texts, rng)
    query, train = vectors[0], vectors[1:].reshape(-1, vectors.shape[2])
    product = query @ train.T
    coords = _coords("query", texts, [QUERY]) | _coords("train", texts, list(texts)[1:])
    methods = {}
    for name, scale, noise in (("BIF", 2e-3, 0.06), ("EK-FAC", 3e-1, 0.03)):
        value = -scale * (product**3 + noise * rng.standard_normal(product.shape))
        methods[name] = xr.Dataset(
            {"influence": (("query_token", "train_token"), value.astype(np.float32))}, coords
        )
    error = 2e-3 * 0.06 * rng.uniform(0.5, 1.5, product.shape).astype(np.float32)
    bif = methods["BIF"].assign(mcse=(("query_token", "train_token"), error))
    methods["BIF"] = bif.assign_attrs(mcse_df=MCSE_DF)
    return methods, {"BIF": _sums(methods["BIF"])}


def load_seconds(page: Path, repeats: int = REPEATS) -> list[tuple[float, float]]:
    """Open a page from its file in headless Chromium, off line, and wait until it is drawn.

    Parameters
    ----------
    page
        The file.
    repeats
        How often, each time in a fresh context.

    Returns
    -------
    list of (float, float)
        Seconds by the clock, and processor seconds of the page's main thread.
    """
    from playwright.sync_api import sync_playwright

    seconds = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--no-sandbox"],
        )
        for _ in range(repeats):
            context = browser.new_context(offline=True)
            tab = context.new_page()
            meter = context.new_cdp_session(tab)
            meter.send("Performance.enable", {"timeDomain": "threadTicks"})
            began = time.perf_counter()
            tab.goto(page.as_uri())
            tab.wait_for_selector("html[data-ready]")
            tab.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
            wall = time.perf_counter() - began
            metrics = meter.send("Performance.getMetrics")["metrics"]
            busy = next(m["value"] for m in metrics if m["name"] == "TaskDuration")
            seconds.append((wall, busy))
            context.close()
        browser.close()
    return seconds


def main(argv: list[str] | None = None) -> int:
    """Print a table; return 1 if the page is too large or too slow."""
    from bayesinf.plots import token_influence

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="keep the page here")
    options = parser.parse_args(argv)
    scores, sums = made_up_scores()
    began = time.perf_counter()
    page = token_influence(scores, query=QUERY, sums=sums)
    made = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        file = page.save(options.out or Path(folder) / "page.html").resolve()
        size = file.stat().st_size
        load, busy = (statistics.median(times) for times in zip(*load_seconds(file), strict=True))
    rows = [
        ("making the page, s", f"{made:.2f}", "", ""),
        ("size, MB", f"{size / 1e6:.2f}", f"{SIZE_BAR / 1e6:g}", verdict(size < SIZE_BAR)),
        (
            f"load, s (median of {REPEATS})",
            f"{load:.2f}",
            f"{LOAD_BAR:g}",
            verdict(load < LOAD_BAR),
        ),
        ("  processor seconds of it", f"{busy:.2f}", "", ""),
    ]
    print(format_table(("token page", "measured", "bar", ""), rows))
    return int(size >= SIZE_BAR or load >= LOAD_BAR)


def _passages(tokens: int) -> dict[str, list[str]]:
    """Stretches of Python's help, cut into words with the blank before them."""
    from pydoc_data.topics import topics

    found = {}
    for topic, text in sorted(topics.items()):
        pieces = re.findall(r" ?\w{1,6}|\n+ *| ?[^\w\s]{1,3}| +", text)
        for k in range(len(pieces) // tokens):
            found[f"{topic}-{k}"] = pieces[k * tokens : (k + 1) * tokens]
    return found


def _vectors(texts: dict[str, list[str]], rng: np.random.Generator) -> np.ndarray:
    """Unit vectors ``(sequences, tokens, 24)``: of the piece, its neighbours and the sequence."""
    kinds = {piece: k for k, piece in enumerate(dict.fromkeys(chain(*texts.values())))}
    table = rng.standard_normal((len(kinds), 24))
    table *= np.array([1.0 if re.search(r"\w{3}", piece) else 0.4 for piece in kinds])[:, None]
    own = np.stack([table[[kinds[piece] for piece in pieces]] for pieces in texts.values()])
    near = (np.roll(own, 1, 1) + np.roll(own, -1, 1)) / 2
    mixed = own + 0.6 * near + 0.5 * own.mean(1, keepdims=True)
    return mixed / np.sqrt(24)


def _coords(split: str, texts: dict[str, list[str]], ids: list[str]) -> dict[str, Any]:
    dim = f"{split}_token"
    lengths = [len(texts[key]) for key in ids]
    return {
        split: (dim, np.repeat(ids, lengths)),
        f"{split}_position": (dim, np.concatenate([np.arange(n) for n in lengths])),
        f"{dim}_text": (dim, list(chain(*(texts[key] for key in ids)))),
    }


def _sums(scores: xr.Dataset) -> list[xr.Dataset]:
    """Sums over train tokens, query tokens and both; errors as if tokens' were independent."""

    def total(of: xr.Dataset, side: str) -> xr.Dataset:
        if side == "train":
            return of.groupby("train").sum()
        return of.sum("query_token").expand_dims(query=[QUERY])

    squares = scores.assign(mcse=scores["mcse"].astype(np.float64) ** 2)
    squares["influence"] = squares["influence"].astype(np.float64)
    found = []
    for sides in (["train"], ["query"], ["train", "query"]):
        part = squares
        for side in sides:
            part = total(part, side)
        part = part.assign(mcse=np.sqrt(part["mcse"])).assign_attrs(scores.attrs)
        found.append(part)
    return found


if __name__ == "__main__":
    sys.exit(main())
