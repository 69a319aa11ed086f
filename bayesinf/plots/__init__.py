"""Figures; nothing imports this."""

from bayesinf.plots._calibration import plot_calibration
from bayesinf.plots._frontier import plot_frontier
from bayesinf.plots._gaps import plot_response_gaps
from bayesinf.plots._interventions import plot_curves, plot_mislabels
from bayesinf.plots._lds import plot_lds, plot_lds_time
from bayesinf.plots._report import Report, report
from bayesinf.plots._token_figure import token_figure
from bayesinf.plots._token_page import TokenPage, token_influence

__all__ = [
    "Report",
    "TokenPage",
    "plot_calibration",
    "plot_curves",
    "plot_frontier",
    "plot_lds",
    "plot_lds_time",
    "plot_mislabels",
    "plot_response_gaps",
    "report",
    "token_figure",
    "token_influence",
]
