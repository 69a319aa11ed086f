"""For posteriors that ArviZ reads: what each observation does, from draws alone."""

from bayesinf.bayesian._case_influence import case_influence
from bayesinf.bayesian._case_removal import ParetoWarning, case_removal
from bayesinf.bayesian._case_summary import case_summary
from bayesinf.bayesian._jackknife import infinitesimal_jackknife
from bayesinf.bayesian._loss_kernel import anomaly_scores, loss_map, w_kernel

__all__ = [
    "ParetoWarning",
    "anomaly_scores",
    "case_influence",
    "case_removal",
    "case_summary",
    "infinitesimal_jackknife",
    "loss_map",
    "w_kernel",
]
