"""Curvature of the training loss, and operators made from it."""

from bayesinf.curvature._curvature import Block, Curvature
from bayesinf.curvature._damping import gamma_from_damping, source_damping
from bayesinf.curvature._definite import NotPositiveDefiniteError
from bayesinf.curvature._find import find_layers
from bayesinf.curvature._fit import fit_curvature
from bayesinf.curvature._hessian import dense_hessian
from bayesinf.curvature._layers import Layer
from bayesinf.curvature._saving import load_curvature, save_curvature

__all__ = [
    "Block",
    "Curvature",
    "Layer",
    "NotPositiveDefiniteError",
    "dense_hessian",
    "find_layers",
    "fit_curvature",
    "gamma_from_damping",
    "load_curvature",
    "save_curvature",
    "source_damping",
]
