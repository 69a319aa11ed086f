"""Tutorials: every script runs, and every notebook is its script with stored outputs."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest

TUTORIALS = Path(__file__).resolve().parent.parent / "tutorials"
SCRIPTS = sorted((TUTORIALS / "scripts").glob("*.py"))
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
SECONDS = 75
MACHINE_PATH = re.compile(r"(?<![\w.~/])/(?:home|work|tmp|root|Users|usr)/")


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


def drift(notebook: Any, script: Any) -> str:
    """Say where the cells first differ; empty if they do not."""
    pairs = [[(cell.cell_type, cell.source) for cell in book.cells] for book in (notebook, script)]
    for k, (ours, theirs) in enumerate(zip(*pairs, strict=False)):
        if ours != theirs:
            return f"cell {k}: the notebook has {ours}, the script {theirs}"
    counts = [len(cells) for cells in pairs]
    return "" if counts[0] == counts[1] else f"the notebook and the script have {counts} cells"


def faults(notebook: Any) -> list[str]:
    """What keeps the stored outputs from being those of one clean run from top to bottom."""
    found = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("cells were not run once, in order")
    for k, cell in enumerate(code):
        kinds = [output.output_type for output in cell.outputs]
        if "error" in kinds or any(output.get("name") == "stderr" for output in cell.outputs):
            found.append(f"code cell {k} has an error or a warning in its outputs")
        if "print(" in cell.source and "stream" not in kinds:
            found.append(f"code cell {k} prints, and has no printed output")
        if "plt.subplots(" in cell.source or "plt.figure(" in cell.source:
            pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
            if not pictures:
                found.append(f"code cell {k} draws, and has no picture")
        text = [
            str(content)
            for output in cell.outputs
            for kind, content in [("text", output.get("text", "")), *output.get("data", {}).items()]
            if not kind.startswith("image/")
        ]
        if MACHINE_PATH.search("\n".join(text)):
            found.append(f"code cell {k} shows a path of the machine it ran on")
    return found


def test_notebooks_and_scripts_are_paired() -> None:
    assert SCRIPTS
    assert names(NOTEBOOKS) == names(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS, ids=names(SCRIPTS))
def test_script_runs(script: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stderr
    assert not list(tmp_path.iterdir())
    assert seconds < SECONDS  # of processor time, which other programs beside it do not lengthen


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_notebook_is_its_script(notebook: Path) -> None:
    script = jupytext.read(TUTORIALS / "scripts" / f"{notebook.stem}.py")
    assert not drift(nbformat.read(notebook, as_version=4), script)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_stored_outputs(notebook: Path) -> None:
    book = nbformat.read(notebook, as_version=4)
    nbformat.validate(book)
    assert not faults(book)


@pytest.mark.parametrize("script", SCRIPTS, ids=names(SCRIPTS))
def test_script_ends_in_asserts(script: Path) -> None:
    last = jupytext.read(script).cells[-1]
    assert last.cell_type == "code"
    assert len(re.findall(r"^assert ", last.source, flags=re.MULTILINE)) >= 3


def test_drift_is_seen() -> None:
    def book(*sources: str) -> Any:
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])

    assert not drift(book("a", "b"), book("a", "b"))
    assert drift(book("a", "b"), book("a", "c")).startswith("cell 1")
    assert "cells" in drift(book("a"), book("a", "b"))


def test_faults_are_seen() -> None:
    def fault(source: str, count: int = 1, **output: Any) -> list[str]:
        outputs = [nbformat.v4.new_output(**output)] if output else []
        cell = nbformat.v4.new_code_cell(source, execution_count=count, outputs=outputs)
        return faults(nbformat.v4.new_notebook(cells=[cell]))

    stream = {"output_type": "stream", "name": "stdout"}
    assert not fault("print(1)", **stream, text="1/home/x and a/tmp/b")
    assert fault("print(1)")
    assert fault("x = 1", count=2)
    assert fault("plt.figure()")
    assert fault("print(1)", **stream, text="saved in /home/someone/x")
    assert fault("print(1)", output_type="stream", name="stderr", text="a warning")
    assert fault("1 / 0", output_type="error", ename="ZeroDivisionError", evalue="", traceback=[])
