"""What HTML pages share: one file with its style and script inside, and nothing else may run."""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
from importlib.resources import files
from pathlib import Path

__all__ = ["framed", "make_page", "save_page"]


def make_page(name: str, **parts: str) -> str:
    """Fill ``_name.html`` with its style, its script and the parts, each at ``{part}``.

    The page's content security policy names the hashes of style and script, so that no other may
    run. Nothing is looked for inside the parts.
    """
    folder = files("bayesinf.plots")
    page, style, script = (
        folder.joinpath(f"_{name}.{kind}").read_text(encoding="utf-8")
        for kind in ("html", "css", "js")
    )
    texts = {
        "style hash": _hash(style),
        "script hash": _hash(script),
        "style": style,
        "script": script,
        **parts,
    }
    marks = "|".join(re.escape(mark) for mark in texts)
    return re.sub(rf"\{{({marks})\}}", lambda found: texts[found[1]], page)


def save_page(page: str, path: str | os.PathLike[str]) -> Path:
    """Write a page to a file and return its path."""
    target = Path(path)
    target.write_text(page, encoding="utf-8", newline="\n")
    return target


def framed(page: str, title: str) -> str:
    """Show a page inside a frame, which keeps its style and script from a notebook's."""
    return (
        f'<iframe title="{html.escape(title)}" sandbox="allow-scripts" width="100%" height="640" '
        f'style="border:0" srcdoc="{html.escape(page)}"></iframe>'
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
