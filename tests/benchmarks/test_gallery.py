"""The gallery writes pictures that are small, of all that functions of plots return."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks import gallery

pytest.importorskip("matplotlib")


def test_pictures_of_observations_are_small(tmp_path: Path) -> None:
    """Axes, and an array of them; views of chains are saved in the slow test."""
    for name, drawn in gallery.breast_cancer_figures(gallery.Size(cases=200)):
        path = tmp_path / f"{name}.png"
        assert gallery.save(drawn, path) == path.stat().st_size < gallery.LIMIT
        with Image.open(path) as image:
            assert image.size == {"case-influence": (600, 256), "case-summary": (600, 480)}[name]
            assert len(image.getcolors()) > 10


@pytest.mark.slow
def test_all_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--digits", "40", "--diabetes", "40", "--cases", "200"]
    assert gallery.main(["--out", str(tmp_path), *sizes]) == 0
    assert len(list(tmp_path.glob("gallery-*.png"))) == 11
    assert "MISSED" not in capsys.readouterr().out
