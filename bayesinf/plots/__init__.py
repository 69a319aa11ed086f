"""Figures; nothing imports this."""

from bayesinf.plots._agreement import plot_agreement
from bayesinf.plots._calibration import plot_calibration
from bayesinf.plots._cases import plot_case_influence, plot_case_summary
from bayesinf.plots._forest import plot_forest
from bayesinf.plots._frontier import plot_frontier
from bayesinf.plots._gaps import plot_response_gaps
from bayesinf.plots._heat_map import plot_heat_map
from bayesinf.plots._interventions import plot_curves, plot_mislabels
from bayesinf.plots._lds import plot_lds, plot_lds_time
from bayesinf.plots._loss_map import plot_loss_map
from bayesinf.plots._report import Report, report
from bayesinf.plots._sweep import plot_sweep
from bayesinf.plots._token_figure import token_figure
from bayesinf.plots._token_page import TokenPage, token_influence
from bayesinf.plots._trace_views import plot_ess_evolution, plot_rank, plot_trace

__all__ = [
    "Report",
    "TokenPage",
    "plot_agreement",
    "plot_calibration",
    "plot_case_influence",
    "plot_case_summary",
    "plot_curves",
    "plot_ess_evolution",
    "plot_forest",
    "plot_frontier",
    "plot_heat_map",
    "plot_lds",
    "plot_lds_time",
    "plot_loss_map",
    "plot_mislabels",
    "plot_rank",
    "plot_response_gaps",
    "plot_sweep",
    "plot_trace",
    "report",
    "token_figure",
    "token_influence",
]
