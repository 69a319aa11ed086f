"""Which training data made a neural network behave as it does, and how sure one can be."""

from bayesinf._likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from bayesinf._task import Task

__version__ = "0.1.0.dev0"

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Likelihood", "Task"]
