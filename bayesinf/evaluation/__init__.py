"""Judging scores by real retrainings."""

from bayesinf.evaluation._agreement import agreement, seed_stability
from bayesinf.evaluation._alpha import alpha_curve
from bayesinf.evaluation._bank import make_bank, open_bank, save_bank
from bayesinf.evaluation._ceiling import effective_queries, noise_ceiling
from bayesinf.evaluation._counterfactual import RemovalWarning, removal_counterfactual
from bayesinf.evaluation._distributional import distributional_lds
from bayesinf.evaluation._gaps import response_gaps
from bayesinf.evaluation._import_banks import (
    bank_from_bergson,
    bank_from_dattri,
    bank_from_kronfluence,
    bank_from_quanda,
)
from bayesinf.evaluation._lds import lds, lds_difference, lds_table
from bayesinf.evaluation._loo import loo_correlation
from bayesinf.evaluation._mislabelled import mislabel_detection
from bayesinf.evaluation._null import lds_null
from bayesinf.evaluation._own_training import retrain_with
from bayesinf.evaluation._pbrf import pbrf
from bayesinf.evaluation._pbrf_correlation import pbrf_correlation
from bayesinf.evaluation._pruning import pruning_curve
from bayesinf.evaluation._recipes import AdamWRecipe, Recipe, SGDRecipe
from bayesinf.evaluation._retraining import retrain, train_one
from bayesinf.evaluation._subsets import (
    disjoint_subsets,
    leave_one_out,
    listed_subsets,
    random_subsets,
)
from bayesinf.evaluation._tail_patch import tail_patch

__all__ = [
    "AdamWRecipe",
    "Recipe",
    "RemovalWarning",
    "SGDRecipe",
    "agreement",
    "alpha_curve",
    "bank_from_bergson",
    "bank_from_dattri",
    "bank_from_kronfluence",
    "bank_from_quanda",
    "disjoint_subsets",
    "distributional_lds",
    "effective_queries",
    "lds",
    "lds_difference",
    "lds_null",
    "lds_table",
    "leave_one_out",
    "listed_subsets",
    "loo_correlation",
    "make_bank",
    "mislabel_detection",
    "noise_ceiling",
    "open_bank",
    "pbrf",
    "pbrf_correlation",
    "pruning_curve",
    "random_subsets",
    "removal_counterfactual",
    "response_gaps",
    "retrain",
    "retrain_with",
    "save_bank",
    "seed_stability",
    "tail_patch",
    "train_one",
]
