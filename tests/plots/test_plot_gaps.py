"""The figure of the gaps holds their numbers."""

import builtins
from collections.abc import Iterator

import numpy as np
import pytest
import xarray as xr

from bayesinf.plots._gaps import plot_response_gaps

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def close() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture
def gaps() -> xr.Dataset:
    names = ["warm_start", "proximity", "non_convergence", "linearization", "ekfac"]
    return xr.Dataset(
        {
            "rms": ("gap", [0.5, 0.1, 0.0, 0.01, np.nan]),
            "noise": ("gap", [0.2, 0.0, 0.0, 0.0, 0.0]),
            "correlation": ("gap", [0.12, 0.5, np.nan, 0.99, 0.8]),
        },
        coords={"gap": names},
        attrs={"measurement": "margin"},
    )


def test_points_noise_and_correlations(gaps: xr.Dataset) -> None:
    ax = plot_response_gaps(gaps, labels={"ekfac": "EK-FAC"})
    ax.figure.canvas.draw()
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        "warm-start gap", "proximity gap", "non-convergence gap", "linearisation error", "EK-FAC",
    ]  # fmt: skip
    difference, noise = ax.lines
    np.testing.assert_allclose(np.stack(difference.get_data()), [[0.5, 0.1, 0.01], [4, 3, 1]])
    np.testing.assert_allclose(np.stack(noise.get_data()), [[0.2], [4]])
    assert ax.get_xscale() == "log"
    found = {float(t.xy[1]): t.get_text() for t in ax.texts}
    assert found == {4: "r = 0.120", 3: "r = 0.500", 1: "r = 0.990", 0: "r = 0.800"}
    assert ax.get_xlabel() == "root-mean-square difference of the margin"
    assert {t.get_text() for t in ax.get_legend().get_texts()} == {
        "difference", "noise of the seeds",
    }  # fmt: skip


def test_without_cold_starts(gaps: xr.Dataset) -> None:
    _, own = plt.subplots()
    ax = plot_response_gaps(gaps.isel(gap=slice(1, None)), ax=own)
    assert ax is own
    assert ax.get_legend() is None
    assert ax.get_yticklabels()[-1].get_text() == "solver error: ekfac"
    nothing = plot_response_gaps(gaps.isel(gap=[2]))
    assert nothing.get_xscale() == "linear"  # no point to scale to


def test_refusals(gaps: xr.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"lacks \['noise'\]. Make them with response_gaps"):
        plot_response_gaps(gaps.drop_vars("noise"))
    with pytest.raises(ValueError, match=r"has dims \[\]"):
        plot_response_gaps(gaps.isel(gap=0))
    real = builtins.__import__

    def absent(name: str, *rest: object, **options: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"pip install 'bayesinf\[plots\]'"):
        plot_response_gaps(gaps)
