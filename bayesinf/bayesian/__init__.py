"""For posteriors that ArviZ reads: what each observation does, from draws alone."""

from bayesinf.bayesian._anomaly import anomaly_scores
from bayesinf.bayesian._bootstrap import approximate_bootstrap
from bayesinf.bayesian._case_influence import case_influence
from bayesinf.bayesian._case_removal import ParetoWarning, case_removal
from bayesinf.bayesian._case_summary import case_summary
from bayesinf.bayesian._functional_variance import functional_variance
from bayesinf.bayesian._jackknife import infinitesimal_jackknife
from bayesinf.bayesian._loss_kernel import loss_map, representative_cases, w_kernel

__all__ = [
    "ParetoWarning",
    "anomaly_scores",
    "approximate_bootstrap",
    "case_influence",
    "case_removal",
    "case_summary",
    "functional_variance",
    "infinitesimal_jackknife",
    "loss_map",
    "representative_cases",
    "w_kernel",
]
