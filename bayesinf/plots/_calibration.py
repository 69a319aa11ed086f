"""Picture of a calibration: where the loss is local, and the spectrum beside the damping."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xarray as xr

from bayesinf.plots._look import ACCENT, INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_calibration"]


def plot_calibration(report: xr.Dataset) -> Figure:
    """Draw the virial ratio against ``nβ``, and the eigenvalues of EK-FAC beside the damping.

    Parameters
    ----------
    report
        From :func:`bayesinf.calibrate`.

    Returns
    -------
    Figure
        Two panels; the choices are marked by dashed lines.

    Raises
    ------
    ValueError
        If the dataset is no calibration's report.
    ImportError
        If matplotlib is not installed.
    """
    missing = [name for name in ("virial", "eigenvalue") if name not in report]
    if missing:
        raise ValueError(
            f"this dataset lacks {missing}. Give the report of bi.calibrate(task): "
            f"plot_calibration(calibration.report)."
        )
    figure = _new_figure()
    left, right = figure.subplots(1, 2)
    left.plot(report["n_beta"], report["virial"], "o-", color=INK, markersize=4)
    left.axhline(1.0, color="0.7", linewidth=0.8, zorder=0)
    left.axvline(report.attrs["n_beta"], color=ACCENT, linestyle="--", label="chosen")
    left.set(xscale="log", xlabel="n_beta (hot ← → cold)", ylabel="virial ratio of Laplace draws")
    left.legend(frameon=False)
    right.plot(report["rank"], report["eigenvalue"], color=INK)
    right.axhline(report.attrs["damping"], color=ACCENT, linestyle="--", label="damping")
    low = 1e-6 * report.attrs["lambda_max"]
    right.set(
        xscale="log", yscale="log", xlabel="rank", ylabel="eigenvalue of EK-FAC", ylim=(low, None)
    )
    right.legend(frameon=False)
    return figure


def _new_figure() -> Figure:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib, which is not installed: pip install 'bayesinf[plots]'"
        ) from error
    return plt.figure(figsize=(8.0, 3.2), layout="constrained")
