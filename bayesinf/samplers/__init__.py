"""Samplers, one kernel a file; all meet :class:`Sampler`."""

from bayesinf.samplers._ekfac_laplace import EKFACLaplace
from bayesinf.samplers._gauss_newton_laplace import GaussNewtonLaplace
from bayesinf.samplers._hmc import HMC
from bayesinf.samplers._mala import MALA
from bayesinf.samplers._preconditioner import Preconditioner
from bayesinf.samplers._protocol import Sampler, State
from bayesinf.samplers._rmsprop_sgld import RMSpropSGLD
from bayesinf.samplers._sghmc import SGHMC
from bayesinf.samplers._sgld import SGLD
from bayesinf.samplers._sgnht import SGNHT
from bayesinf.samplers._underdamped import Underdamped

__all__ = [
    "HMC",
    "MALA",
    "SGHMC",
    "SGLD",
    "SGNHT",
    "EKFACLaplace",
    "GaussNewtonLaplace",
    "Preconditioner",
    "RMSpropSGLD",
    "Sampler",
    "State",
    "Underdamped",
]
