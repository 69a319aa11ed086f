"""Samplers, one kernel a file; all meet :class:`Sampler`."""

from bayesinf.samplers._protocol import Sampler, State
from bayesinf.samplers._rmsprop_sgld import RMSpropSGLD
from bayesinf.samplers._sgld import SGLD

__all__ = ["SGLD", "RMSpropSGLD", "Sampler", "State"]
