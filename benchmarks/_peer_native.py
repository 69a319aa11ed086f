"""Run a peer's program and keep what its library wrote or returned, in the library's own format.

``python _peer_native.py --program FILE --native DIR [options of the program]``, by an interpreter
that has the peers installed. The programs write to a scratch folder that they erase; here it lies
in ``DIR`` and stays. dattri writes nothing: what its attributors return is saved as it is, in
``DIR/attribute.pt``.
"""

from __future__ import annotations

import argparse
import functools
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["main"]

_ATTRIBUTORS = ("IFAttributorEKFAC", "TracInAttributor", "TRAKAttributor")


class _Scratch(tempfile.TemporaryDirectory[str]):
    """A temporary directory that is erased by ``shutil.rmtree``: Debian's Python has its own."""

    def __init__(
        self, suffix: str | None = None, prefix: str | None = None, dir: Any = None, **_: Any
    ) -> None:
        self.name = tempfile.mkdtemp(suffix, prefix, dir)

    def cleanup(self) -> None:
        shutil.rmtree(self.name, ignore_errors=True)


def _keep_scratch(folder: Path) -> None:
    """Scratch folders are made in ``folder`` and not erased; what is inside them still is."""
    tempfile.tempdir = str(folder)
    tempfile.TemporaryDirectory = _Scratch  # type: ignore[assignment, misc]
    erase = shutil.rmtree

    def rmtree(path: Any, *args: Any, **options: Any) -> None:
        if Path(path).resolve().parent != folder:
            erase(path, *args, **options)

    shutil.rmtree = rmtree  # type: ignore[assignment]


def _save_returned(file: Path) -> None:
    """Save what ``attribute`` of dattri's attributors returns."""
    import dattri.algorithm  # type: ignore[import-not-found]

    def saving(attribute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(attribute)
        def wrapper(*args: Any, **options: Any) -> torch.Tensor:
            scores = attribute(*args, **options)
            torch.save(scores.detach().cpu(), file)
            return scores

        return wrapper

    for name in _ATTRIBUTORS:
        attributor = getattr(dattri.algorithm, name)
        attributor.attribute = saving(attributor.attribute)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--program", type=Path, required=True)
    parser.add_argument("--native", type=Path, required=True)
    own, others = parser.parse_known_args()
    folder = own.native.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    program = own.program.resolve()
    sys.path[0] = str(program.parent)  # not ours, whose names other libraries may import
    sys.argv = [str(program), *others]
    _keep_scratch(folder)
    if program.name.startswith("dattri"):
        _save_returned(folder / "attribute.pt")
    runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    main()
