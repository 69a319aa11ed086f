"""Curvature of the training loss: capture, Kronecker algebra, factors."""

from bayesinf.curvature._definite import NotPositiveDefiniteError
from bayesinf.curvature._ekfac import LayerFactors, fit_factors
from bayesinf.curvature._hessian import dense_hessian
from bayesinf.curvature._layers import Layer, UntreatedParametersWarning, find_layers

__all__ = [
    "Layer",
    "LayerFactors",
    "NotPositiveDefiniteError",
    "UntreatedParametersWarning",
    "dense_hessian",
    "find_layers",
    "fit_factors",
]
