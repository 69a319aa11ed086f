"""Figures; nothing imports this."""

from bayesinf.plots._calibration import plot_calibration
from bayesinf.plots._gaps import plot_response_gaps
from bayesinf.plots._lds import plot_lds, plot_lds_time

__all__ = ["plot_calibration", "plot_lds", "plot_lds_time", "plot_response_gaps"]
