"""Which training data made a neural network behave as it does, and how sure one can be."""

from bayesinf._diagnostics import ConvergenceWarning, diagnose
from bayesinf._gradients import VectorizationWarning
from bayesinf._likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from bayesinf._posterior import LocalPosterior
from bayesinf._sampling import DivergenceError, sample
from bayesinf._task import Task
from bayesinf._traces import FailedChainsWarning, StoreError, TraceStore, open_traces
from bayesinf.attribution._bif import bif
from bayesinf.samplers import SGLD, RMSpropSGLD

__version__ = "0.1.0.dev0"

__all__ = [
    "SGLD",
    "Bernoulli",
    "Categorical",
    "ConvergenceWarning",
    "DivergenceError",
    "FailedChainsWarning",
    "Gaussian",
    "Likelihood",
    "LocalPosterior",
    "RMSpropSGLD",
    "StoreError",
    "Task",
    "TraceStore",
    "VectorizationWarning",
    "bif",
    "diagnose",
    "open_traces",
    "sample",
]
