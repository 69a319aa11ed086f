"""Curvature of the training loss, and operators made from it."""

from bayesinf.curvature._arnoldi import arnoldi_eigenpairs
from bayesinf.curvature._astra import astra
from bayesinf.curvature._conjugate_gradient import conjugate_gradient
from bayesinf.curvature._curvature import Block, Curvature
from bayesinf.curvature._damping import gamma_from_damping, source_damping
from bayesinf.curvature._definite import NotPositiveDefiniteError
from bayesinf.curvature._deflation import DeflatedInverse, deflate
from bayesinf.curvature._find import find_layers
from bayesinf.curvature._fit import fit_curvature
from bayesinf.curvature._hessian import dense_hessian
from bayesinf.curvature._lanczos import Eigenpairs, top_eigenpairs
from bayesinf.curvature._layers import Layer
from bayesinf.curvature._neumann import neumann
from bayesinf.curvature._nystrom import NystromApproximation, nystrom_approximation
from bayesinf.curvature._operator import SymmetricOperator
from bayesinf.curvature._products import GaussNewtonProduct, HessianProduct
from bayesinf.curvature._saving import load_curvature, save_curvature
from bayesinf.curvature._solvers import Solution, SolverDivergenceError, SolverWarning

__all__ = [
    "Block",
    "Curvature",
    "DeflatedInverse",
    "Eigenpairs",
    "GaussNewtonProduct",
    "HessianProduct",
    "Layer",
    "NotPositiveDefiniteError",
    "NystromApproximation",
    "Solution",
    "SolverDivergenceError",
    "SolverWarning",
    "SymmetricOperator",
    "arnoldi_eigenpairs",
    "astra",
    "conjugate_gradient",
    "deflate",
    "dense_hessian",
    "find_layers",
    "fit_curvature",
    "gamma_from_damping",
    "load_curvature",
    "neumann",
    "nystrom_approximation",
    "save_curvature",
    "source_damping",
    "top_eigenpairs",
]
