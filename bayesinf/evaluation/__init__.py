"""Judging scores by real retrainings."""

from bayesinf.evaluation._alpha import alpha_curve
from bayesinf.evaluation._bank import open_bank, save_bank
from bayesinf.evaluation._ceiling import effective_queries, noise_ceiling
from bayesinf.evaluation._gaps import response_gaps
from bayesinf.evaluation._lds import lds, lds_difference, lds_table
from bayesinf.evaluation._null import lds_null
from bayesinf.evaluation._pbrf import pbrf
from bayesinf.evaluation._recipes import AdamWRecipe, Recipe, SGDRecipe
from bayesinf.evaluation._retraining import retrain, train_one
from bayesinf.evaluation._subsets import random_subsets

__all__ = [
    "AdamWRecipe",
    "Recipe",
    "SGDRecipe",
    "alpha_curve",
    "effective_queries",
    "lds",
    "lds_difference",
    "lds_null",
    "lds_table",
    "noise_ceiling",
    "open_bank",
    "pbrf",
    "random_subsets",
    "response_gaps",
    "retrain",
    "save_bank",
    "train_one",
]
