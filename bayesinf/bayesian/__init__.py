"""For posteriors that ArviZ reads: what each observation does, from draws alone."""

from bayesinf.bayesian._case_influence import case_influence
from bayesinf.bayesian._case_removal import ParetoWarning, case_removal

__all__ = ["ParetoWarning", "case_influence", "case_removal"]
