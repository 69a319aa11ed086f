"""Samplers, one kernel a file; all meet :class:`Sampler`."""

from bayesinf.samplers._preconditioner import Preconditioner
from bayesinf.samplers._protocol import Sampler, State
from bayesinf.samplers._rmsprop_sgld import RMSpropSGLD
from bayesinf.samplers._sgld import SGLD
from bayesinf.samplers._underdamped import Underdamped

__all__ = ["SGLD", "Preconditioner", "RMSpropSGLD", "Sampler", "State", "Underdamped"]
